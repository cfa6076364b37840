"""The page's recipe: the command that repeats the run, batch and learning rate, parts and settings."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from eval.pages.page import render
from eval.report.gather import RunFolder
from ssl.recipe import batch_arithmetic, lr_arithmetic
from ssl.same_run import flat


def recipe(run: RunFolder) -> Markup:
    """The command, then what it made of the settings."""
    parts = run.recipe.get("parts")
    parts = parts if isinstance(parts, Mapping) else {}
    return render(
        """{% if command %}<p>This command makes the run again{{ where }}:</p>
<pre id="command">{{ command }}</pre><button type="button" data-copy="command">Copy the command</button>
{% if num_commands > 1 %}<p>The starts of this run were typed in {{ num_commands }} ways, of which this is the last; the
table of starts below has them all.</p>{% endif %}
{% else %}<p>What was typed is not known: {{ why }}. The settings below are complete.</p>{% endif %}
<h3>Batch and learning rate</h3><ul>{% for line in arithmetic %}<li>{{ line }}</li>{% else %}
<li>Not known: config.yaml is missing or has no trainer and optim.</li>{% endfor %}</ul>
<h3>Parts</h3>{% if parts %}<dl class="facts">{% for name, value in parts.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>{% else %}
<p>recipe.json does not list the parts of this run, which is older than that list.</p>{% endif %}
{% if notes %}<h3>Notes</h3><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<h3>Parameter groups</h3>{% if groups %}<div class="scroll" tabindex="0"><table><thead><tr>
<th>parts</th><th class="number">layer</th><th class="number">tensors</th><th class="number">parameters</th>
<th class="number">lr</th><th class="number">weight decay</th></tr></thead>
<tbody>{% for group in groups %}<tr><td>{{ group.parts | join(", ") }}</td>
<td class="number">{{ "" if group.layer is none else group.layer }}</td><td class="number">{{ group.tensors }}</td>
<td class="number">{{ "{:,}".format(group.parameters) }}</td><td class="number">{{ "%.4g" % group.lr }}</td>
<td class="number">{{ "%.4g" % group.weight_decay }}</td></tr>{% endfor %}</tbody></table></div>
{% else %}<p>recipe.json is missing.</p>{% endif %}
<details><summary>All settings (config.yaml)</summary><div class="table" tabindex="0"><table><tbody>
{% for key, value in settings.items() %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}
</tbody></table></div></details>""",
        command=_command(run),
        num_commands=len({tuple(words) for words in _typed(run)}),
        where=", from the project's folder at the commit below" if run.starts else "",
        why="the run was started from Python" if run.starts else "the run is older than starts.jsonl, which keeps it",
        arithmetic=_arithmetic(run),
        parts={name: in_a_line(value) for name, value in parts.items()},
        notes=run.recipe.get("notes") or [],
        groups=run.recipe.get("groups") or [],
        settings={key: in_a_line(value) for key, value in flat(run.config).items()} if run.config else {},
    )


def _command(run: RunFolder) -> str | None:
    """The words of the last start that were typed: a run that was continued has the settings of its last start."""
    typed = _typed(run)
    return shlex.join(typed[-1]) if typed else None


def _typed(run: RunFolder) -> list[list[str]]:
    return [start.command for start in run.starts if start.command]


def _arithmetic(run: RunFolder) -> list[str]:
    """How the batch and the learning rate came about."""
    trainer, optim = run.config.get("trainer") or {}, run.config.get("optim") or {}
    if "global_batch_size" not in trainer or "base_lr" not in optim:
        return []
    world_size = (run.saved.card.get("world_size") if run.saved else None) or 1
    batch = batch_arithmetic(
        trainer["global_batch_size"], world_size=world_size, device_batch_size=trainer.get("device_batch_size")
    )
    scaling = optim.get("scaling", "linear")
    lines = [str(batch), lr_arithmetic(optim["base_lr"], global_batch_size=batch.global_batch_size, scaling=scaling)]
    per_epoch = run.steps_per_epoch
    if per_epoch:
        lines.append(f"{per_epoch:,.0f} steps are an epoch" + (f"; {run.stop_step:,} in all" if run.stop_step else ""))
    schedule = (run.recipe.get("parts") or {}).get("schedule") if isinstance(run.recipe.get("parts"), Mapping) else None
    if isinstance(schedule, Mapping):
        lines.append("schedule: " + in_a_line(schedule))
    return lines


def in_a_line(value: Any) -> str:
    """A value of a config in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_a_line(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "; ".join(in_a_line(each) for each in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
