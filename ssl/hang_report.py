"""What each rank says of itself, and what that tells of a run in which no step ends."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

DATA, STEP, GATHER, LOG = "waiting for data", "the step itself", "gathering metrics", "writing metrics"
STARTING = "starting"
JOINT = frozenset({STEP, GATHER})
"""Phases in which a rank may be waiting for the others."""
ROOT = str(Path(__file__).resolve().parent.parent) + os.sep


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int | None
    """The step that it is in, as metrics count them; None before the first."""
    phase: str
    seconds: float
    """For how long it has been in this phase."""
    where: str
    """The line that its main thread is at."""
    left: float = 0.0
    """Seconds that it still has to finish its step."""
    paused: bool = False
    ended: bool = False
    time: float = 0.0
    """By the clock of its machine, which also tells two reports apart."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        return f"{'before its first step' if self.step is None else f'in step {self.step}'}, {self.phase}"


def explain(
    reports: Sequence[Report], *, silent: Mapping[int, float], late: float, world_size: int | None = None
) -> str:
    """Which ranks hold the others up and where, in words.

    Ranks that are silent or have left are named, and of the others those that are in the earliest step and in a phase
    of their own; where all may be waiting for each other, the lines that they are at. With `world_size`, ranks that
    never reported are named too. `silent` and `late` are seconds.
    """
    lines = [
        f"{each.name} has been silent for {silent[each.rank]:.0f} s (stopped or its machine gone), last {each.place}"
        for each in reports
        if each.rank in silent
    ]
    lines += [f"{each.name} has left the run {each.place}" for each in reports if each.ended]
    never = sorted(set(range(world_size or 0)) - {each.rank for each in reports})
    lines += [f"{_ranks(never)} never reported"] if never else []
    living = [each for each in reports if each.rank not in silent and not each.ended]
    first = min((-1 if each.step is None else each.step for each in living), default=-1)
    behind = [each for each in living if (-1 if each.step is None else each.step) == first]
    alone = [each for each in behind if each.phase not in JOINT]
    named = alone or (behind if len(behind) < len(living) or len(reports) == 1 else [])
    lines += [f"{each.name}: {each.place} for {each.seconds:.0f} s, at {each.where}" for each in named]
    waiting = [each for each in living if each not in named]
    if waiting and not lines:
        lines.append(f"all {len(waiting)} ranks are {waiting[0].place}: the network or a device may have stopped")
    lines += _groups(waiting)
    shown = [*lines[:12], *([f"and {len(lines) - 12} lines more"] if len(lines) > 12 else [])]
    return f"no step was finished for {late:.0f} s (trainer.hang_timeout)\n  " + "\n  ".join(shown)


def _groups(waiting: Iterable[Report]) -> list[str]:
    """Ranks that are at the same line together, the smallest group first."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for each in waiting:
        groups[each.place, each.where].append(each.rank)
    return [
        f"{_ranks(ranks)}: {place}, at {where}"
        for (place, where), ranks in sorted(groups.items(), key=lambda item: len(item[1]))
    ]


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-6, 9`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    words = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def line_of(frame: FrameType | None) -> str:
    """The line that a thread is at, and below a library's the one of ours that called it."""
    if frame is None:
        return "no line of Python"
    ours: FrameType | None = frame
    while ours is not None and not _is_ours(ours):
        ours = ours.f_back
    called_from = f", called from {_place(ours)}" if ours is not None and ours is not frame else ""
    return f"{_place(frame)}{called_from}"


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(ROOT) and "site-packages" not in frame.f_code.co_filename


def _place(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    short = name.removeprefix(ROOT) if _is_ours(frame) else os.sep.join(name.split(os.sep)[-2:])
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
