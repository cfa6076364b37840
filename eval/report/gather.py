"""Everything that a run folder tells, read for its page. What cannot be read is named, and the rest goes on."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from eval.protocols import read_result
from eval.report.metrics import History, is_number
from ssl.checkpoint import steps_saved
from ssl.checkpoint_card import CARD, read_config, read_text
from ssl.run_lock import is_held
from ssl.starts import COMPLETE, ENDED, FAILED, STOPPED, Start, read_starts

T = TypeVar("T")
MOST_RESULTS = 200
GROUPS = ("trainer", "data", "optim", "model")
"""Of config.yaml, those that are read."""
PICTURE = re.compile(r"(?P<name>.+)_(?P<step>\d{8})\.png")
RUNNING, LOST = "running", "lost"
UNSOUND = "has a protocol that no evaluation writes, and is left out"


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint."""

    step: int
    folder: Path
    written: float
    """By the file system's clock, in seconds."""
    card: dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """A result of an evaluation."""

    path: Path
    written: float
    metrics: dict[str, Any]
    protocol: dict[str, Any]
    details: Any


@dataclass
class RunFolder:
    """A run, as its folder tells of it."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    """parts, groups and notes."""
    history: History = field(default_factory=History)
    starts: list[Start] = field(default_factory=list)
    saved: Saved | None = None
    pictures: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    """By name, each with its steps in order."""
    results: list[Evaluated] = field(default_factory=list)
    failed: list[Path] = field(default_factory=list)
    """Folders of steps for which the run ended."""
    hangs: list[Path] = field(default_factory=list)
    is_locked: bool = False
    report: dict[str, Any] = field(default_factory=dict)
    """What earlier refreshes of the page cost: see eval.report.budget."""
    problems: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def step(self) -> int:
        """The last step that is known of."""
        steps = [int(self.history.last.get("step", 0)), self.saved.step if self.saved else 0]
        return max(steps)

    @property
    def steps_per_epoch(self) -> float | None:
        step, epoch = self.history.last.get("step"), self.history.last.get("epoch")
        per_epoch = step / epoch if step and epoch else None
        return per_epoch if per_epoch is not None and math.isfinite(per_epoch) else None

    @property
    def stop_step(self) -> int | None:
        """The step at which the run is to end, as its last start said, or else its settings."""
        if self.starts and self.starts[-1].stop_step:
            return self.starts[-1].stop_step
        trainer = self.config.get("trainer") or {}
        per_epoch, epochs, steps = self.steps_per_epoch, trainer.get("epochs"), trainer.get("steps")
        ends = [int(steps)] if is_number(steps) and steps else []
        if is_number(epochs) and epochs and per_epoch and is_number(epochs * per_epoch):
            ends.append(max(round(epochs * per_epoch), 1))
        return min(ends) if ends else None

    @property
    def state(self) -> str:
        """running, complete, stopped, ended, failed; lost where it was killed or its machine went away."""
        if self.is_locked:
            return RUNNING
        end = self.starts[-1].end if self.starts else None
        if end is not None and end.get("how") in (COMPLETE, STOPPED, ENDED, FAILED):
            return str(end["how"])
        if self.stop_step is not None and self.saved is not None and self.saved.step >= self.stop_step:
            return COMPLETE
        return FAILED if self.failed else LOST if self.starts else STOPPED

    @property
    def message(self) -> str | None:
        """What ended the last start."""
        end = self.starts[-1].end if self.starts else None
        return None if end is None else end.get("message")

    @property
    def train_seconds(self) -> float | None:
        return self.saved.card.get("train_seconds") if self.saved else None


def gather(path: Path, *, history: History | None = None, most_bytes: int | None = None) -> RunFolder:
    """Read a run folder. `history` is what an earlier call has read of its metrics; of more than `most_bytes` that are
    new a sample is read.
    """
    run = RunFolder(path, history=history or History())
    run.config = _part(run, "config.yaml", {}, lambda: _config(run))
    run.recipe = _part(run, "recipe.json", {}, lambda: _recipe(path / "recipe.json"))
    if (path / "metrics.jsonl").exists():
        _part(run, "metrics.jsonl", None, lambda: run.history.read(path / "metrics.jsonl", most_bytes=most_bytes))
    run.starts = _part(run, "starts.jsonl", [], lambda: read_starts(path))
    run.saved = _part(run, "the newest checkpoint", None, lambda: _saved(path))
    run.pictures = _part(run, "pictures", {}, lambda: _pictures(path / "pictures"))
    run.results = _part(run, "eval", [], lambda: _results(run))
    run.failed = _part(
        run, "failed", [], lambda: sorted(step.parent for step in (path / "failed").glob("**/step.json"))
    )
    run.hangs = _part(run, "hang", [], lambda: sorted((path / "hang").glob("*.txt")))
    run.is_locked = _part(run, "run.lock", False, lambda: is_held(path))
    run.report = _part(run, "report.json", {}, lambda: read_json(path / "report.json"))
    return run


def check_run_folder(path: Path) -> None:
    """Raise ValueError where a path holds no run."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a run folder, such as runs/<run>, or a sweep's folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the run's folder, such as runs/<run>")
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        raise ValueError(
            f"{path} is no run folder: it has no config.yaml, no metrics.jsonl and no checkpoints; "
            "give the folder that the run's `out=` named"
        )


def is_sound(protocol: Mapping[str, Any]) -> bool:
    """Whether the parts of a protocol that pages read are what evaluations write."""
    data, checkpoint, weights = (protocol.get(name) for name in ("data", "checkpoint", "weights"))
    parts = [part for part in (data, checkpoint, weights) if part is not None]
    if not all(isinstance(part, Mapping) for part in parts):
        return False
    numbers = [(part or {}).get("step") for part in (checkpoint, weights)]
    numbers += [(data or {}).get(name) for name in ("num_train", "num_test")]
    counted = all(each is None or (isinstance(each, int) and is_number(each)) for each in numbers)
    return counted and isinstance(protocol.get("notes") or [], list)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a small file; empty where there is none. Raises ValueError where it is something else."""
    if not path.exists():
        return {}
    found = json.loads(read_text(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def _part(run: RunFolder, name: str, empty: T, read: Callable[[], T]) -> T:
    """One part of a folder, or what stands for its absence."""
    try:
        return read()
    except FileNotFoundError:
        run.problems.append(f"{name} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        run.problems.append(f"{name} cannot be read: {' '.join(str(error).split())[:300]}")
    return empty


def _config(run: RunFolder) -> dict[str, Any]:
    """The settings, without those groups that are none."""
    config = read_config(run.path, "config.yaml")
    for name in GROUPS:
        if config.get(name) is not None and not isinstance(config[name], Mapping):
            run.problems.append(f"config.yaml: {name} is {str(config.pop(name))[:60]!r}, and no group of settings")
    return config


def _recipe(path: Path) -> dict[str, Any]:
    """Runs of before 0.3 wrote the parameter groups alone."""
    found = json.loads(read_text(path))
    return {"groups": found, "parts": {}, "notes": []} if isinstance(found, list) else dict(found)


def _saved(path: Path) -> Saved | None:
    folders = steps_saved(path)
    if not folders:
        return None
    step, folder = folders[-1]
    card = json.loads(read_text(folder / CARD))
    return Saved(step, folder, (folder / CARD).stat().st_mtime, card if isinstance(card, dict) else {})


def _pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        match = PICTURE.fullmatch(path.name)
        if match is not None:
            found.setdefault(match["name"], []).append((int(match["step"]), path))
    return found


def result_paths(path: Path) -> list[Path]:
    """The results in a run folder, and of what was fine-tuned from it."""
    return [*sorted(path.glob("eval/*.json")), *sorted(path.glob("finetune/**/eval/*.json"))]


def _results(run: RunFolder) -> list[Evaluated]:
    paths = result_paths(run.path)
    if len(paths) > MOST_RESULTS:
        run.problems.append(f"of {len(paths)} evaluations the first {MOST_RESULTS} are shown")
    found = []
    for path in paths[:MOST_RESULTS]:
        try:
            result = read_result(path)
        except ValueError as error:
            run.problems.append(str(error))
            continue
        if not is_sound(result["protocol"]):
            run.problems.append(f"{path} {UNSOUND}")
            continue
        with contextlib.suppress(OSError):
            written = path.stat().st_mtime
            found.append(Evaluated(path, written, result["metrics"], result["protocol"], result.get("details")))
    return found
