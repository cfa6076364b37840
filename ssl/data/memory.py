"""A whole decoded image set held in memory, and crops of it made batch-wise."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl.data.bad_images import BadList
from ssl.data.decode import crop_resize
from ssl.data.reader import UNREADABLE, OtherSize, Reader
from ssl.data.recycled import Recycled
from ssl.data.stream import groups_of
from ssl.data.threads import Crew, ShouldStop

if TYPE_CHECKING:
    from ssl.data.sources import Source

log = logging.getLogger(__name__)

NUM_SAMPLED = 256
CHUNK = 32
# Per image, on one core: 3 us against 14 us for an interpolate call at 32 x 32, 13 us against 20 us at 64 x 64.
LARGEST_BATCHED = 64 * 64
LARGEST_TABLE = 2**21  # numbers in the taps of all parts of a side, 8 MiB
BLOCK = 3 * 2**17  # bytes of images resized at once: what is made of more falls out of a core's cache


class TooLarge(Exception):
    """The decoded set does not fit in the memory it was given."""


class SizesDiffer(Exception):
    """An image has another size than the sample of sizes promised."""


def sample_sizes(source: Source, *, num: int = NUM_SAMPLED) -> np.ndarray:
    """(height, width) of up to `num` images spread evenly, int64 (n, 2); unreadable ones are left out.

    Of a streamed source the images of two groups, because each is read whole.
    """
    reader, groups = Reader(source, channels=3), groups_of(source)
    spread = np.unique(np.linspace(0, len(source) - 1, min(num, len(source))).astype(np.int64))
    sizes = []
    for index in spread if groups is None else groups.sample(num):
        try:
            sizes.append(reader.open(int(index))[1])
        except UNREADABLE:
            continue
    return np.array(sizes, np.int64).reshape(-1, 2)


def common_size(source: Source) -> tuple[int, int] | None:
    """(height, width) where all images of an evenly spread sample agree, else None."""
    sizes = sample_sizes(source)
    if len(sizes) == 0 or (sizes != sizes[0]).any():
        return None
    return int(sizes[0, 0]), int(sizes[0, 1])


class MemoryImages:
    """Decoded images: uint8 (N, C, H, W) where all sizes agree, else one flat uint8 array of (H, W, C) images."""

    def __init__(self, pixels: np.ndarray, *, sizes: np.ndarray, channels: int):
        self.pixels = pixels
        self.channels = channels
        self.equal = pixels.ndim == 4
        self._sizes = sizes  # (N, 2), or (1, 2) where all agree
        if not self.equal:
            self._offsets = offsets(sizes, channels)

    @property
    def num_bytes(self) -> int:
        return self.pixels.nbytes

    def sizes(self, index: np.ndarray) -> np.ndarray:
        """(height, width) of each image, int64 (B, 2)."""
        return np.broadcast_to(self._sizes, (len(index), 2)) if self.equal else self._sizes[index]

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, C), without a copy."""
        if self.equal:
            return self.pixels[index].transpose(1, 2, 0)
        height, width = self._sizes[index]
        return self.pixels[self._offsets[index] : self._offsets[index + 1]].reshape(height, width, self.channels)

    def crop(self, index: np.ndarray, box: np.ndarray, out: Tensor, *, interpolation: str) -> None:
        """Write each image's `box` (B, 4: top, left, height, width), resized, into `out` uint8 (B, C, h, w)."""
        h, w = out.shape[-2:]
        if self.equal and (box == (0, 0, h, w)).all() and self.pixels.shape[-2:] == (h, w):
            for part in self._blocks(len(index)):
                out[part] = self._taken(index[part])
        elif self.equal and is_batched(self.pixels.shape[-2:]):
            for part in self._blocks(len(index)):
                boxes = torch.from_numpy(box[part])
                crop_resize_batch(self._taken(index[part]), boxes, (h, w), interpolation=interpolation, into=out[part])
        else:
            into = out.numpy()
            for slot, place in enumerate(index):
                into[slot] = crop_resize(self.image(int(place)), tuple(box[slot].tolist()), (h, w), interpolation)

    def _blocks(self, num: int) -> Iterator[slice]:
        size = max(BLOCK // self.pixels[0].size, 1)
        yield from (slice(start, start + size) for start in range(0, num, size))

    def _taken(self, index: np.ndarray) -> Tensor:
        """Images (B, C, H, W), in memory as they are held."""
        if is_batched(self.pixels.shape[-2:]):
            return torch.from_numpy(self.pixels.transpose(0, 3, 1, 2)[index]).permute(0, 2, 3, 1)
        return torch.from_numpy(self.pixels[index])


def is_batched(size: Sequence[int]) -> bool:
    """Whether images of this (height, width) are resized many at once, which larger ones gain nothing from."""
    return size[0] * size[1] <= LARGEST_BATCHED


def empty_images(num: int, channels: int, size: Sequence[int]) -> np.ndarray:
    """Uninitialised uint8 of the logical shape (N, C, H, W); in memory the axis that is resized first stands first."""
    height, width = size
    if is_batched(size):
        return np.empty((num, width, channels, height), np.uint8).transpose(0, 2, 3, 1)
    return np.empty((num, height, width, channels), np.uint8).transpose(0, 3, 1, 2)


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


def hold(source: Source, *, channels: int, limit_gib: float, num_threads: int, bad: BadList) -> MemoryImages | None:
    """Decode the whole source into memory, or return None where that takes more than `limit_gib`.

    The size is estimated from a sample of the images' headers first, so a set that is far too large costs little.
    Raises BadImages.
    """
    limit = int(limit_gib * 2**30)
    sampled = sample_sizes(source) if limit > 0 else np.zeros((0, 2), np.int64)
    if len(sampled) == 0 or sampled.prod(axis=1).mean() * channels * len(source) > limit:
        return None
    log.info("decoding %d images into memory", len(source))
    reader = Reader(source, channels=channels)
    try:
        if (sampled == sampled[0]).all():
            try:
                return _hold_equal(reader, sampled[0], num_threads=num_threads, bad=bad)
            except SizesDiffer:
                pass
        return _hold_ragged(reader, limit=limit, num_threads=num_threads, bad=bad)
    except TooLarge:
        return None


def offsets(sizes: np.ndarray, channels: int) -> np.ndarray:
    """Where each image (height, width) begins in the flat array, and where the last one ends, int64 (N + 1,)."""
    return np.concatenate(([0], np.cumsum(sizes.prod(axis=1) * channels)))


def _hold_equal(reader: Reader, size: np.ndarray, *, num_threads: int, bad: BadList) -> MemoryImages:
    """Decode straight into one array. Raises SizesDiffer at the first image of another size."""
    height, width = size.tolist()
    pixels = empty_images(len(reader.source), reader.channels, (height, width))

    def keep(index: int) -> None:
        try:  # without a look at the header first, which takes a third of a small PNG's time
            image = reader.decode(index, reader.read(index), (height, width))
        except OtherSize:
            raise SizesDiffer from None
        pixels[index] = image.transpose(2, 0, 1)

    _for_each(keep, reader, num_threads=num_threads, bad=bad)
    return MemoryImages(pixels, sizes=size[None], channels=reader.channels)


def _hold_ragged(reader: Reader, *, limit: int, num_threads: int, bad: BadList) -> MemoryImages:
    """Read all sizes, then decode into one flat array. Raises TooLarge as soon as the sizes sum up to it."""
    sizes = np.zeros((len(reader.source), 2), np.int64)
    lock, total = threading.Lock(), 0

    def measure(index: int) -> None:
        nonlocal total
        sizes[index] = size = reader.open(index)[1]
        with lock:
            total += size[0] * size[1] * reader.channels
            if total > limit:
                raise TooLarge

    _for_each(measure, reader, num_threads=num_threads, bad=bad)
    memory = MemoryImages(
        np.empty(int(sizes.prod(axis=1).sum()) * reader.channels, np.uint8), sizes=sizes, channels=reader.channels
    )

    def keep(index: int) -> None:
        memory.image(index)[:] = reader.decode(index, *reader.open(index))

    _for_each(keep, reader, num_threads=num_threads, bad=bad)
    return memory


class _ForEach:
    """A job that calls `action` with every image that is not known to be bad, and lists those that it fails on."""

    def __init__(self, action: Callable[[int], None], reader: Reader, bad: BadList):
        size = len(reader.source)
        self.chunks: Sequence[tuple[int, int]] = [(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
        self.action, self.reader, self.bad = action, reader, bad

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        for index in range(start, stop):
            if should_stop():
                return
            if index in self.bad.messages:
                continue
            try:
                self.action(index)
            except UNREADABLE as error:
                self.bad.add(index, error)

    def finish(self) -> None:
        return None


def _for_each(action: Callable[[int], None], reader: Reader, *, num_threads: int, bad: BadList) -> None:
    with Crew(num_threads) as crew:
        crew.wait(crew.submit(_ForEach(action, reader, bad)))
