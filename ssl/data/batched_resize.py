"""Crops of many small images of one size, resized at once as torch's antialiased interpolate resizes each."""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from torch import Tensor

from ssl.data.recycled import Recycled

LARGEST_TABLE = 2**21  # numbers in the taps of all parts of a side, 8 MiB


def crop_resize_batch(
    pixels: Tensor, box: Tensor, size: tuple[int, int], *, interpolation: str, into: Tensor | None = None
) -> Tensor:
    """Crop and resize uint8 images (B, C, H, W) with one `box` (B, 4) each to uint8 (B, C, h, w), `into` where given.

    Equal to torch's antialiased interpolate of each crop to one level: along the width, then the height, each line of
    the result is a weighted sum of a few lines of the image, which is what torch's embedding bags are fast at. Fastest
    where `pixels` lie in memory as those of `empty_images`.
    """
    num, channels, height, width = pixels.shape
    h, w = size
    lines = _scratch.take("pixels", num, width, channels, height).copy_(pixels.permute(0, 3, 1, 2))
    taps = _taps(box[:, 1], box[:, 3], source=width, target=w, interpolation=interpolation)
    columns = _weighted_sums(lines.view(num * width, channels * height), *taps)  # (B*w, C*H)
    if interpolation == "bicubic":
        columns.clamp_(0, 255)  # torch's uint8 path stores a uint8 between the passes
    lines = _scratch.take("turned", num, height, channels, w)
    lines.copy_(columns.view(num, w, channels, height).permute(0, 3, 2, 1))
    taps = _taps(box[:, 0], box[:, 2], source=height, target=h, interpolation=interpolation)
    rows = _weighted_sums(lines.view(num * height, channels * w), *taps).add_(0.5)  # (B*h, C*w), about to be cut off
    if interpolation == "bicubic":
        rows.clamp_(0, 255)
    whole = rows.numpy().astype(np.uint8).reshape(num, h, channels, w)  # numpy's cast takes a quarter of torch's time
    into = torch.empty(num, channels, h, w, dtype=torch.uint8) if into is None else into
    return into.copy_(torch.from_numpy(whole).transpose(1, 2))


def _weighted_sums(lines: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """Sums of `lines` (B*source, D) at `place` (B, target, T) in their image, times `weight` (B, target, T).

    Returns (B*target, D).
    """
    num, target, taps = place.shape
    first = torch.arange(0, len(lines), len(lines) // num, dtype=place.dtype)[:, None, None]  # (B, 1, 1)
    index, starts = (place + first).view(-1), torch.arange(0, num * target * taps, taps, dtype=place.dtype)
    # functional.embedding_bag's own checks take as long as a fifth of the sums
    return torch.embedding_bag(lines, index, starts, False, 0, False, weight.reshape(-1))[0]


def _taps(start: Tensor, length: Tensor, *, source: int, target: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """`resize_taps`, picked out of those of all parts where these are not too many."""
    if source**2 * target * num_taps(source, target, interpolation) > LARGEST_TABLE:
        return resize_taps(start, length, source=source, target=target, interpolation=interpolation)
    part = start * source + (length - 1)
    place, weight = _taps_of_all_parts(source, target, interpolation)
    return place.index_select(0, part), weight.index_select(0, part)


@functools.lru_cache(maxsize=4)
def _taps_of_all_parts(source: int, target: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """`resize_taps` of every part [start, start + length), at start * source + length - 1."""
    part = torch.arange(source * source)
    return resize_taps(
        part // source, part % source + 1, source=source, target=target, interpolation=interpolation
    )  # fmt: skip


class _Scratch(threading.local):
    """Float memory that a thread uses again: at 32 pixels fresh pages cost more than what is written to them."""

    shared = Recycled()  # what threads that have ended leave

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, use: str, *shape: int) -> Tensor:
        """Uninitialised, float32 of `shape`, until the same `use` is taken again."""
        num = math.prod(shape)
        if use not in self.kept or self.kept[use].numel() < num:
            self.kept[use] = self.shared.empty((num,), torch.float32)
        return self.kept[use][:num].view(shape)


_scratch = _Scratch()


SUPPORT = {"bilinear": 1, "bicubic": 2}  # pixels to each side that a filter reaches, where the image does not shrink


def num_taps(source: int, target: int, interpolation: str) -> int:
    """How many of up to `source` pixels a pixel of `target` is made of at most. Raises ValueError."""
    if interpolation not in SUPPORT:
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
    return math.ceil(2 * SUPPORT[interpolation] * max(source / target, 1))


def resize_taps(
    start: Tensor, length: Tensor, *, source: int, target: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """Antialiased resampling of `source` pixels' part [start, start + length) (B,) to `target` pixels.

    Returns the pixels that each is made of, int32 (B, target, T), and their weights, float32 of the same shape. The
    filters are those of torch's `interpolate(antialias=True)`: a triangle, or Keys' cubic with a = -0.5, widened by the
    scale where the image shrinks, cut at the crop's edge and normalised.
    """
    taps = torch.arange(num_taps(source, target, interpolation))  # (T,)
    start, length = start[:, None, None], length[:, None, None]  # (B, 1, 1)
    scale = length.float() / target
    widened = scale.clamp(min=1)
    centre = start + scale * (torch.arange(target)[:, None] + 0.5)  # (B, target, 1)
    first = (centre - SUPPORT[interpolation] * widened + 0.5).floor().long()
    place = first + taps  # (B, target, T)
    distance = (place + 0.5).sub_(centre).div_(widened).abs_()
    if interpolation == "bilinear":
        weight = distance.neg_().add_(1).clamp_(min=0)
    else:
        # Keys' cubic without a branch: (p - 1) p^2 / 2 + (1 - 2 q) q^2 with p = max(2 - d, 0) and q = max(1 - d, 0).
        far, near = (2 - distance).clamp_(min=0), (1 - distance).clamp_(min=0)
        weight = (far - 1).mul_(0.5).mul_(far).mul_(far)
        weight += (1 - 2 * near).mul_(near).mul_(near)
    weight *= (place >= start) & (place < start + length)
    place = torch.minimum(torch.maximum(place, start), start + length - 1)
    return place.int(), weight.div_(weight.sum(dim=2, keepdim=True))
