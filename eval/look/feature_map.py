"""`what=map`: the features in two dimensions, before and after training; as pictures and as a page with thumbnails."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.look.drawing import figure_pixels, plot
from eval.look.estimate import LONG
from eval.look.groups import SYMBOLS, Groups, grouped, legend, scatter
from eval.look.labels import class_name, labelled, one_class
from eval.look.map_page import Panel, map_page
from eval.look.neighbours import backbones
from eval.look.projections import CAUTION, PROJECTIONS, TITLES, Projected, project, seconds_of
from eval.look.result import DoesNotApply, Look
from eval.look.samples import SampleFeatures
from eval.look.scene import Scene

MOST_ON_PAGE = 4000
"""Images whose thumbnails the page holds."""


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
        scatter(axis, projected.place, groups, size=size)
        axis.set_title(f"{which}\n{projected.summary}", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(f"{TITLES[name]} of {subject}\n{CAUTION[name]}", fontsize=11)
    if len(groups.names) > 1:
        words = {"ncols": 5, "fontsize": 10, "markerscale": 2, "frameon": False}
        figure.legend(*legend(axes[0], groups), loc="outside lower center", **words)
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
