"""Some of a source's images: a limit on their number, or a slice held out."""

from __future__ import annotations

import numpy as np

from ssl.data.sources import Source
from ssl.data.stream import groups_of
from ssl.randomness import uniforms


class Subset:
    """The images of `source` at `indices`, in that order; of a streamed source in its own.

    Raises ValueError for indices that it does not have.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.indices = np.asarray(indices, np.int64)  # (N,)
        if self.indices.ndim != 1 or not self.indices.size:
            raise ValueError(f"a subset of {source.name} needs a list of at least one index, got {self.indices.shape}")
        if self.indices.min() < 0 or self.indices.max() >= len(source):
            raise ValueError(
                f"indices into {source.name} must lie in 0..{len(source) - 1}, "
                f"got {self.indices.min()}..{self.indices.max()}"
            )
        self.source = source
        self.name = f"{source.name}, {len(self.indices)} of {len(source)}"
        self.labels = source.labels[self.indices]
        self.classes = source.classes
        self.num_ignored = source.num_ignored
        groups = groups_of(source)
        self.groups = None if groups is None else groups.subset(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.indices[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


def limit(source: Source, count: int | None, seed: int = 0) -> Source:
    """`count` images of `source`, seeded and balanced over its classes; `source` itself where it has no more.

    A larger count with the same seed keeps the images of a smaller one. Raises ValueError for counts below 1.
    """
    if count is None:
        return source
    if count < 1:
        raise ValueError(f"data.limit must be at least 1 image, got {count}; leave it out to use all {len(source)}")
    if count >= len(source):
        return source
    order, rank, _ = ranks_by_class(source.labels, seed, "limit")
    balanced = order[np.argsort(rank[order], kind="stable")]  # each prefix holds equally many of each class
    return Subset(source, np.sort(balanced[:count]))


def limit_note(source: Source, count: int | None) -> str | None:
    """What to say where `count` is more than there are: that `limit` then takes all of `source`."""
    if count is None or count <= len(source):
        return None
    return f"data.limit={count:,}, but there are {len(source):,} images: all are taken"


def split_held_out(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held_out): `fraction` of each class is held out, at least one image of each class of two.

    Raises ValueError for fractions outside (0, 1) and where nothing would be held out or kept.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    _, rank, size = ranks_by_class(labels, seed, "held out")  # (N,) each
    number = np.where(size > 1, np.clip(np.round(fraction * size), 1, np.maximum(size - 1, 1)), 0)
    out = rank < number
    if not out.any() or out.all():
        raise ValueError(
            f"cannot hold out {fraction} of {len(rank)} images in {(rank == 0).sum()} classes: "
            "at least one class needs two images or more"
        )
    return np.flatnonzero(~out), np.flatnonzero(out)


def ranks_by_class(labels: np.ndarray, seed: int, use: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random order of the images, each one's place in it among those of its class, and the size of its class.

    (N,) each. The order is a function of (seed, use, index). Of multi-label images see `strata`.
    """
    values = strata(labels)
    order = np.argsort(uniforms(seed, 0, np.arange(len(values)), use, 1)[:, 0], kind="stable")
    by_class = order[np.argsort(values[order], kind="stable")]  # random within each class, classes one behind another
    values = values[by_class]
    first = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])  # where each class begins
    sizes = np.diff(np.r_[first, len(values)])
    rank, size = np.empty((2, len(values)), np.int64)
    rank[by_class] = np.arange(len(values)) - np.repeat(first, sizes)
    size[by_class] = np.repeat(sizes, sizes)
    return order, rank, size


def strata(labels: np.ndarray) -> np.ndarray:
    """The one class (N,) by which each image is balanced: its label, of several the one that fewest images have.

    Multi-hot labels (N, C) without a class form a class of their own, C. So each class of a multi-label set, the rare
    ones above all, is shared out in proportion.
    """
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return labels
    count = np.where(labels > 0, (labels > 0).sum(0), len(labels) + 1)  # (N, C)
    return np.where((labels > 0).any(1), count.argmin(1), labels.shape[1])
