"""A table that its reader sorts and filters, and whose columns they choose: HTML, and the script and style it needs.

Without the script it is a plain table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from eval.pages.page import render

HERE = Path(__file__).resolve().parent
CHOOSE_FROM = 5
"""From so many columns on they can be chosen."""
FILTER_FROM = 3
"""From so many rows on they can be filtered."""


@dataclass(frozen=True)
class Column:
    """What stands above a column; `lines` are smaller, under the title. A hidden one is in the chooser."""

    title: str
    lines: Sequence[str] = ()
    hidden: bool = False


@dataclass(frozen=True)
class Cell:
    """What stands in a cell: `text`, smaller `lines` under it, and what it is sorted by.

    Numbers stand before texts, cells without a `value` last in both directions. `marked` highlights it.
    """

    text: str
    value: float | str | None = None
    lines: Sequence[str] = ()
    marked: bool = False

    @property
    def number(self) -> str | None:
        """The value as HTML has it, where it is a number."""
        if isinstance(self.value, str) or self.value is None or math.isnan(self.value):
            return None
        return repr(float(self.value)).replace("inf", "Infinity")


MISSING = Cell("–")


@dataclass(frozen=True)
class Row:
    """Cells, the first of which names the row; `key` is how scripts call it."""

    cells: Sequence[Cell]
    key: str = ""


@dataclass(frozen=True)
class SortableTable:
    """A table under a caption, in a box that scrolls; `id` is unique in its page."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row] = field(default_factory=list)

    def html(self) -> Markup:
        """The table with its controls. Everything in it is escaped."""
        return render(
            TEMPLATE,
            table=self,
            filtered=len(self.rows) >= FILTER_FROM,
            chosen=len(self.columns) >= CHOOSE_FROM or any(column.hidden for column in self.columns),
        )


def text_cell(text: str | None, *, lines: Sequence[str] = (), marked: bool = False) -> Cell:
    """A text, sorted with the numbers in it as numbers; nothing is missing."""
    return MISSING if text is None else Cell(text, text, lines, marked)


def number_cell(value: float | None, text: str | None = None, *, lines: Sequence[str] = ()) -> Cell:
    """A number, shown as `text` or with four digits; None and NaN are missing."""
    if value is None or math.isnan(value):
        return MISSING
    return Cell(f"{value:.4g}" if text is None else text, value, lines)


def script() -> str:
    """The script that all sortable tables of a page share."""
    return (HERE / "sortable.js").read_text(encoding="utf-8")


def style() -> str:
    """The style of all sortable tables of a page."""
    return (HERE / "sortable.css").read_text(encoding="utf-8")


TEMPLATE = """\
<div class="sortable" id="{{ table.id }}">
<div class="sortable-tools" hidden>
{% if filtered %}
<label>Rows that contain <input type="search" autocomplete="off" spellcheck="false"></label>
{% endif %}
{% if chosen %}
<details class="sortable-columns"><summary>Columns</summary>
<div>
{% for column in table.columns[1:] %}
<label><input type="checkbox" data-column="{{ loop.index }}" {{ '' if column.hidden else 'checked' }}>
{{ column.title }}{% for line in column.lines %} <small>{{ line }}</small>{% endfor %}</label>
{% endfor %}
</div>
</details>
{% endif %}
<span role="status"></span>
</div>
<div class="sortable-box" role="region" tabindex="0" aria-label="{{ table.caption }}">
<table>
<caption>{{ table.caption }}</caption>
<thead><tr>
{% for column in table.columns %}
<th scope="col" {{ 'hidden' if column.hidden else '' }}><button type="button">{{ column.title }}</button>
{%- for line in column.lines %}<small>{{ line }}</small>{% endfor %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr data-key="{{ row.key }}">
{%- for cell in row.cells %}
{%- set tag = 'th' if loop.first else 'td' -%}
<{{ tag }}{% if loop.first %} scope="row"{% endif %}{% if table.columns[loop.index0].hidden %} hidden{% endif %}
{%- if cell.number is not none %} data-number="{{ cell.number }}"
{%- elif cell.value is string %} data-text="{{ cell.value }}"{% endif %}
{%- if cell.marked %} class="marked"{% endif %}>{{ cell.text }}
{%- for line in cell.lines %}<small>{{ line }}</small>{% endfor %}</{{ tag }}>
{%- endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</div>
"""
