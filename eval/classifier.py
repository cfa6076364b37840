"""A backbone and what names classes on top of it: a head that a probe has trained, or a fine-tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.head_file import Head, is_head, load_head
from eval.layers import FeatureSet, make_extract, resolve_sets
from ssl.checkpoint import LoadedBackbone, classifier_model, find, load_backbone, steps_saved
from ssl.loaded import is_foreign
from ssl.models.backbones import is_token_model

HEADS, OWN_HEAD = "eval/*.head", "eval/linear_probe.head"
ACCEPTED = (
    "a fine-tuned run (python -m eval.finetune) or its export, a run with a probed head "
    "(python -m eval.linear_probe ckpt=runs/<run> writes <run>/eval/linear_probe.head), or such a head's folder"
)


@dataclass(frozen=True)
class Classifier:
    """From normalised images (B, C, H, W) to logits (B, classes), and what the images must be."""

    model: Callable[[Tensor], Tensor]
    classes: list[str]
    image_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    channels: int
    multi_label: bool = False
    title: str = ""
    """What it was made from, for messages."""
    network: nn.Module | None = None
    """The module that `model` runs, alone or before a probed head, for those who look at its layers."""


def load_classifier(
    path: str | Path,
    *,
    backbone: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """What `path` names, ready on `device`: a fine-tuned run or its export, a run with a probed head, a head's folder.

    `backbone` tells where the backbone of a probed head lies now, `model` what a file of another project's weights is
    of, as in `load_backbone`. Raises ValueError where nothing there names classes,
    and where a head and a backbone do not belong together.
    """
    device = torch.device(device)
    path = Path(path).expanduser()
    if is_head(path):
        return load_probed(path, backbone=backbone, model=model, device=device, dtype=dtype)
    heads = sorted(path.glob(HEADS))
    ours = not is_foreign(path) and (not heads or _has_checkpoint(path))
    if ours and _is_finetuned(folder := find(path)):
        if backbone is not None:
            raise ValueError(f"backbone= has no effect: {path} is fine-tuned and brings its own; leave it out")
        from eval.finetune import load_finetuned  # which names the dataclass of this file

        return _on(load_finetuned(folder), device, dtype)
    if not heads:
        loaded = load_backbone(path, model=model)
        if loaded.classifier is None:
            raise ValueError(f"ckpt={path} is a backbone and names no classes; predicting needs {ACCEPTED}")
        return _on(_exported(loaded), device, dtype)
    own = path / OWN_HEAD  # of the data that the run was made from; others bear the name of theirs
    if own not in heads and len(heads) > 1:
        listed = ", ".join(map(str, heads))
        raise ValueError(f"ckpt={path} has {len(heads)} probed heads, and which is meant? Give one: {listed}")
    return load_probed(own if own in heads else heads[0], backbone=backbone, model=model, device=device, dtype=dtype)


def load_probed(
    folder: str | Path,
    *,
    backbone: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """A head that a probe has saved, on the backbone that it was trained on.

    The backbone is looked for where it was then, and in the run that the head lies in; `backbone` tells where else.
    Raises ValueError where it is gone or is another one: the SHA-256 of its weights must be the head's.
    """
    folder = Path(folder).expanduser()
    head = load_head(folder)
    device = torch.device(device)
    loaded = _find_backbone(head, folder, backbone, model)
    extract = probed_features(loaded, head.features, device=device, dtype=dtype)
    weight, bias = head.weight.to(device), head.bias.to(device)
    head = replace(head, weight=weight, bias=bias)

    def logits(image: Tensor) -> Tensor:
        features = extract(image)  # (B, D) in fp32, as the probe had it
        if features.shape[1] != weight.shape[1]:
            raise ValueError(f"{folder} reads {weight.shape[1]} features, the backbone gives {features.shape[1]}")
        return head.logits(features)  # (B, C)

    return Classifier(
        model=logits,
        classes=head.classes,
        image_size=loaded.spec.image_size,
        mean=loaded.mean,
        std=loaded.std,
        channels=loaded.spec.in_chans,
        multi_label=head.multi_label,
        title=f"{folder} on {loaded.path}",
        network=loaded.model,
    )


def probed_features(
    loaded: LoadedBackbone, features: dict[str, Any], *, device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """The function from normalised images (B, C, H, W) to the features (B, D) that a head was trained on."""
    try:
        wanted = FeatureSet(**features)
    except TypeError as error:
        raise ValueError(f"the head reads features that this version does not know: {features} ({error})") from error
    extract = make_extract(loaded.model, resolve_sets(loaded.model, [wanted]), device=device, dtype=dtype)
    return lambda image: extract(image)[0]  # (B, D)


def _find_backbone(
    head: Head, folder: Path, given: str | Path | None, model: Mapping[str, Any] | None
) -> LoadedBackbone:
    """The backbone whose weights have the head's hash, for images of the head's size."""
    run = folder.parent.parent
    places = [given] if given is not None else [head.checkpoint, *(path for _, path in reversed(steps_saved(run)))]
    others = []
    for place in dict.fromkeys(map(str, places)):
        try:
            loaded = load_backbone(place, model=model if is_foreign(place) else None, image_size=head.image_size)
        except ValueError as error:
            others.append(str(error))
            continue
        if loaded.hash == head.sha256:
            return loaded
        others.append(f"{loaded.path} has other weights, SHA-256 {loaded.hash[:12]}...")
    raise ValueError(
        f"{folder} belongs to a backbone with SHA-256 {head.sha256[:12]}..., which was {head.checkpoint}:\n  "
        + "\n  ".join(others)
        + "\nGive backbone=<where it is now>, or probe the backbone that you have: python -m eval.linear_probe ckpt=..."
    )


def _exported(loaded: LoadedBackbone) -> Classifier:
    """timm's model of a fine-tuned export, with its classifier."""
    assert loaded.classifier is not None
    return Classifier(
        model=classifier_model(loaded),
        classes=loaded.classifier.classes,
        image_size=loaded.spec.image_size,
        mean=loaded.mean,
        std=loaded.std,
        channels=loaded.spec.in_chans,
        multi_label=loaded.classifier.multi_label,
        title=str(loaded.path),
    )


def _has_checkpoint(path: Path) -> bool:
    return bool(steps_saved(path)) or (path / "state.json").exists()


def _is_finetuned(folder: Path) -> bool:
    try:
        return "classifier" in json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return False  # an export, or damaged: what reads it next says so


def _on(found: Classifier, device: torch.device, dtype: torch.dtype) -> Classifier:
    """A fine-tuned model in eval mode on its device, computing in `dtype`."""
    assert isinstance(found.model, nn.Module)
    model = found.model.to(device).eval()
    channels_last = not is_token_model(model)

    def logits(image: Tensor) -> Tensor:
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return model(image).float()  # (B, C)

    return replace(found, model=logits, network=model)
