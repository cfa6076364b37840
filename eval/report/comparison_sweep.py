"""A sweep's folder as the comparison reads it: which settings were swept, and how each of its runs went."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ssl.sweep import OUTCOME

MULTIRUN = "multirun.yaml"
"""What Hydra writes of a sweep, with the folder that it was started in and what an optimizing sweeper looks for."""


@dataclass(frozen=True)
class Job:
    """A run of a sweep: what it overrides, and how it ended."""

    number: int
    overrides: Mapping[str, str]
    state: str
    message: str | None
    objective: float | None
    metrics: Mapping[str, Any]
    out: Path | None
    """What it made, a run folder or the JSON of an evaluation; None where it made nothing or that is gone."""


@dataclass(frozen=True)
class SweepFolder:
    """The runs of the newest sweep in a folder."""

    path: Path
    jobs: list[Job] = field(default_factory=list)
    direction: str | None = None
    """What an optimizing sweeper did with the objective, maximize or minimize."""
    others: int = 0
    """Outcomes of earlier sweeps in the same folder, which are not among the jobs."""

    @property
    def swept(self) -> list[str]:
        """The settings in which its runs differ."""
        values: dict[str, set[str]] = {}
        for job in self.jobs:
            for key, value in job.overrides.items():
                values.setdefault(key, set()).add(value)
        return [key for key, own in values.items() if len(own) > 1]

    @property
    def objective(self) -> str:
        """How its runs were judged."""
        names = {job.overrides.get("objective") for job in self.jobs} - {None}
        return f"objective ({' or '.join(sorted(map(str, names)))})" if names else "objective"


def read_sweep(folder: Path) -> SweepFolder | None:
    """The sweep in a folder; None where it holds none. A torn outcome is left out."""
    paths = [*folder.glob(f"*/{OUTCOME}"), *folder.glob(f"*/*/{OUTCOME}")]
    outcomes = [each for path in sorted(paths, key=_changed) if (each := _read(path)) is not None]
    if not outcomes:
        return None
    newest = outcomes[-1]["sweep"]
    settings = _multirun(folder)
    cwd, sweeper = (settings.get(name) or {} for name in ("runtime", "sweeper"))
    bases = [Path(str(cwd["cwd"]))] if "cwd" in cwd else []
    bases += [Path.cwd(), *folder.absolute().parents]  # a folder that was moved: its runs beside it
    own = sorted((each for each in outcomes if each["sweep"] == newest), key=lambda each: each["run"])
    direction = sweeper.get("direction")
    return SweepFolder(
        path=folder,
        jobs=[_job(each, bases) for each in own],
        direction=direction if isinstance(direction, str) else None,
        others=len(outcomes) - len(own),
    )


def as_value(text: str | None) -> float | str | None:
    """What an override's value is sorted by: a number where it is one."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _job(outcome: Mapping[str, Any], bases: list[Path]) -> Job:
    words = (str(word).partition("=") for word in outcome["overrides"])
    given = outcome.get("out")
    found = [base / given for base in bases if (base / given).exists()] if given else []
    objective = outcome.get("objective")
    return Job(
        number=int(outcome["run"]),
        overrides={key.lstrip("+~"): value for key, _, value in words},
        state=str(outcome["state"]),
        message=outcome.get("message"),
        objective=float(objective) if isinstance(objective, int | float) else None,
        metrics=outcome.get("metrics") or {},
        out=found[0] if found else None,
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        outcome = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(outcome, dict) and {"sweep", "run", "overrides", "state"} <= outcome.keys()
    return outcome if whole else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _multirun(folder: Path) -> dict[str, Any]:
    """Hydra's own settings of the sweep; nothing where they cannot be read."""
    try:
        settings = yaml.safe_load((folder / MULTIRUN).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    hydra = settings.get("hydra") if isinstance(settings, dict) else None
    return hydra if isinstance(hydra, dict) else {}
