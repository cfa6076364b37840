"""The page's facts: data and what of it could not be read, environment and starts, failed steps and hangs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from markupsafe import Markup

from eval.pages.page import render
from eval.report.failed_steps import failed_step
from eval.report.gather import RunFolder
from eval.report.page_recipe import in_a_line

MOST_FILES = 200


def data(run: RunFolder) -> Markup:
    """The set, and the images that could not be read, by name."""
    settings = run.config.get("data") or {}
    card = run.saved.card if run.saved else {}
    bad = card.get("bad_images") or {}
    facts = {
        "name": settings.get("name"),
        "root": settings.get("root"),
        "images trained on": f"{card['num_images']:,}" if isinstance(card.get("num_images"), int) else None,
        "limit": settings.get("limit"),
        "image size": (card.get("backbone") or {}).get("image_size"),
        "channels": settings.get("channels"),
        "mean": card.get("mean") or settings.get("mean"),
        "std": card.get("std") or settings.get("std"),
        "checksum of the set": card.get("images"),
        "seed": run.config.get("seed"),
    }
    files = [str(why) for why in bad.values()] if isinstance(bad, Mapping) else [str(bad)]
    return render(
        '<dl class="facts">{% for name, value in facts.items() if value is not none %}<dt>{{ name }}</dt>'
        "<dd>{{ value }}</dd>{% endfor %}</dl>"
        "{% if not saved %}<p>No checkpoint has been written yet; counts and unreadable images stand in it.</p>"
        "{% elif files %}<p>{{ number }} images could not be read, and another image took the place of each:</p>"
        '<ul class="small">{% for each in files %}<li>{{ each }}</li>{% endfor %}</ul>'
        "{% if more %}<p>... and {{ more }} more, in state.json of the checkpoint.</p>{% endif %}"
        "{% else %}<p>All images that were asked for could be read.</p>{% endif %}",
        facts={name: None if value is None else in_a_line(value) for name, value in facts.items()},
        saved=run.saved is not None,
        files=files[:MOST_FILES],
        number=f"{len(files):,}",
        more=max(len(files) - MOST_FILES, 0),
    )


def environment(run: RunFolder) -> Markup:
    """Versions, devices, and each start with how it ended."""
    card = run.saved.card if run.saved else {}
    rows = []
    for start in run.starts:
        end = start.end or {}
        versions = start.about.get("versions")
        rows.append(
            {
                "date": start.date,
                "step": f"{start.step:,}",
                "end": f"{end['how']} at step {end.get('step'):,}" if end.get("how") else "no end was noted",
                "device": f"{start.about.get('world_size', '?')} x {start.about.get('device', '?')}",
                "host": start.about.get("host"),
                "commit": start.about.get("commit"),
                "versions": in_a_line({k: v for k, v in versions.items() if k != "commit"}) if versions else "",
                "command": shlex.join(start.command) if start.command else "from Python",
            }
        )
    trainer = run.config.get("trainer") or {}
    facts = {
        "seed": run.config.get("seed"),
        "precision": trainer.get("precision"),
        "ranks": card.get("world_size"),
        "versions of the last checkpoint": in_a_line(card["versions"]) if card.get("versions") else None,
        "last checkpoint": f"step {run.saved.step:,}, {run.saved.folder.name}" if run.saved else None,
        "out": run.config.get("out"),
    }
    return render(
        '<dl class="facts">{% for name, value in facts.items() if value is not none %}<dt>{{ name }}</dt>'
        "<dd>{{ value }}</dd>{% endfor %}</dl>"
        '{% if rows %}<h3>Starts</h3><div class="scroll" tabindex="0"><table><thead><tr><th>date</th>'
        '<th class="number">from step</th><th>ended</th><th>devices</th><th>host</th><th>commit</th><th>versions</th>'
        "<th>command</th></tr></thead><tbody>"
        '{% for row in rows %}<tr><td>{{ row.date }}</td><td class="number">{{ row.step }}</td><td>{{ row.end }}</td>'
        "<td>{{ row.device }}</td><td>{{ row.host }}</td><td><code>{{ row.commit or 'not known' }}</code></td>"
        "<td>{{ row.versions }}</td><td><code>{{ row.command }}</code></td></tr>{% endfor %}</tbody></table></div>"
        "{% else %}<p>starts.jsonl is missing: this run is older than it, so that its starts, versions and devices are "
        "known only from its checkpoints.</p>{% endif %}",
        facts=facts,
        rows=rows[-50:],
    )


def incidents(run: RunFolder) -> Markup:
    """Steps for which the run ended, and what was written when it hung."""
    failed = [(path.relative_to(run.path), failed_step(path)) for path in run.failed]
    hangs = [(path.relative_to(run.path), path.read_text(errors="replace")[:6000]) for path in run.hangs[:16]]
    return render(
        "{% if failed %}<h3>Steps for which the run ended</h3><ul>{% for path, said in failed %}<li>"
        "<code>{{ path }}</code>: {{ said }}</li>{% endfor %}</ul>"
        "<p><code>python -m ssl.replay failed=&lt;that folder&gt;</code> does such a step again.</p>"
        "{% else %}<p>No step failed for good.</p>{% endif %}"
        "{% if hangs %}<h3>Hangs</h3>{% for path, text in hangs %}<details><summary>{{ path }}</summary>"
        "<pre>{{ text }}</pre></details>{% endfor %}{% else %}<p>No start of this run hung.</p>{% endif %}",
        failed=failed,
        hangs=hangs,
    )
