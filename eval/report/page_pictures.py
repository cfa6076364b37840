"""The page's pictures: of each kind the first and the newest that the run left, and how to make those that it lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from markupsafe import Markup

from eval.look.result import Look
from eval.pages.page import render
from eval.pages.pictures import embedded
from eval.report.gather import RunFolder

KINDS = {
    "views": ("Views", "What the method sees of the first images: a column for each image, a row for each view."),
    "reconstructions": (
        "Reconstructions",
        "Of the first images: the input, what the encoder sees of it (masked parts are gray), and what the method "
        "makes of that.",
    ),
    "pretext": ("Pretext task", "Patches and where the method places them."),
    "neighbours": (
        "Nearest neighbours",
        "The left column are images of the run, the others the images whose features are most like theirs.",
    ),
    "map": ("Map of the features", "Each point is an image; images with like features lie together."),
}


BEGIN, END = '<div data-look="{{ name }}" data-step="{{ step }}">', "</div><!-- of a look -->"
"""Around a part that was made for the page, so that it is found again: no text has END in it, as texts are escaped."""
MADE = re.compile(r'(<div data-look="(\w+)" data-step="(\d+)">.*?' + re.escape(END) + ")", re.DOTALL)


def pictures(
    run: RunFolder,
    *,
    made: Mapping[str, Look],
    left_out: Mapping[str, str],
    kept: Mapping[str, Markup],
    during: bool = False,
) -> Markup:
    """A part for each kind. `made` are pictures of the last checkpoint that were made for this page, by kind;
    `left_out` says why others were not, and `kept` are such parts of an earlier page. `during` is true of a page that
    the run itself makes.
    """
    names = [*KINDS, *sorted({*run.pictures, *made, *left_out, *kept} - KINDS.keys())]
    parts = [kept.get(name) or _kind(run, name, made.get(name), left_out.get(name), during) for name in names]
    return Markup("").join(parts)


def kept_parts(page: str, step: int) -> dict[str, Markup]:
    """The parts of an earlier page of the run, by kind, whose pictures were made for it of the checkpoint of `step`."""
    return {name: Markup(part) for part, name, of in MADE.findall(page) if int(of) == step}


def _kind(run: RunFolder, name: str, made: Look | None, left_out: str | None, during: bool) -> Markup:
    title, words = KINDS.get(name, (name, ""))
    taken = run.pictures.get(name, [])
    shown: list[tuple[str, Path | np.ndarray]] = []
    if taken:
        (first, first_path), (last, last_path) = taken[0], taken[-1]
        shown = [(f"Step {last:,}" + (", the newest" if last != first else ""), last_path)]
        if last != first and name != "views":  # those of the first images are the same at each step
            shown = [(f"Step {first:,}, the first that was kept", first_path), *shown]
    if made is not None:
        step = run.saved.step if run.saved else run.step
        shown = [
            (f"Step {step:,}, the last checkpoint{': ' + each.replace('_', ' ') if each else ''}", picture)
            for each, picture in made.pictures.items()
        ]
    if not shown and not _applies(run, name) and left_out is None:
        return Markup("")
    figures = [_figure(f"{title}, {caption.lower()}. {words}", caption, picture) for caption, picture in shown]
    part = render(
        '<h3 id="picture-{{ id }}">{{ title }}</h3><p class="soft">{{ words }}</p>'
        '{% if left_out %}<p class="warning">Left out: {{ left_out }}</p>{% endif %}'
        '{% if figures %}<div class="pair">{% for figure in figures %}{{ figure }}{% endfor %}</div>'
        "{% elif not left_out %}<p>{{ why }}</p>{% endif %}"
        "{% if lines %}<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}",
        lines=_lines(run, name, made),
        id=name,
        title=title,
        words=words,
        figures=figures,
        why=_why_missing(run, name, during),
        left_out=left_out,
    )
    if made is None or run.saved is None:
        return part
    return render(BEGIN, name=name, step=run.saved.step) + part + Markup(END)


def _lines(run: RunFolder, name: str, made: Look | None) -> list[str]:
    """What a look says of itself, without the page that only `eval.look` writes."""
    if made is None:
        return []
    files = tuple(f"{name}_{page}.html" if page else f"{name}.html" for page in made.pages)
    lines = [line for line in made.lines if not line.startswith(files)]
    if made.pages:
        lines.append(f"python -m eval.look ckpt={shlex.quote(str(run.path))} what={name} makes a page of it to move in")
    return lines


def _figure(alt: str, caption: str, picture: Path | np.ndarray) -> Markup:
    try:
        return embedded(picture, alt, caption=caption)
    except (OSError, ValueError) as error:
        return render('<p class="problem">{{ caption }}: {{ error }}</p>', caption=caption, error=str(error)[:300])


def _applies(run: RunFolder, name: str) -> bool:
    """Whether the run's method would have pictures of this kind."""
    method = run.config.get("method")
    target = str(method.get("_target_", "")) if isinstance(method, Mapping) else ""
    if name == "reconstructions":
        return target.endswith(("MAE", "SimMIM"))
    return target.endswith("RelativeLocation") if name == "pretext" else True


def _why_missing(run: RunFolder, name: str, during: bool) -> str:
    path = shlex.quote(str(run.path))
    if name in ("neighbours", "map", "pretext"):
        why = "There was no time for it within report.max_share. " if during else "It was not asked for. "
        return f"{why}python -m eval.report {path} makes it from the last checkpoint."
    if not (run.config.get("trainer") or {}).get("pictures", True):
        return "The run was told to make no pictures (trainer.pictures=false)."
    return "None has been made yet: the run makes them at its checkpoints."
