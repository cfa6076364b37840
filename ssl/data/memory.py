"""A whole decoded image set held in memory, and crops of it made batch-wise."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl.data.bad_images import BadList
from ssl.data.batched_resize import crop_resize_batch
from ssl.data.decode import crop_resize_into
from ssl.data.reader import UNREADABLE, OtherSize, Reader
from ssl.data.stream import groups_of
from ssl.data.threads import Crew, ShouldStop

if TYPE_CHECKING:
    from ssl.data.sources import Source

log = logging.getLogger(__name__)

NUM_SAMPLED = 256
CHUNK = 32
# Per image, on one core: 3 us against 14 us for an interpolate call at 32 x 32, 13 us against 20 us at 64 x 64.
LARGEST_BATCHED = 64 * 64
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
            for slot, place in enumerate(index):
                crop_resize_into(out[slot], self.image(int(place)), tuple(box[slot].tolist()), interpolation)

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
