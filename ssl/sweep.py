"""What a sweep (`-m`) is to each of its runs, and what each leaves behind for the table at its end.

Hydra's launchers have a sweep's runs in one process, in others beside it (joblib) or on other machines (submitit). So
each run keeps its outcome in a file in its folder of the sweep, and the process that started the sweep reads them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssl.stopping import TIME_IS_UP

OUTCOME = "outcome.json"
RUNNING, DONE, FAILED, STOPPED, OUT_OF_TIME, LOST = "running", "done", "failed", "stopped", "out of time", "lost"


@dataclass(frozen=True)
class Outcome:
    """What a command made: metrics, where they or the run lie, and the number that a sweep optimizes."""

    metrics: Mapping[str, Any]
    out: str | Path | None = None
    objective: float | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep as each of its runs knows it, in whatever process."""

    folder: Path
    id: str
    """Tells its outcomes from those of an earlier sweep in the same folder."""
    host: str
    pid: int
    on_cluster: bool
    """Whether its runs are jobs of a scheduler, which live on without the process that submitted them."""
    direction: str | None
    """What an optimizing sweeper does with the objective, maximize or minimize."""
    swept: tuple[str, ...]
    """The settings in which its runs differ."""

    @property
    def name(self) -> str:
        """What the sweep is called, as the group of its runs on wandb."""
        return self.folder.name

    @property
    def is_above(self) -> bool:
        """Whether this process is a worker of the one that started the sweep, as joblib's are."""
        return (self.host, self.pid) == (socket.gethostname(), os.getppid())

    def end(self, code: int) -> None:
        """Let no further run start, and say with which exit code the sweep ends."""
        with contextlib.suppress(OSError):
            self._end_file.write_text(f"{code}\n")

    @property
    def end_code(self) -> int:
        """The exit code that a signal gave the sweep, 0 while it may go on."""
        try:
            return int(self._end_file.read_text())
        except (OSError, ValueError):
            return 0

    def outcomes(self) -> list[dict[str, Any]]:
        """What its runs have left so far, in their order."""
        found = []
        for path in [*self.folder.glob(f"*/{OUTCOME}"), *self.folder.glob(f"*/*/{OUTCOME}")]:
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text()))
        return sorted((each for each in found if each["sweep"] == self.id), key=lambda each: each["run"])

    def has_objective(self) -> bool:
        """Whether one of its runs has ended with what the sweep optimizes."""
        return any(each["objective"] is not None for each in self.outcomes())

    def running_beside(self) -> list[int]:
        """Processes of this machine, other than this one, in which runs go on."""
        here = [each for each in self.outcomes() if each["state"] == RUNNING and each["host"] == socket.gethostname()]
        return [each["pid"] for each in here if each["pid"] != os.getpid() and _is_alive(each["pid"])]

    @property
    def _end_file(self) -> Path:
        return self.folder / f"ended_{self.id}"


@dataclass
class Job:
    """One run of a sweep, as its file tells of it; only the first process of several writes."""

    path: Path
    about: dict[str, Any]
    began: float = field(default_factory=time.monotonic)

    def tell(self, state: str, *, message: str | None = None, outcome: Outcome | None = None) -> None:
        """Write how the run is or ended. A disk that is full costs the row of the table, not the run."""
        self.about |= {"state": state, "message": message, "seconds": round(time.monotonic() - self.began, 2)}
        if outcome is not None:
            self.about |= {"metrics": _plain(outcome.metrics), "objective": outcome.objective}
            self.about["out"] = self.about["out"] if outcome.out is None else str(outcome.out)
        if os.environ.get("RANK", "0") != "0":
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.about, indent=2) + "\n")
            os.replace(partial, self.path)
        except OSError as error:
            print(f"the sweep's table will lack this run: {self.path}: {error.strerror}", file=sys.stderr, flush=True)


def state_of(code: int) -> str:
    """How a run ended, by the exit code of a run of its own."""
    if code == 0:
        return DONE
    if code == TIME_IS_UP:
        return OUT_OF_TIME
    return STOPPED if code > 128 else FAILED


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them."""
    return {
        name: value if isinstance(value, int | str) else float(value)
        for name, value in metrics.items()
        if value is not None
    }
