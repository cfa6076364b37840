"""A few labelled images of each class, drawn by a seed."""

from __future__ import annotations

import re

import numpy as np

from ssl.data.subset import ranks_by_class

_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def draw(labels: np.ndarray, amount: str | int, *, seed: int) -> np.ndarray:
    """Sorted indices of `amount` images of each class: a share such as "1%", at least one image, or a number.

    All images of a class that has no more. A larger amount with the same seed keeps the images of a smaller one.
    `labels` are (N,), or (N, C) multi-hot, where an image counts for its rarest class. Raises ValueError for other
    amounts, and for one that leaves nothing to draw because it takes every image.
    """
    labels = np.asarray(labels)
    if not len(labels):
        raise ValueError(f"there are no images to draw {amount} of each class from")
    share, count = parse(amount)
    _, rank, size = ranks_by_class(labels, seed, "low shot")  # (N,) each
    wanted = np.full(len(size), count) if share is None else np.maximum(np.round(share * size), 1)
    drawn = np.flatnonzero(rank < wanted)
    if len(drawn) == len(labels):
        raise ValueError(
            f"{amount} of each class is all of the {len(labels)} images, the largest class has {size.max()}: nothing "
            "is drawn; give less, or leave the setting out"
        )
    return drawn


def parse(amount: str | int) -> tuple[float | None, int]:
    """(share of each class, 0) or (None, number of each class); ValueError for anything else."""
    percent = _PERCENT.fullmatch(str(amount).strip())
    if percent and 0 < float(percent[1]) < 100:
        return float(percent[1]) / 100, 0
    if str(amount).strip().isdecimal() and int(amount) > 0:
        return None, int(amount)
    raise ValueError(
        f"{amount!r} is no amount of images per class; give a share between 0% and 100%, such as 1% or 10%, or a "
        "number of 1 or more"
    )
