"""Pairs of duplicates: of candidates those whose pictures look alike, laid over each other (`eval.look.aligned`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.look.aligned import COLOURS, SIDE, align, colour_agreement, luma, structure
from eval.look.scene import Scene
from ssl.data.decode import crop_resize
from ssl.data.reader import UNREADABLE, Reader
from ssl.data.sources import Source
from ssl.data.threads import available_cores

READ_AT_ONCE = 512


@dataclass(frozen=True)
class Pool:
    """The images of all splits that are compared, one split behind another: N images."""

    split: np.ndarray
    """(N,) names of splits."""
    index: np.ndarray
    """(N,) in the split."""
    names: list[str]
    labels: np.ndarray
    """(N,), or multi-hot (N, C), as train numbers them."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of images that are duplicates: places in the pool, the first before the second."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    """Cosine of their features."""
    correlation: np.ndarray
    """Of the aligned pictures' structure."""
    colours: np.ndarray
    """How well the aligned pictures' colours agree, 1 the best."""
    mirrored: np.ndarray
    exact: np.ndarray
    """Whether all pixels are equal."""

    def __len__(self) -> int:
        return len(self.first)

    def kind(self, pair: int) -> str:
        """`exact`, `mirrored` or `near`."""
        return "exact" if self.exact[pair] else "mirrored" if self.mirrored[pair] else "near"

    def chosen(self, which: np.ndarray) -> Pairs:
        """The pairs that `which`, a mask or places, names."""
        return Pairs(*(getattr(self, each)[which] for each in Pairs.__dataclass_fields__))


@dataclass(frozen=True)
class SmallPictures:
    """Whole images made small, uint8 (n, C, 32, 32); a digest of the pixels of each, None of those not decodable."""

    pixels: Tensor
    digest: list[bytes | None]


def read_small(source: Source, index: np.ndarray, *, channels: int, threads: int | None = None) -> SmallPictures:
    """The images of `source` at `index` (n,), sorted, made small without regard to their shape."""
    reader = Reader(source, channels=channels)
    pixels = torch.zeros(len(index), channels, SIDE, SIDE, dtype=torch.uint8)
    digest: list[bytes | None] = [None] * len(index)

    def read(slots: Iterable[int]) -> None:
        for slot in slots:
            number = int(index[slot])
            try:
                data, size = reader.open(number)
                image = reader.decode(number, data, size)
            except UNREADABLE:
                continue
            image = np.ascontiguousarray(image)
            digest[slot] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
            pixels[slot] = torch.from_numpy(crop_resize(image, (0, 0, *size), (SIDE, SIDE), "bilinear"))

    with ThreadPoolExecutor(threads or available_cores()) as pool:
        list(pool.map(read, parts(len(index), READ_AT_ONCE)))
    return SmallPictures(pixels, digest)


def parts(num: int, size: int) -> list[range]:
    """The numbers 0..num in runs of `size`."""
    return [range(start, min(start + size, num)) for start in range(0, num, size)]


def compare(
    pictures: SmallPictures, first: np.ndarray, second: np.ndarray, *, flip: bool, least: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For pairs of places in `pictures` (P,): correlation of structure, agreement of colours, whether mirrored,
    whether all pixels are equal. Colours of pairs that correlate less than `least` are left at 0.
    """
    correlation, colours = np.zeros(len(first), np.float32), np.zeros(len(first), np.float32)
    mirrored = np.zeros(len(first), bool)
    for each in parts(len(first), READ_AT_ONCE):
        part = slice(each.start, each.stop)
        one, two = (pictures.pixels[places[part]].float() / 255 for places in (first, second))  # (B, C, 32, 32)
        found = align(structure(luma(one)), structure(luma(two)), flip=flip)
        correlation[part], mirrored[part] = found.correlation.numpy(), found.mirrored.numpy()
        alike = (found.correlation >= least).nonzero()[:, 0]  # (p,)
        colours[each.start + alike.numpy()] = colour_agreement(one[alike], two[alike], found.chosen(alike)).numpy()
    digest = pictures.digest
    exact = np.array([digest[a] is not None and digest[a] == digest[b] for a, b in zip(first, second)], bool)
    return correlation, colours, mirrored, exact


def confirmed(scene: Scene, pool: Pool, first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> Pairs:
    """The candidates whose pictures are equal, or correlate and agree in their colours."""
    settings = scene.config.duplicates
    used = np.unique(np.concatenate([first, second]))  # (n,) in the pool, so by split and by index
    of_splits = [
        read_small(
            scene.source(split),
            pool.index[used[pool.split[used] == split]],
            channels=scene.channels,
            threads=scene.config.threads,
        )
        for split in dict.fromkeys(pool.split.tolist())
    ]
    pixels = torch.cat([each.pixels for each in of_splits])  # (n, C, 32, 32)
    pictures = SmallPictures(pixels, [digest for each in of_splits for digest in each.digest])
    one, two = np.searchsorted(used, first), np.searchsorted(used, second)
    correlation, colours, mirrored, exact = compare(pictures, one, two, flip=settings.flip, least=settings.correlation)
    every = Pairs(first, second, similarity, correlation, colours, mirrored & ~exact, exact)
    return every.chosen(exact | ((correlation >= settings.correlation) & (colours >= COLOURS)))
