"""What stands below the tables and curves: in which settings recipes differ, and how results were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from eval.pages.page import render
from eval.protocols import brief, identity
from eval.report.comparison_recipes import Recipe, Setting, as_text, free_settings
from eval.report.comparison_results import Protocol, numbers_of
from eval.report.comparison_runs import Run

MOST_SIDE_BY_SIDE = 12
"""Recipes whose settings stand in columns; of more each value is listed with how many have it."""
MOST_NAMED = 3
LONGEST_PROTOCOL = 20_000
"""Characters of a protocol that a page shows; the result's file has it whole."""


def recipes_section(recipes: Sequence[Recipe], settings: Sequence[Setting], runs: Sequence[Run]) -> Markup:
    """Settings in which recipes differ, those that are equal in all, and free ones that differ between runs."""
    trained = [recipe for recipe in recipes if recipe.runs[0].config]
    trained_runs = [run for run in runs if run.config]
    differing = [each for each in settings if each.differs]
    names = [recipe.name for recipe in trained]
    free = free_settings(runs)
    return render(
        RECIPES,
        number=len(trained),
        differing=len(differing),
        differences=_differences(differing, names, "The recipes' settings that differ"),
        equal=[each for each in settings if not each.differs],
        free=_differences(free, [run.name for run in trained_runs], "Free settings of the runs that differ"),
        num_free=len(free),
    )


def _differences(settings: Sequence[Setting], names: Sequence[str], caption: str) -> Markup:
    """Settings as rows: a column for each name, or, where there are many, each value with how many have it."""
    if not settings:
        return Markup("")
    if len(names) <= MOST_SIDE_BY_SIDE:
        return render(MATRIX, settings=settings, names=names, caption=caption, brief=_short)
    counted = []
    for each in settings:
        owners: dict[str | None, list[str]] = {}
        for name, value in zip(names, each.values):
            owners.setdefault(value, []).append(name)
        values = [
            (_short(value), len(own), ", ".join(own[:MOST_NAMED]) + (", ..." if len(own) > MOST_NAMED else ""))
            for value, own in sorted(owners.items(), key=lambda item: -len(item[1]))
        ]
        counted.append((each.key, values[:MOST_SIDE_BY_SIDE], max(len(values) - MOST_SIDE_BY_SIDE, 0)))
    return render(COUNTED, counted=counted, caption=caption)


def _short(value: str | None) -> str:
    return "–" if value is None else value if len(value) <= 200 else f"{value[:197]}..."


def protocols_section(protocols: Sequence[Protocol]) -> Markup:
    """Of each protocol all that defines it, and the results that were measured by it; in words where there is none."""
    if not protocols:
        return render(
            "<p>None of these runs has been evaluated: <code>python -m eval.knn ckpt=runs/&lt;run&gt;</code> writes a "
            "result into its folder.</p>"
        )
    return render(PROTOCOLS, protocols=[_about(protocol) for protocol in protocols])


def _about(protocol: Protocol) -> Mapping[str, Any]:
    text = "\n".join(f"{name}: {as_text(value)}" for name, value in sorted(identity(protocol.example).items()))
    cut = len(text) - LONGEST_PROTOCOL
    results = [
        {
            "path": str(each.path),
            "about": ", ".join(
                f"{name} {brief(value)}"
                for name, value in (
                    ("step", each.step),
                    ("seed", each.protocol.get("seed")),
                    ("date", each.protocol.get("date")),
                    *((name, float(f"{number:.5g}")) for name, number in list(numbers_of(each).items())[:4]),
                )
                if value is not None
            ),
        }
        for each in protocol.results
    ]
    return {
        "id": protocol.id,
        "command": protocol.command,
        "data": protocol.data,
        "notes": [f"{name}: {' | '.join(values)}" for name, values in protocol.circumstances().items()],
        "names": list(protocol.circumstances()),
        "text": text if cut <= 0 else f"{text[:LONGEST_PROTOCOL]}\n... {cut:,} characters more in the result's file",
        "results": results,
    }


MATRIX = """\
<div class="differences" role="region" tabindex="0" aria-label="{{ caption }}"><table>
<thead><tr><th scope="col">setting</th>{% for name in names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for each in settings %}
<tr><th scope="row">{{ each.key }}</th>
{%- for value in each.values %}<td{% if each.is_odd(value) %} class="marked"{% endif %}>{{ brief(value) }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
"""
COUNTED = """\
<div class="differences" role="region" tabindex="0" aria-label="{{ caption }}"><table>
<thead><tr><th scope="col">setting</th><th scope="col">values, and how many have each</th></tr></thead>
<tbody>
{% for key, values, more in counted %}
<tr><th scope="row">{{ key }}</th><td>{% for value, number, own in values %}<div><b>{{ value }}</b>
 <span class="soft">{{ number }}: {{ own }}</span></div>{% endfor %}
{% if more %}<div class="soft">and {{ more }} more values</div>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
"""
RECIPES = """\
{% if number == 0 %}<p>None of these was trained, so there is no recipe.</p>
{% elif number == 1 %}<p>All runs have one recipe.</p>
{% else %}<p>{{ number }} recipes; {{ differing }} settings differ. A value is marked where most have another one, or
all have different ones; – is a setting that a recipe does not have.</p>
{% endif %}
{{ differences }}
{% if equal %}
<details><summary>{{ equal|length }} settings that are equal in all</summary>
<div class="differences" role="region" tabindex="0" aria-label="Settings that are equal in all recipes"><table>
<thead><tr><th scope="col">setting</th><th scope="col">value</th></tr></thead><tbody>
{% for each in equal %}<tr><th scope="row">{{ each.key }}</th><td>{{ each.values[0] }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
{% if num_free %}
<details><summary>Free settings that differ: {{ num_free }}, which do not make another recipe</summary>
{{ free }}</details>
{% endif %}
"""
PROTOCOLS = """\
<p>A protocol is everything that defines a measurement. Its eight digits stand in the head of its columns.</p>
{% for each in protocols %}
<details class="protocol"><summary><b>{{ each.command }}</b> on {{ each.data }}, protocol <b>{{ each.id }}</b>,
{{ each.results|length }} result{{ '' if each.results|length == 1 else 's' }}
{%- if each.notes %}; {{ each.names|join(', ') }} differ{{ 's' if each.names|length == 1 }}{% endif %}</summary>
{% if each.notes %}<p>Differs between its results, and may:</p><ul>{% for note in each.notes %}
<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<p>Results:</p><ul>
{% for result in each.results %}<li><code>{{ result.path }}</code> {{ result.about }}</li>
{% endfor %}</ul>
<p>All that defines it:</p><pre>{{ each.text }}</pre>
</details>
{% endfor %}
"""
