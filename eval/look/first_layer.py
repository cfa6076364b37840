"""The convolution that reads the image: found by watching the model run, with its filters and what they answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eval.look.layer_places import token_grid
from eval.look.result import DoesNotApply
from ssl.models.backbones import pooled_features
from ssl.models.positions import sincos_2d

aten = torch.ops.aten
RECTIFIERS = {
    *(aten.relu, aten.relu_, aten.relu6, aten.hardtanh, aten.hardtanh_, aten.clamp, aten.clamp_, aten.clamp_min),
    *(aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.hardswish, aten.hardswish_, aten.mish, aten.mish_),
    *(aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_),
}
SMALL = 1e-3
FLAT = 1e-6


@dataclass(frozen=True)
class FirstLayer:
    """The convolution that reads the image, and its answers to some images."""

    name: str
    weight: Tensor
    """(F, C, h, w) float32 on the CPU."""
    is_embedding: bool
    """Whether it cuts the image into patches that do not overlap."""
    low: Tensor
    """(F,) least answer over the images and places, behind the activation function that follows if one does."""
    high: Tensor
    activation: str | None
    """The activation function that follows, None where the next layer reads the answers themselves."""

    @property
    def norm(self) -> Tensor:
        """(F,) lengths of the filters."""
        return self.weight.flatten(1).norm(dim=1)

    @property
    def is_dead(self) -> Tensor:
        """(F,) whether a filter is next to 0, or gives one answer to everything."""
        spread = self.high - self.low
        return self.is_next_to_0 | (spread <= FLAT * spread.max())

    @property
    def is_next_to_0(self) -> Tensor:
        """(F,) whether a filter is no longer than a thousandth of the median length."""
        return self.norm <= SMALL * self.norm.median()


@torch.no_grad()
def first_layer(model: nn.Module, image: Tensor) -> FirstLayer:
    """The first convolution that runs on normalised images (B, C, H, W).

    Raises DoesNotApply where it does not read the image, as in models whose first layer is linear.
    """
    watch = _Watch(image)
    handles = [
        part.register_forward_hook(partial(watch.meet, name))
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d)
    ]
    try:
        with watch:
            pooled_features(model, image)
    finally:
        for handle in handles:
            handle.remove()
    if watch.conv is None or not watch.reads_image:
        raise DoesNotApply(f"what=filters needs a convolution that reads the image; {type(model).__name__} has none")
    conv, answers = watch.conv, watch.answers.float()
    return FirstLayer(
        name=watch.name,
        weight=conv.weight.detach().float().cpu(),
        is_embedding=conv.kernel_size == conv.stride and max(conv.kernel_size) > 1,
        low=answers.amin((0, 2, 3)).cpu(),
        high=answers.amax((0, 2, 3)).cpu(),
        activation=watch.activation,
    )


class _Watch(TorchDispatchMode):
    """Notes the first convolution, and what the activation function behind it makes of its answers."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image_shape = image.shape
        self.name, self.conv, self.reads_image = "", None, False
        self.answers = torch.empty(0)
        self.activation: str | None = None
        self.is_open = False

    def meet(self, name: str, conv: nn.Module, inputs: Any, output: Any) -> None:
        if self.conv is not None:
            return
        assert isinstance(conv, nn.Conv2d)
        self.name, self.conv, self.reads_image = name, conv, inputs[0].shape == self.image_shape
        self.answers, self.is_open = output.clone(), True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if self.is_open and operation is aten.convolution:
            self.is_open = False  # what follows answers another layer
        elif self.is_open and operation in RECTIFIERS and result.shape == self.answers.shape:
            self.answers, self.is_open = result.clone(), False
            self.activation = operation.__name__.rstrip("_")
        return result


def filter_tiles(weight: Tensor) -> Tensor:
    """Filters (F, C, h, w) as colours (F, 3, h, w) in 0..1, each by its own greatest weight; 0.5 is a weight of 0.

    One channel is gray, of more than three the first three are shown, of two the third is 0.5.
    """
    bound = weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    tiles = weight / bound / 2 + 0.5
    if tiles.shape[1] == 1:
        return tiles.expand(-1, 3, -1, -1)
    if tiles.shape[1] == 2:
        return torch.cat([tiles, torch.full_like(tiles[:, :1], 0.5)], dim=1)
    return tiles[:, :3]


def position_embedding(model: nn.Module, image_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int], bool] | None:
    """The positions of a vision transformer's patches (N, D), their grid, and whether they are fixed sines and cosines.

    None for a model without absolute positions.
    """
    found = getattr(model, "pos_embed", None)
    if found is None:
        found = getattr(getattr(model, "encoder", None), "pos_embedding", None)  # torchvision's
    grid = token_grid(model, image_size)
    if not isinstance(found, Tensor) or found.ndim != 3 or grid is None or found.shape[1] < math.prod(grid[0]):
        return None
    patches = found[0, -math.prod(grid[0]) :].detach().float().cpu()  # (N, D)
    fixed = patches.shape[1] % 4 == 0 and torch.allclose(patches, sincos_2d(patches.shape[1], *grid[0]), atol=1e-5)
    return patches, grid[0], fixed


def position_similarity(positions: Tensor) -> Tensor:
    """The cosine similarity of each patch's position to each other's, (N, D) to (N, N)."""
    unit = positions / positions.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return unit @ unit.T
