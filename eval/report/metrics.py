"""The curves of a metrics.jsonl, however long: read as it grows, and never held whole."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from eval.pages.decimate import MOST_POINTS, decimated

HOLD = 4 * MOST_POINTS
"""Points of a curve at which those in memory are decimated."""
NUM_BLOCKS = 64
"""Places of a file that is too long to be read whole, from which lines are taken."""


class Curve:
    """One metric's points, at most HOLD of them; among those that were let go is neither its lowest nor its highest."""

    def __init__(self) -> None:
        self._numbers = array("d")  # step, epoch and value of each point after the other
        self.num_points = 0
        """All that were added, also those let go."""
        self.num_missing = 0
        """Rows in which the metric was null or NaN: it was not finite."""

    def add(self, step: float, epoch: float, value: float) -> None:
        """Add a point."""
        self.num_points += 1
        self._numbers.extend((step, epoch, value))
        if len(self) >= HOLD:
            self.thin(MOST_POINTS)

    def thin(self, most: int) -> None:
        """Let go of all but `most` points, the lowest and the highest of each part of the steps among those kept."""
        if len(self) > most:
            points = self._points()
            kept = points[decimated(points[:, 0], points[:, 2], most=most)]
            self._numbers = array("d", kept.tobytes())

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
        return self._points()[:, place].copy()

    def _points(self) -> np.ndarray:
        """(N, 3)"""
        return np.array(self._numbers, dtype=np.float64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._numbers) // 3


class History:
    """All curves of a run's metrics.jsonl. `read` again to take up what was written since."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, Any] = {}
        self.latest: dict[str, float] = {}
        """Of each metric the last value that is a number."""
        self.pace = Curve()
        """Seconds of training up to each step for each image of a batch, by the images per second that were logged."""
        self.num_rows = 0
        self.num_torn = 0
        """Lines that are no JSON object whose step, and epoch where there is one, are finite numbers."""
        self.skipped_bytes = 0
        """What was passed over, where a file was too long."""
        self.total_bytes = 0
        self._offset = 0
        self._paced: tuple[float, float] = (0.0, 0.0)  # step and seconds of the last point of `pace`

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

    def thin(self, most: int) -> None:
        """Let go of all but `most` points of each curve; see Curve.thin."""
        for curve in (*self.curves.values(), self.pace):
            curve.thin(most)

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
        except (ValueError, RecursionError):
            row = None
        step, epoch = (row.get("step"), row.get("epoch")) if isinstance(row, dict) else (None, None)
        if row is None or not is_number(step) or not (epoch is None or is_number(epoch)):
            self.num_torn += 1
            return
        step, epoch = float(step), math.nan if epoch is None else float(epoch)
        self.num_rows += 1
        self.last = row
        for name, value in row.items():
            if name in ("step", "epoch"):
                continue
            if is_number(value):
                self._curve(name).add(step, epoch, value)
                self.latest[name] = value
            elif value is None or isinstance(value, float):
                self._curve(name).num_missing += 1
        self._add_pace(step, epoch, row.get("images_per_second"))

    def _add_pace(self, step: float, epoch: float, speed: Any) -> None:
        before, seconds = self._paced
        if is_number(speed) and speed > 0 and step > before:  # a run that was taken back does steps again
            self._paced = (step, seconds + (step - before) / speed)
            self.pace.add(step, epoch, self._paced[1])

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


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a JSON is a finite number, and no larger than float64 holds."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False
