"""What the comparison reads of each run folder: recipe, curves, results, and how the run stands."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.compare import Result
from eval.pages.decimate import MOST_POINTS
from eval.protocols import read_result
from eval.report.comparison_results import by_protocol
from eval.report.comparison_sweep import Job, SweepFolder, read_sweep
from eval.report.failed_steps import failed_step
from eval.report.gather import LOST, UNSOUND, RunFolder, gather, is_sound
from eval.report.metrics import Curve, History
from ssl.same_run import flat
from ssl.starts import COMPLETE, FAILED
from ssl.sweep import DONE, RUNNING

DEEPEST = 4
"""So many levels of folders below a given one are searched for runs."""
MOST_RUNS = 1000
MOST_BYTES = 2_000_000
"""Of each metrics.jsonl, some 0.05 s; of a longer one a sample is read."""
MOST_IN_ALL = 120_000
"""Points that a page has of all curves, and that are kept of all runs for each metric: some MB for 200 runs."""
FEWEST = 40
"""Points of a curve, however many there are."""
RUNS_A_LINE = 10
"""After so many runs a line says how far the reading is."""
NOT_TRAINED, UNREADABLE = "not trained", "unreadable"


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, and what turns a step into epochs, images and hours."""

    history: History = field(default_factory=History)
    batch_size: int = 0
    """Images of a step, over all devices; 0 where the config does not tell."""
    median_speed: float | None = None
    """Images per second, over all that were read."""

    @property
    def metrics(self) -> dict[str, Curve]:
        """By name, those that have a point."""
        return {name: curve for name, curve in self.history.curves.items() if len(curve)}

    @property
    def last_step(self) -> int:
        return int(self.history.last.get("step", 0))

    @property
    def last_epoch(self) -> float:
        return float(self.history.last.get("epoch") or 0.0)

    def axes(self, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Where steps (N,) stand on each x axis: step, epoch, images seen and hours of training, each (N,).

        Hours are those of the steps, from the images per second that were logged: neither saving nor evaluation.
        """
        per_epoch = self.last_step / self.last_epoch if self.last_epoch else math.nan
        images = steps * float(self.batch_size or math.nan)
        return {"step": steps, "epoch": steps / per_epoch, "images": images, "hours": self._hours(steps)}

    def _hours(self, steps: np.ndarray) -> np.ndarray:
        pace = self.history.pace
        if not len(pace) or not self.batch_size:
            return np.full(len(steps), math.nan)
        hours = pace.values * self.batch_size / 3600
        return np.interp(steps, np.concatenate([[0], pace.steps]), np.concatenate([[0.0], hours]))


@dataclass(frozen=True)
class State:
    """How a run stands, in a word such as complete, running, failed or not trained; and why, where there is more."""

    word: str
    why: str = ""


@dataclass(frozen=True)
class Run:
    """A row of the comparison: a run, a run of a sweep that made none, or a baseline that was only judged."""

    name: str
    path: Path
    state: State
    config: Mapping[str, Any] = field(default_factory=dict)
    """By dotted keys; empty where there was no training."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """Of recipe.json, by dotted keys."""
    curves: Curves = field(default_factory=Curves)
    results: Mapping[str, Sequence[Result]] = field(default_factory=dict)
    """By protocol."""
    job: Job | None = None
    problems: Sequence[str] = field(default_factory=list)
    """What could not be read."""


def read_runs(given: Sequence[Path]) -> tuple[list[Run], list[SweepFolder]]:
    """The runs that folders hold, and the sweeps among the folders.

    A folder is a run, a sweep, or has runs in it. Raises ValueError where it is none of them.
    """
    sweeps: list[SweepFolder] = []
    found: dict[Path, tuple[Path, Job | None]] = {}
    without: dict[str, tuple[Path, Job]] = {}
    for folder in given:
        sweep = read_sweep(folder) if folder.is_dir() else None
        if sweep is None:
            for path in find_runs(folder):
                found.setdefault(path.resolve(), (path, None))
            continue
        sweeps.append(sweep)
        found |= {job.out.resolve(): (job.out, job) for job in sweep.jobs if job.out is not None}
        for job in sweep.jobs:
            if job.out is None:
                without[f"{folder.name}/{job.number}"] = (folder / str(job.number), job)
    if len(found) + len(without) > MOST_RUNS:
        raise ValueError(f"{len(found) + len(without):,} runs are too many for a page; give at most {MOST_RUNS:,}")
    rows = [(name, path, job) for name, (path, job) in zip(short_names(list(found)), found.values())]
    rows += [(name, path, job) for name, (path, job) in without.items()]
    most = most_points(len(rows))
    read: list[Run] = []
    for number, (name, path, job) in enumerate(rows, 1):
        read += _read(path, name, job, most=most)
        if number % RUNS_A_LINE == 0:
            print(f"{number:,} of {len(rows):,} runs are read", flush=True)
    return read, sweeps


def most_points(num_curves: int) -> int:
    """Points that each of so many curves may have."""
    return max(FEWEST, min(MOST_POINTS, MOST_IN_ALL // max(num_curves, 1)))


def find_runs(folder: Path) -> list[Path]:
    """A run folder, or those in a folder. Raises ValueError where there are none."""
    if not folder.exists():
        raise ValueError(f"{folder} does not exist; give run folders, such as runs/a runs/b, or a sweep's folder")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file; give run folders, or compare the results of evaluations with python -m eval.compare"
        )
    found = list(_below(folder, DEEPEST))
    if not found:
        raise ValueError(
            f"{folder} is no run, no sweep, and has none in it (a run has config.yaml and metrics.jsonl, "
            "or eval/*.json); python -m ssl.pretrain makes one"
        )
    return found


def read_run(path: Path, *, name: str, job: Job | None = None, most: int = MOST_POINTS) -> list[Run]:
    """The row of a run, and one more for each baseline that was judged in its folder. What cannot be read is told.
    `most` points are kept of each curve.
    """
    problems: list[str] = []
    if path.is_file():  # what an evaluation in a sweep made
        results = _sound(_results([path], problems), problems)
        state = _state_of_job(job) or State("evaluated")
        return [Run(name, path, state, results=by_protocol(results), job=job, problems=problems)]
    folder = gather(path, most_bytes=MOST_BYTES)
    speed = folder.history.curves.get("images_per_second")
    median_speed = float(np.median(speed.values)) if speed else None
    folder.history.thin(most)
    trained = bool(folder.config) or bool(folder.history.num_rows)
    problems += [each for each in folder.problems if trained and not each.endswith("is missing")]
    results = [Result(each.path, each.metrics, each.protocol) for each in folder.results]
    results = results or _sound(_results(_result_files(path), problems), problems)
    problems = list(dict.fromkeys(problems))
    own = [each for each in results if not trained or not _is_baseline(each)]
    batch = (folder.config.get("trainer") or {}).get("global_batch_size")
    rows = [
        Run(
            name,
            path,
            _state_of_job(job) or (_state(folder) if trained else _state_without_training(job, results)),
            config=flat(folder.config) if folder.config else {},
            parts=flat(folder.recipe.get("parts") or {}),
            curves=Curves(folder.history, batch if isinstance(batch, int) else 0, median_speed),
            results=by_protocol(own),
            job=job,
            problems=problems,
        )
    ]
    baselines: dict[str, list[Result]] = {}
    for result in results:
        if trained and _is_baseline(result):
            baselines.setdefault(str(result.protocol.get("subject")), []).append(result)
    for subject, judged in baselines.items():
        rows.append(Run(f"{subject} (judged in {name})", path, State(NOT_TRAINED), results=by_protocol(judged)))
    return rows


def short_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: each without the folders that all lie in."""
    whole = [path.absolute() for path in paths]
    if len(whole) == 1:
        return ["/".join(whole[0].parts[-2:])]
    common = Path(os.path.commonpath([path.parent for path in whole])) if whole else Path()
    return [str(path.relative_to(common)) for path in whole]


def _read(path: Path, name: str, job: Job | None, *, most: int) -> list[Run]:
    """The rows of a run. One whose files hold something else than a run writes is told, and costs no other its row."""
    try:
        return read_run(path, name=name, job=job, most=most)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        return [Run(name, path, State(UNREADABLE, f"{type(error).__name__}: {error}"), job=job)]


def _below(folder: Path, levels: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    if levels == 0:
        return
    for child in sorted(folder.iterdir(), key=_natural):
        if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
            yield from _below(child, levels - 1)


def _natural(path: Path) -> list[str | int]:
    """What orders names by the numbers in them: run2 before run10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", path.name))]


def _is_run(folder: Path) -> bool:
    trained = (folder / "config.yaml").is_file() and any(
        (folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "recipe.json")
    )
    return trained or bool(_result_files(folder))


def _result_files(folder: Path) -> list[Path]:
    """The results in a run folder and of what was fine-tuned from it; or those that lie in the folder itself."""
    found = [*sorted(folder.glob("eval/*.json")), *sorted(folder.glob("finetune/**/eval/*.json"))]
    return found or [path for path in sorted(folder.glob("*.json")) if _is_result(path)]


def _is_result(path: Path) -> bool:
    try:
        read_result(path)
    except ValueError:
        return False
    return True


def _results(paths: Sequence[Path], problems: list[str]) -> list[Result]:
    found = []
    for path in paths:
        try:
            result = read_result(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        found.append(Result(path, result["metrics"], result["protocol"]))
    return found


def _sound(results: Sequence[Result], problems: list[str]) -> list[Result]:
    """Results whose protocols have the parts that the page reads, as evaluations write them."""
    problems += [f"{each.path} {UNSOUND}" for each in results if not is_sound(each.protocol)]
    return [each for each in results if is_sound(each.protocol)]


def _is_baseline(result: Result) -> bool:
    """Whether it judges raw pixels or an untrained backbone, and no weights of a run."""
    return not result.protocol.get("checkpoint") and result.protocol["command"] != "eval.finetune"


def _state_of_job(job: Job | None) -> State | None:
    """How a run of a sweep ended, where its own folder does not tell better."""
    if job is None or job.state in (DONE, RUNNING):
        return None
    return State(job.state, (job.message or "").strip())


def _state_without_training(job: Job | None, results: Sequence[Result]) -> State:
    if job is not None and not results:
        return State(job.state)
    return State(NOT_TRAINED, " and ".join(dict.fromkeys(str(each.protocol.get("subject")) for each in results)))


def _state(folder: RunFolder) -> State:
    if folder.state == COMPLETE:
        return State(COMPLETE)
    if folder.state == FAILED:
        return State(FAILED, folder.message or (failed_step(folder.failed[-1]) if folder.failed else ""))
    if folder.state == LOST:
        return State(LOST, f"killed, or its machine went away, after step {folder.step:,}")
    end = folder.stop_step
    where = f"at step {folder.step:,}" + (f" of {end:,}" if end else "")
    hung = f"; {folder.hangs[0].parent} tells of a hang" if folder.hangs else ""
    return State(folder.state, f"{where}{hung}" + (f"; {folder.message}" if folder.message else ""))
