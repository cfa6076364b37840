"""Mixup, CutMix and label smoothing: what fine-tuning does to a batch on its way to the loss.

Everything random follows from `noise` (B, num_noise), uniform numbers that the loader gives each image; what a batch
has once follows from its first image's. Image i is mixed with image B-1-i, as timm does: batches are shuffled already.
A batch is what one device takes at once, so that here, as in BatchNorm, the number of devices is part of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl.models.hidden import HiddenLayer

Classify = Callable[[Tensor], Tensor]
MODES = ("batch", "elem")
_QUANTILES = 2**13


@dataclass(frozen=True)
class Mixed:
    """What became of a batch: its loss, the logits (B, C), and the soft targets (B, C) that they were held against."""

    loss: Tensor
    logits: Tensor
    targets: Tensor


class Mixing(nn.Module):
    """Label smoothing alone, and what all ways of mixing share.

    With `multi_label` the labels are (B, C) of 0 and 1, the loss is binary cross-entropy and smoothing draws towards
    one half; else they are class numbers (B,), the loss is cross-entropy and smoothing draws towards 1 / C.
    """

    num_noise: int = 0

    def __init__(self, *, num_classes: int, smoothing: float = 0.0, multi_label: bool = False) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing is the share of the label that is spread, from 0 to below 1, got {smoothing}")
        self.num_classes = num_classes
        self.smoothing = smoothing
        self.multi_label = multi_label

    def forward(
        self,
        classify: Classify,
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        model: nn.Module | None = None,
        layers: Sequence[HiddenLayer] = (),
        std: Sequence[float] = (),
    ) -> Mixed:
        """The loss of normalised `images` (B, C, H, W), which `classify` turns into logits (B, classes).

        Some ways need more: `model`, the module that `classify` runs, its hidden `layers`, and `std` (C,), what the
        images were divided by, in units of 0..1.
        """
        targets = self.soft_targets(labels)
        logits = classify(images)
        return Mixed(self.loss(logits, targets), logits, targets)

    def soft_targets(self, labels: Tensor) -> Tensor:
        """Labels as smoothed targets, float32 (B, C)."""
        if self.multi_label:
            return labels.to(torch.float32) * (1 - self.smoothing) + 0.5 * self.smoothing
        return soft_targets(labels, self.num_classes, smoothing=self.smoothing)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of logits (B, C) against soft targets (B, C)."""
        if self.multi_label:
            return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
        return functional.cross_entropy(logits, targets.to(logits.dtype))


class InputMixing(Mixing):
    """Mixup (Zhang et al. 2017) or CutMix (Yun et al. 2019) of the images, as timm's Mixup chooses between them.

    mixup, cutmix: alpha of the Beta distribution that the share comes from, 0 for never. probability: of mixing at all;
    switch: of CutMix where both are on. mode: one draw for the `batch`, or one for each of its elements (`elem`).
    Raises ValueError for values that are out of range or have no effect.
    """

    num_noise = 5  # mixed at all, switched to CutMix, share, box's centre down and across

    def __init__(
        self,
        *,
        num_classes: int,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        probability: float = 1.0,
        switch: float = 0.5,
        mode: str = "batch",
        smoothing: float = 0.0,
        multi_label: bool = False,
    ) -> None:
        super().__init__(num_classes=num_classes, smoothing=smoothing, multi_label=multi_label)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
        if not (mixup or cutmix) or min(mixup, cutmix) < 0:
            raise ValueError(
                f"mixup={mixup} and cutmix={cutmix} are alphas of a Beta distribution: one or both must be above 0"
            )
        if not (0 < probability <= 1 and 0 <= switch <= 1):
            raise ValueError(
                f"probability must lie above 0 and at most at 1 and switch in 0..1, got {probability} and {switch}"
            )
        if mixup and cutmix and switch in (0, 1):
            unused = "cutmix" if switch == 0 else "mixup"
            raise ValueError(f"{unused} has no effect with switch={switch}; set {unused}=0 and leave switch out")
        self.switch = switch if mixup and cutmix else float(not mixup)
        self.probability = probability
        self.mode = mode
        self.mixup_share = BetaShare(mixup) if mixup else None
        self.cutmix_share = BetaShare(cutmix) if cutmix else None

    def forward(
        self,
        classify: Classify,
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        model: nn.Module | None = None,
        layers: Sequence[HiddenLayer] = (),
        std: Sequence[float] = (),
    ) -> Mixed:
        """As Mixing's; the images are mixed before they are classified."""
        images, own = self.mix(images, noise)
        targets = mix(self.soft_targets(labels), own)
        logits = classify(images)
        return Mixed(self.loss(logits, targets), logits, targets)

    def mix(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed images (B, C, H, W) and the share of its own label that each keeps, (B, 1) or (1, 1)."""
        drawn = (noise[:1] if self.mode == "batch" else noise).to(images.device, torch.float64)  # (1 or B, 5)
        mixed, cut, quantile = drawn[:, 0] < self.probability, drawn[:, 1] < self.switch, drawn[:, 2]
        share = torch.ones_like(quantile)
        if self.mixup_share is not None:
            share = torch.where(cut, share, self.mixup_share(quantile))
        own = share[:, None, None, None]  # of each pixel: (1 or B, 1, 1 or H, 1 or W)
        if self.cutmix_share is not None:
            size = (images.shape[2], images.shape[3])
            box = cut_box(self.cutmix_share(quantile), drawn[:, 3:5], size)
            inside = box_mask(box, size)  # (1 or B, 1, H, W)
            own = torch.where(cut[:, None, None, None], 1 - inside.to(own.dtype), own)
            share = torch.where(cut, box_share(box, size), share)
        own = torch.where(mixed[:, None, None, None], own, 1.0)
        share = torch.where(mixed, share, 1.0)
        return mix(images, own.to(images.dtype)), share[:, None].to(torch.float32)


class BetaShare(nn.Module):
    """Beta(alpha, alpha)'s quantile function, from a table: no library's random state, and no wait for the device.

    The table is of the lower half, the upper is its mirror image: x**min(alpha, 1) by the quantile to the power of
    1 / max(alpha, 1), which is nearly a straight line. It is right to 1e-6 for the alphas that are allowed.
    """

    table: Tensor

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if not 0.05 <= alpha <= 20:
            raise ValueError(f"alpha of a Beta distribution must lie in 0.05..20, got {alpha}; 1 is uniform")
        self.below, self.above = min(alpha, 1.0), max(alpha, 1.0)
        step = np.linspace(0, 0.5**self.below, 2**17 + 1)
        x = step ** (1 / self.below)
        # The integral of (x (1 - x))^(alpha - 1) dx over x = step^(1 / below), which is finite at 0.
        density = step ** (alpha / self.below - 1) * (1 - x) ** (alpha - 1)
        mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
        grid = np.linspace(0, 1, _QUANTILES + 1)
        table = np.interp(grid, (mass / mass[-1]) ** (1 / self.above), step)
        self.register_buffer("table", torch.from_numpy(table), persistent=False)

    def forward(self, uniform: Tensor) -> Tensor:
        """The share, float64, whose quantile each of the `uniform` numbers is."""
        uniform = uniform.to(torch.float64)
        upper = uniform > 0.5
        place = (2 * torch.where(upper, 1 - uniform, uniform)) ** (1 / self.above) * _QUANTILES
        cell = place.floor().clamp_(max=_QUANTILES - 1)
        x = torch.lerp(self.table[cell.long()], self.table[cell.long() + 1], place - cell) ** (1 / self.below)
        return torch.where(upper, 1 - x, x)


def soft_targets(labels: Tensor, num_classes: int, *, smoothing: float = 0.0) -> Tensor:
    """Class numbers (B,) as targets (B, C): 1 - smoothing at the class, and smoothing spread over all of them."""
    return functional.one_hot(labels, num_classes).to(torch.float32) * (1 - smoothing) + smoothing / num_classes


def mix(values: Tensor, own: Tensor) -> Tensor:
    """Each row i of `values` (B, ...) with a share `own`, and row B-1-i with the rest; `own` broadcasts."""
    return values * own + values.flip(0) * (1 - own)


def cut_box(share: Tensor, place: Tensor, size: tuple[int, int]) -> Tensor:
    """CutMix's boxes, int64 (N, 4) as top, bottom, left, right, in images of `size` (H, W).

    Each side is sqrt(1 - `share` (N,)) of the image's; the centre lies anywhere, by uniform `place` (N, 2), and what
    reaches beyond the edge is cut off (Yun et al. 2019, algorithm A1, with timm's rounding).
    """
    sides = []
    for axis, length in enumerate(size):
        cut = (length * torch.sqrt(1 - share)).floor()
        centre = (place[:, axis] * length).floor()
        sides += [centre - (cut / 2).floor(), centre + ((cut + 1) / 2).floor()]
        sides[-2:] = [side.clamp(0, length) for side in sides[-2:]]
    return torch.stack(sides, dim=1).long()


def box_share(box: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of the image, float64 (N,), that the boxes (N, 4) leave."""
    top, bottom, left, right = box.unbind(1)
    return 1 - ((bottom - top) * (right - left)).to(torch.float64) / (size[0] * size[1])


def box_mask(box: Tensor, size: tuple[int, int]) -> Tensor:
    """True inside of the boxes (N, 4): bool (N, 1, H, W)."""
    down, across = (torch.arange(length, device=box.device) for length in size)
    top, bottom, left, right = (side[:, None] for side in box.unbind(1))
    rows = (down >= top) & (down < bottom)  # (N, H)
    columns = (across >= left) & (across < right)  # (N, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]
