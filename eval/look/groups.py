"""The colours and signs of classes on a map, for up to ten of them, and the dots that carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.look.labels import class_name, labelled, one_class

COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadb")
"""Petroff 2021 (arXiv:2107.02270): ten colours that people tell apart with any of three colour-vision deficiencies."""
REST = "#c4c4c4"
MARKERS = "os^DvPX<>p"
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left",
           "triangle-right", "pentagon")  # fmt: skip
LONGEST_NAME = 28
"""Letters of a class in a legend."""


@dataclass(frozen=True)
class Groups:
    """What the colours mean: names of at most 10 groups of images and the number of each image's, (N,)."""

    names: list[str]
    number: np.ndarray
    rest: bool = False
    """Whether the last group is all that have no colour of their own, in gray."""

    def colour(self, group: int) -> str:
        return REST if self.rest and group == len(self.names) - 1 else COLOURS[group]


def grouped(labels: np.ndarray, classes: Sequence[str] | None) -> Groups:
    """One group for each class of up to 10; of more the 9 most frequent, and the rest. Images without a label are rest.

    Without labels of one class each, a single group.
    """
    if not one_class(labels):
        return Groups(["images"], np.zeros(len(labels), np.int64))
    values, counts = np.unique(labels[labelled(labels)], return_counts=True)
    unlabelled = bool((~labelled(labels)).any())
    room = len(COLOURS) - unlabelled
    kept = values if len(values) <= room else np.sort(values[np.argsort(-counts, kind="stable")[: len(COLOURS) - 1]])
    names = [str(class_name(value, classes)) for value in kept]
    number = np.searchsorted(kept, labels).clip(max=len(kept) - 1)
    number = np.where(kept[number] == labels, number, len(kept))  # (N,)
    if not (number == len(kept)).any():
        return Groups(names, number)
    others = len(values) - len(kept)
    parts = ([f"{others} other classes"] if others else []) + (["no label"] if unlabelled else [])
    return Groups([*names, ", ".join(parts)], number, rest=True)


def scatter(axis: Any, place: np.ndarray, groups: Groups, *, size: float) -> None:
    """Dots of `size` square points at `place` (N, 2), gray ones lowest; a distance is as long upwards as sideways."""
    order = range(len(groups.names))
    for group in reversed(order) if groups.rest else order:
        own = place[groups.number == group]
        name = groups.names[group][:LONGEST_NAME].replace("$", r"\$")  # else matplotlib reads formulas
        axis.scatter(*own.T, s=size, c=groups.colour(group), marker=MARKERS[group], label=name, linewidths=0)
    axis.set_aspect("equal", adjustable="datalim")


def legend(axis: Any, groups: Groups) -> tuple[list[Any], list[str]]:
    """What matplotlib's legend takes, signs and names, in the groups' order."""
    signs, names = axis.get_legend_handles_labels()
    return (signs[::-1], names[::-1]) if groups.rest else (signs, names)
