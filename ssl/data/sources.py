"""What a set of images is to the loader and to the evaluation: an index to encoded bytes or pixels, and a label."""

from __future__ import annotations

from typing import Protocol

import numpy as np

UNLABELLED = -1
SPLITS = ("train", "test")


class NoTestSplit(ValueError):
    """The images have no labelled test split: one may be held out of train instead."""


class Source(Protocol):
    """Images by index. Reading is thread safe, and an index means the same image in every process and every run."""

    name: str
    """For messages, such as `folder /data/photos (train)`."""
    labels: np.ndarray
    """int64 (N,), `UNLABELLED` where there is none."""
    classes: list[str] | None
    """Class names in the order of their labels; None where no image has one."""
    num_ignored: int
    """Files that are no images and were left out; 0 where that has no meaning."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """Encoded bytes for `decode`, or pixels as uint8 (H, W, C)."""
        ...

    def describe(self, index: int) -> str:
        """The file's path, or the table's row, for messages."""
        ...


def check_split(split: str) -> str:
    """Return `split`; ValueError unless it is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split
