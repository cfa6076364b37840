"""Weights that leave: `python -m eval.export ckpt=runs/<run> out=DIR` writes a folder that timm loads by itself.

model.safetensors, config.json    timm.create_model("local-dir:DIR", pretrained=True)
README.md                         a model card: recipe, data, seed, steps, results with how they were made
load.py                           only for what timm cannot build alone: a ResNet with a small stem, a model of
                                  torchvision, and a family that is written here, whose file comes with it
model.onnx                        onnx=true
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from omegaconf import MISSING, DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eval.config import EvalDataConfig, register
from eval.extract import centre_view
from eval.hub_upload import check_push, push
from eval.load_script import load_script, needs_script
from eval.model_card import model_card
from eval.onnx_file import check_onnx_packages, write_onnx
from eval.splits import data_settings
from eval.subject import BASELINES
from ssl.checkpoint import LoadedBackbone, classifier_model, export, load_backbone
from ssl.command import run_command
from ssl.config import CONF, ModelConfig, build, check, plain
from ssl.data.augment import Augment
from ssl.data.embedded import Embedded
from ssl.data.image_size import as_size
from ssl.data.loader import Loader
from ssl.data.sources import Source
from ssl.data.subset import Subset
from ssl.models import families
from ssl.models.backbones import pooled_features
from ssl.models.families import family_file

FAMILY_FILES = tuple(f"{name}.py" for name in families.__all__)
FILES = ("model.safetensors", "config.json", "README.md", "load.py", "model.onnx", *FAMILY_FILES)
TOLERANCE = 1e-5  # of the largest output: what the order of sums may move in fp32
NUM_IMAGES = 4  # real ones, and as many random ones

USAGE = """eval.export needs ckpt= and out=, what to export and the folder to write:
  python -m eval.export ckpt=runs/<run> out=exports/<name>                  the last checkpoint of a run
  python -m eval.export ckpt=runs/<run>/checkpoints/step_00001000 out=...
  python -m eval.export ckpt=mae.pth model=vit_b out=...                    a file of mae, mmselfsup, solo-learn, timm
with onnx=true for an ONNX file too, push=<user>/<name> to upload the folder"""


@dataclass
class ExportConfig:
    """What `python -m eval.export` takes."""

    ckpt: str | None = None  # a run folder, a checkpoint in it, timm:<name>, or a file
    out: str | None = None  # folder that is written
    model: ModelConfig | None = None  # what a file of another project's weights is of
    data: EvalDataConfig = MISSING  # images that both ways of loading are compared on
    onnx: bool = False
    push: str | None = None
    seed: int = 0  # of the random images


def run(config: DictConfig) -> dict[str, Any]:
    """Write the export that `config` names, compared through timm; returns its folder and the largest differences.

    Raises ValueError, and leaves `out` as it was, where timm does not compute the same.
    """
    if config.out is None:
        raise ValueError("out= is missing, the folder to write, such as out=exports/my_backbone")
    if config.ckpt in BASELINES:
        raise ValueError(
            f"ckpt={config.ckpt} is a baseline and has no weights to export; give a run, such as runs/<run>"
        )
    if config.onnx:
        check_onnx_packages()
    if config.push is not None:
        check_push(config.push)
    out = Path(config.out).expanduser()
    _check_replaceable(out)
    data = plain(config.data) or {}
    loaded = load_backbone(config.ckpt, model=plain(config.model), image_size=as_size(data.get("image_size")))
    images, whose, problem = comparison_images(config, loaded)

    partial = out.with_name(f".partial_{out.name}_{os.getpid()}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        export(loaded, partial)
        if needs_script(loaded.spec):
            (partial / "load.py").write_text(load_script(loaded))
        if (source := family_file(loaded.spec.architecture)) is not None:
            shutil.copyfile(source, partial / source.name)
        ways = compare(loaded, partial, images)
        if config.onnx:
            model = classifier_model(loaded) if loaded.classifier else Pooled(loaded.model)
            ways["model.onnx through onnxruntime"] = write_onnx(model, images, partial / "model.onnx")
        (partial / "README.md").write_text(model_card(loaded, name=out.name, ways=ways, images=whose))
        _put(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    for way, difference in ways.items():
        print(f"{way}: largest difference {difference:.1e} of the largest output, over {whose}")
    for note in [*loaded.notes, *([problem] if problem else [])]:
        print(f"note: {note}")
    print(f"written: {out}", flush=True)
    url = push(config.push, out, FILES) if config.push is not None else None
    if url:
        print(f"pushed: {url}", flush=True)
    print(f"next: {_next(config, loaded, out)}", flush=True)
    return {"out": str(out), "differences": ways, "url": url}


class Pooled(nn.Module):
    """A backbone whose forward gives pooled features, (B, C, H, W) to (B, D)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, D)."""
        return pooled_features(self.model, image)


def compare(loaded: LoadedBackbone, folder: Path, images: Tensor) -> dict[str, float]:
    """Per way of loading the folder without this package, the largest difference to our own outputs, as a part of the
    largest output.

    Pooled features are compared, and logits where there is a classifier; `images` are (B, C, H, W). Raises ValueError
    where one exceeds 1e-5.
    """
    head = classifier_model(loaded) if loaded.classifier else None
    with torch.no_grad():
        expected = [pooled_features(loaded.model, images)]  # (B, D)
        expected += [head(images)] if head is not None else []  # (B, classes)
    ways = {}
    for way, load in ways_to_load(loaded, folder).items():
        try:
            model = load().eval()
            with torch.no_grad():
                found = [model(images)]
                if head is not None and hasattr(model, "forward_head"):
                    found.insert(0, pooled_features(model, images))
        except (OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"the export was not written: it cannot be loaded by {way}: {error}") from error
        compared = zip(found, expected[-len(found) :], strict=True)
        difference = max(_difference(one, other) for one, other in compared)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the export was not written: loaded by {way} it computes something else, by {difference:.1e} of the "
                f"largest output where {TOLERANCE:.0e} is rounding; timm is {timm.__version__}, try another version"
            )
        ways[way] = difference
    return ways


def ways_to_load(loaded: LoadedBackbone, folder: Path) -> dict[str, Callable[[], nn.Module]]:
    """What a person would type, without this package, and what it does."""
    spec, num_classes = loaded.spec, len(loaded.classifier.classes) if loaded.classifier else 0
    if family_file(spec.architecture) is not None:
        return {"load.py": lambda: ElsewhereLoaded(folder)}
    if needs_script(spec):
        return {"load.py": lambda: runpy.run_path(str(folder / "load.py"))["load"]()}
    args: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.model_args.items()}
    weights = str(folder / "model.safetensors")
    return {
        'timm.create_model("local-dir:...", pretrained=True)': lambda: timm.create_model(
            f"local-dir:{folder}", pretrained=True
        ),
        "timm.create_model(name, checkpoint_path=...)": lambda: timm.create_model(
            spec.architecture, checkpoint_path=weights, num_classes=num_classes, in_chans=spec.in_chans, **args
        ),
    }


class ElsewhereLoaded(nn.Module):
    """What load.py of a folder computes in another process, which knows nothing of this package.

    Here its family would be registered with timm a second time, in the place of ours.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder.resolve()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to the model's output. Raises RuntimeError with what the process said where it fails."""
        with tempfile.TemporaryDirectory() as place:
            save_file({"images": images.contiguous()}, f"{place}/images.safetensors")
            command = [sys.executable, "-P", "-c", ELSEWHERE, str(self.folder), place]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
            return load_file(f"{place}/outputs.safetensors")["outputs"]


ELSEWHERE = """
import runpy, sys
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
folder, place = sys.argv[1:]
model = runpy.run_path(f"{folder}/load.py")["load"]()
with torch.no_grad():
    outputs = model(load_file(f"{place}/images.safetensors")["images"])
save_file({"outputs": outputs.contiguous()}, f"{place}/outputs.safetensors")
"""


def comparison_images(config: DictConfig, loaded: LoadedBackbone) -> tuple[Tensor, str, str | None]:
    """Normalised images (B, C, H, W), half of them real and half random, which they are, and what was in the way.

    Real ones are of `data=`, by default the checkpoint's own; where those cannot be read, the embedded ones.
    """
    data, problem = plain(config.data), None
    whose = "the run's own data" if data["name"] == "checkpoint" else data["name"]
    try:
        source = _source(config, loaded)
    except (ValueError, OSError) as error:
        if data["name"] != "checkpoint":
            raise
        whose, reason = "the embedded set", str(error).split("\n")[0]
        problem = f"compared on the embedded images, as the checkpoint's own cannot be read: {reason}"
        source = Embedded(split="train", size=min(loaded.spec.image_size), num_train=100, num_test=1, seed=0)
    height, width = loaded.spec.image_size
    loader = Loader(
        Subset(source, np.arange(min(NUM_IMAGES, len(source)))),
        [centre_view((height, width))],
        size=(height, width),
        channels=loaded.spec.in_chans,
        seed=0,
        threads=1,
        in_memory_gib=0.0,
    )
    with loader:
        augment = Augment(loader.views, mean=loaded.mean, std=loaded.std)
        real = augment(next(iter(loader.sequential(batch_size=NUM_IMAGES))))["views"][0].float()  # (B, C, H, W)
    generator = torch.Generator().manual_seed(config.seed)
    random = torch.randn(NUM_IMAGES, loaded.spec.in_chans, height, width, generator=generator)
    return torch.cat([real, random]), f"{len(real)} images of {whose} and {len(random)} random ones", problem


def _source(config: DictConfig, loaded: LoadedBackbone) -> Source:
    given = plain(config.data)
    own = given["name"] == "checkpoint"
    values = {key: value for key, value in given.items() if key != "image_size"}
    data = data_settings(values, loaded.config.get("data", {}), subject=config.ckpt)
    return build(data["source"], within="ssl.data." if own else None, split="train")


def _next(config: DictConfig, loaded: LoadedBackbone, out: Path) -> str:
    """A command that judges the export: on the images that were given, else on the run's own, else on embedded ones."""
    given = {key: value for key, value in plain(config.data).items() if value is not None}
    own = loaded.config.get("data") or {}
    data = given if given["name"] != "checkpoint" else {**own, **given, "name": own.get("name")}
    if data["name"] not in {path.stem for path in Path(CONF, "data").glob("*.yaml")}:
        data = {"name": "embedded"}
    root = [f"data.root={data['root']}"] if data.get("root") is not None else []
    return shlex.join(["python", "-m", "eval.knn", f"ckpt={out}", f"data={data['name']}", *root])


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _check_replaceable(out: Path) -> None:
    """Raise ValueError where `out` is something else than an earlier export."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()):
        config = out / "config.json"
        if (out / "state.json").exists() or not config.is_file() or "ssl_backbone" not in config.read_text():
            raise ValueError(f"out={out} holds other files than an export; give an empty or a new folder")


def _put(partial: Path, out: Path) -> None:
    """Move the finished folder to its place; in an earlier export only its own files are replaced."""
    if not out.exists():
        os.replace(partial, out)
        return
    for name in FILES:
        if (partial / name).exists():
            os.replace(partial / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)


def main() -> None:
    """The command line."""
    register(ExportConfig)

    def task(config: DictConfig) -> None:
        if config.ckpt is None:
            print(USAGE, file=sys.stderr)
            raise SystemExit(2)
        check(config, ExportConfig)
        run(config)

    run_command(task, config_name="export")


if __name__ == "__main__":
    main()
