"""starts.jsonl: when and how a run was started each time, and how each start ended. Nothing here stops a run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from ssl.version import versions

NAME = "starts.jsonl"
TYPED = "SSL_TYPED"
"""Environment variable in which a command tells the processes that it starts what was typed, and for which folder."""
COMPLETE, STOPPED, ENDED, FAILED = "complete", "stopped", "ended", "failed"
"""How a start ends: at the run's last step; asked to; by an evaluation's verdict; for a mistake."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    step: int
    """Completed steps that it went on from."""
    stop_step: int
    date: str
    command: list[str] | None
    """Words that a shell takes; None where the run was started from Python."""
    about: dict[str, Any]
    """Versions, commit, device, number of ranks, host, dimensions of the backbone's features."""
    end: dict[str, Any] | None = None
    """How it ended (`how`, `step`, `date`, `message`); None while it runs, and where it was killed."""


def note_command(module: str, out: Path) -> None:
    """Remember what was typed for the run folder `out`, also for the processes that will be started for it."""
    words = sys.argv[1:]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        words = list(HydraConfig.get().overrides.task)
        if not any(word.startswith("out=") for word in words):
            words.append(f"out={out}")
    os.environ[TYPED] = json.dumps({"out": str(out), "command": ["python", "-m", module, *words]})


def note_start(out: Path, *, step: int, stop_step: int, device: str, world_size: int, num_features: int | None) -> None:
    """Add a line for a start that goes on from `step`."""
    known = versions()
    _append(
        out,
        {
            "event": "start",
            "date": _now(),
            "step": step,
            "stop_step": stop_step,
            "command": _typed(out),
            "commit": known["commit"],
            "versions": {**known, "python": sys.version.split()[0]},
            "device": device,
            "world_size": world_size,
            "num_features": num_features,
            "host": socket.gethostname(),
        },
    )


def note_end(out: Path, *, step: int, how: str, message: str | None = None) -> None:
    """Add a line on how the last start ended."""
    _append(out, {"event": "end", "date": _now(), "step": step, "how": how, "message": message})


def read_starts(out: Path) -> list[Start]:
    """The starts of a run in order; none where it was made before they were noted. Lines that are torn are left out."""
    starts: list[Start] = []
    for row in _rows(out / NAME):
        if row.get("event") == "start" and isinstance(row.get("step"), int):
            own = ("event", "step", "stop_step", "date", "command")
            command = row.get("command")
            starts.append(
                Start(
                    step=row["step"],
                    stop_step=row["stop_step"] if isinstance(row.get("stop_step"), int) else 0,
                    date=str(row.get("date")),
                    command=[str(word) for word in command] if isinstance(command, list) else None,
                    about={key: value for key, value in row.items() if key not in own},
                )
            )
        elif row.get("event") == "end" and starts:
            last = starts.pop()
            starts.append(Start(last.step, last.stop_step, last.date, last.command, last.about, end=row))
    return starts


def _append(out: Path, row: Mapping[str, Any]) -> None:
    """One write of one line, after a line break where an earlier one was torn."""
    path = out / NAME
    try:
        with path.open("ab+", buffering=0) as file:
            torn = False
            if file.tell():
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be written (%s); the run goes on without", path, error.strerror or error)


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    rows = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def _typed(out: Path) -> list[str] | None:
    try:
        typed = json.loads(os.environ.get(TYPED, ""))
        return [str(word) for word in typed["command"]] if typed["out"] == str(out) else None
    except (ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
