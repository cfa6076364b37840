"""How good what a run made is, for a sweep that chooses among runs: on images held out of train, or without labels.

The test split is not read: what is chosen here is reported there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from eval import health, linear_probe
from eval.knn import knn
from eval.results import write_results
from eval.splits import make_splits
from eval.subject import Judged, read_features
from eval.suite import compose_evaluation
from ssl.config import plain
from ssl.data.subset import split_held_out

HELD_OUT = 0.1
MOST_IMAGES = 50_000
"""Of train that are read, equally many of each class: a trial's evaluation should not take as long as its training."""


def check_data(name: str, config: DictConfig) -> None:
    """Raise ValueError where the data of a pretraining `config` has no labels that the evaluation needs."""
    if name != "eval.health":
        make_splits(plain(config.data), own=False, seed=config.seed, command=f"objective={name}", multi_label=False)


def judge(name: str, config: DictConfig, *, out: Path) -> float:
    """What the evaluation `name` finds of the run in `out`, which `config` pretrained; the larger, the better.

    eval.knn: top-1 of a tenth of train among the rest of it. eval.linear_probe: top-1 of the best head (L-BFGS, by its
    weight decay) on the held-out images that chose it. eval.health: RankMe. Written to
    <out>/eval/objective_<name>.json.
    """
    short = name.removeprefix("eval.")
    limit = min(config.data.limit or MOST_IMAGES, MOST_IMAGES)
    values = {
        "ckpt": str(out),
        "data": {"name": "checkpoint", "limit": limit},
        "device": config.trainer.device.name,
        "threads": config.loader.threads,
        "name": f"objective_{short}",
    }
    if short == "health":
        return health.run(compose_evaluation(short, {**values, "views": 0}))["metrics"]["rankme"]
    settings = compose_evaluation(short, values | ({"solver": "lbfgs"} if short == "linear_probe" else {}))
    judged = read_features(settings, command=name)
    found, how = {"knn": _knn, "linear_probe": _linear_probe}[short](settings, judged)
    protocol = {**judged.protocol, "test": "not read", **how, "notes": judged.notes}
    write_results(judged.folder / f"{judged.name}.json", metrics={"held_out_top1": found}, protocol=protocol)
    return found


def _knn(settings: DictConfig, judged: Judged) -> tuple[float, dict[str, Any]]:
    features, labels = judged.train.features, judged.train.labels  # (N, D), (N,)
    kept, held_out = map(torch.from_numpy, split_held_out(labels.numpy(), HELD_OUT, settings.seed))
    scores = knn(
        features[kept],
        labels[kept],
        features[held_out],
        labels[held_out],
        k=list(settings.k),
        temperature=plain(settings.temperature),
        num_classes=len(judged.splits.classes),
        metric=settings.metric,
        vote=settings.vote,
        device=judged.device,
    )
    first = scores.first()
    return first["top1"], {**_without_scores(first), "held_out": HELD_OUT, "num_held_out": len(held_out)}


def _linear_probe(settings: DictConfig, judged: Judged) -> tuple[float, dict[str, Any]]:
    train = judged.read("train", judged.subject.sets)
    grid, rows = linear_probe.make_grid(settings), torch.arange(len(train[0].labels))
    draw = linear_probe.choose_on(settings, judged, train, grid, settings.seed, rows)
    choice = draw.selection.choice
    return choice["held_out_top1"], {"choice": choice, "num_held_out": draw.num_held_out}


def _without_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("top")}
