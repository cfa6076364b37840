"""How good a backbone is under a linear classifier: `python -m eval.linear_probe ckpt=runs/<run>`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

import ssl.distributed as distributed
from eval.command import judge, start
from eval.extract import Features
from eval.head_file import fold, save_head
from eval.layers import GRID_DIM
from eval.low_shot import draw
from eval.probe import WEIGHT_DECAY, Grid, Selection, check_labels, hold_out, select
from eval.probe_protocol import ProtocolConfig, check_cached
from eval.scores import details, headline
from eval.subject import Judged
from ssl.config import plain
from ssl.data.subset import ranks_by_class

DRAWS = 5
HELD_OUT = {0: None, 1: "one slice"}


@dataclass
class LinearProbeConfig(ProtocolConfig):
    """What `python -m eval.linear_probe` takes; null is what its yaml says it is."""

    grid_dim: int = GRID_DIM
    features_gib: float = 8.0
    batchnorm: list[bool] | None = None
    solver: str = "sgd"
    lr: list[float] | None = None
    weight_decay: list[float] | None = None
    steps: int | None = None
    probe_batch_size: int | None = None
    held_out: float | None = None
    folds: int | None = None
    retrain: bool = True
    train_amount: Any = None
    draws: int | None = None


@dataclass(frozen=True)
class Draw:
    """What was chosen from `num_train` images of train; all of them, or a few of each class drawn by `seed`."""

    seed: int
    num_train: int
    num_held_out: int
    num_groups: int
    selection: Selection


def score(config: DictConfig, judged: Judged) -> tuple[dict[str, float], dict[str, Any], str]:
    """A linear probe, as `config` says: trained and chosen on train; test is then read, once, for what was chosen."""
    grid, sets, splits = make_grid(config), judged.subject.sets, judged.splits
    train = judged.read("train", sets)
    labels, dimensions = train[0].labels, [each.features.shape[1] for each in train]
    draws = [choose_on(config, judged, train, grid, seed, rows) for seed, rows in draw_rows(config, labels)]
    del train  # before the features of test take their place

    places = sorted({each.selection.place for each in draws})
    test = dict(zip(places, judged.read("test", [sets[place] for place in places])))
    truth = test[places[0]].labels
    check_labels("test", truth, num_classes=len(splits.classes))
    logits = [each.selection.logits(test[each.selection.place].features) for each in draws]  # (M, C) each
    metrics = [headline(each, truth, multi_label=splits.multi_label) for each in logits]
    by_class = [details(each, truth, splits.classes, multi_label=splits.multi_label) for each in logits]
    settings = describe(config, grid, judged, dimensions) | outcome(config, draws, metrics)
    sizes = {
        "num_train_of_class": class_sizes(labels, splits.classes),
        "num_test_of_class": class_sizes(truth, splits.classes),
    }
    if config.train_amount is None:
        settings |= {"weights": save(judged, draws[0].selection), "details": sizes | by_class[0]}
    else:
        of_draws = [describe_draw(*each) for each in zip(draws, metrics, by_class)]
        settings |= {"details": sizes | {"draws": of_draws}}
    return mean_and_deviation(metrics), settings, title(config, draws)


def make_grid(config: DictConfig) -> Grid:
    """The grid that `config` names. Raises ValueError for settings that the solver does not know."""
    given = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "batchnorm": config.batchnorm,
        "steps": config.steps,
        "batch_size": config.probe_batch_size,
    }
    for key in ("lr", "steps", "probe_batch_size"):
        if config.solver == "lbfgs" and config[key] is not None:
            raise ValueError(
                f"{key}={config[key]} has no effect with solver=lbfgs, which finds the minimum; leave it out"
            )
    values = {key: plain(value) for key, value in given.items() if value is not None}
    return Grid(config.solver, **({"weight_decay": WEIGHT_DECAY.get(config.solver, (0.0,))} | values))


def draw_rows(config: DictConfig, labels: Tensor) -> list[tuple[int, Tensor]]:
    """Seeds and rows of train to learn from: all of them, or `draws` times `train_amount` of each class."""
    if config.train_amount is None:
        if config.draws is not None:
            raise ValueError(f"draws={config.draws} has no effect without train_amount, such as train_amount=1%")
        return [(config.seed, torch.arange(len(labels)))]
    draws = DRAWS if config.draws is None else config.draws
    if draws < 1:
        raise ValueError(f"draws must be 1 or more, got {draws}")
    seeds = range(config.seed, config.seed + draws)
    return [(seed, torch.from_numpy(draw(labels.numpy(), config.train_amount, seed=seed))) for seed in seeds]


def choose_on(
    config: DictConfig, judged: Judged, train: Sequence[Features], grid: Grid, seed: int, rows: Tensor
) -> Draw:
    """The head that held-out rows of `rows` choose."""
    labels, sets = train[0].labels, judged.subject.sets
    of_rows = labels[rows].numpy()
    is_choice = len(sets) * len(grid.batchnorm) * len(grid.heads()) > 1 or not config.retrain
    largest_class = ranks_by_class(of_rows, seed, "held out")[2].max()
    groups = []  # one head on one image of each class needs no held-out images, and there can be none
    if is_choice or largest_class > 1:
        groups = hold_out(of_rows, folds=config.folds, fraction=config.held_out, seed=seed)
    selection = select(
        [each.features for each in train],
        labels,
        num_classes=len(judged.splits.classes),
        held_out=[rows[torch.from_numpy(group)] for group in groups],
        grid=grid,
        names=[each.to_dict() for each in sets],
        rows=rows,
        retrain=config.retrain,
        seed=seed,
        device=judged.device,
    )
    return Draw(seed, len(rows), sum(map(len, groups)), len(groups), selection)


def describe(config: DictConfig, grid: Grid, judged: Judged, dimensions: Sequence[int]) -> dict[str, Any]:
    """How the probe is done, for the protocol."""
    multi_label = judged.splits.multi_label
    loss = "binary cross-entropy, summed over classes" if multi_label else "cross-entropy"
    if grid.solver == "sgd":
        how = f"SGD, momentum 0.9, cosine to zero, {loss}, no augmentation"
        settings = {"optimizer": how, "steps": grid.steps, "batch_size": grid.batch_size}
    else:
        settings = {"optimizer": f"L-BFGS to the minimum, {loss}, weight decay / 2 |weight|^2, no augmentation"}
    settings["choice_rule"] = (
        "on held-out images of train: highest mAP"
        if multi_label
        else "on held-out images of train: lowest loss within one standard error of the highest top-1"
    )
    sets = judged.subject.sets
    if len(sets) > 1:
        read = [{**each.to_dict(), "dimensions": dim} for each, dim in zip(sets, dimensions)]
        features = {
            key: value for key, value in judged.protocol["features"].items() if key not in ("layer", "dimensions")
        }
        settings |= {"pooling": None, "features": {"sets": read, **features}}
    return {
        "protocol": config.protocol,
        "head": "linear with bias; batchnorm: on features standardised by train (BatchNorm without affine)",
        "solver": grid.solver,
        **settings,
        "tried": grid.tried(),
    }


def outcome(config: DictConfig, draws: Sequence[Draw], metrics: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What was chosen, for the protocol; of several draws their scores, the rest stands in the details."""
    first = draws[0]
    found: dict[str, Any] = {
        "held_out": HELD_OUT.get(first.num_groups, f"{first.num_groups} folds, each held out in turn"),
        "num_held_out": first.num_held_out,
        "reported": "the chosen setting "
        + ("retrained on all of train" if config.retrain else "without held-out images"),
    }
    notes = list(dict.fromkeys(note for each in draws for note in each.selection.notes))
    if config.train_amount is None:
        return found | {"choice": first.selection.choice, "grid": first.selection.grid, "notes": notes}
    found["low_shot"] = {
        "train_amount": config.train_amount,
        "images": first.num_train,
        "seeds": [each.seed for each in draws],
        "reported": "mean over the draws, and their standard deviation (n - 1)",
    }
    name = next(iter(metrics[0]))
    return found | {f"draws_{name}": [each[name] for each in metrics], "notes": notes}


def class_sizes(labels: Tensor, classes: Sequence[str]) -> dict[str, int]:
    """How many images each class has, by name; labels (N,) or multi-hot (N, C)."""
    count = labels.sum(0) if labels.ndim == 2 else torch.bincount(labels, minlength=len(classes))  # (C,)
    return dict(zip(classes, count.tolist(), strict=True))


def describe_draw(draw: Draw, metrics: dict[str, float], by_class: dict[str, Any]) -> dict[str, Any]:
    """One draw, for the details."""
    return {
        "seed": draw.seed,
        "num_train": draw.num_train,
        "metrics": metrics,
        "choice": draw.selection.choice,
        "grid": draw.selection.grid,
        **by_class,
    }


def mean_and_deviation(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over the draws, and as `<name>_std` its sample standard deviation where there are several."""
    means = {name: statistics.fmean(each[name] for each in metrics) for name in metrics[0]}
    if len(metrics) == 1:
        return means
    return means | {f"{name}_std": statistics.stdev(each[name] for each in metrics) for name in metrics[0]}


def title(config: DictConfig, draws: Sequence[Draw]) -> str:
    """What the printed line calls the probe."""
    selection = draws[0].selection
    if config.train_amount is not None:
        of_each = config.train_amount if "%" in str(config.train_amount) else f"{config.train_amount} images"
        return f"linear probe ({of_each} of each class, {len(draws)} draw{'s' * (len(draws) > 1)})"
    words = [f"{key}={value:g}" for key, value in selection.choice.items() if key in ("lr", "weight_decay")]
    layers = {row["layer"] for row in selection.grid} | {row["pooling"] for row in selection.grid}
    if len(layers) > 2:
        words.append(f"layer {selection.choice['layer']}, pooling {selection.choice['pooling']}")
    return f"linear probe ({len(selection.grid)} heads, {', '.join(words)} chosen)"


def save(judged: Judged, selection: Selection) -> str | None:
    """Write the chosen head beside the JSON, for prediction; None for a baseline, which nobody loads again."""
    checkpoint = judged.subject.identity["checkpoint"]
    if checkpoint is None or not distributed.is_main():
        return None
    weight, bias = fold(selection.head.weight.T.cpu(), selection.head.bias.cpu(), selection.standardize)
    folder = save_head(
        judged.folder / f"{judged.name}.head",
        weight=weight,
        bias=bias,
        classes=judged.splits.classes,
        checkpoint=checkpoint["path"],
        sha256=checkpoint["sha256"],
        features=judged.subject.sets[selection.place].to_dict(),
        image_size=judged.subject.image_size,
        multi_label=judged.splits.multi_label,
        data=judged.splits.identity(),
    )
    return str(folder)


def run(config: DictConfig) -> dict[str, Any]:
    """Judge what `config.ckpt` names by a linear probe; returns the metrics and the protocol."""
    if config.protocol != "cached":
        from eval.published_probe import run as run_published

        return run_published(config, schema=LinearProbeConfig)
    check_cached(config)
    next_command = "python -m eval.knn"
    return judge(config, score, command="eval.linear_probe", next_command=next_command, multi_label=True)


def held_out_score(result: dict[str, Any]) -> float | None:
    """How the choice did on held-out images of train; None where nothing was chosen."""
    choice = result["protocol"].get("choice") or {}
    return choice.get("held_out_top1", choice.get("held_out_map"))


if __name__ == "__main__":
    start(run, LinearProbeConfig, command="eval.linear_probe", objective=held_out_score)
