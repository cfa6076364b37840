"""`what=map`: the features in two dimensions, before and after training; as pictures and as a page with thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.look.drawing import figure_pixels, plot
from eval.look.estimate import LONG
from eval.look.labels import class_name, labelled, one_class
from eval.look.map_page import Panel, map_page
from eval.look.neighbours import backbones
from eval.look.projections import CAUTION, PROJECTIONS, TITLES, Projected, project, seconds_of
from eval.look.result import DoesNotApply, Look
from eval.look.samples import SampleFeatures
from eval.look.scene import Scene

COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadb")
"""Petroff 2021 (arXiv:2107.02270): ten colours that people tell apart with any of three colour-vision deficiencies."""
REST = "#c4c4c4"
MARKERS = "os^DvPX<>p"
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left",
           "triangle-right", "pentagon")  # fmt: skip
MOST_ON_PAGE = 4000
"""Images whose thumbnails the page holds."""


@dataclass(frozen=True)
class Groups:
    """What the colours mean: names of at most 10 groups of images and the number of each image's, (N,)."""

    names: list[str]
    number: np.ndarray
    rest: bool = False
    """Whether the last group is all that have no colour of their own, in gray."""

    def colour(self, group: int) -> str:
        return REST if self.rest and group == len(self.names) - 1 else COLOURS[group]


def look(scene: Scene) -> Look:
    """Maps of a sample's features, of the trained backbone beside the untrained one."""
    settings = scene.config.map
    names = list(dict.fromkeys(settings.projections))
    _check(settings, names)
    sample = scene.features()
    if len(sample) < 4:
        raise DoesNotApply(f"a map needs 4 images or more, there are {len(sample)}; give more sample=, or more data")
    found: dict[str, dict[str, Projected]] = {}
    features = {which: scene.features(model=network).features for which, network in reversed(backbones(scene).items())}
    for name in names:
        seconds = seconds_of(name, len(sample), len(features))
        if seconds > LONG:
            print(f"{TITLES[name]} of {len(sample):,} images, {len(features)} times: about {seconds:.0f} s", flush=True)
        found[name] = {
            which: project(
                rows,
                name,
                seed=scene.seed,
                perplexity=settings.perplexity,
                neighbours=settings.umap_neighbours,
            )
            for which, rows in features.items()
        }
    groups = grouped(sample.labels, scene.source(scene.split).classes)
    subject = f"{len(sample):,} images of {scene.split}"
    pictures = {
        name: _picture(subject, name, {scene.called(which): each for which, each in maps.items()}, groups)
        for name, maps in found.items()
    }
    page = _page(scene, sample, found, groups, subject)
    metrics = {
        f"{name}_trustworthiness_{which}": projected.facts["trustworthiness"]
        for name, each in found.items()
        for which, projected in each.items()
    }
    facts = {name: {which: projected.facts for which, projected in each.items()} for name, each in found.items()}
    data = {"split": scene.split, "images": len(sample), "projections": facts, "colours": groups.names}
    arrays = {f"{name}_{which}": projected.place for name, each in found.items() for which, projected in each.items()}
    arrays |= {"index": sample.index, "labels": sample.labels}
    lines = [
        f"{TITLES[name]} {scene.called(which)}: {each.summary}"
        for name, maps in found.items()
        for which, each in maps.items()
    ]
    lines += [f"{TITLES[name]}: {CAUTION[name]}" for name in found]
    lines.append(f"map.html shows each image where it lies; one file of {len(page.encode()) / 1e6:.1f} MB, offline")
    if not one_class(sample.labels):
        why = "several classes each" if labelled(sample.labels).any() else "no labels"
        lines.append(f"the images have {why}, so the maps are of one colour")
    return Look(pictures, data, arrays=arrays, metrics=metrics, lines=lines, pages={"": page})


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


def _check(settings: Any, names: list[str]) -> None:
    unknown = [name for name in names if name not in PROJECTIONS]
    if unknown or not names:
        raise ValueError(
            f"map.projections must name one or several of {', '.join(PROJECTIONS)}, got {list(settings.projections)}"
        )
    for key, name in (("perplexity", "tsne"), ("umap_neighbours", "umap")):
        if settings[key] is not None and name not in names:
            raise ValueError(f"map.{key} has no effect without {name} in map.projections; leave it out")
    if not 8 <= settings.thumbnail <= 128:
        raise ValueError(f"map.thumbnail must lie in 8..128 pixels, got {settings.thumbnail}")


def _picture(subject: str, name: str, panels: dict[str, Projected], groups: Groups) -> np.ndarray:
    """The maps side by side, with one legend below."""
    figure = plot(6.2 * len(panels), 6.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    size = float(np.clip(30_000 / len(groups.number), 6, 40))
    for axis, (which, projected) in zip(axes, panels.items()):
        order = range(len(groups.names))
        for group in reversed(order) if groups.rest else order:  # gray below
            own = projected.place[groups.number == group]
            axis.scatter(
                *own.T, s=size, c=groups.colour(group), marker=MARKERS[group], label=groups.names[group], linewidths=0
            )
        axis.set_title(f"{which}\n{projected.summary}", fontsize=11)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"{TITLES[name]} of {subject}\n{CAUTION[name]}", fontsize=11)
    if len(groups.names) > 1:
        handles, texts = axes[0].get_legend_handles_labels()
        place = dict(zip(texts, handles))
        legend = [place[text] for text in groups.names]
        figure.legend(
            legend, groups.names, loc="outside lower center", ncols=5, fontsize=10, markerscale=2, frameon=False
        )
    return figure_pixels(figure)


def _page(
    scene: Scene, sample: SampleFeatures, found: dict[str, dict[str, Projected]], groups: Groups, subject: str
) -> str:
    chosen = np.arange(len(sample))
    if len(sample) > MOST_ON_PAGE:
        chosen = np.unique(np.linspace(0, len(sample) - 1, MOST_ON_PAGE).round().astype(int))
        subject = f"{len(chosen):,} of {subject}"
    classes = scene.source(scene.split).classes
    panels = [
        Panel(TITLES[name], scene.called(which), projected.place[chosen], projected.summary, CAUTION[name])
        for name, each in found.items()
        for which, projected in each.items()
    ]
    return map_page(
        title=f"Map of {scene.title}",
        subject=subject,
        panels=panels,
        thumbnails=scene.thumbnails(scene.split, sample.index[chosen], scene.config.map.thumbnail),
        names=[sample.names[place] for place in chosen],
        labels=[class_name(sample.labels[place], classes) for place in chosen],
        groups=groups.names,
        number=groups.number[chosen],
        colours=[groups.colour(group) for group in range(len(groups.names))],
        symbols=SYMBOLS[: len(groups.names)],
    )
