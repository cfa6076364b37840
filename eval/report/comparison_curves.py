"""Curves of several runs over each other: a chart for each metric, and one choice of runs for all charts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from eval.online import HEALTH
from eval.pages.charts import Series, line_chart, x_switch
from eval.pages.page import render
from eval.report.comparison_recipes import as_text
from eval.report.comparison_runs import MOST_BYTES, Run, most_points
from eval.report.metric_titles import is_share, title_of

MOST_DRAWN = 12
"""Runs that are drawn at once: eight colours, and dashes beyond."""
MOST_METRICS = 24
FIRST = ("loss", "knn_top1", "rankme", "lr", "images_per_second", "data_wait")
"""Metrics whose charts stand open; the others are below them."""
ONLINE = ("knn_top1", *HEALTH)
"""Metrics that are measured in the way that `online` says, on the run's data."""
NOTES = {"loss": "Losses of different methods, views or batch sizes are different quantities."}
AXES = {"step": "step", "epoch": "epoch", "images": "images seen", "hours": "hours of training"}


def curves_section(runs: Sequence[Run]) -> Markup:
    """The choice of runs, the switch of the x axis, and the charts. In words where no run has a curve."""
    drawn = [run for run in runs if run.curves.metrics]
    if not drawn:
        return Markup("<p>None of these runs has metrics.jsonl, so there are no curves to draw.</p>")
    groups = [group for name in _metrics(drawn) for group in measured_alike(name, drawn)]
    most = most_points(len(drawn) * len(groups))
    charts = [
        (name, _chart(f"curve-{place}", name, own, told, drawn, most=most))
        for place, (name, own, told) in enumerate(groups)
    ]
    return render(
        SECTION,
        switch=x_switch(_axes(drawn)),
        runs=drawn,
        most=MOST_DRAWN,
        sampled=sum(run.curves.history.skipped_bytes > 0 for run in drawn),
        megabytes=MOST_BYTES / 1e6,
        first=[chart for name, chart in charts if name in FIRST],
        others=[chart for name, chart in charts if name not in FIRST],
    )


def script() -> str:
    """The script by which one choice of runs holds for all charts."""
    return (Path(__file__).resolve().parent / "comparison.js").read_text(encoding="utf-8")


def style() -> str:
    """The style of what compares runs."""
    return (Path(__file__).resolve().parent / "comparison.css").read_text(encoding="utf-8")


def measured_alike(metric: str, runs: Sequence[Run]) -> list[tuple[str, list[Run], str]]:
    """(metric, its runs, how they measured it in words) for each way of measuring: one, and no words, as a rule.

    Metrics that are evaluated during a run share a chart only where `online` and the data are the same.
    """
    own = [run for run in runs if metric in run.curves.metrics]
    if metric not in ONLINE:
        return [(metric, own, "")]
    ways = {id(run): _way(metric, run.config) for run in own}
    keys = list(dict.fromkeys(json.dumps(way, sort_keys=True, default=str) for way in ways.values()))
    if len(keys) == 1:
        return [(metric, own, "")]
    everything = list(ways.values())
    differing = [
        name
        for name in dict.fromkeys(name for way in everything for name in way)
        if any(way.get(name) != everything[0].get(name) for way in everything)
    ]
    found = []
    for key in keys:
        alike = [run for run in own if json.dumps(ways[id(run)], sort_keys=True, default=str) == key]
        way = ways[id(alike[0])]
        found.append((metric, alike, ", ".join(f"{name} {as_text(way.get(name))}" for name in differing)))
    return found


def _way(metric: str, config: Mapping) -> Mapping[str, object]:
    """What of a run's config says how a metric is measured during the run."""
    groups = ("online.knn.",) if metric == "knn_top1" else ("online.",)
    ways = {name: value for name, value in config.items() if name.startswith(groups)}
    data = ("data.name", "data.limit", "data.source.num_train", "data.source.num_test")
    return ways | {name: config.get(name) for name in data}


def _chart(id: str, metric: str, own: Sequence[Run], told: str, drawn: Sequence[Run], *, most: int) -> Markup:
    series = []
    for place, run in enumerate(drawn):
        if not any(run is each for each in own):
            continue
        curve = run.curves.metrics[metric]
        axes = {name: values for name, values in run.curves.axes(curve.steps).items() if name in AXES}
        series.append(Series(run.name, curve.values, axes, visible=place < MOST_DRAWN, num_points=curve.num_points))
    title = title_of(metric) + (f" ({told})" if told else "")
    note = NOTES.get(metric, "")
    if told:
        note = "Runs that measured it otherwise have a chart of their own."
    return line_chart(id, series, x=_axes(drawn), y=metric, title=title, percent=is_share(metric), note=note, most=most)


def _axes(runs: Sequence[Run]) -> dict[str, str]:
    """The x axes that all curves can be drawn over; images first where a step has not as many in every run."""
    known = all(run.curves.batch_size for run in runs)
    axes = {name: title for name, title in AXES.items() if known or name not in ("images", "hours")}
    if not all(run.curves.last_epoch for run in runs):
        axes.pop("epoch")
    if known and len({run.curves.batch_size for run in runs}) > 1:
        axes = {"images": axes["images"], **axes}
    return axes


def _metrics(runs: Sequence[Run]) -> list[str]:
    """What to draw, first what people look at."""
    found = dict.fromkeys(name for run in runs for name in run.curves.metrics)
    ordered = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    return ordered[:MOST_METRICS]


SECTION = """\
<p>One choice holds for all charts; at most {{ most }} runs are drawn at once.</p>
<fieldset id="drawn" data-most="{{ most }}"><legend>Runs that are drawn</legend>
{% if runs|length > 6 %}
<div class="controls">
<button type="button" data-draw="table">The first {{ most }} rows of the table</button>
<button type="button" data-draw="none">None</button>
<label>Find <input type="search" autocomplete="off" spellcheck="false"></label>
</div>
{% endif %}
<div class="drawn-list">
{% for run in runs %}
<label><input type="checkbox" value="{{ run.name }}" autocomplete="off"{{ ' checked' if loop.index <= most else '' }}>
<span class="swatch" hidden></span><span class="name">{{ run.name }}
{%- if run.state.word != "complete" %} <small>({{ run.state.word }})</small>{% endif %}</span></label>
{% endfor %}
</div>
<p class="small" role="status"></p>
</fieldset>
{{ switch }}
{% if sampled %}<p class="soft small">Of {{ sampled }} run{{ '' if sampled == 1 else 's' }} a sample of metrics.jsonl
was read, as it has more than {{ '%g' % megabytes }} MB: peaks may be missing. <code>python -m eval.report</code> with
one run reads all of it.</p>{% endif %}
<div class="charts compared">
{% for chart in first %}
{{ chart }}
{% endfor %}
</div>
{% if others %}
<details class="more-curves"><summary>{{ others|length }} more metrics</summary>
<div class="charts compared">
{% for chart in others %}
{{ chart }}
{% endfor %}
</div>
</details>
{% endif %}
"""
