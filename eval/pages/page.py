"""One HTML file that opens offline: all that it shows is in it, and it asks nothing of anywhere.

Values reach the HTML through Jinja with everything escaped that is not Markup, and scripts as JSON in which no tag can
end (`as_json`). A Content-Security-Policy in the page refuses every request all the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).resolve().parent
DIGITS = 6
"""Significant digits of numbers in a page: more than a screen or an eye can tell apart."""


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading of its own, to which the list at the top leads."""

    id: str
    title: str
    body: Markup


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: str = "",
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
    charts: bool = True,
) -> str:
    """A whole page: heading, `lead` (Markup), links to its sections, these, a switch of dark and light.

    `scripts` and `styles` are source text of ours that is added to the page's own; `charts` brings plotly (4.8 MB) and
    the code that draws what `eval.pages.charts` makes.
    """
    own = [_text("page.js"), *([plotly_source(), _text("charts.js")] if charts else []), *scripts]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            lead=lead,
            sections=sections,
            styles=[Markup(text) for text in (_text("page.css"), *styles)],
            scripts=[Markup(text) for text in own],
        )
    )


def render(template: str, **values: Any) -> Markup:
    """A piece of a page from the text of a Jinja template. Values are escaped, unless they are Markup."""
    return Markup(_compiled(template).render(**values))


def as_json(value: Any, id: str) -> Markup:
    """A script element that holds data: JSON in which `<` and `>` are escaped, so that no text ends the element.

    Numbers that are not finite become null, others keep six significant digits.
    """
    text = json.dumps(_rounded(value), allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return render('<script type="application/json" id="{{ id }}">{{ text }}</script>', id=id, text=Markup(text))


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all: who reads it meanwhile, or after a crash, finds the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@functools.cache
def plotly_source() -> str:
    """The script that draws charts, of the installed plotly package (MIT licence, which stands at its head)."""
    return (importlib.resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


@functools.cache
def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.lru_cache(maxsize=256)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _rounded(value: Any) -> Any:
    """A value as JSON has it, with numbers in the page's digits."""
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
