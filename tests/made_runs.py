"""Run folders and sweeps as commands leave them, made of text alone: for tests of pages that compare runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "method": {"_target_": "ssl.methods.mae.MAE", "mask_ratio": 0.75},
    "model": {"name": "vit_tiny_patch16_224", "args": {"depth": 2}},
    "data": {"name": "embedded", "root": None, "limit": None, "source": {"num_train": 600, "num_test": 120}},
    "augment": {"views": [{"count": 1, "crop": "random_resized", "flip": 0.5}]},
    "optim": {"name": "adamw", "base_lr": 0.001, "weight_decay": 0.05},
    "trainer": {"epochs": 4.0, "steps": None, "global_batch_size": 32, "log_every_steps": 10},
    "loader": {"threads": 1},
    "online": {"knn": {"_target_": "eval.online.KNN", "k": 20}},
    "seed": 0,
    "out": None,
}
PROTOCOL = {
    "command": "eval.knn",
    "subject": "runs/a/checkpoints/step_00000040",
    "checkpoint": {"path": "runs/a/checkpoints/step_00000040", "sha256": "aa", "step": 40},
    "features": {"crop": "center", "dimensions": 32},
    "data": {"name": "embedded", "num_train": 600, "num_test": 120, "test": "embedded (test)"},
    "seed": 0,
    "k": [20],
    "temperature": [0.07],
    "commit": "c0ffee",
    "date": "2026-01-01T00:00:00+00:00",
}


def changed(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with other values, by dotted keys."""
    made: dict[str, Any] = copy.deepcopy(dict(node))
    for key, value in changes.items():
        *parents, last = key.split(".")
        inner = made
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return made


def protocol(**changes: Any) -> dict[str, Any]:
    """PROTOCOL with other values; `data__name="x"` changes a part of a part."""
    return changed(PROTOCOL, {name.replace("__", "."): value for name, value in changes.items()})


def rows(num_steps: int = 40, *, every: int = 10, per_epoch: int = 10, **metrics: float) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a loss that falls, and more that stay."""
    return [
        {"step": step, "epoch": step / per_epoch, "loss": 1 + 1 / step, "images_per_second": 320.0, **metrics}
        for step in range(every, num_steps + 1, every)
    ]


def write_run(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    lines: Iterable[Mapping[str, Any]] | None = None,
    results: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None,
    parts: Mapping[str, Any] | None = None,
    saved: int | None = 40,
) -> Path:
    """A run folder: CONFIG with changes by dotted keys, lines of metrics.jsonl, (metrics, protocol) of evaluations by
    name, and a checkpoint's card of step `saved`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(CONFIG, {"out": str(folder), **(config or {})})))
    (folder / "recipe.json").write_text(json.dumps({"parts": parts or {"optimizer": {"name": "adamw"}}, "groups": []}))
    lines = rows() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved is not None:
        card = folder / "checkpoints" / f"step_{saved:08d}" / "state.json"
        card.parent.mkdir(parents=True)
        card.write_text(json.dumps({"format": 1, "step": saved}))
    write_results(folder, results or {})
    return folder


def write_results(folder: Path, results: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Path:
    """(metrics, protocol) of evaluations by name, in the folder's eval/."""
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    for name, (metrics, how) in results.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps({"metrics": metrics, "protocol": how}))
    return folder


def write_sweep(
    folder: Path, jobs: Sequence[Mapping[str, Any]], *, id: str = "abc", direction: str | None = None
) -> Path:
    """A sweep's folder: an outcome for each job, which may name its overrides, out, objective, state and message."""
    for number, job in enumerate(jobs):
        about = {"sweep": id, "run": number, "overrides": [], "out": None, "objective": None, "metrics": {}}
        about |= {"job": str(number), "host": "here", "pid": 1, "state": "done", "message": None, "seconds": 1.0}
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        (folder / str(number) / "outcome.json").write_text(json.dumps({**about, **job}))
    settings = {"runtime": {"cwd": str(folder.parent)}, "sweeper": {"direction": direction}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": settings}))
    return folder
