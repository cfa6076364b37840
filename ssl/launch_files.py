"""What the launcher and the processes that it starts tell each other: files in a folder of their own.

    <folder>/task.json, config.yaml      what is to be done, the same for every start
    <folder>/<start>/rank_3.pid          rank 3 has begun
    <folder>/<start>/rank_3.json         how rank 3 ended

Nothing heavy is imported: a process says that it has begun before it imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TASK, CONFIG = "task.json", "config.yaml"


@dataclass(frozen=True)
class Task:
    """What every process is to do: `command` with the config in the folder, in the run folder `out`."""

    command: str
    out: str
    shutdown_seconds: float
    log_level: int
    launcher: int
    """The process that the others end with."""
    began: float
    """When the command began, in seconds of time.monotonic(), which all processes of a machine read alike."""


@dataclass(frozen=True)
class Report:
    """How a process ended. `code` is the exit code that it stands for."""

    rank: int
    host: str
    code: int
    message: str = ""
    is_plain: bool = True
    """Whether the message says all, as a mistake of the user's does; else its traceback was printed."""
    step: int | None = None
    """The step that was saved when it was asked to stop."""
    is_fault: bool = False
    """Whether it was lost by a fault of its own device, where the others only missed it."""
    is_heard: bool = False
    """Whether the mistake is that of another rank, which told it before it left."""
    result: Any = None


def write_task(folder: Path, task: Task, config_yaml: str) -> None:
    """Leave the task for `read_task`."""
    (folder / TASK).write_text(json.dumps(asdict(task)))
    (folder / CONFIG).write_text(config_yaml)


def read_task(folder: Path) -> tuple[Task, Path]:
    """The task, and the file of its config."""
    return Task(**json.loads((folder / TASK).read_text())), folder / CONFIG


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of its text, or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_report(place: Path, *, code: int, **values: Any) -> None:
    """Say how this process, of the rank in its environment, ended."""
    report = Report(rank=int(os.environ["RANK"]), host=socket.gethostname(), code=code, **values)
    write_whole(place / f"rank_{report.rank}.json", json.dumps(asdict(report), default=_plain))


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, and everything else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") else str(value)


class Workers:
    """The processes of one start, as far as they have said that they have begun."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.pids: dict[int, int] = {}
        self._ended: dict[int, float] = {}
        self._told: set[tuple[int, int]] = set()

    def look(self) -> None:
        """Note who has begun and who has ended since the last look."""
        for path in self.place.glob("rank_*.pid"):
            rank = int(path.stem.removeprefix("rank_"))
            if rank not in self.pids:
                self.pids[rank] = int(path.read_text())
        for rank, pid in self.pids.items():
            if rank not in self._ended and _has_ended(pid):
                self._ended[rank] = time.time()

    def send(self, number: int) -> None:
        """Send a signal, once, to each process that lives; SIGKILL also to what it has started."""
        for rank, pid in self.pids.items():
            if rank in self._ended or (rank, number) in self._told:
                continue
            self._told.add((rank, number))
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(pid, number)  # elastic gives each a session of its own
                else:
                    os.kill(pid, number)

    def reports(self) -> dict[int, Report]:
        """By rank, how the processes ended that could still say it."""
        found = [Report(**json.loads(path.read_text())) for path in self.place.glob("rank_*.json")]
        return {report.rank: report for report in sorted(found, key=lambda report: report.rank)}

    def lost_at(self) -> float:
        """When the first process that did not come to its own end was seen to be gone, in seconds since the epoch."""
        good = {rank for rank, report in self.reports().items() if report.code == 0}
        return min((when for rank, when in self._ended.items() if rank not in good), default=time.time())


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, without taking its exit code from who waits for it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
