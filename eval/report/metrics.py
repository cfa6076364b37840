"""The curves of a metrics.jsonl, however long: read as it grows, and never held whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eval.pages.decimate import MOST_POINTS, decimated

HOLD = 4 * MOST_POINTS
"""Points of a curve at which those in memory are decimated."""
NUM_BLOCKS = 64
"""Places of a file that is too long to be read whole, from which lines are taken."""


class Curve:
    """One metric's points, at most HOLD of them; among those that were let go is neither its lowest nor its highest."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float, float]] = []
        self.num_points = 0
        """All that were added, also those let go."""
        self.num_missing = 0
        """Rows in which the metric was null: it was not finite."""

    def add(self, step: float, epoch: float, value: float) -> None:
        """Add a point."""
        self.num_points += 1
        self._points.append((step, epoch, value))
        if len(self._points) >= HOLD:
            steps, _, values = np.array(self._points).T
            self._points = [self._points[place] for place in decimated(steps, values)]

    @property
    def steps(self) -> np.ndarray:
        """(N,) float64, as are `epochs` and `values`."""
        return self._column(0)

    @property
    def epochs(self) -> np.ndarray:
        return self._column(1)

    @property
    def values(self) -> np.ndarray:
        return self._column(2)

    def _column(self, place: int) -> np.ndarray:
        return np.array([point[place] for point in self._points], dtype=np.float64)

    def __len__(self) -> int:
        return len(self._points)


class History:
    """All curves of a run's metrics.jsonl. `read` again to take up what was written since."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.latest: dict[str, float] = {}
        """Of each metric the last value that is a number."""
        self.num_rows = 0
        self.num_torn = 0
        """Lines that are no JSON object with a step."""
        self.skipped_bytes = 0
        """What was passed over, where a file was too long."""
        self.total_bytes = 0
        self._offset = 0

    def read(self, path: Path, *, most_bytes: int | None = None) -> None:
        """Add the whole lines that were written since the last call.

        Of more than `most_bytes` only the lines in equally spaced parts of the file are read, among them the first and
        the last ones. A file that has become shorter is read from its beginning. Raises OSError where it cannot be.
        """
        size = path.stat().st_size
        if size < self._offset:
            self.__init__()
        with path.open("rb") as file:
            unread = size - self._offset
            if most_bytes is None or unread <= most_bytes:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written
                    self._offset += len(line)
                    self._add(line)
            else:
                self._offset = self._sample(file, size, max(most_bytes // NUM_BLOCKS, 4096))
        self.total_bytes = size

    def describe(self) -> str:
        """What of the file the curves leave out; nothing where they have all of it."""
        if not self.skipped_bytes:
            return ""
        share = 1 - self.skipped_bytes / max(self.total_bytes, 1)
        return (
            f"The curves are drawn from {share:.0%} of metrics.jsonl, taken from {NUM_BLOCKS} equally spaced parts of "
            f"its {self.total_bytes / 1e6:,.0f} MB; peaks between them are missing. python -m eval.report reads all."
        )

    def _sample(self, file: Any, size: int, block: int) -> int:
        """Read equally spaced blocks between the offset and `size`; returns where the last whole line ends."""
        end = self._offset
        for number in range(NUM_BLOCKS):
            start = self._offset + round((size - block - self._offset) * number / (NUM_BLOCKS - 1))
            start = max(start, end)
            file.seek(start)
            data = file.read(min(block, size - start))
            if start > end:  # in the middle of a line
                head, _, rest = data.partition(b"\n")
                self.skipped_bytes += start - end + len(head) + 1
                data, start = rest, start + len(head) + 1
            whole = data[: data.rfind(b"\n") + 1]
            for line in whole.splitlines():
                self._add(line)
            end = max(start + len(whole), end)
        return end

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.num_torn += 1
            return
        epoch = row.get("epoch")
        epoch = float(epoch) if _is_number(epoch) else math.nan
        self.num_rows += 1
        self.first = self.first or row
        self.last = row
        for name, value in row.items():
            if name in ("step", "epoch"):
                continue
            if _is_number(value):
                self._curve(name).add(step, epoch, value)
                self.latest[name] = value
            elif value is None:
                self._curve(name).num_missing += 1

    def _curve(self, name: str) -> Curve:
        if name not in self.curves:
            self.curves[name] = Curve()
        return self.curves[name]


def skips(curve: Curve) -> Iterator[tuple[float, float, int]]:
    """(step, epoch, number) of the logged rows at which the count of skipped steps had grown since the row before."""
    before = 0.0
    for step, epoch, value in zip(curve.steps, curve.epochs, curve.values, strict=True):
        if value > before:
            yield step, epoch, round(value - before)
        before = value  # a run that was taken back to a checkpoint may count again


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
