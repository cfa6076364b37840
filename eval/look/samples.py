"""Some images of a split: those that are looked at, and those whose features are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.look.labels import class_name
from ssl.data.sources import Source
from ssl.data.subset import Subset, limit

MOST_SHOWN = 256
"""Images that can be looked at one by one: a row of pictures each."""


@dataclass(frozen=True)
class Shown:
    """The few images to look at, in their central view."""

    index: np.ndarray
    """(B,) in the split, or in the list of images that a person named."""
    image: Tensor
    """(B, C, h, w) float32, normalised, on the device."""
    pixels: np.ndarray
    """uint8 (B, h, w, 3)."""
    labels: np.ndarray
    """(B,), -1 where there is none; of multi-label sets (B, C)."""
    names: list[str]
    classes: list[str] | None

    def __len__(self) -> int:
        return len(self.index)

    def truth(self, place: int) -> str | None:
        """The name of the class of the image at `place`, of several joined by commas; None where nobody said."""
        return class_name(self.labels[place], self.classes)


@dataclass(frozen=True)
class SampleFeatures:
    """Features of a seeded sample of a split, in its order without the images that could not be decoded."""

    features: Tensor
    """(N, D) float32 on the CPU."""
    index: np.ndarray
    """(N,) in the split."""
    labels: np.ndarray
    """(N,), -1 where there is none; of multi-label sets (N, C)."""
    names: list[str]
    num_bad: int

    def __len__(self) -> int:
        return len(self.index)


def sample_index(source: Source, num: int, seed: int) -> np.ndarray:
    """`num` indices into `source`, sorted, seeded and spread over its classes; all where it has no more."""
    chosen = limit(source, num, seed=seed)
    return chosen.indices if isinstance(chosen, Subset) and chosen is not source else np.arange(len(source))
