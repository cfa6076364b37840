"""One page that compares runs: `python -m eval.report runs/a runs/b`, or a sweep's folder.

A table of runs, in which no two results of a column were measured otherwise; seeds of one recipe together; curves over
each other; in which settings the recipes differ. No run is called the best for what it has on a test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from eval.pages import sortable
from eval.pages.page import Section, page, render, write_page
from eval.report import comparison_curves
from eval.report.comparison_details import protocols_section, recipes_section
from eval.report.comparison_recipes import Recipe, recipe_settings, recipes_of
from eval.report.comparison_results import protocols_of, result_columns
from eval.report.comparison_runs import Run, read_runs
from eval.report.comparison_sweep import SweepFolder
from eval.report.comparison_sweep_charts import sweep_section
from eval.report.comparison_tables import has_seeds, runs_section, seeds_section


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the comparison of run folders, of folders with runs in them, or of a sweep; returns the page's path.

    Raises ValueError where a folder is none of them, OSError where the page cannot be written.
    """
    found, sweeps = read_runs(runs)
    write_page(out, compare(found, sweeps))
    return out


def compare(runs: Sequence[Run], sweeps: Sequence[SweepFolder] = ()) -> str:
    """The page as HTML."""
    recipes = recipes_of(runs)
    protocols = protocols_of(run.results for run in runs)
    columns = result_columns(protocols)
    settings = recipe_settings(recipes)
    sections = [
        Section("runs", "Runs", runs_section(runs, recipes, columns, sweeps)),
        *([Section("seeds", "Seeds together", seeds_section(recipes, columns))] if has_seeds(recipes) else []),
        *(Section(f"sweep-{i}", "Sweep", sweep_section(sweep, f"sweep-{i}")) for i, sweep in enumerate(sweeps)),
        Section("curves", "Curves", comparison_curves.curves_section(runs)),
        Section("recipes", "Recipes", recipes_section(recipes, settings, runs)),
        Section("protocols", "Protocols", protocols_section(protocols)),
    ]
    return page(
        f"Comparison of {len(runs)} runs" if len(runs) > 1 else f"Comparison of {runs[0].name}",
        sections,
        lead=_lead(runs, recipes),
        scripts=[sortable.script(), comparison_curves.script()],
        styles=[sortable.style(), comparison_curves.style()],
    )


def _lead(runs: Sequence[Run], recipes: Sequence[Recipe]) -> Markup:
    states: dict[str, int] = {}
    for run in runs:
        states[run.state.word] = states.get(run.state.word, 0) + 1
    trained = [recipe for recipe in recipes if recipe.runs[0].config]
    return render(
        LEAD,
        states=", ".join(f"{number} {word}" for word, number in states.items()),
        recipes=len(trained),
        most_seeds=max((len(recipe.runs) for recipe in trained), default=0),
        problems=[problem for run in runs for problem in run.problems],
    )


LEAD = """\
<p>{{ states }}. {% if recipes %}{{ recipes }} recipe{{ '' if recipes == 1 else 's' }}
{%- if most_seeds == 1 %}, {{ 'each ' if recipes > 1 }}of one seed{% endif %}. {% endif %}
 Results stand in one column only where they were measured alike: by the same evaluation, with the same settings, on the
same images. What is measured on a test split is there to report a run that was chosen otherwise: no run is called the
best for it.</p>
{% if problems %}
<div class="warning"><p>Not everything could be read:</p><ul>{% for problem in problems %}
<li>{{ problem }}</li>{% endfor %}</ul></div>
{% endif %}
"""
