"""Labels of the images that are looked at: which images have one, what it is called, which of them agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl.data.sources import UNLABELLED


def labelled(labels: np.ndarray) -> np.ndarray:
    """Which images (N,) somebody has labelled; labels (N,), or multi-hot (N, C)."""
    return labels != UNLABELLED if labels.ndim == 1 else (labels != UNLABELLED).all(1)


def one_class(labels: np.ndarray) -> bool:
    """Whether each labelled image has one class, and some image has a label."""
    return labels.ndim == 1 and bool(labelled(labels).any())


def in_classes_of(labels: np.ndarray, names: Sequence[str] | None, wanted: Sequence[str] | None) -> np.ndarray:
    """Labels that number the classes `names`, as those of `wanted` number them; of a class that is not there, none."""
    if names is None or wanted is None or list(names) == list(wanted):
        return labels
    place = {name: number for number, name in enumerate(wanted)}
    there = np.array([place.get(name, UNLABELLED) for name in names] + [UNLABELLED])  # (C+1,); -1 stays -1
    if labels.ndim == 1:
        return there[labels]
    moved = np.zeros((len(labels), len(wanted)), labels.dtype)
    known = np.flatnonzero(there[:-1] >= 0)
    moved[:, there[known]] = labels[:, known]
    moved[~labelled(labels)] = UNLABELLED
    return moved


def agree(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether labels (M,) and those of k other images each, (M, k), have a class in common: bool (M, k).

    Multi-hot they are (M, C) and (M, k, C). An image without a label agrees with none.
    """
    if labels.ndim == 1:
        return np.logical_and(labels[:, None] == others, labels[:, None] != UNLABELLED)
    return np.any((labels[:, None] > 0) & (others > 0), axis=-1)


def class_name(label: int | np.ndarray, classes: Sequence[str] | None) -> str | None:
    """What a label, or a multi-hot row, is called; None where there is none."""
    if np.ndim(label):
        return ", ".join(_name(int(each), classes) for each in np.flatnonzero(np.asarray(label) > 0)) or None
    return None if label == UNLABELLED else _name(int(label), classes)


def _name(label: int, classes: Sequence[str] | None) -> str:
    return classes[label] if classes is not None and label < len(classes) else str(label)
