"""A table of results, as a person, Markdown and a spreadsheet want it."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRACTIONS = ("top1", "top5", "map", "accuracy")
"""How metrics begin that are shares of one: shown as percentages. All others are shown as numbers."""


@dataclass(frozen=True)
class Table:
    """Rows of plain values under named columns; None is an empty cell."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def text(self) -> str:
        """Columns as wide as they must be, numbers to the right, for a terminal."""
        cells = [list(self.columns), *self._shown()]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        right = [self._is_number(column) for column in range(len(self.columns))]
        lines = []
        for row in cells:
            padded = [
                cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in zip(row, widths, right)
            ]
            lines.append("  ".join(padded).rstrip())
        return "\n".join(lines)

    def markdown(self) -> str:
        """A table for a README or an issue."""
        lines = [self.columns, ["---:" if self._is_number(column) else "---" for column in range(len(self.columns))]]
        lines += [[cell.replace("|", "\\|") for cell in row] for row in self._shown()]
        return "\n".join("| " + " | ".join(row) + " |" for row in lines)

    def csv(self) -> str:
        """The values as they are, not rounded."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return stream.getvalue().rstrip("\n")

    def write(self, path: Path) -> None:
        """Write it whole, as CSV or Markdown by the end of the file's name, else as text."""
        text = {".csv": self.csv, ".md": self.markdown}.get(path.suffix, self.text)()
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OSError(f"{path} cannot be written: {error.strerror}; give another out=") from error

    def _shown(self) -> list[list[str]]:
        return [[shown(name, value) for name, value in zip(self.columns, row)] for row in self.rows]

    def _is_number(self, column: int) -> bool:
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)


def shown(name: str, value: Any) -> str:
    """A value as it stands in a table: shares as percentages, other numbers with four digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1%}" if name.lower().startswith(FRACTIONS) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def metric_columns(results: Iterable[dict[str, Any]], *, most: int | None = None) -> list[str]:
    """The names of all metrics, in the order in which they are first met, top1 and top5 before; at most `most`."""
    results = list(results)
    names = dict.fromkeys(["top1", "top5"]) | dict.fromkeys(name for metrics in results for name in metrics)
    present = [name for name in names if any(name in metrics for metrics in results)]
    return present if most is None else present[:most]
