"""Charts of a page: data as JSON beside an empty box, which `charts.js` fills by plotly in the page's colours.

Every chart has its finding in words (`aria-label`), its data as a table, and buttons that a keyboard reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from eval.pages.decimate import MOST_POINTS, decimated
from eval.pages.page import as_json, render

Numbers = Sequence[float] | np.ndarray

CHART = """\
<figure class="chart" id="{{ id }}" data-kind="{{ kind }}">
<figcaption><b>{{ title }}</b>{% if switch %}
<button type="button" class="log" aria-pressed="{{ 'true' if log_y else 'false' }}"
 aria-label="Logarithmic scale of {{ title }}">log scale</button>
{% endif %}</figcaption>
<div class="plot" role="img" aria-label="{{ words }}"></div>
<div class="names"></div>
{% if note %}<p class="soft small">{{ note }}</p>
{% endif %}
<details class="data"><summary>Data as a table</summary><div class="table" tabindex="0"></div></details>
{{ data }}
</figure>
"""


@dataclass(frozen=True)
class Series:
    """A curve: its values and, for each x axis that the chart offers, where they stand."""

    name: str
    y: Numbers
    x: Mapping[str, Numbers]
    """By the axis's name, such as step and epoch; each as long as `y`."""
    visible: bool = True
    is_dashed: bool = False
    num_points: int = 0
    """All that there were, where some were left out before."""


@dataclass(frozen=True)
class Mark:
    """An event on the x axis: a line across the chart with a sign at its foot."""

    x: Mapping[str, float]
    label: str
    kind: str = "resume"
    """resume, a dashed line; skipped, a cross at the foot."""


@dataclass(frozen=True)
class Group:
    """Points of one colour and sign."""

    name: str
    x: Numbers
    y: Numbers
    texts: Sequence[str] = field(default_factory=list)
    """One for each point, shown where it is pointed at."""


def line_chart(
    id: str,
    series: Sequence[Series],
    *,
    x: Mapping[str, str],
    y: str,
    title: str | None = None,
    marks: Sequence[Mark] = (),
    log_y: bool = False,
    percent: bool = False,
    note: str = "",
    most: int = MOST_POINTS,
) -> Markup:
    """Curves over a common x axis. `x` names the axes that the page's switch offers, first the one that is shown, with
    their titles; `y` is the title of the other. Curves of more than `most` points are decimated, and it is said.
    """
    drawn, told = [], []
    for each in series:
        ys = np.asarray(each.y, dtype=np.float64)
        xs = {name: np.asarray(each.x[name], dtype=np.float64) for name in x}
        kept = decimated(next(iter(xs.values())), ys, most=most)
        num_points = max(int(np.isfinite(ys).sum()), each.num_points)
        if len(kept) < num_points:
            told.append(num_points)
        drawn.append(
            {
                "name": each.name,
                "y": ys[kept],
                "x": {name: values[kept] for name, values in xs.items()},
                "visible": each.visible,
                "dash": each.is_dashed,
            }
        )
    data = {
        "series": drawn,
        "x": dict(x),
        "y": y,
        "marks": [{"x": dict(mark.x), "label": mark.label, "kind": mark.kind} for mark in marks],
        "percent": percent,
    }
    return render(
        CHART,
        id=id,
        kind="lines",
        title=title or y,
        switch=True,
        log_y=log_y,
        words=_in_words(title or y, drawn, next(iter(x))),
        note=" ".join(filter(None, [note, _thinned(told, most)])),
        data=as_json(data, f"{id}-data"),
    )


def scatter(
    id: str, groups: Sequence[Group], *, x: str, y: str, title: str, note: str = "", log_x: bool = False
) -> Markup:
    """Points in the plane, a colour and a sign for each group; `x` and `y` are the axes' titles. Texts on the x axis
    are categories.
    """
    data = {
        "groups": [
            {"name": each.name, "x": np.asarray(each.x), "y": np.asarray(each.y), "text": list(each.texts)}
            for each in groups
        ],
        "x": x,
        "y": y,
        "log_x": log_x,
    }
    counts = ", ".join(f"{len(each.x):,} of {each.name}" for each in groups)
    return render(
        CHART,
        id=id,
        kind="scatter",
        title=title,
        switch=False,
        log_y=False,
        words=f"{title}: a scatter of {y} over {x}, {counts}",
        note=note,
        data=as_json(data, f"{id}-data"),
    )


def x_switch(axes: Mapping[str, str]) -> Markup:
    """Buttons that give all charts of the page another x axis; nothing where there is only one."""
    if len(axes) < 2:
        return Markup("")
    return render(
        '<div class="controls" role="group" aria-label="x axis of all charts"><span class="soft">x axis:</span>\n'
        '{% for key, name in axes.items() %}<button type="button" data-x="{{ key }}" '
        "aria-pressed=\"{{ 'true' if loop.first else 'false' }}\">{{ name }}</button>\n{% endfor %}</div>",
        axes=axes,
    )


def _thinned(counts: Sequence[int], most: int) -> str:
    """What is said of curves that had more points than are drawn."""
    if not counts:
        return ""
    number = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    return f"Of {number} points at most {most:,} are drawn: the lowest and the highest of each part of the axis."


def _in_words(title: str, drawn: Sequence[Mapping], axis: str) -> str:
    """What a curve shows, for those who do not see it."""
    told = []
    for each in drawn[:8]:
        ys, xs = each["y"], each["x"][axis]
        if not len(ys):
            told.append(f"{each['name']} has no points")
            continue
        low, high = int(np.argmin(ys)), int(np.argmax(ys))
        told.append(
            f"{each['name']} goes from {ys[0]:.4g} at {axis} {xs[0]:.6g} to {ys[-1]:.4g} at {axis} {xs[-1]:.6g}, "
            f"lowest {ys[low]:.4g} at {xs[low]:.6g}, highest {ys[high]:.4g} at {xs[high]:.6g}"
        )
    more = [f"and {len(drawn) - 8} more curves"] if len(drawn) > 8 else []
    return f"{title}, a line chart: " + "; ".join([*told, *more])
