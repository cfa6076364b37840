"""metrics.jsonl: one line per logged step, in order, each once, whatever the disk does meanwhile."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class MetricsFile:
    """Lines appended to a file at once, or as soon as there is room again; a run never stops for them.

    What could not be written is kept in memory, all of it: a line has some 300 bytes. A line that was written in part
    goes on where it broke off. Lines after `resume_step`, which a run that was killed wrote beyond its last checkpoint,
    are dropped at the start. Raises OSError where that cannot be done.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        self.closed = False
        self._waiting = bytearray()
        self._told = False
        keep_lines_until(path, resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, which has only what JSON has."""
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, as far as there is room for them now."""
        try:
            # Opened each time: a folder that was away for a while, as network ones are, is found again.
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    del self._waiting[: file.write(self._waiting) or 0]
        except OSError as error:
            if not self._told:
                self._told = True
                log.warning(
                    "%s cannot be written (%s); the run goes on, and its lines wait in memory until there is room",
                    *(self.path, error.strerror or error),
                )
            return
        if self._told:
            self._told = False
            log.warning("%s is written again, and complete", self.path)

    def close(self) -> None:
        """Try once more, and say what was never written."""
        if self.closed:
            return
        self.closed = True
        self.flush()
        if self._waiting:
            lines = self._waiting.splitlines()
            log.warning(
                "%s is not complete: %d lines up to step %s were never written. The last of them: %s",
                *(self.path, len(lines), json.loads(lines[-1])["step"], lines[-1].decode()),
            )


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file whose step is later than `step`, and torn ones.

    As a rule they are the last ones, and the file is cut there, which needs no room; else it is replaced whole.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    kept = b"".join(line + b"\n" for line in data.splitlines() if _step_of(line) <= step)
    if kept == data:
        return
    if data.startswith(kept):
        os.truncate(path, len(kept))
        return
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if _step_of(line) < math.inf:
                yield json.loads(line)


def last_step(path: Path) -> int:
    """The latest step of a metrics file; 0 where it has none."""
    return max((int(row["step"]) for row in rows_of(path)), default=0)


def _step_of(line: bytes) -> float:
    """The step of a line, infinite where the line is torn or has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
