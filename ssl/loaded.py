"""A pretrained backbone as loaded, and what reads one from an export, a timm folder or another project's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl.checkpoint_card import read_text, statistics, stay_inside
from ssl.foreign import SUFFIXES, read_foreign
from ssl.hub import PREFIX, read_hub
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.models.classifier import head_names
from ssl.models.described import check_described, no_larger_than
from ssl.tensor_files import check_fit, fingerprint, load_strictly, load_tensors, match_keys, sha256

FOLLOWS_FROM_WEIGHTS = ("img_size", "patch_size", "in_chans", "num_classes", "dynamic_img_size")


@dataclass(frozen=True)
class Classifier:
    """timm's own classifier of a fine-tuned model: its tensors under timm's names, and what its outputs mean."""

    classes: list[str]
    multi_label: bool
    tensors: dict[str, Tensor]


@dataclass
class LoadedBackbone:
    """A pretrained backbone in eval mode, and what its checkpoint says of itself."""

    model: nn.Module
    spec: BackboneSpec
    config: dict[str, Any]
    step: int | None
    """None where the file does not say."""
    hash: str
    path: Path
    mean: list[float]
    std: list[float]
    run_dir: Path
    weights: str
    """`model`, or `ema` where the run kept a moving average: that is what is evaluated then."""
    layout: str = "ssl"
    """Whose checkpoint it is: `ssl` is ours, others are named in ssl/foreign.py."""
    notes: list[str] = field(default_factory=list)
    """What was inferred, resampled or left out, for people to read."""
    classifier: Classifier | None = None


def load_export(folder: Path) -> LoadedBackbone:
    """The backbone of an export of ours or of a folder that timm has written; ValueError where it is neither."""
    try:
        card = json.loads(read_text(folder / "config.json"))
        settings = card["pretrained_cfg"]
        spec = BackboneSpec.from_dict(card["ssl_backbone"]) if "ssl_backbone" in card else None
        name = str(card["architecture"])
        channels, height, width = settings.get("input_size", [3, 224, 224]) if spec is None else (spec.in_chans, 0, 0)
        mean_std = statistics((settings["mean"], settings["std"]), channels=channels, where=folder / "config.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"ckpt={folder} is not an export, nor a folder that timm has written: config.json says no backbone "
            f"({error!r})"
        ) from error
    mean, std = mean_std
    path = folder / "model.safetensors"
    stay_inside(path)
    digest = sha256(path)
    if spec is None:
        args = {key: value for key, value in card.get("model_args", {}).items() if key not in FOLLOWS_FROM_WEIGHTS}
        check_described(
            {
                "architecture": name,
                "image_size": [height, width],
                "in_chans": channels,
                "model_args": args,
                "stem": "standard",
            }
        )
        found = read_foreign(path, model={"name": name, "args": args}, image_size=(height, width))
        notes = [note for note in found.notes if "ImageNet" not in note]
        return LoadedBackbone(
            found.model, found.spec, {}, None, digest, folder, mean, std, folder, "model", "timm folder", notes
        )
    model, classifier = load_model(spec, load_tensors(path), card.get("ssl_classifier"), folder)
    return LoadedBackbone(
        model, spec, {}, None, digest, folder, mean, std, folder, "model", "export", classifier=classifier
    )


def load_foreign(ckpt: str, *, model: Mapping[str, Any] | None, image_size: tuple[int, int] | None) -> LoadedBackbone:
    """A file of another project's weights, built as `model` says, or `timm:<name>` from timm's hub.

    Raises ValueError where `model` is missing for the one or given for the other, and as `read_foreign` and `read_hub`.
    """
    path = Path(ckpt).expanduser()
    if ckpt.startswith(PREFIX):
        if model is not None:
            raise ValueError(f"model= has no effect with ckpt={ckpt}, which names its own; leave it out")
        found = read_hub(ckpt)
        digest, name = fingerprint(found.model.state_dict()), ckpt.replace(":", "_")
    else:
        found = read_foreign(path, model=model, image_size=image_size)
        digest, name = sha256(path), path.stem
    return LoadedBackbone(
        model=found.model,
        spec=found.spec,
        config={},
        step=None,
        hash=digest,
        path=path,
        mean=found.mean,
        std=found.std,
        run_dir=Path("runs") / name,
        weights=found.weights,
        layout=found.layout,
        notes=found.notes,
    )


def is_foreign(ckpt: str | Path) -> bool:
    """Whether `ckpt` is `timm:<name>` or a file of weights by itself, not one of a checkpoint or an export of ours."""
    if str(ckpt).startswith(PREFIX):
        return True
    path = Path(ckpt).expanduser()
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    beside = path.with_name("state.json").exists()
    return not beside and not (path.name == "model.safetensors" and path.with_name("config.json").exists())


def load_model(
    spec: BackboneSpec, tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, folder: Path
) -> tuple[nn.Module, Classifier | None]:
    """The described backbone in eval mode with its tensors, and the classifier that `card` says they hold too.

    Raises ValueError where a tensor is missing, left over or of another shape.
    """
    with no_larger_than(tensors):
        trial: Any = backbone_from_spec(spec, device="meta")
    own = trial.state_dict()
    classes = None if card is None else _classes(card, folder)
    inside = {name: tensor for name, tensor in tensors.items() if name in own or classes is None}
    check_fit(own, inside, folder)  # before memory is taken for it
    head = {name: tensor for name, tensor in tensors.items() if name not in inside}
    if classes is not None:
        with torch.device("meta"):
            trial.reset_classifier(len(classes))
        match_keys(head_names(trial), head, folder)
    model = backbone_from_spec(spec)
    load_strictly(model, inside, folder)
    if card is None or classes is None:
        return model.eval(), None
    return model.eval(), Classifier(classes, bool(card["multi_label"]), head)


def _classes(card: Mapping[str, Any], folder: Path) -> list[str]:
    """The names of a classifier's classes. Raises ValueError where they are no list of words."""
    classes = card.get("classes") if isinstance(card, Mapping) else None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or "multi_label" not in card:
        raise ValueError(f"{folder} says that it holds a classifier, and not of which classes")
    return classes
