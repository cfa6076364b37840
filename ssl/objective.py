"""The one number of a run that a sweep is told (`objective=`): a metric of its own, or how an evaluation judges what it
made, on images held out of train or without labels. Never on the test split, on which the chosen run is reported.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

JUDGED = ("eval.knn", "eval.linear_probe", "eval.health")
"""Evaluations that can be an objective: what each finds, larger is better, see eval/objective.py."""
LARGER_IS_BETTER = (*JUDGED, "rankme", "lidar")
SMALLER_IS_BETTER = ("loss",)
ON_TEST = ("knn_top1",)


def check_direction(config: DictConfig) -> None:
    """Raise ValueError where a sweeper that optimizes is not told what, or in the wrong direction.

    `config` is a whole command's, with `hydra`.
    """
    sweeper = config.hydra.sweeper
    if "objective" not in config or str(sweeper._target_).endswith(".BasicSweeper"):
        return
    if config.objective is None:
        raise ValueError(
            f"this sweeper optimizes, and must be told what: objective=, one of {', '.join(JUDGED)}, "
            "or a metric of the run such as rankme or loss"
        )
    _check_name(config.objective)
    direction = str(sweeper.get("direction"))
    better = {"minimize": LARGER_IS_BETTER, "maximize": SMALLER_IS_BETTER}
    if config.objective in better.get(direction, ()):
        other = "maximize" if direction == "minimize" else "minimize"
        raise ValueError(
            f"hydra.sweeper.direction={direction} looks for the worst objective={config.objective}; "
            f"give hydra.sweeper.direction={other}"
        )


def check_objective(config: DictConfig) -> None:
    """Raise ValueError, before a run begins, for an objective that it could not be told when it ends."""
    name = config.objective
    if name is None:
        return
    _check_name(name)
    if name in ("rankme", "lidar") and (not config.online or config.trainer.eval_every_epochs is None):
        raise ValueError(f"objective={name} is found during the run: give online=health and trainer.eval_every_epochs=")
    if name in JUDGED:
        importlib.import_module("eval.objective").check_data(name, config)


def _check_name(name: str) -> None:
    """Raise ValueError for an evaluation that is none, or that reads the test split."""
    if name in ON_TEST:
        raise ValueError(
            f"objective={name} is measured on the test split, and what is chosen by it could not be reported on it; "
            "objective=eval.knn is the same on images held out of train"
        )
    if name.startswith("eval.") and name not in JUDGED:
        raise ValueError(f"objective={name} is not known; of the evaluations there are {', '.join(JUDGED)}")


def find_objective(config: DictConfig, metrics: Mapping[str, float | None], *, out: Path) -> float | None:
    """The objective of the finished run in `out` with the last `metrics`; None where none is asked for.

    Raises ValueError where the run has no such metric, which ends a search by it, or its last one is not finite.
    """
    name = config.objective
    if name is None:
        return None
    if name in JUDGED:
        value: Any = importlib.import_module("eval.objective").judge(name, config, out=out)
    elif name in metrics:
        value = metrics[name]
    else:
        importlib.import_module("ssl.sweeps").end_search()  # it reads this file
        raise ValueError(
            f"objective={name}, but this run has {', '.join(sorted(metrics))}; or {', '.join(JUDGED)}. "
            "The same command with another objective= finds it without training again"
        )
    if value is None:
        raise ValueError(
            f"objective={name} cannot be told: the run's last {name} is not finite, as every step since its last line "
            "was skipped; see skipped_steps in metrics.jsonl. Try a lower optim.base_lr, or objective=eval.knn"
        )
    print(f"objective {name}: {value:.6g}", flush=True)
    return float(value)
