"""The page's evaluations: a table for each way of measuring, so that nothing of two protocols shares a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from eval.pages.page import render
from eval.protocols import brief, protocol_id
from eval.report.gather import Evaluated, RunFolder
from ssl.same_run import flat
from ssl.tables import FRACTIONS, metric_columns

MOST_WORST = 8


def evaluations(run: RunFolder) -> Markup:
    """All results of a run, or how to make some."""
    if not run.results:
        return render(
            "<p>No evaluation has been made: <code>python -m eval.knn ckpt={{ path }}</code>, "
            "<code>python -m eval.linear_probe ckpt={{ path }}</code>, "
            "<code>python -m eval.finetune ckpt={{ path }}</code>.</p>",
            path=run.path,
        )
    groups: dict[str, list[Evaluated]] = {}
    for result in run.results:
        groups.setdefault(protocol_id(result.protocol), []).append(result)
    parts = [_guarded(run, key, results) for key, results in groups.items()]
    said = (
        "Each table holds results that were measured alike. Numbers of two tables cannot be compared."
        if len(groups) > 1
        else ""
    )
    return render('<p class="soft">{{ said }}</p>{% for part in parts %}{{ part }}{% endfor %}', said=said, parts=parts)


def _guarded(run: RunFolder, key: str, results: list[Evaluated]) -> Markup:
    """A table; one whose files hold something else than an evaluation writes is told, and costs no other."""
    try:
        return _group(run, key, results)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = ", ".join(str(each.path.relative_to(run.path)) for each in results)
        said = f"{type(error).__name__}: {error}"[:300]
        return render('<p class="problem">{{ names }} cannot be shown ({{ said }}).</p>', names=names, said=said)


def _group(run: RunFolder, key: str, results: list[Evaluated]) -> Markup:
    first = results[0].protocol
    data = first.get("data") or {}
    counts = [f"{data[k]:,} {word}" for k, word in (("num_train", "train"), ("num_test", "test")) if k in data]
    metrics = metric_columns(each.metrics for each in results)
    rows = [
        {
            "name": str(each.path.relative_to(run.path)),
            "step": _judged_step(each),
            "date": _date(each),
            "values": [_number(name, each.metrics.get(name)) for name in metrics],
        }
        for each in results
    ]
    return render(
        '<h3>{{ command }} on {{ data }}</h3><div class="scroll" tabindex="0"><table><thead><tr><th>result</th>'
        '<th class="number">step</th>{% for name in metrics %}<th class="number">{{ name }}</th>{% endfor %}'
        "<th>measured</th></tr></thead><tbody>{% for row in rows %}<tr><td>{{ row.name }}</td>"
        '<td class="number">{{ "" if row.step is none else "{:,}".format(row.step) }}</td>'
        '{% for value in row["values"] %}<td class="number">{{ value }}</td>{% endfor %}<td>{{ row.date }}</td></tr>'
        "{% endfor %}</tbody></table></div>"
        "{% for note in notes %}<p>Note: {{ note }}</p>{% endfor %}{{ worst }}"
        "{% for name, protocol in protocols %}<details><summary>Protocol {{ key }} of {{ name }}, in full</summary>"
        '<div class="table" tabindex="0"><table><tbody>{% for setting, value in protocol.items() %}<tr>'
        "<td>{{ setting }}</td><td>{{ value }}</td></tr>{% endfor %}</tbody></table></div></details>{% endfor %}",
        command=str(first.get("command")),
        data=f"{data.get('name', 'no data')}" + (f" ({', '.join(counts)})" if counts else ""),
        metrics=metrics,
        rows=rows,
        notes=list(dict.fromkeys(str(note) for each in results for note in each.protocol.get("notes") or [])),
        worst=Markup("").join(part for each in results for part in _where_it_fails(run, each)),
        key=key,
        protocols=[
            (
                str(each.path.relative_to(run.path)),
                {name: brief(value) for name, value in flat(each.protocol).items()},
            )
            for each in results
        ],
    )


def _judged_step(result: Evaluated) -> int | None:
    """The step of the weights that were judged: of a fine-tuned model its own, not that of the checkpoint before."""
    fine_tuned = result.protocol.get("command") == "eval.finetune"
    return (result.protocol.get("weights" if fine_tuned else "checkpoint") or {}).get("step")


def _where_it_fails(run: RunFolder, result: Evaluated) -> Iterator[Markup]:
    """The classes that are recognised worst, and what they are most often taken for."""
    found = result.details if isinstance(result.details, Mapping) else {}
    scores = found.get("per_class") or found.get("average_precision")
    if not isinstance(scores, Mapping):
        return
    known = sorted((value, name) for name, value in scores.items() if isinstance(value, int | float))
    taken = _taken_for(found.get("confusion"))
    rows = [(name, f"{value:.1%}", taken.get(name, "")) for value, name in known[:MOST_WORST]]
    yield render(
        '<details><summary>Where it fails: the weakest classes of {{ name }}</summary><div class="table" tabindex="0">'
        '<table><thead><tr><th>class</th><th class="number">score</th><th>most often taken for</th></tr></thead>'
        '<tbody>{% for row in rows %}<tr><td>{{ row[0] }}</td><td class="number">{{ row[1] }}</td><td>{{ row[2] }}</td>'
        "</tr>{% endfor %}</tbody></table></div></details>",
        name=str(result.path.relative_to(run.path)),
        rows=rows,
    )


def _taken_for(confusion: Any) -> dict[str, str]:
    """Of each class the other one that its images are most often given."""
    if not isinstance(confusion, Mapping):
        return {}
    classes, said = list(confusion.get("classes") or []), {}
    for own, row in enumerate(confusion.get("rows") or []):
        others = [(count, place) for place, count in enumerate(row) if place != own and count]
        if others:
            count, place = max(others)
            said[classes[own]] = f"{classes[place]} ({count / sum(row):.0%})"
    return said


def _number(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:.2%}" if name.startswith(FRACTIONS) else f"{value:.5g}"


def _date(result: Evaluated) -> str:
    date = result.protocol.get("date")
    return str(date) if date else datetime.fromtimestamp(result.written, UTC).isoformat(timespec="seconds")
