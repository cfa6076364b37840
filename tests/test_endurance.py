"""A long run stays what it was; the whole of it is benchmarks/endurance.py's, 20,000 steps long."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import ssl.training
from benchmarks import endurance
from benchmarks.endurance import Point, Window
from ssl.pretrain import run
from tests.forks import start
from tests.test_pretrain import METHODS, SHORT, composed


@pytest.mark.parametrize("method", METHODS)
def test_open_files_and_threads_are_flat_over_checkpoints_and_evaluations(tmp_path: Path, method: str, monkeypatch):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    seen: dict[int, tuple[int, int]] = {}

    class Watched(ssl.training.Tracker):
        def log(self, step, metrics):
            super().log(step, metrics)
            seen[step] = len(os.listdir("/proc/self/fd")), threading.active_count()

    monkeypatch.setattr(ssl.training, "Tracker", Watched)
    words = [
        *METHODS[method],
        *SHORT,
        "trainer.epochs=16",
        "trainer.checkpoint_every_steps=2",
        "online.health.sample=24",
    ]
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    run(composed(*words, "trainer.eval_every_epochs=1", "trainer.keep_last=1", "data.in_memory_gib=0"), out=tmp_path)
    assert list(seen) == list(range(1, 49))
    assert len({seen[step] for step in range(4, 48)}) == 1  # the last step's batch has no threads behind it
    assert threading.active_count() <= before[1]
    assert len(os.listdir("/proc/self/fd")) <= before[0]


def windows(**changes: list[float]) -> list[Window]:
    """Ten windows of 100 steps with these numbers."""
    plain = {"mib": [50.0] * 10, "files": [7] * 10, "threads": [3] * 10, "steps_per_second": [20.0] * 10, **changes}
    return [Window(last_step=100 * (k + 1), **{name: values[k] for name, values in plain.items()}) for k in range(10)]


def test_a_slope_is_that_of_the_line_behind_the_first_two_windows():
    growing = windows(mib=[0.0, 1.0, *(50 + 0.3 * k for k in range(8))])
    assert endurance.slope(growing, "mib") == pytest.approx(3.0)  # 0.3 in each 100 steps
    assert endurance.slope(growing, "files") == 0
    assert endurance.slope(growing[:3], "mib") == 0
    assert "+3.000 MiB" in endurance.table(growing)


def test_files_and_threads_that_grow_are_told():
    assert endurance.grew(windows(files=[3, 5, *[7] * 8])) == []
    assert endurance.grew(windows(files=[3, 5, *[7] * 7, 9])) == ["open files: 7 up to step 300, 9 at the end"]
    assert endurance.grew(windows(threads=list(range(10)))) == ["threads: 2 up to step 300, 9 at the end"]


def test_windows_take_the_median_of_memory_and_speed_and_the_fewest_files_and_threads_before_the_end():
    points = [Point(step, mib=float(step), files=step % 3, threads=4) for step in range(1, 21)]
    lines = [{"step": step, "images_per_second": 16.0 * step} for step in range(1, 21)]
    first, second = endurance.windows(points, lines, steps=20, count=2)
    assert first == Window(last_step=10, mib=5.5, files=0, threads=4, steps_per_second=5.5)
    assert (second.mib, second.steps_per_second) == (15.0, 15.5)
    assert endurance.windows(points[10:], lines, steps=20, count=2) == [second]


def test_a_run_is_watched_until_it_ends(tmp_path: Path):
    out = tmp_path / "run"
    words = endurance.settings("mae", steps=40, out=out)
    child = start(["ssl.pretrain", *words, "loader.threads=1"], home=tmp_path, said=tmp_path / "said")
    assert child.pid is not None
    try:
        points = endurance.watch(child.pid, child.is_alive, out / "metrics.jsonl", every=0.01)
        child.join(60)
    finally:
        child.kill()
    assert child.exitcode == 0, (tmp_path / "said").read_text()[-3000:]
    assert len(list((out / "pictures").iterdir())) >= 10  # and a checkpoint each
    assert points[-1].step <= 40
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert min(point.files for point in points) > 3
    assert endurance.last_line(out / "metrics.jsonl")["step"] == 40
