"""Which size the images of a run have."""

from __future__ import annotations

from typing import Any

from ssl.data.memory import common_size
from ssl.data.sources import Source

LARGEST_NATIVE = 96
DEFAULT = 224


def as_size(given: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of an int or a pair; None for None. Raises ValueError for anything else."""
    if given is None:
        return None
    pair = [given, given] if isinstance(given, int) else list(given) if isinstance(given, list | tuple) else []
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"data.image_size is one size in pixels or [height, width], got {given!r}")
    return pair[0], pair[1]


def choose_image_size(given: Any, source: Source) -> tuple[int, int]:
    """(height, width) in pixels: `given` (an int or a pair), else the images' own size where all agree and it is at
    most 96, else 224.

    Sizes are compared over an evenly spread sample. Raises ValueError on anything but one or two positive integers.
    """
    size = as_size(given)
    if size is not None:
        return size
    own = common_size(source)
    return own if own is not None and max(own) <= LARGEST_NATIVE else (DEFAULT, DEFAULT)
