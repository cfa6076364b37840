"""Whether a long run stays what it was: memory, open files, threads and steps per second, in windows of its steps.

    python -m benchmarks.endurance [--steps 20000] [--method mae]

A small run of the real command, with logging, pictures, evaluations, checkpoints, and wandb offline, is watched from
outside through /proc, which only Linux has. Memory is that of the run's own process, without wandb's. The command ends
with an error where the number of open files or of threads grew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import ROOT, about
from benchmarks.memory import resident
from benchmarks.start import SMALL_DECODER, environment
from ssl.data.threads import available_cores

NUM_WINDOWS = 20
BATCH_SIZE = 16
SMALL_RESNET = ("model=resnet10", "model.args={layers:[1,1,1,1],channels:[8,8,16,16]}")
METHODS = {
    "mae": ("method=mae", "model=vit_micro", *SMALL_DECODER),
    "simclr": ("method=simclr", *SMALL_RESNET),
    "relative_location": ("method=relative_location", *SMALL_RESNET, "method.hidden_dim=32"),
}
CHANGES = {"mib": "MiB", "files": "files", "threads": "threads"}
TAIL = 4096
"""Bytes at a file's end in which its last line lies."""


@dataclass(frozen=True)
class Point:
    """The run at one moment."""

    step: int
    mib: float
    files: int
    threads: int


@dataclass(frozen=True)
class Window:
    """Some of the run's steps: medians of memory and speed, and the fewest open files and threads, which are those
    between two saves or evaluations.
    """

    last_step: int
    mib: float
    files: int
    threads: int
    steps_per_second: float


def settings(method: str, *, steps: int, out: Path) -> list[str]:
    """What the command is given: a checkpoint and an evaluation in each window."""
    window = max(steps // NUM_WINDOWS, 1)
    epochs = steps * BATCH_SIZE / 512
    return [
        *METHODS[method],
        *["data=embedded", "data.source.num_train=512", "data.source.num_test=64", f"out={out}"],
        *[f"trainer.global_batch_size={BATCH_SIZE}", f"trainer.epochs={epochs}", "trainer.precision=fp32"],
        *["trainer.device=cpu", f"trainer.checkpoint_every_steps={window}", "wandb.mode=offline"],
        *[f"trainer.eval_every_epochs={epochs / NUM_WINDOWS}", "online.health.sample=64", "launch=none"],
    ]


def watch(process: int, is_alive: Callable[[], bool], metrics: Path, *, every: float = 0.2) -> list[Point]:
    """Look at a process every so many seconds, from its first logged step until it has ended."""
    points = []
    while is_alive():
        step = last_line(metrics).get("step", 0)
        mib, _ = resident(process)
        status = _status(process)
        if step and mib and status is not None:
            points.append(Point(step, mib, *status))
        time.sleep(every)
    return points


def last_line(metrics: Path) -> dict:
    """The last whole line of metrics.jsonl, empty before there is one."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - TAIL, 0))
        lines = file.read().decode().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1]) if lines else {}


def _status(process: int) -> tuple[int, int] | None:
    """Open files and threads; None where the process has ended."""
    try:
        return len(os.listdir(f"/proc/{process}/fd")), len(os.listdir(f"/proc/{process}/task"))
    except OSError:
        return None


def windows(points: Sequence[Point], lines: Sequence[dict], *, steps: int, count: int = NUM_WINDOWS) -> list[Window]:
    """The run in `count` equal parts; one that was over before it was looked at is left out."""
    found = []
    for number in range(count):
        first, last = steps * number // count, steps * (number + 1) // count
        seen = [point for point in points if first < point.step <= last and point.step < steps]  # not of its end
        rates = [line["images_per_second"] / BATCH_SIZE for line in lines if first < line["step"] <= last]
        if seen and rates:
            found.append(
                Window(
                    last_step=last,
                    mib=statistics.median(point.mib for point in seen),
                    files=min(point.files for point in seen),
                    threads=min(point.threads for point in seen),
                    steps_per_second=statistics.median(rates),
                )
            )
    return found


def slope(found: Sequence[Window], name: str) -> float:
    """The least-squares change of a window's number per 1,000 steps, once the run has warmed up: from the third of its
    windows on. 0 where there are fewer than two left.
    """
    rest = found[2:]
    if len(rest) < 2:
        return 0.0
    steps = [window.last_step / 1000 for window in rest]
    return statistics.linear_regression(steps, [getattr(window, name) for window in rest]).slope


def grew(found: Sequence[Window]) -> list[str]:
    """What must not grow and did, from the third window to the last, in words."""
    if len(found) < 4:
        return []
    early, late = found[2], found[-1]
    return [
        f"{what}: {getattr(early, name)} up to step {early.last_step:,}, {getattr(late, name)} at the end"
        for name, what in (("files", "open files"), ("threads", "threads"))
        if getattr(late, name) > getattr(early, name)
    ]


def table(found: Sequence[Window]) -> str:
    """The windows in columns, and the slopes below them."""
    lines = [f"{'to step':>10} {'MiB':>8} {'open files':>11} {'threads':>8} {'steps/s':>8}"]
    lines += [
        f"{window.last_step:>10,} {window.mib:>8.1f} {window.files:>11} {window.threads:>8} "
        f"{window.steps_per_second:>8.1f}"
        for window in found
    ]
    speed = slope(found, "steps_per_second") / statistics.mean(window.steps_per_second for window in found)
    changes = ", ".join(f"{slope(found, name):+.3f} {what}" for name, what in CHANGES.items())
    lines.append(f"per 1,000 steps, from the third line on: {changes}, speed {speed:+.2%}")
    return "\n".join(lines)


def endure(method: str, *, steps: int, threads: int) -> list[Window]:
    """Run `steps` steps and watch them. Raises RuntimeError with what the run said where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "run", Path(folder) / "said"
        words = [*settings(method, steps=steps, out=out), f"loader.threads={threads}"]
        command = [sys.executable, "-m", "ssl.pretrain", *words]
        with said.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(threads), stdout=stream, stderr=stream)
            try:
                points = watch(process.pid, lambda: process.poll() is None, out / "metrics.jsonl")
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read_text()[-2000:]}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return windows(points, lines, steps=steps)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--method", choices=METHODS, default="mae")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the run")
    parser.set_defaults(rounds=1)
    given = parser.parse_args(words)
    print("\n".join(f"{name}: {value}" for name, value in about(given).items()), flush=True)
    found = endure(given.method, steps=given.steps, threads=given.threads)
    print(table(found))
    for problem in grew(found):
        print(f"GREW: {problem}")
    return 1 if grew(found) else 0


if __name__ == "__main__":
    sys.exit(main())
