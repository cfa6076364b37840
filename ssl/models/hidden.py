"""A timm backbone's hidden layers, and a way to change what one of them hands on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HiddenLayer:
    """A module whose output is a map of features: (B, C, h, w), channels last (B, h, w, C), or tokens (B, N, C)."""

    name: str
    module: nn.Module
    num_prefix: int = 0
    """Class and register tokens that stand before the patches'."""
    channels_last: bool = False

    def to_grid(self, hidden: Tensor, images: Tensor) -> Tensor:
        """The output for `images` (B, C, H, W) as (B, C, h, w), without prefix tokens. Raises ValueError."""
        if hidden.ndim == 4:
            return hidden.permute(0, 3, 1, 2) if self.channels_last else hidden
        if hidden.ndim != 3:
            raise ValueError(f"{self.name} gives {tuple(hidden.shape)}, which is no map of features; leave it out")
        patches = hidden[:, self.num_prefix :].transpose(1, 2)  # (B, C, N)
        height = round(math.sqrt(patches.shape[2] * images.shape[2] / images.shape[3]))
        if patches.shape[2] % max(height, 1):
            raise ValueError(f"{self.name} gives {patches.shape[2]} tokens, which are no grid of the image's shape")
        return patches.unflatten(2, (height, -1))  # (B, C, h, w)

    def from_grid(self, grid: Tensor, hidden: Tensor) -> Tensor:
        """What `to_grid` took apart, with `grid` in place of its part of `hidden`."""
        if hidden.ndim == 4:
            return grid.permute(0, 2, 3, 1) if self.channels_last else grid
        patches = grid.flatten(2).transpose(1, 2)  # (B, N, C)
        return torch.cat((hidden[:, : self.num_prefix], patches), dim=1)


def hidden_layers(backbone: nn.Module) -> list[HiddenLayer]:
    """The layers that timm lists for features: a ResNet's stem and stages, a ViT's blocks, from input to output.

    Raises ValueError where timm lists none.
    """
    listed = getattr(backbone, "feature_info", None)
    names = list(dict.fromkeys(info["module"] for info in listed)) if listed else []
    if not all(names) or not names:
        raise ValueError(f"timm lists no hidden layers of {type(backbone).__name__}; take another model=")
    return [
        HiddenLayer(
            name=name,
            module=backbone.get_submodule(name),
            num_prefix=getattr(backbone, "num_prefix_tokens", 0),
            channels_last=getattr(backbone, "output_fmt", "NCHW") == "NHWC",
        )
        for name in names
    ]


@contextmanager
def replaced_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this is open, `module` hands on `change` of its output.

    Raises RuntimeError where it did not run exactly once: a compiled model may pass hooks by.
    """
    runs = 0

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if runs != 1:
        raise RuntimeError(f"the layer {type(module).__name__} ran {runs} times instead of once; set compile to false")
