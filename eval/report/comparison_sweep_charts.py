"""A sweep in charts: what its runs were judged by, against each setting that was swept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from eval.pages.charts import Group, scatter
from eval.pages.page import render
from eval.report.comparison_sweep import Job, SweepFolder, as_value
from eval.report.metrics import is_number
from ssl.sweep_table import best_of

MOST_CHARTS = 12
LOG_FROM = 30.0
"""A setting whose largest value is so many times its smallest is drawn on a logarithmic axis."""


def sweep_section(sweep: SweepFolder, id: str) -> Markup:
    """Which settings were swept, how many runs ended how, and a scatter for each setting."""
    measure, values = _measure(sweep)
    judged = [job for job in sweep.jobs if values.get(job.number) is not None]
    charts = []
    for place, key in enumerate(sweep.swept[:MOST_CHARTS] if judged else []):
        own = [job for job in judged if key in job.overrides]
        settings = [as_value(job.overrides[key]) for job in own]
        numbers = [each for each in settings if isinstance(each, float)]
        numeric = len(numbers) == len(settings) and all(map(math.isfinite, numbers))
        charts.append(
            scatter(
                f"{id}-{place}",
                [
                    Group(
                        "runs",
                        numbers if numeric else [_shown(job.overrides[key]) for job in own],  # pyright: ignore
                        [values[job.number] for job in own],
                        [_words(job, sweep.swept) for job in own],
                    )
                ],
                x=key,
                y=measure,
                title=f"{measure} against {key}",
                log_x=numeric and is_logarithmic(numbers),
            )
        )
    outcomes = [{"objective": job.objective, "job": job} for job in sweep.jobs]
    best = best_of(outcomes, sweep.direction)
    states: dict[str, int] = {}
    for job in sweep.jobs:
        states[job.state] = states.get(job.state, 0) + 1
    return render(
        SECTION,
        sweep=sweep,
        states=", ".join(f"{number} {word}" for word, number in states.items()),
        best=None
        if best is None
        else f"run {best['job'].number}, {best['objective']:.6g}: " + _words(best["job"], sweep.swept),
        measure=measure,
        charts=charts,
        left_out=max(len(sweep.swept) - MOST_CHARTS, 0),
    )


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """Whether positive numbers span so much that a linear axis would crowd the small ones."""
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_FROM


def _measure(sweep: SweepFolder) -> tuple[str, dict[int, float]]:
    """What the runs are drawn by: the objective, or the last training loss where there is none; by the run's number."""
    values = {job.number: job.objective for job in sweep.jobs if is_number(job.objective)}
    if values:
        return sweep.objective, values  # pyright: ignore[reportReturnType]
    losses = {job.number: job.metrics["loss"] for job in sweep.jobs if is_number(job.metrics.get("loss"))}
    return "last training loss", losses


def _words(job: Job, swept: Sequence[str]) -> str:
    return f"run {job.number}: " + ", ".join(f"{key}={job.overrides[key]}" for key in swept if key in job.overrides)


def _shown(text: str) -> str:
    """A category as an axis takes it: plotly reads tags in its labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


SECTION = """\
<p><code>{{ sweep.path }}</code>: {{ states }}.
{% if sweep.swept %}Swept: {{ sweep.swept|join(', ') }}.{% else %}Its runs differ in no setting.{% endif %}
{% if sweep.others %}{{ sweep.others }} outcomes of earlier sweeps in this folder are left out.{% endif %}</p>
{% if best %}<p>The sweep was to {{ sweep.direction }} its {{ sweep.objective }}; it found {{ best }}.</p>{% endif %}
{% if charts %}<div class="charts">
{% for chart in charts %}
{{ chart }}
{% endfor %}
</div>{% else %}<p>None of its runs was judged by an objective or has a loss: there is nothing to draw.</p>{% endif %}
{% if left_out %}<p>{{ left_out }} more swept settings are in the table only.</p>{% endif %}
"""
