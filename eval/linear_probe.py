"""How good a backbone is under a linear classifier: `python -m eval.linear_probe ckpt=runs/<run>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from eval.command import judge, start
from eval.config import EvalConfig
from eval.heads import Standardizer, choose, score_heads, train_heads
from eval.subject import Judged
from ssl.data.subset import split_held_out

LR = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAY = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a few images per class want the largest


@dataclass
class LinearProbeConfig(EvalConfig):
    """What `python -m eval.linear_probe` takes."""

    lr: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    held_out: float = 0.1
    steps: int = 2000
    probe_batch_size: int = 512
    retrain: bool = True


@dataclass(frozen=True)
class Probe:
    """Test accuracy of the head that the held-out slice chose, as fractions, and the whole grid on that slice."""

    metrics: dict[str, float]
    choice: dict[str, Any]
    grid: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    held_out: Tensor,
    num_classes: int,
    lr: Sequence[float] = LR,
    weight_decay: Sequence[float] = WEIGHT_DECAY,
    steps: int = 2000,
    batch_size: int = 512,
    retrain: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Probe:
    """Train a grid of linear heads on features (N, D), choose one on the held-out rows, report it on test.

    `held_out` (h,) are rows of train that no head of the grid sees. With `retrain` the chosen setting is trained once
    more on all of train before it meets the test split (as Kornblith et al. 2019, appendix A.4); without, the chosen
    head itself is reported. Features are standardised with the statistics of the rows trained on. Raises ValueError on
    what cannot be probed.
    """
    _check(train, train_labels, test, test_labels, held_out=held_out, num_classes=num_classes)
    if not lr or not weight_decay or min(lr) <= 0 or min(weight_decay) < 0:
        raise ValueError(
            f"lr needs numbers above 0, weight_decay none below 0; got {list(lr)} and {list(weight_decay)}"
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be 1 or more; got {steps} and {batch_size}")
    notes = []
    grid = [(a, b) for a in lr for b in weight_decay]
    fitted = torch.ones(len(train), dtype=torch.bool)
    fitted[held_out] = False
    setting = {"num_classes": num_classes, "steps": steps, "batch_size": batch_size, "seed": seed, "device": device}

    standardize = Standardizer.fit(train[fitted])
    heads = train_heads(
        standardize(train[fitted]),
        train_labels[fitted],
        lr=[a for a, _ in grid],
        weight_decay=[b for _, b in grid],
        **setting,
    )
    scores = score_heads(heads, standardize(train[held_out]), train_labels[held_out])
    best = choose(scores, num_images=len(held_out))
    chosen_lr, chosen_decay = grid[best]
    choice = {"lr": chosen_lr, "weight_decay": chosen_decay, "held_out_top1": scores.top1[best].item()}
    if len(lr) > 1 and chosen_lr in (min(lr), max(lr)):
        notes.append(
            f"the chosen lr={chosen_lr:g} lies at the edge of the grid {list(lr)}; a wider one may score higher"
        )
    diverged = int((~scores.finite).sum())
    if diverged:
        notes.append(f"{diverged} of the {len(grid)} heads diverged; the others are not affected")

    head = heads.only(best)
    if retrain:
        restandardize = Standardizer.fit(train)
        again = train_heads(restandardize(train), train_labels, lr=[chosen_lr], weight_decay=[chosen_decay], **setting)
        if torch.isfinite(again.weight).all():
            head, standardize = again, restandardize
        else:
            notes.append("the chosen head diverged when retrained on all of train; the one from the grid is reported")
    result = score_heads(head, standardize(test), test_labels)
    metrics = {"top1": result.top1[0].item()}
    if num_classes > 5:
        metrics["top5"] = result.top5[0].item()
    return Probe(metrics, choice, _table(grid, scores), notes)


def _table(grid: list[tuple[float, float]], scores: Any) -> list[dict[str, Any]]:
    """The whole grid on the held-out slice; null for a head that diverged, as JSON has no NaN."""
    rows = []
    for head, (lr, weight_decay) in enumerate(grid):
        finite = bool(scores.finite[head])
        rows.append(
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "held_out_top1": scores.top1[head].item() if finite else None,
                "held_out_loss": scores.loss[head].item() if finite else None,
            }
        )
    return rows


def _check(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, held_out: Tensor, num_classes: int
) -> None:
    for what, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or len(features) == 0 or len(labels) != len(features):
            raise ValueError(
                f"{what} must be features (images, dimensions), at least one, with a label each; "
                f"got {tuple(features.shape)} and {len(labels)} labels"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"labels of {what} must lie in 0..{num_classes - 1}; got {int(labels.min())}..{int(labels.max())}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"the features of {what} are not all finite; the backbone has diverged")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"the features of train have {train.shape[1]} dimensions, those of test {test.shape[1]}")
    if len(held_out) == 0 or len(held_out) >= len(train):
        raise ValueError(
            "a linear probe needs images to train on and images held out to choose by; "
            f"got {len(train)} in train of which {len(held_out)} are held out. Give more labelled images"
        )
    if len(torch.unique(train_labels)) < 2:
        raise ValueError("a linear probe needs two classes or more in train, got one")


def score(config: DictConfig, judged: Judged) -> tuple[dict[str, float], dict[str, Any], str]:
    """A linear probe of the test features, trained and chosen on the train features, as `config` says."""
    _, held_out = split_held_out(judged.train.labels.numpy(), config.held_out, config.seed)
    probe = linear_probe(
        judged.train.features,
        judged.train.labels,
        judged.test.features,
        judged.test.labels,
        held_out=torch.from_numpy(held_out),
        num_classes=len(judged.splits.classes),
        lr=list(config.lr),
        weight_decay=list(config.weight_decay),
        steps=config.steps,
        batch_size=config.probe_batch_size,
        retrain=config.retrain,
        seed=config.seed,
        device=judged.device,
    )
    settings = {
        "head": "linear with bias, on features standardised by train (BatchNorm without affine)",
        "optimizer": "SGD, momentum 0.9, cosine to zero, cross-entropy, no augmentation",
        "steps": config.steps,
        "batch_size": config.probe_batch_size,
        "choice_rule": "on held-out images of train: lowest loss within one standard error of the highest top-1",
        "num_held_out": len(held_out),
        "choice": probe.choice,
        "reported": "the chosen setting "
        + ("retrained on all of train" if config.retrain else "without held-out images"),
        "grid": probe.grid,
        "notes": probe.notes,
    }
    return probe.metrics, settings, f"linear probe ({len(probe.grid)} heads, lr={probe.choice['lr']:g} chosen)"


def run(config: DictConfig) -> dict[str, Any]:
    """Judge what `config.ckpt` names by a linear probe; returns the metrics and the protocol."""
    return judge(config, score, command="eval.linear_probe", next_command="python -m eval.knn")


if __name__ == "__main__":
    start(run, LinearProbeConfig, command="eval.linear_probe")
