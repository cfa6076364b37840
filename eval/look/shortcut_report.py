"""The shortcut probes of a trained and an untrained backbone side by side: bars, numbers, and what follows in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.look.drawing import figure_pixels, plot
from eval.look.shortcuts import GRID, ClassProbe, PlaceProbe


@dataclass(frozen=True)
class Shortcuts:
    """What linear probes tell from the features of single patches."""

    cell: ClassProbe
    place: PlaceProbe
    channel: ClassProbe | None
    """None for images of one channel."""


def shortcut_plot(found: Mapping[str, Shortcuts], *, title: str) -> np.ndarray:
    """Bars of the probes: each backbone, the same with shuffled labels, and a line at chance."""
    figure = plot(9.5, 3.9)
    figure.suptitle(title, fontsize=11)
    first = next(iter(found.values()))
    panels = figure.subplots(
        1, 2 if first.channel is None else 3, width_ratios=[1, 1.3] + [1] * (first.channel is not None)
    )
    _class_bars(panels[0], {name: each.cell for name, each in found.items()}, f"cell of a {GRID}×{GRID} grid")
    _place_bars(panels[1], {name: each.place for name, each in found.items()})
    if first.channel is not None:
        each = {name: one.channel for name, one in found.items() if one.channel is not None}
        _class_bars(panels[2], each, "displaced colour channel")
    return figure_pixels(figure)


INKS = {"trained": "#0072B2", "untrained": "#E69F00", "shuffled": "#999999"}
"""Okabe and Ito's blue and orange, and gray."""


def _class_bars(axes: Any, found: Mapping[str, ClassProbe], title: str) -> None:
    first = next(iter(found.values()))
    names = [*found, "shuffled"]
    heights = [100 * each.top1 for each in found.values()] + [100 * first.shuffled]
    spread = [100 * each.error for each in found.values()] + [100 * first.shuffled_error]
    axes.bar(names, heights, yerr=spread, capsize=3, color=[INKS[name] for name in names], width=0.65)
    axes.axhline(100 * first.chance, color="black", linestyle="--", linewidth=1, label=f"chance {first.chance:.0%}")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("% of patches told right")
    axes.set_ylim(0, max(*heights, 100 * first.chance) * 1.25)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _place_bars(axes: Any, found: Mapping[str, PlaceProbe]) -> None:
    first = next(iter(found.values()))
    groups = {name: ((each.r2_x, each.r2_y), (each.error_x, each.error_y)) for name, each in found.items()}
    groups["shuffled"] = ((first.shuffled_x, first.shuffled_y), (float("nan"), float("nan")))
    width = 0.8 / len(groups)
    for number, (name, (values, spread)) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        axes.bar([offset, 1 + offset], values, width=0.9 * width, yerr=spread, capsize=3, color=INKS[name], label=name)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks([0, 1], ["x, left to right", "y, top to bottom"])
    axes.set_title("place in the image", fontsize=10)
    axes.set_ylabel("explained variance R²")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.02), max(high, 0.1) * 1.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(groups))
    axes.spines[["top", "right"]].set_visible(False)


def shortcut_metrics(found: Shortcuts, suffix: str) -> dict[str, float]:
    """The headline of each probe, their names ending in `suffix`."""
    metrics = {
        f"cell_top1{suffix}": found.cell.top1,
        f"place_r2_x{suffix}": found.place.r2_x,
        f"place_r2_y{suffix}": found.place.r2_y,
    }
    if found.channel is not None:
        metrics[f"channel_top1{suffix}"] = found.channel.top1
    return metrics


def shortcut_lines(found: Mapping[str, Shortcuts], *, relative: bool) -> list[str]:
    """The probes in words, `trained` beside `untrained`, and what follows."""
    first = next(iter(found.values()))
    lines = [
        f"place, from one patch: the cell of {GRID}×{GRID} {_told(found, 'cell')}; "
        f"R2 of x {_r2_told(found, 'x')}, of y {_r2_told(found, 'y')}"
    ]
    if first.channel is not None:
        lines.append(f"which channel is displaced, from one patch: {_told(found, 'channel')}")
    trained, untrained = found.get("trained"), found.get("untrained")
    if trained is None or untrained is None:
        return [*lines, "there are no trained weights to compare with"]
    return [*lines, *findings(trained, untrained, relative=relative)]


def findings(trained: Shortcuts, untrained: Shortcuts, *, relative: bool) -> list[str]:
    """What training has made easier to tell from a single patch, and what a person may do."""
    x, y = (
        _more(
            getattr(trained.place, f"r2_{axis}") - getattr(untrained.place, f"r2_{axis}"),
            getattr(trained.place, f"error_{axis}"),
            getattr(untrained.place, f"error_{axis}"),
        )
        for axis in ("x", "y")
    )
    cell = _more(trained.cell.top1 - untrained.cell.top1, trained.cell.error, untrained.cell.error)
    found = []
    if x or (cell and not y):
        found.append(
            "training has made it easier to tell where in the image a patch lies, from left to right too: look for "
            "colour fringes of a lens, dark corners, frames or stamps that all images share"
        )
    elif y:
        found.append(
            "training has made it easier to tell how high in the image a patch lies, and not how far to the right: "
            "photos have a top and a bottom, which is knowledge and no shortcut"
        )
    coloured, before = trained.channel, untrained.channel
    if coloured is not None and before is not None and _more(coloured.top1 - before.top1, coloured.error, before.error):
        advice = "method.colour=drop, or gray with a larger method.gray_probability" if relative else "more grayscale"
        found.append(f"training has made a displaced colour channel easier to tell; against that: {advice}")
    return found or ["no sign that training has learned a shortcut: an untrained backbone tells as much"]


def _more(difference: float, *errors: float) -> bool:
    """Whether a difference is more than two standard errors of it, given those of what it is between."""
    return difference > 2 * sum(error**2 for error in errors) ** 0.5


def _told(found: Mapping[str, Shortcuts], probe: str) -> str:
    each: list[tuple[str, ClassProbe]] = [(name, getattr(one, probe)) for name, one in found.items()]
    words = ", ".join(f"{name} {one.top1:.1%} +- {one.error:.1%}" for name, one in each)
    return f"{words}, shuffled labels {each[0][1].shuffled:.1%}, chance {each[0][1].chance:.1%}"


def _r2_told(found: Mapping[str, Shortcuts], axis: str) -> str:
    return ", ".join(
        f"{which} {getattr(one.place, f'r2_{axis}'):.2f} +- {getattr(one.place, f'error_{axis}'):.2f}"
        for which, one in found.items()
    )
