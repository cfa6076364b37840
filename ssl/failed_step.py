"""The step at which a run ended for its loss or gradient, kept beside a checkpoint so that it can be done again.

`runs/x/failed/.../step_00001234/` is a checkpoint with the weights as they were before the step, and in it

    batch.safetensors      the global batch: index, label, noise, crops.0, parameters.0.flip, ...
    step.json              which step it was, what was wrong with it, what computed it, and whose images they are

`python -m ssl.replay failed=<that folder>` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl.checkpoint_card import read_text, stay_inside
from ssl.methods.base import Batch
from ssl.tensor_files import load_tensors, save_tensors, sha256, sync

STEP_FILE, BATCH_FILE = "step.json", "batch.safetensors"


@dataclass(frozen=True)
class FailedStep:
    """What is known of a step that was skipped, the first of those for which the run ended."""

    step: int
    """As metrics count steps: the first of a run is 1."""
    reason: str
    precision: str
    """What it was computed in: fp32, bf16 or fp16."""
    device: str
    """Its type, cpu or cuda."""
    images: list[str]
    """The global batch's images as their source describes them, in the batch's order."""


def write_failed_step(folder: Path, failed: FailedStep, batch: Batch) -> None:
    """Add a step and its global batch, as the loader gives it, to the checkpoint in `folder`."""
    save_tensors(_flat(batch), folder / BATCH_FILE)
    sync(folder / BATCH_FILE)
    card = {**asdict(failed), "sha256": sha256(folder / BATCH_FILE)}
    (folder / STEP_FILE).write_text(json.dumps(card, indent=2) + "\n")  # last: with it the step is whole
    sync(folder / STEP_FILE)
    sync(folder)


def read_failed_step(folder: Path) -> tuple[FailedStep, Batch]:
    """What `write_failed_step` wrote. Raises ValueError where there is none, or where it is damaged."""
    try:
        card = json.loads(read_text(folder / STEP_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"failed={folder} holds no step to do again: {STEP_FILE} cannot be read ({error}); give the folder that "
            "the run named when it ended, runs/<run>/failed/..."
        ) from error
    names = {field.name for field in fields(FailedStep)}
    if not isinstance(card, dict) or set(card) != names | {"sha256"}:
        raise ValueError(f"{folder / STEP_FILE} was written by another program or version: it needs {sorted(names)}")
    path = folder / BATCH_FILE
    stay_inside(path)
    if not path.is_file() or sha256(path) != card.pop("sha256"):
        raise ValueError(f"{path} is missing or not what was written; the step cannot be done again")
    return FailedStep(**card), _nested(load_tensors(path))


def _flat(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts and lists of tensors as one dict with dotted names."""
    if isinstance(value, Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    assert isinstance(value, Mapping | Sequence)
    flat: dict[str, Tensor] = {}
    for key, each in items:
        flat |= _flat(each, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _nested(tensors: Mapping[str, Tensor]) -> Batch:
    """What `_flat` was given: numbered names are lists."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor
    return {key: _as_list(value) for key, value in tree.items()}


def _as_list(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if all(key.isdigit() for key in node):
        return [_as_list(node[key]) for key in sorted(node, key=int)]
    return {key: _as_list(value) for key, value in node.items()}
