"""The tables of the comparison: a row for each run, and one for each recipe with its seeds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from eval.pages.page import render
from eval.pages.sortable import MISSING, Cell, Column, Row, SortableTable, number_cell, text_cell
from eval.report.comparison_recipes import ACTS, SEED, Recipe, as_text, complete_configs, recipe_settings
from eval.report.comparison_results import ResultColumn, Score, over_runs, score_of
from eval.report.comparison_runs import NOT_TRAINED, UNREADABLE, Run
from eval.report.comparison_sweep import SweepFolder, as_value
from eval.report.gather import LOST
from ssl.starts import FAILED

MOST_SHOWN_SETTINGS = 3
MOST_SETTINGS = 30
"""Columns of settings in which runs differ; the list of differences has all."""
MOST_SHOWN_RESULTS = 12
MOST_RESULTS = 80
MOST_NAMED = 3
SHORT = 30
"""Characters of the longest value of a setting whose column stands open."""
LONG_NUMBER = 10
"""Characters beyond which a number stands in six digits."""
FIRST_SETTINGS = (
    "method._target_",
    "model.name",
    "data.name",
    "optim.name",
    "optim.base_lr",
    "trainer.epochs",
    "trainer.global_batch_size",
)
BAD_STATES = (FAILED, LOST, UNREADABLE)


def runs_section(
    runs: Sequence[Run], recipes: Sequence[Recipe], columns: Sequence[ResultColumn], sweeps: Sequence[SweepFolder]
) -> Markup:
    """A row for each run: how it stands, what was swept, settings that differ, results, progress."""
    swept = list(dict.fromkeys(key for sweep in sweeps for key in sweep.swept))
    judged = [sweep for sweep in sweeps if any(job.objective is not None for job in sweep.jobs)]
    keys, settings = _setting_heads([key for key in _differing(recipes) if key not in swept], recipes)
    shown = columns[:MOST_RESULTS]
    heads = [
        Column("run"),
        Column("state"),
        *(Column(key) for key in swept),
        *(Column(sweep.objective, [f"what {sweep.path.name} judged its runs by"]) for sweep in judged),
        *(replace(each, hidden=each.hidden or bool(swept)) for each in settings),
        *_result_heads(shown),
        *([] if SEED in swept else [Column(SEED, hidden=True)]),
        Column("epochs", hidden=bool(shown)),
        Column("steps", hidden=True),
        Column("last loss", ["of training, each method's own"], hidden=bool(shown)),
        Column("images/s", ["median"], hidden=True),
        Column("hours", ["of training steps"], hidden=True),
        Column("folder", hidden=True),
    ]
    rows = []
    for run, config in zip(runs, complete_configs(runs)):
        overrides = run.job.overrides if run.job else {}
        cells = [
            text_cell(run.name, lines=[run.state.why] if run.state.word == NOT_TRAINED and run.state.why else []),
            _state_cell(run),
            *(setting_cell(overrides.get(key)) for key in swept),
            *(_objective_cell(run, sweep) for sweep in judged),
            *(_value_cell(key, config) for key in keys),
            *(_score_cell(score_of(run.results, column), column, run) for column in shown),
            *([] if SEED in swept else [_value_cell(SEED, config)]),
            *_progress_cells(run),
            text_cell(str(run.path)),
        ]
        rows.append(Row(cells, key=run.name))
    table = SortableTable("runs-table", "Runs and their results", heads, rows)
    return render(RUNS, table=table.html(), left_out=len(columns) - len(shown), any_results=bool(columns))


def seeds_section(recipes: Sequence[Recipe], columns: Sequence[ResultColumn]) -> Markup:
    """A row for each recipe: the mean of its runs, with how many they are."""
    keys, settings = _setting_heads(_differing(recipes), recipes)
    shown = columns[:MOST_RESULTS]
    heads = [Column("recipe"), Column("seeds"), *settings, *_result_heads(shown)]
    rows = []
    configs = complete_configs([recipe.runs[0] for recipe in recipes])
    for recipe, config in zip(recipes, configs):
        cells = [
            text_cell(recipe.name, lines=_members(recipe)),
            Cell(recipe.seeds, float(len(recipe.runs))),
            *(_value_cell(key, config) for key in keys),
            *(_mean_cell(recipe, column) for column in shown),
        ]
        rows.append(Row(cells, key=recipe.name))
    table = SortableTable("recipes-table", "Recipes, their seeds together", heads, rows)
    return render(SEEDS, table=table.html())


def setting_cell(text: str | None) -> Cell:
    """A setting, sorted as a number where it is one."""
    if text is None:
        return MISSING
    value = as_value(text)
    if isinstance(value, float) and len(text) > LONG_NUMBER:
        return Cell(f"{value:.6g}", value)
    return Cell(text if len(text) <= 80 else f"{text[:77]}...", value)


def has_seeds(recipes: Sequence[Recipe]) -> bool:
    """Whether some recipe was run more than once."""
    return any(len(recipe.runs) > 1 for recipe in recipes)


def _differing(recipes: Sequence[Recipe]) -> list[str]:
    """Settings of the config in which recipes differ, those that people look at first."""
    named = [each.key for each in recipe_settings(recipes) if each.differs and not each.key.startswith(ACTS)]
    ordered = sorted(named, key=lambda key: FIRST_SETTINGS.index(key) if key in FIRST_SETTINGS else len(FIRST_SETTINGS))
    return ordered[:MOST_SETTINGS]


def _setting_heads(keys: Sequence[str], recipes: Sequence[Recipe]) -> tuple[Sequence[str], list[Column]]:
    """A column for each setting. Those stand open that every trained recipe has, and that are no long texts."""
    configs = [config for config in complete_configs([recipe.runs[0] for recipe in recipes]) if config]
    heads, opened = [], 0
    for key in keys:
        is_short = all(key in config and len(_told(key, config)) <= SHORT for config in configs)
        is_open = opened < MOST_SHOWN_SETTINGS and is_short
        opened += is_open
        heads.append(Column(key.removesuffix("._target_"), hidden=not is_open))
    return keys, heads


def _value_cell(key: str, config: Mapping[str, Any]) -> Cell:
    return setting_cell(_told(key, config) if key in config else None)


def _told(key: str, config: Mapping[str, Any]) -> str:
    """A setting's value; of a class only its own name."""
    text = as_text(config[key])
    return text.rpartition(".")[2] if key.endswith("_target_") else text


def _members(recipe: Recipe) -> list[str]:
    names = [run.name for run in recipe.runs]
    if names == [recipe.name]:
        return []
    return [", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if names[MOST_NAMED:] else "")]


def _result_heads(columns: Sequence[ResultColumn]) -> list[Column]:
    """A head for each metric of each protocol; the first of each protocol stand open."""
    heads, open_ones, seen = [], 0, set[str]()
    for column in columns:
        is_first = column.protocol.id not in seen and open_ones < MOST_SHOWN_RESULTS
        seen.add(column.protocol.id)
        open_ones += is_first
        heads.append(Column(f"{column.protocol.command} {column.metric}", column.lines, hidden=not is_first))
    return heads


def _state_cell(run: Run) -> Cell:
    why = run.state.why if run.state.word != NOT_TRAINED else ""
    lines = [why if len(why) <= 200 else f"{why[:197]}..."] if why else []
    return text_cell(run.state.word, lines=lines, marked=run.state.word in BAD_STATES)


def _objective_cell(run: Run, sweep: SweepFolder) -> Cell:
    """What a sweep judged a run by; runs of other sweeps were judged otherwise."""
    is_own = run.job is not None and any(job is run.job for job in sweep.jobs)
    return number_cell(run.job.objective if is_own and run.job else None)


def _score_cell(score: Score | None, column: ResultColumn, run: Run) -> Cell:
    if score is None:
        return MISSING
    lines = []
    if score.spread is not None:
        lines.append(f"± {_spread(score.spread, column)}, {len(score.values)} seeds of the evaluation")
    step = score.steps[0]
    if step is not None and run.curves.last_step and step != run.curves.last_step and _judges(run, score):
        lines.append(f"of step {step:,}")
    return number_cell(score.mean, column.shown(score.mean), lines=lines)


def _judges(run: Run, score: Score) -> bool:
    """Whether the checkpoint that was judged is one of this run, and not what it was fine-tuned from."""
    path = (score.results[0].protocol.get("checkpoint") or {}).get("path")
    return score.results[0].protocol["command"] != "eval.finetune" or str(run.path) in str(path)


def _mean_cell(recipe: Recipe, column: ResultColumn) -> Cell:
    scores = [(run, score_of(run.results, column)) for run in recipe.runs]
    score = over_runs([each for _, each in scores])
    if score is None:
        return MISSING
    lines = []
    if recipe.runs[0].config:
        number = len(score.values)
        seeds = len({run.config.get(SEED) for run, each in scores if each is not None})
        told = f"{number} seeds" if seeds == number else f"{number} runs of {'one seed' if seeds == 1 else seeds}"
        lines.append("one seed" if score.spread is None else f"± {_spread(score.spread, column)}, {told}")
        if number < len(recipe.runs):
            lines.append(f"{len(recipe.runs) - number} without a result")
    steps = [f"step {step:,}" for step in score.steps if step is not None]
    if len(steps) > 1:
        lines.append("of " + ", ".join(steps[:MOST_NAMED]) + (", ..." if steps[MOST_NAMED:] else ""))
    return number_cell(score.mean, column.shown(score.mean), lines=lines)


def _spread(spread: float, column: ResultColumn) -> str:
    """A standard deviation, in percentage points where the values are shares."""
    return f"{100 * spread:.2g}" if column.is_share else f"{spread:.2g}"


def _progress_cells(run: Run) -> list[Cell]:
    """Epochs, steps, last loss, images per second and hours."""
    curves = run.curves
    if not curves.metrics:
        return [MISSING] * 5
    loss, speed = curves.metrics.get("loss"), curves.median_speed
    hours = float(curves.axes(np.array([curves.last_step]))["hours"][0])
    return [
        number_cell(curves.last_epoch or None),
        number_cell(curves.last_step, f"{curves.last_step:,}"),
        number_cell(None if loss is None else float(loss.values[-1])),
        number_cell(speed, None if speed is None else f"{speed:,.0f}"),
        number_cell(hours, f"{hours:.2f}"),
    ]


RUNS = """\
<p class="small soft">A click on a heading, or Enter, sorts; a second one turns the order round. Under
<em>Columns</em> are more. As CSV or Markdown: <code>python -m eval.compare runs/a runs/b format=csv</code>.</p>
{% if not any_results %}<p>None of these runs has been evaluated yet.</p>{% endif %}
{% if left_out %}<p>{{ left_out }} more metrics are left out here; eval.compare has all.</p>{% endif %}
{{ table }}
"""
SEEDS = """\
<p>Each value is the mean over the runs of a recipe, each with its own seed; ± is their standard deviation (n - 1), of
shares in percentage points.</p>
{{ table }}
"""
