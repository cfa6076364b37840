"""README.md of an export: what the weights are, how they were made, how good they are, how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from eval.load_script import needs_script
from ssl.checkpoint import LoadedBackbone
from ssl.models.torchvision_models import is_torchvision

RECIPE = ("method", "model", "data", "augment", "optim", "schedule", "trainer", "seed")
PRIVATE = (
    "root",
    "path",
    "out",
    "folder",
    "subject",
    "head",
    "train",
    "test",
    "run",
)  # where files lie on the machine of the run
ELSEWHERE = ("checkpoint", "backbone", "data", "features", "versions", "commit", "gpu", "device", "command", "notes")
LONGEST = 50  # lists beyond this are counted in the card; the JSON beside the run holds them


def model_card(loaded: LoadedBackbone, *, name: str, ways: Mapping[str, float], images: str) -> str:
    """The card of an export called `name`; `ways` are how it was loaded without this package, and with what difference
    on which `images`.

    Results are those of the run's `eval/*.json` that were made from these very weights.
    """
    parts = [
        _front_matter(loaded),
        f"# {name}\n\n{_summary(loaded)}",
        f"## Load it\n\n{_how_to_load(loaded)}",
        f"## Results\n\n{_results(loaded)}",
        f"## Recipe\n\n{_recipe(loaded)}",
        f"## Checked\n\n{_checked(ways, images)}",
        "## Licence\n\nNot chosen yet: write yours here and as `license:` above. The images that it was trained on may "
        "have a say in it.",
    ]
    return "\n\n".join(parts) + "\n"


def results_of(loaded: LoadedBackbone) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """(name, content) of each JSON of the run made from these weights, and how many were made from others."""
    own, others = [], 0
    for path in sorted((loaded.run_dir / "eval").glob("*.json")):
        try:
            content = json.loads(path.read_text())
            made_from = (
                "weights" if "started_from" in content["protocol"] else "checkpoint"
            )  # fine-tuning makes its own
            digest = (content["protocol"].get(made_from) or {}).get("sha256")
            content["metrics"].items()
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue  # not one of ours
        if digest == loaded.hash:
            own.append((path.stem, content))
        else:
            others += 1
    return own, others


def _front_matter(loaded: LoadedBackbone) -> str:
    method = _method(loaded)
    task = "image-classification" if loaded.classifier else "image-feature-extraction"
    library = "torchvision" if is_torchvision(loaded.spec.architecture) else "timm"
    tags = [task, library, "self-supervised-learning", *([method.lower()] if method else [])]
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n{listed}\n# license: yours to choose\n---"


def _summary(loaded: LoadedBackbone) -> str:
    spec, config = loaded.spec, loaded.config
    height, width = spec.image_size
    stem = "" if spec.stem == "standard" else " whose first layer keeps the resolution (3x3, stride 1, no max-pool)"
    words = [f"A `{spec.architecture}`{stem} for images of {height} x {width} pixels, {spec.in_chans} channels"]
    method = _method(loaded)
    if method:
        data = _data(config.get("data") or {})
        words.append(
            f"trained with {method} on {data or 'images that the run does not name'}, seed {config.get('seed')}, "
            f"step {loaded.step:,}" + (" (moving average of the weights)" if loaded.weights == "ema" else "")
        )
    if loaded.layout != "ssl":
        words.append(f"read from {loaded.path.name} ({loaded.layout})")
    if loaded.classifier:
        words.append(f"with a classifier of {len(loaded.classifier.classes)} classes")
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    return f"{', '.join(words)}. {count / 1e6:.1f} M parameters. Made from weights with SHA-256 `{loaded.hash}`."


def _how_to_load(loaded: LoadedBackbone) -> str:
    height, width = loaded.spec.image_size
    gives = "logits" if loaded.classifier else "features"
    if not needs_script(loaded.spec):
        lines = [
            "import timm, torch",
            'model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()  # or hf-hub:user/name',
        ]
    else:
        library = "torchvision" if is_torchvision(loaded.spec.architecture) else "timm"
        needs = f"load.py of this folder; needs torch, {library} and safetensors"
        lines = ["import torch", f"from load import load  # {needs}"]
        lines.append("model = load()")
    lines.append(f"{gives} = model(torch.zeros(1, {loaded.spec.in_chans}, {height}, {width}))")
    code = "\n".join(lines)
    mean, std = ([round(value, 4) for value in values] for values in (loaded.mean, loaded.std))
    return (
        f"```python\n{code}\n```\n\nImages: {height} x {width} pixels, values in 0..1, then mean {mean} and standard "
        f"deviation {std} per channel."
    )


def _results(loaded: LoadedBackbone) -> str:
    found, others = results_of(loaded)
    lines = []
    if found:
        lines += ["| evaluation | data | test images | metrics | protocol |", "|---|---|---|---|---|"]
        for name, content in found:
            protocol, data = content["protocol"], content["protocol"].get("data") or {}
            metrics = ", ".join(f"{key} {_number(value)}" for key, value in list(content["metrics"].items())[:6])
            how = ", ".join(
                f"{key} {value}"
                for key, value in protocol.items()
                if key not in (*ELSEWHERE, *PRIVATE) and isinstance(value, str | int | float) and len(str(value)) < 60
            )
            lines.append(f"| {name} | {data.get('name')} | {data.get('num_test', '')} | {metrics} | {how} |")
        lines.append("")
        for name, content in found:
            text = json.dumps(_public(content["protocol"]), indent=1)
            lines.append(f"<details><summary>{name}: whole protocol</summary>\n\n```json\n{text}\n```\n</details>\n")
    else:
        lines.append("None: no evaluation of these weights lies beside the run.")
    if others:
        lines.append(f"{others} evaluations beside the run were made from other weights, and are left out.")
    return "\n".join(lines).strip()


def _recipe(loaded: LoadedBackbone) -> str:
    recipe = {key: loaded.config[key] for key in RECIPE if loaded.config.get(key) is not None}
    if not recipe:
        return "The file says nothing of how it was made.\n" + "".join(f"\n- {note}" for note in loaded.notes)
    epochs = (loaded.config.get("trainer") or {}).get("epochs")
    done = f"Step {loaded.step:,} of a run" + (f" of {epochs:g} epochs" if epochs is not None else "")
    text = OmegaConf.to_yaml(OmegaConf.create(_public(recipe))).rstrip()
    return (
        f"{done}, with these settings (a ViT's patch size and the like are in `config.json`):\n\n```yaml\n{text}\n```"
    )


def _checked(ways: Mapping[str, float], images: str) -> str:
    listed = "\n".join(f"- `{way}`: {difference:.1e}" for way, difference in ways.items())
    return (
        f"Loaded without the code that trained it when this was written, and compared with it on {images}; largest "
        f"difference, as a part of the largest output:\n\n{listed}"
    )


def _data(data: Mapping[str, Any]) -> str | None:
    name, root = data.get("name"), data.get("root")
    return f"{name} ({Path(root).name})" if root and name in ("folder", "parquet") else name


def _method(loaded: LoadedBackbone) -> str | None:
    return str((loaded.config.get("method") or {}).get("_target_", "")).rpartition(".")[2] or None


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _public(node: Any) -> Any:
    """Settings without the paths of the machine, and without long lists."""
    if isinstance(node, Mapping):
        return {str(key): _public(value) for key, value in node.items() if key not in PRIVATE}
    if isinstance(node, list):
        return [_public(value) for value in node] if len(node) <= LONGEST else f"{len(node)} values"
    return Path(node).name if isinstance(node, str) and node.startswith(("/", "~/")) else node
