"""The page of one run: sections from what `eval.report.gather` has read, made so that none can spoil another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup

from eval.look.result import Look
from eval.pages.page import Section, page, render
from eval.report.advice import warnings_of
from eval.report.budget import Budget
from eval.report.gather import LOST, RUNNING, RunFolder
from eval.report.page_curves import features, training
from eval.report.page_evaluations import evaluations
from eval.report.page_facts import data, environment, incidents
from eval.report.page_pictures import pictures
from eval.report.page_recipe import recipe
from ssl.run_report import Moment
from ssl.starts import COMPLETE, ENDED, FAILED, STOPPED
from ssl.tracking import duration

STATES = {
    RUNNING: "running",
    COMPLETE: "complete",
    STOPPED: "stopped before its end",
    ENDED: "ended by an evaluation",
    FAILED: "failed",
    LOST: "ended without a word (killed, or its machine was lost)",
}


@dataclass(frozen=True)
class Spent:
    """What the page costs the run that it tells of."""

    budget: Budget
    train_seconds: float
    max_share: float
    sample: int
    pictures_failed: str | None = None


def run_page(
    run: RunFolder,
    *,
    moment: Moment | None = None,
    spent: Spent | None = None,
    made: Mapping[str, Look] | None = None,
    left_out: Mapping[str, str] | None = None,
    kept: Mapping[str, Markup] | None = None,
) -> str:
    """The page as HTML. `moment` is where the run is, as it knows itself better than its folder does; `spent` is told
    at the foot of a page that was made while it ran. `made` are looks at the last checkpoint by name, and `left_out`
    says of others why they were not made. `kept` are those of an earlier page that is made again, and no new ones.
    """
    state = moment.state if moment else run.state
    sections = [
        _section("warnings", "What to look at", lambda: _warnings(run, state)),
        _section("recipe", "Recipe and command", lambda: recipe(run)),
        _section("training", "Training", lambda: training(run)),
        _section("features", "Features during training", lambda: features(run)),
        _section(
            "pictures",
            "What it sees and knows",
            lambda: pictures(run, made=made or {}, left_out=left_out or {}, kept=kept or {}, during=spent is not None),
        ),
        _section("evaluations", "Evaluations", lambda: evaluations(run)),
        _section("data", "Data and unreadable images", lambda: data(run)),
        _section("environment", "Environment and starts", lambda: environment(run)),
        _section("incidents", "Failed steps and hangs", lambda: incidents(run)),
        _section("about", "About this page", lambda: _about(run, spent, is_renewed=kept is not None)),
    ]
    lead = _guarded(lambda: _lead(run, state, moment))
    return page(_title(run), sections, lead=lead)


def _section(id: str, title: str, body: Callable[[], Markup]) -> Section:
    return Section(id, title, _guarded(body))


def _guarded(body: Callable[[], Markup]) -> Markup:
    """A part of the page, or why it is missing: whatever a folder holds, the other parts are shown."""
    try:
        return body()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:300]
        return render('<p class="problem">This part could not be made ({{ said }}).</p>', said=said)


def _title(run: RunFolder) -> str:
    return f"Run {run.path.parent.name}/{run.path.name}" if run.path.parent.name else f"Run {run.path.name}"


def _lead(run: RunFolder, state: str, moment: Moment | None) -> Markup:
    step = max(run.step, moment.step if moment else 0)
    total = moment.stop_step if moment else run.stop_step
    last, latest = run.history.last, run.history.latest
    seconds = moment.train_seconds if moment else run.train_seconds
    counted = moment.step if moment else run.saved.step if run.saved else 0  # the step up to which those are
    tiles = [("step", f"{step:,}" + (f" of {total:,}" if total else ""))]
    if isinstance(last.get("epoch"), int | float):
        tiles.append(("epoch", f"{last['epoch']:.4g}"))
    for name, form in (("loss", "{:.4g}"), ("accuracy", "{:.1%}"), ("knn_top1", "{:.1%}"), ("rankme", "{:.4g}")):
        if name in latest:
            tiles.append(
                ({"knn_top1": "online kNN top-1", "rankme": "RankMe"}.get(name, name), form.format(latest[name]))
            )
    if "images_per_second" in latest:
        tiles.append(("images/s", f"{latest['images_per_second']:,.0f}"))
    if seconds:
        tiles.append(("training time" + (f" up to step {counted:,}" if counted < step else ""), duration(seconds)))
        if state == RUNNING and counted and total and total > step:
            tiles.append(("left, at this pace", duration(seconds / counted * (total - step))))
    message = moment.message if moment else run.message
    return render(
        '<p><span class="state state-{{ state }}">{{ words }}</span> {{ what }}</p>\n'
        "{% if message %}<p>{{ message }}</p>\n{% endif %}"
        '<ul class="tiles">{% for name, value in tiles %}<li><b>{{ value }}</b>{{ name }}</li>\n{% endfor %}</ul>\n'
        '<p class="soft small">Made at {{ now }} from <code>{{ path }}</code></p>',
        state=state,
        words=STATES.get(state, state),
        what=_what(run),
        message=message,
        tiles=tiles,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        path=run.path,
    )


def _what(run: RunFolder) -> str:
    """`SimCLR of resnet18 on cifar10 (50,000 images)`."""
    method = run.config.get("method")
    target = method.get("_target_", "") if isinstance(method, Mapping) else ""
    kind = str(target).rpartition(".")[2] or ("Fine-tuning" if "recipe" in run.config else "Training")
    card = run.saved.card if run.saved else {}
    backbone = card.get("backbone") or {}
    model = backbone.get("architecture") or (run.config.get("model") or {}).get("name") or "an unknown backbone"
    name = (run.config.get("data") or {}).get("name", "unknown data")
    count = f" ({card['num_images']:,} images)" if isinstance(card.get("num_images"), int) else ""
    return f"{kind} of {model} on {name}{count}"


def _warnings(run: RunFolder, state: str) -> Markup:
    return render(
        "{% for each in warnings %}<div class=\"{{ 'problem' if each.is_severe else 'warning' }}\">"
        "<b>{{ each.what }}</b> What helps: {{ each.advice }}.</div>\n"
        "{% else %}<p>Nothing stands out: the checks of loss, skipped steps, features, data wait, throughput, warm-up, "
        "unreadable images and evaluations found no sign of trouble.</p>\n{% endfor %}"
        "{% if problems %}<p>What could not be read of this folder:</p><ul>{% for each in problems %}"
        "<li>{{ each }}</li>{% endfor %}</ul>{% endif %}",
        warnings=warnings_of(run, state),
        problems=run.problems,
    )


def _about(run: RunFolder, spent: Spent | None, *, is_renewed: bool) -> Markup:
    again = f"python -m eval.report {shlex.quote(str(run.path))}"
    lines = []
    if is_renewed:
        lines.append("It was made again from the run folder when a result was added, with the pictures that it had.")
    elif spent is None:
        lines.append("It was made by python -m eval.report, from the run folder.")
    else:
        budget = spent.budget
        share = budget.seconds / spent.train_seconds if spent.train_seconds else 0.0
        lines.append(
            f"It was made by the run itself. The {budget.num_pages} pages and {budget.num_pictures} sets of feature "
            f"pictures before this one took {budget.seconds:.2f} s, {share:.2%} of the {duration(spent.train_seconds)} "
            f"of training (report.max_share allows {spent.max_share:.0%}; the last page of a run is made in any case)."
        )
        if budget.num_left_out:
            lines.append(
                f"At {budget.num_left_out} of the checkpoints the page was left as it was, for want of time or room."
            )
        if spent.sample == 0:
            lines.append("Neighbours and map are not made during this run (report.sample=0).")
        elif spent.pictures_failed:
            lines.append(f"Neighbours and map could not be made ({spent.pictures_failed}).")
        elif budget.pictures_left_out:
            lines.append(
                "Neighbours and map would not have been within that share, and were left out at "
                f"{budget.pictures_left_out} of the checkpoints."
            )
    return render(
        "{% for line in lines %}<p>{{ line }}</p>\n{% endfor %}<p>This command makes it again, with neighbours and map "
        'of the last checkpoint:</p><pre id="again">{{ again }}</pre>'
        '<button type="button" data-copy="again">Copy</button>'
        '<p class="soft small">The page holds all that it shows and asks nothing of any server. Charts are drawn by '
        "plotly.js (MIT licence), most of its 5 MB.</p>",
        lines=lines,
        again=again,
    )
