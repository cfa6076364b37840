"""load.py of an export: what loads a backbone that timm cannot build by itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssl.checkpoint import LoadedBackbone
from ssl.models.backbones import BackboneSpec
from ssl.models.families import family_file
from ssl.models.torchvision_models import PREFIX, TorchvisionModel, builder_arguments, is_torchvision


def needs_script(spec: BackboneSpec) -> bool:
    """Whether timm cannot build the described model by itself."""
    return spec.stem != "standard" or is_torchvision(spec.architecture) or family_file(spec.architecture) is not None


def load_script(loaded: LoadedBackbone) -> str:
    """The program, whose `load()` needs neither this package nor anything but the libraries that it names."""
    if isinstance(loaded.model, TorchvisionModel):
        return _of_torchvision(loaded, loaded.model)
    spec, num_classes = loaded.spec, len(loaded.classifier.classes) if loaded.classifier else 0
    file = family_file(spec.architecture)
    args = _written({key: tuple(v) if isinstance(v, list) else v for key, v in spec.model_args.items()})
    build = (
        f'model = timm.create_model("{spec.architecture}", num_classes={num_classes}, in_chans={spec.in_chans}{args})'
    )
    why, steps = [], [build]
    if file is not None:
        why.append(f"timm does not have this family: {file.name}, which lies beside this file, registers it with timm.")
        steps = ["sys.path.insert(0, str(Path(__file__).parent))", f"importlib.import_module({file.stem!r})", build]
    if spec.stem != "standard":
        why.append("Its first layer keeps the resolution; timm has no arguments for that, so it is changed here.")
        steps += [_small_stem(loaded.model), "model.maxpool = nn.Identity()"]
    return _program("timm", why, steps)


def _of_torchvision(loaded: LoadedBackbone, model: TorchvisionModel) -> str:
    spec, name = loaded.spec, loaded.spec.architecture.removeprefix(PREFIX)
    args = builder_arguments(name, spec.model_args, image_size=spec.image_size)
    if loaded.classifier:
        args["num_classes"] = len(loaded.classifier.classes)
    steps = [f'model = torchvision.models.get_model("{name}", weights=None{_written(args)})']
    why = ["torchvision builds this model; timm does not have it, or another one of this name."]
    if spec.in_chans != 3:
        first, conv = next((key, each) for key, each in model.named_modules() if isinstance(each, nn.Conv2d))
        why.append(f"Its first layer reads {spec.in_chans} channels, which torchvision has no argument for.")
        steps.append(f'model.set_submodule("{first}", nn.{conv!r})')
    if not loaded.classifier:
        why.append("Its last layer is left out, so that it gives the features which that would read.")
        steps.append(f'model.set_submodule("{model.structure.classifier}", nn.Identity())')
    return _program("torchvision", why, steps)


def _written(args: dict[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in args.items())


def _small_stem(model: Any) -> str:
    conv = model.conv1
    if not isinstance(conv, nn.Conv2d):
        return "model.conv1[0].stride = (1, 1)"
    sizes = f"{conv.in_channels}, {conv.out_channels}, 3, padding={conv.padding[0]}"
    return f"model.conv1 = nn.Conv2d({sizes}, bias=False)"


def _program(library: str, why: list[str], steps: list[str]) -> str:
    text = "\n".join(steps)
    standard = [f"import {name}\n" for name in ("importlib", "sys") if f"{name}." in text]
    weights = 'load_file(Path(__file__).with_name("model.safetensors"))'
    steps = [*steps, f"model.load_state_dict({weights})"]
    if library == "torchvision":
        steps[-1:] = [
            f"weights = {weights}",
            "state = model.state_dict()  # with the versions of its parts, which some models ask for",
            "if state.keys() != weights.keys():",
            '    raise ValueError("the weights are not those of this model")',
            "state.update(weights)",
            "model.load_state_dict(state)",
        ]
    body, reasons = "\n    ".join(steps), "\n".join(why)
    parts = "from torch import nn\n" if "nn." in text else ""
    return f'''"""Load this backbone: from load import load; model = load()

Needs torch, {library} and safetensors.
{reasons}
"""

{"".join(standard)}from pathlib import Path

import {library}
from safetensors.torch import load_file
{parts}

def load():
    {body}
    return model.eval()
'''
