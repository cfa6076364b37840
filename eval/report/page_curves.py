"""The page's curves: training, and the features on the way."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from eval.pages.charts import Mark, Series, line_chart, x_switch
from eval.pages.decimate import decimated
from eval.pages.page import render
from eval.report.gather import RunFolder
from eval.report.metric_titles import HEALTH, TRAINING, is_share
from eval.report.metrics import Curve, skips

AXES = {"step": "step", "epoch": "epoch"}
NO_CHART = ("bad_images", "skipped_steps")


def training(run: RunFolder) -> Markup:
    """Loss, learning rate, throughput and whatever else was logged."""
    history = run.history
    if not history.num_rows:
        return Markup("<p>No step has been logged yet: metrics.jsonl is missing or empty.</p>")
    marks = _marks(run)
    others = [n for n in history.curves if n not in TRAINING and n not in HEALTH and n not in NO_CHART]
    titles = {name: title for name, title in TRAINING.items() if name in history.curves}
    charts = [_chart(run, name, title, marks) for name, title in titles.items()]
    charts += [_chart(run, name, name, marks) for name in sorted(others)]
    missing = [title for name, title in TRAINING.items() if name not in history.curves]
    skipped = history.latest.get("skipped_steps")
    said = [
        _resumed(sum(mark.kind == "resume" for mark in marks)),
        "skipped steps were not counted in this run"
        if skipped is None
        else f"{skipped:,.0f} skipped steps" + (" (crosses)" if skipped else ""),
        *([f"not logged: {', '.join(missing)}"] if missing else []),
    ]
    return render(
        '{{ switch }}<p class="soft">{{ said }}</p>{% if note %}<p class="warning">{{ note }}</p>{% endif %}\n'
        '<div class="charts">\n{% for chart in charts %}{{ chart }}{% endfor %}</div>',
        switch=x_switch(_axes(run)),
        said="; ".join(said) + ".",
        note=history.describe(),
        charts=charts,
    )


def features(run: RunFolder) -> Markup:
    """Online kNN and the health of the features."""
    marks = [mark for mark in _marks(run) if mark.kind == "resume"]
    charts = [_chart(run, name, title, marks) for name, title in HEALTH.items() if name in run.history.curves]
    if not charts:
        return Markup(
            "<p>Nothing was evaluated during this run. <code>online=knn</code> follows the kNN accuracy and the health "
            "of the features, <code>online=health</code> the health alone; "
            "<code>python -m eval.health ckpt=...</code> measures it afterwards.</p>"
        )
    return render(
        '<p class="soft">Measured on a fixed sample every trainer.eval_every_epochs; docs/evaluation.md says how to '
        'read each.</p><div class="charts">\n{% for chart in charts %}{{ chart }}{% endfor %}</div>',
        charts=charts,
    )


def _resumed(times: int) -> str:
    if not times:
        return "never resumed"
    return "resumed once (the dashed line)" if times == 1 else f"resumed {times} times (dashed lines)"


def _chart(run: RunFolder, name: str, title: str, marks: list[Mark]) -> Markup:
    curve = run.history.curves[name]
    axes = _axes(run)
    values = curve.values
    drawn = decimated(curve.steps, values)
    return line_chart(
        f"chart-{_as_id(name)}",
        [Series(title, values[drawn], {key: _on_axis(curve, key)[drawn] for key in axes})],
        x=axes,
        y=title,
        marks=[Mark({key: mark.x[key] for key in axes}, mark.label, mark.kind) for mark in marks],
        percent=is_share(name),
        note=_thinned(curve, len(drawn)),
    )


def _thinned(curve: Curve, drawn: int) -> str:
    """What is said of a curve that had more points than are drawn, and of those that were no numbers."""
    told = []
    if curve.num_points > drawn:
        told.append(
            f"Of {curve.num_points:,} values that were read {drawn:,} are drawn: the lowest and the highest of each "
            "part of the axis."
        )
    if curve.num_missing:
        were = "value was" if curve.num_missing == 1 else "values were"
        told.append(f"{curve.num_missing:,} logged {were} not finite.")
    return " ".join(told)


def _on_axis(curve: Curve, axis: str) -> np.ndarray:
    return curve.steps if axis == "step" else curve.epochs


def _axes(run: RunFolder) -> dict[str, str]:
    """Step and epoch; the step alone where epochs were not logged."""
    return dict(AXES) if run.steps_per_epoch else {"step": "step"}


def _marks(run: RunFolder) -> list[Mark]:
    """Where the run was continued, and where steps were skipped."""
    per_epoch = run.steps_per_epoch or np.nan
    resumed = [start for start in run.starts if 0 < start.step < run.step]
    marks = [
        Mark({"step": s.step, "epoch": s.step / per_epoch}, f"continued at step {s.step:,}, {s.date}") for s in resumed
    ]
    skipped = run.history.curves.get("skipped_steps")
    if skipped is not None:
        marks += [
            Mark({"step": step, "epoch": epoch}, f"{count:,} skipped by step {step:,.0f}", "skipped")
            for step, epoch, count in skips(skipped)
        ]
    return marks[:500]


def _as_id(name: str) -> str:
    return "".join(sign if sign.isalnum() and sign.isascii() else f"-{ord(sign):x}-" for sign in name)
