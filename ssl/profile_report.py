"""A profile in about ten lines, the last of which says what to change first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ssl.data.memory import sample_sizes
from ssl.data.threads import available_cores
from ssl.profiling import ALL_REDUCE, Profile

if TYPE_CHECKING:
    from ssl.data.loader import Loader

DATA_BOTTLENECK = 0.1  # of the step's time spent waiting for data
IDLE = 0.4  # of the traced time in which the device has nothing to do


@dataclass(frozen=True)
class DataFacts:
    """How the images reach the step, for the advice."""

    threads: int
    cores: int
    in_memory: bool
    short_side: int | None
    """The median of a sample; None where the images are held in memory."""
    view_side: int
    """Pixels of a view's longer side."""


def data_facts(loader: Loader) -> DataFacts:
    """How a loader's images reach the step."""
    short_side = None
    if not loader.in_memory:
        sizes = sample_sizes(loader.source, num=32)  # (n, 2)
        short_side = int(median(sizes.min(axis=1))) if len(sizes) else None
    return DataFacts(
        threads=loader.threads,
        cores=available_cores(),
        in_memory=loader.in_memory,
        short_side=short_side,
        view_side=max(loader.size),
    )


def advice(profile: Profile, data: DataFacts) -> str:
    """One line: what to change first."""
    waiting = profile.shares["waiting for data"]
    if waiting > DATA_BOTTLENECK:
        return f"data is the bottleneck, {waiting:.0%} of the step: {_data_advice(data)}"
    if profile.busy is not None and 1 - profile.busy > IDLE:
        return (
            f"the device idles for {1 - profile.busy:.0%} of the traced time and data is not why: give it more at once "
            "(a larger trainer.global_batch_size or device_batch_size), or trainer.compile=true"
        )
    return "none, data keeps up with the step"


def _data_advice(data: DataFacts) -> str:
    if data.threads < data.cores:
        return f"loader.threads={data.threads} leaves cores free, try loader.threads={data.cores}"
    if data.in_memory:
        return f"all {data.cores} cores crop images that are in memory already; the step needs a host with more cores"
    enough = -(-data.view_side * 8 // 7)  # 256 for views of 224
    if data.short_side is None or data.short_side > enough:
        found = f"images with a short side of {data.short_side}" if data.short_side else "large images"
        return (
            f"{found} are decoded for views of {data.view_side}; make them small once with `python -m ssl.prepare "
            f"short_side={enough}`, then data=parquet"
        )
    return f"all {data.cores} cores decode images that are small already; the step needs a host with more cores"


def summary(profile: Profile, facts: DataFacts, *, trace: Path) -> str:
    """About ten lines: speed, the share of each part, the most expensive operators, advice."""
    lines = [
        f"profile of {profile.steps} steps on {profile.device}: {profile.seconds * 1e3:,.1f} ms per step, "
        f"{profile.images_per_second:,.0f} images/s; trace of {profile.steps} more in {trace}"
    ]
    for name, share in profile.shares.items():
        note = " (what backward does not hide)" if name == ALL_REDUCE else ""
        lines.append(f"  {name:<17}{share:6.1%}{note}")
    lines.append("most expensive: " + ", ".join(f"{name} {share:.0%}" for name, share in profile.operators))
    lines.append(f"advice: {advice(profile, facts)}")
    return "\n".join(lines)


def write_summary(profile: Profile, loader: Loader, folder: Path) -> str:
    """Write the summary into `folder`, beside the trace; returns it."""
    text = summary(profile, data_facts(loader), trace=folder / "trace.json.gz")
    (folder / "summary.txt").write_text(text + "\n")
    return text
