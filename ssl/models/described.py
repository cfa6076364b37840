"""A backbone's description that was read from a file, which may come from anyone: judged before anything is built."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import timm
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ssl.models.torchvision_models import PREFIX, TORCHVISION_ARGUMENTS, is_torchvision, model_names

LARGEST = 10**6
"""No number in a description is larger: a width, a count, a side of the image."""
NOT_OF_THE_MODEL = {  # arguments of timm's that read files, reach the network or set what this package sets
    "cache_dir",
    "checkpoint_path",
    "device",
    "dtype",
    "exportable",
    "feature_cfg",
    "features_only",
    "in_chans",
    "kwargs_filter",
    "no_jit",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "scriptable",
}


def check_described(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless a description names a model of timm or torchvision by plain values of a sensible size."""
    name, args = values["architecture"], values["model_args"]
    if not isinstance(name, str) or not _is_known(name):
        raise ValueError(
            f"a checkpoint describes its backbone as {name!r:.80}, which is not the name of a model of timm's, nor "
            "torchvision/ and one of torchvision's"
        )
    if not isinstance(args, dict):
        raise ValueError(f"a checkpoint describes the arguments of {name} as {args!r}; they must be a mapping")
    for key in args:
        if (
            not str(key).isidentifier()
            or key in NOT_OF_THE_MODEL
            or (is_torchvision(name) and key in TORCHVISION_ARGUMENTS)
        ):
            raise ValueError(f"a checkpoint describes {name} with the argument {key!r}, which is refused")
    numbers = [*_values(values["image_size"]), *_values(values["in_chans"]), *_values(args)]
    for value in numbers:
        if not _is_plain(value):
            raise ValueError(
                f"a checkpoint describes {name} with {value!r:.80}; only plain values are read, numbers up to "
                f"{LARGEST:,} and short words"
            )
    sides = values["image_size"]
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(_is_count(side) for side in sides):
        raise ValueError(f"a checkpoint describes images of {sides!r}; two sides in pixels are needed")
    if not _is_count(values["in_chans"]):
        raise ValueError(f"a checkpoint describes images of {values['in_chans']!r} channels")
    if values["stem"] not in ("standard", "small", "padded"):
        raise ValueError(f"a checkpoint describes the stem {values['stem']!r}; it is standard, small or padded")


@contextlib.contextmanager
def no_larger_than(tensors: Mapping[str, Tensor], *, trials: int = 1) -> Iterator[None]:
    """Within it, ValueError ends the building of a model that has many more layers than `tensors` could fill.

    For `trials` on torch's meta device, which cost no memory for tensors and still some for every layer.
    """
    most = trials * (20 * len(tensors) + 1000)
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > most:
            raise ValueError(f"the model described has far more layers than the {len(tensors)} tensors that are there")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_known(name: str) -> bool:
    if is_torchvision(name):
        return name.removeprefix(PREFIX) in model_names()
    return re.fullmatch(r"\w+", name, re.ASCII) is not None and timm.is_model(name)


def _values(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        for child in node.values():
            yield from _values(child)
    elif isinstance(node, list | tuple):
        if len(node) > 1000:
            yield node  # no model takes so many, and it is refused as a value
            return
        for child in node:
            yield from _values(child)
    else:
        yield node


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, str):
        return len(value) <= 200
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= LARGEST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
