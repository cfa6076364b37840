"""A linear head that leaves the probe that trained it: a folder beside the probe's JSON, read again for prediction.

    head.safetensors   weight (C, D) and bias (C,): logits = features @ weight.T + bias
    head.json          which backbone and which of its features it reads, its classes, the SHA-256 of the above

It is written under a temporary name, then renamed: a folder with its final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eval.heads import Standardizer
from ssl.checkpoint_card import read_text, stay_inside
from ssl.tensor_files import load_tensors, match_keys
from ssl.tensor_files import sha256 as sha256_of

FORMAT = 1
WEIGHTS, CARD = "head.safetensors", "head.json"
KEYS = ("format", "kind", "checkpoint", "sha256", "classes", "multi_label", "features", "image_size", "head_sha256")


@dataclass(frozen=True)
class Head:
    """A linear classifier of C classes on D features: weight (C, D), bias (C,)."""

    weight: Tensor
    bias: Tensor
    classes: list[str]
    multi_label: bool
    checkpoint: str
    """Where the backbone lay when the head was trained."""
    sha256: str
    """Of the backbone's weights, as `LoadedBackbone.hash`: no other backbone makes features that it can read."""
    features: dict[str, Any]
    """Which features of the backbone it reads."""
    image_size: tuple[int, int]
    """Height and width of the images that these were read from, in pixels."""
    data: dict[str, Any] | None = None
    """Which split of which images it was trained on; None where that was not said."""

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C)."""
        return torch.addmm(self.bias, features, self.weight.T)


def fold(weight: Tensor, bias: Tensor, standardize: Standardizer) -> tuple[Tensor, Tensor]:
    """The head (C, D), (C,) that gives for raw features what `weight` and `bias` give for standardised ones."""
    scaled = weight.double() * standardize.scale.double().to(weight.device)  # (C, D)
    moved = bias.double() - scaled @ standardize.mean.double().to(weight.device)  # (C,)
    return scaled.float(), moved.float()


def save_head(
    folder: Path,
    *,
    weight: Tensor,
    bias: Tensor,
    classes: Sequence[str],
    checkpoint: str | Path,
    sha256: str,
    features: Mapping[str, Any],
    image_size: Sequence[int],
    multi_label: bool = False,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write a head of `weight` (C, D) and `bias` (C,) whole or not at all, in the place of an older one.

    `features` tells which features of the backbone it reads, as JSON values, `image_size` (height, width) of which
    images, `data` on which it was trained. Raises ValueError where the shapes do not fit each other or a number is not
    finite, OSError where it cannot be written.
    """
    _check_tensors(weight, bias, classes, what="a head to be saved")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        tensors = {"weight": weight, "bias": bias}
        save_file({name: each.detach().float().cpu().contiguous() for name, each in tensors.items()}, partial / WEIGHTS)
        card = {
            "format": FORMAT,
            "kind": "linear",
            "checkpoint": str(checkpoint),
            "sha256": sha256,
            "classes": list(classes),
            "multi_label": multi_label,
            "features": dict(features),
            "image_size": list(image_size),
            "data": None if data is None else dict(data),
            "head_sha256": sha256_of(partial / WEIGHTS),
        }
        (partial / CARD).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the head cannot be written to {folder}: {error}; give another out=") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_head(folder: str | Path) -> bool:
    """Whether a folder holds a saved head."""
    return (Path(folder) / CARD).is_file()


def load_head(folder: str | Path) -> Head:
    """Read what `save_head` wrote. Raises ValueError where it is none of ours, damaged, or of another format."""
    folder = Path(folder).expanduser()
    try:
        card = json.loads(read_text(folder / CARD))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds no head: {CARD} cannot be read ({error})") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("kind") != "linear":
        got = (card.get("format"), card.get("kind")) if isinstance(card, dict) else type(card).__name__
        raise ValueError(f"{folder} holds a head of format and kind {got}; this version reads {(FORMAT, 'linear')}")
    missing = [key for key in KEYS if key not in card]
    if missing:
        raise ValueError(f"{folder} is not a whole head: {CARD} lacks {', '.join(missing)}; probe the backbone again")
    path = folder / WEIGHTS
    stay_inside(path)
    if not path.is_file() or sha256_of(path) != card["head_sha256"]:
        raise ValueError(f"{folder} is damaged: {WEIGHTS} is not what was written; probe the backbone again")
    tensors = load_tensors(path)
    match_keys(("weight", "bias"), tensors, folder, advice="probe the backbone again")
    _check_tensors(tensors["weight"], tensors["bias"], card["classes"], what=str(folder))
    return Head(
        weight=tensors["weight"],
        bias=tensors["bias"],
        classes=card["classes"],
        multi_label=card["multi_label"],
        checkpoint=card["checkpoint"],
        sha256=card["sha256"],
        features=card["features"],
        image_size=(card["image_size"][0], card["image_size"][1]),
        data=card.get("data"),
    )


def _check_tensors(weight: Tensor, bias: Tensor, classes: Sequence[str], *, what: str) -> None:
    if weight.ndim != 2 or bias.ndim != 1 or not len(weight) == len(bias) == len(classes):
        raise ValueError(
            f"{what} needs weight (C, D), bias (C,) and C class names; "
            f"got {tuple(weight.shape)}, {tuple(bias.shape)} and {len(classes)} names"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(f"{what} holds numbers that are not finite: it diverged")
