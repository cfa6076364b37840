"""A pretrained backbone as loaded, and what reads one from an export, a timm folder or another project's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl.foreign import SUFFIXES, read_foreign
from ssl.hub import PREFIX, read_hub
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.models.classifier import head_names
from ssl.tensor_files import fingerprint, load_strictly, load_tensors, match_keys, sha256

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
        card = json.loads((folder / "config.json").read_text())
        mean, std = list(card["pretrained_cfg"]["mean"]), list(card["pretrained_cfg"]["std"])
        spec = BackboneSpec.from_dict(card["ssl_backbone"]) if "ssl_backbone" in card else None
        name = str(card["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"ckpt={folder} is not an export, nor a folder that timm has written: config.json says no backbone "
            f"({error!r})"
        ) from error
    path = folder / "model.safetensors"
    digest = sha256(path)
    if spec is None:
        args = {key: value for key, value in card.get("model_args", {}).items() if key not in FOLLOWS_FROM_WEIGHTS}
        height, width = card["pretrained_cfg"].get("input_size", [3, 224, 224])[1:]
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
    model = backbone_from_spec(spec)
    if card is None:
        load_strictly(model, tensors, folder)
        return model.eval(), None
    own = model.state_dict()
    head = {name: tensor for name, tensor in tensors.items() if name not in own}
    with torch.device("meta"):
        whole: Any = backbone_from_spec(spec, device="meta")
        whole.reset_classifier(len(card["classes"]))
    match_keys(head_names(whole), head, folder)
    load_strictly(model, {name: tensor for name, tensor in tensors.items() if name in own}, folder)
    return model.eval(), Classifier(list(card["classes"]), bool(card["multi_label"]), head)
