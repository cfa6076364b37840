"""Where the time of a step goes: `trainer.profile_steps=N`.

After WARMUP steps, N steps are timed part by part, and N more run under torch's profiler, whose own cost would spoil
the times. On a GPU the parts are timed on its own clock, between events in its queue, so that nothing waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

log = logging.getLogger(__name__)

WARMUP = 5
NUM_OPERATORS = 5
PARTS = ("waiting for data", "copy to device", "augment", "forward", "backward", "optimizer")
OUTSIDE = "evaluation and saving"
"""What is no part of a step: its time does not count."""
ALL_REDUCE = "all-reduce"
OTHER = "other"

Intervals = list[tuple[float, float]]


def steps_needed(profile_steps: int) -> int:
    """How many steps a run must have for a profile of so many."""
    return WARMUP + 2 * profile_steps


def is_profiled(profile_steps: int | None, *, start_step: int, stop_step: int) -> bool:
    """Whether this start of a run is profiled. ValueError for a run that is too short, a warning for what is left of
    one.
    """
    if profile_steps is None or start_step >= stop_step:
        return False
    needed = steps_needed(profile_steps)
    if stop_step - start_step >= needed:
        return True
    words = f"trainer.profile_steps={profile_steps} needs {needed} steps (to warm up, to time, to trace)"
    if start_step == 0:
        raise ValueError(f"{words} and the run has {stop_step}; lower it, or lengthen the run")
    log.warning("%s and only %d are left; no profile is written", words, stop_step - start_step)
    return False


@dataclass(frozen=True)
class Profile:
    """What was found out about some steps."""

    device: str
    steps: int
    seconds: float
    """Of one step."""
    images_per_second: float
    shares: dict[str, float]
    """Of the step's time, by part; they sum to one."""
    operators: list[tuple[str, float]]
    """The most expensive ones with their shares of all operators' time."""
    busy: float | None
    """Share of the traced time in which the GPU computed or copied; None on a CPU."""


class StepProfiler:
    """Times the parts of some steps, traces some more, and reports. Off before, between and after, a part costs a
    comparison.

    `report` is called once, with the profile, when `folder` holds `trace.json.gz`.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        folder: Path,
        device: torch.device,
        global_batch_size: int,
        report: Callable[[Profile], None],
    ) -> None:
        self.num_steps, self.folder, self.device = num_steps, folder, device
        self.global_batch_size, self.report = global_batch_size, report
        self._done = 0
        self._clock: _PartClock | None = None
        self._timed: tuple[float, dict[str, float]] | None = None
        self._profiler: Any = None
        self._traced_from = 0.0

    def part(self, name: str) -> AbstractContextManager[Any]:
        """What surrounds a part of the step, one of PARTS or OUTSIDE; parts do not nest."""
        if self._clock is not None:
            return self._clock.part(name)
        return contextlib.nullcontext() if self._profiler is None else record_function(name)

    def step_done(self) -> None:
        """Go on to timing, to tracing and to the report when their step has come."""
        self._done += 1
        if self._done == WARMUP:
            self._clock = _PartClock(self.device)
        elif self._done == WARMUP + self.num_steps:
            assert self._clock is not None
            self._timed, self._clock = self._clock.stop(), None
            self._start_trace()
        elif self._done == WARMUP + 2 * self.num_steps:
            self._finish()

    def close(self) -> None:
        """End a trace that is still running, without a report."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _start_trace(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._traced_from = time.perf_counter()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        traced = time.perf_counter() - self._traced_from
        profiler = self._profiler
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        assert self._timed is not None
        seconds, parts = self._timed
        events = list(profiler.events())
        shares = step_shares(parts, total=seconds, all_reduce=exposed_all_reduce(events) / 1e6 / traced)
        on_gpu = self.device.type == "cuda"
        self.report(
            Profile(
                device=torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
                steps=self.num_steps,
                seconds=seconds / self.num_steps,
                images_per_second=self.num_steps * self.global_batch_size / seconds,
                shares=shares,
                operators=expensive_operators(profiler.key_averages(), on_gpu=on_gpu),
                busy=min(length(_on_device(events)) / 1e6 / traced, 1.0) if on_gpu else None,
            )
        )


class _PartClock:
    """Seconds by part, from now to `stop`: of the host on a CPU, of the device's queue on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._start = self._now()

    @contextlib.contextmanager
    def part(self, name: str):
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds in all, and by part; what lies outside of steps counts in neither."""
        end = self._now()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        parts: dict[str, float] = defaultdict(float)
        for name, start, stop in self._marks:
            parts[name] += self._between(start, stop)
        total = self._between(self._start, end) - parts.pop(OUTSIDE, 0.0)
        return max(total, 1e-9), dict(parts)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


def step_shares(parts: Mapping[str, float], *, total: float, all_reduce: float) -> dict[str, float]:
    """Each part's share of `total` seconds; `all_reduce`, a share, is taken out of backward, and the rest is other."""
    shares = {name: parts.get(name, 0.0) / total for name in PARTS}
    all_reduce = min(all_reduce, shares["backward"])
    shares["backward"] -= all_reduce
    if all_reduce:
        shares[ALL_REDUCE] = all_reduce
    return shares | {OTHER: max(1.0 - sum(shares.values()), 0.0)}


def exposed_all_reduce(events: Iterable[Any]) -> float:
    """Microseconds of all-reduce that no other work hides, from a profiler's events.

    On a GPU the kernels of NCCL against all other kernels and copies; else gloo's work against torch's operators.
    """
    events = list(events)
    on_device = [event for event in events if _is_device(event)]
    if on_device:
        reducing = [event for event in on_device if re.search("nccl.*allreduce", event.name, re.IGNORECASE)]
        working = [event for event in on_device if "nccl" not in event.name.lower()]
    else:
        reducing = [event for event in events if event.name.startswith("gloo:all_reduce")]
        working = [event for event in events if event.name.startswith("aten::")]
    return length(without(_intervals(reducing), _intervals(working)))


def expensive_operators(averages: Iterable[Any], *, on_gpu: bool) -> list[tuple[str, float]]:
    """The operators that take most time by themselves, with their share of all: the device's time on a GPU."""
    own = {
        average.key: average.self_device_time_total if on_gpu else average.self_cpu_time_total
        for average in averages
        if average.device_type == DeviceType.CPU and average.key not in (*PARTS, OUTSIDE)
    }
    total = sum(own.values()) or 1.0
    first = sorted(own, key=lambda name: -own[name])[:NUM_OPERATORS]
    return [(name, own[name] / total) for name in first if own[name] > 0]


def _is_device(event: Any) -> bool:
    """Work on the device, not a range of ours that is drawn there as well."""
    return event.device_type == DeviceType.CUDA and event.name not in (*PARTS, OUTSIDE)


def _on_device(events: Iterable[Any]) -> Intervals:
    return merged(_intervals(event for event in events if _is_device(event)))


def _intervals(events: Iterable[Any]) -> Intervals:
    return [(event.time_range.start, event.time_range.end) for event in events]


def merged(intervals: Intervals) -> Intervals:
    """Their union as intervals that do not touch, in order."""
    union: Intervals = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def without(intervals: Intervals, others: Intervals) -> Intervals:
    """The parts of `intervals` in which none of `others` is."""
    left: Intervals = []
    others = merged(others)
    for start, end in merged(intervals):
        for begin, stop in others:
            if stop <= start or begin >= end:
                continue
            if begin > start:
                left.append((start, begin))
            start = max(start, stop)
        if start < end:
            left.append((start, end))
    return left


def length(intervals: Intervals) -> float:
    """How long the union of intervals is."""
    return sum(end - start for start, end in merged(intervals))
