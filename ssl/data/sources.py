"""What a set of images is to the loader and to the evaluation: an index to encoded bytes or pixels, and a label."""

from __future__ import annotations

import zlib
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
    """int64 (N,), `UNLABELLED` where there is none. Of multi-label sets multi-hot (N, C): 1 where an image has a class,
    a row of `UNLABELLED` where nobody has said which it has."""
    classes: list[str] | None
    """Class names in the order of their labels, or columns; None where no image has one."""
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


def checksum(source: Source) -> int:
    """CRC-32 over eight images spread evenly: tells a set that was moved from another one.

    Of a streamed source over the sizes of its groups, because each of eight images may take a group's read.
    """
    groups = getattr(source, "groups", None)
    if groups is not None:
        return groups.checksum()
    crc = 0
    for index in np.linspace(0, len(source) - 1, 8).astype(int).tolist():
        try:
            data = source.read(index)
        except (OSError, ValueError):
            continue  # the loader replaces it
        crc = zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes(), crc)
    return crc
