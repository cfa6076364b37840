"""A linear probe of features: a grid of heads, the choice on held-out rows of train, then the test split once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.heads import Heads, HeadScores, Standardizer, choose, score_heads, train_heads
from eval.lbfgs import solve_heads
from ssl.data.subset import ranks_by_class, split_held_out, strata

SOLVERS = ("sgd", "lbfgs")
LR = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
WEIGHT_DECAY = {
    "sgd": (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),  # a few images per class want the largest
    "lbfgs": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),  # none at all would have no minimum where classes are separable
}
STEPS, BATCH_SIZE = 2000, 512
SMALL = 5000
"""Below as many images the choice is made by `FOLDS` folds: a tenth of them would be too few to choose by."""
FOLDS, HELD_OUT = 5, 0.1
GROUP = 2**27  # weights that are trained at once: 0.5 GiB, and as much for momentum


@dataclass(frozen=True)
class Grid:
    """How heads are trained, and what is tried: every lr with every weight decay, with and without BatchNorm."""

    solver: str = "sgd"
    lr: Sequence[float] = LR
    weight_decay: Sequence[float] = WEIGHT_DECAY["sgd"]
    batchnorm: Sequence[bool] = (True,)
    steps: int = STEPS
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver} is not known; allowed: {', '.join(SOLVERS)}")
        if not self.lr or not self.weight_decay or min(self.lr) <= 0 or min(self.weight_decay) < 0:
            raise ValueError(
                "lr needs numbers above 0, weight_decay none below 0; "
                f"got {list(self.lr)} and {list(self.weight_decay)}"
            )
        if not self.batchnorm:
            raise ValueError("batchnorm needs [true], [false] or both; got an empty list")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be 1 or more; got {self.steps} and {self.batch_size}")

    def tried(self) -> dict[str, Any]:
        """The values of each setting, as JSON values."""
        values = {"lr": list(self.lr)} if self.solver == "sgd" else {}
        return {**values, "weight_decay": list(self.weight_decay), "batchnorm": list(self.batchnorm)}

    def heads(self) -> list[dict[str, float]]:
        """The settings of each head that is trained on one set of features."""
        if self.solver == "lbfgs":
            return [{"weight_decay": decay} for decay in self.weight_decay]
        return [{"lr": lr, "weight_decay": decay} for lr, decay in itertools.product(self.lr, self.weight_decay)]


@dataclass(frozen=True)
class Selection:
    """The head that the held-out rows chose, and how every head of the grid did on them."""

    choice: dict[str, Any]
    grid: list[dict[str, Any]]
    place: int
    """Which of the sets of features it reads."""
    head: Heads
    standardize: Standardizer
    notes: list[str] = field(default_factory=list)

    def logits(self, features: Tensor) -> Tensor:
        """Features (N, D) as the backbone gives them to logits (N, C), on the CPU."""
        device = self.head.weight.device
        standardize = self.standardize.to(device)
        parts = [self.head.logits(standardize(piece.to(device)))[:, :, 0].cpu() for piece in features.split(8192)]
        return torch.cat(parts)


def select(
    sets: Sequence[Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    held_out: Sequence[Tensor],
    grid: Grid | None = None,
    names: Sequence[dict[str, Any]] | None = None,
    rows: Tensor | None = None,
    retrain: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Selection:
    """Train the grid on each set of features (N, D_i) of the same images and choose one head.

    `held_out` are disjoint groups of rows; heads are trained without each group in turn, scored on it, and the scores
    averaged over all held-out rows. One group is a held-out slice, several are folds, none will do for a grid of one
    head. With `retrain` the chosen setting is trained once more on all `rows` (as Kornblith et al. 2019, appendix A.4);
    without, on those outside the one group. Features are standardised with the statistics of the rows trained on.
    `names` say what each set is called in the grid. Raises ValueError on what cannot be probed.
    """
    grid = Grid() if grid is None else grid
    names = [{} for _ in sets] if names is None else names
    rows = torch.arange(len(labels)) if rows is None else rows
    _check_train(sets, labels[rows], num_classes=num_classes)
    table = [
        {**name, "batchnorm": batchnorm, **setting}
        for name, batchnorm, setting in itertools.product(names, grid.batchnorm, grid.heads())
    ]
    trainer = _Trainer(labels, num_classes, grid, seed, torch.device(device))

    if len(table) == 1 and not held_out and retrain:
        head, standardize = trainer.one(sets[0], rows, table[0])
        return Selection(table[0], table, 0, head, standardize, ["there was one head and nothing to choose"])
    _check_held_out(held_out, len(rows), retrain=retrain)

    scores = []
    for features, batchnorm in itertools.product(sets, grid.batchnorm):
        over_folds = []
        for group in held_out:
            fitted = rows[~torch.isin(rows, group)]
            over_folds.append(trainer.scores(features, fitted, group, batchnorm=batchnorm))
        scores.append(average_scores(over_folds, [len(group) for group in held_out]))
    joined = join_scores(scores)
    best = choose(joined, num_images=sum(map(len, held_out)))
    place = best // (len(grid.batchnorm) * len(grid.heads()))
    table = [row | _held_out_scores(joined, head) for head, row in enumerate(table)]

    notes = _notes(table[best], joined, grid)
    without = rows[~torch.isin(rows, held_out[0])]
    head, standardize = trainer.one(sets[place], rows if retrain else without, table[best])
    if not torch.isfinite(head.weight).all():
        notes.append(
            "the chosen head diverged when retrained on all of train; the one without held-out rows is reported"
        )
        head, standardize = trainer.one(sets[place], without, table[best])
    return Selection(table[best], table, place, head, standardize, notes + trainer.notes())


class _Trainer:
    """Trains heads of one grid on rows of features, by the solver that the grid names."""

    def __init__(self, labels: Tensor, num_classes: int, grid: Grid, seed: int, device: torch.device) -> None:
        self.labels, self.num_classes, self.grid = labels, num_classes, grid
        self.seed, self.device = seed, device
        self.num_restless = 0

    def scores(self, features: Tensor, fitted: Tensor, held_out: Tensor, *, batchnorm: bool) -> HeadScores:
        """Every head of the grid trained on the rows `fitted`, scored on the rows `held_out`."""
        standardize = standardizer(features, fitted, batchnorm=batchnorm)
        settings = self.grid.heads()
        size = max(1, GROUP // (features.shape[1] * self.num_classes))
        parts = []
        for start in range(0, len(settings), size):
            heads = self._train(features, fitted, standardize, settings[start : start + size])
            parts.append(score_heads(heads, features, self.labels, rows=held_out, standardize=standardize))
        return join_scores(parts)

    def one(self, features: Tensor, fitted: Tensor, setting: dict[str, Any]) -> tuple[Heads, Standardizer]:
        """One head of the grid trained on the rows `fitted`, and how its features are standardised."""
        standardize = standardizer(features, fitted, batchnorm=setting["batchnorm"])
        return self._train(features, fitted, standardize, [setting]), standardize

    def notes(self) -> list[str]:
        if not self.num_restless:
            return []
        return [f"{self.num_restless} L-BFGS solutions did not come to rest; their loss could still fall a little"]

    def _train(self, features: Tensor, fitted: Tensor, standardize: Standardizer, settings: list[dict]) -> Heads:
        shared = {"num_classes": self.num_classes, "rows": fitted, "standardize": standardize, "device": self.device}
        decay = [setting["weight_decay"] for setting in settings]
        if self.grid.solver == "lbfgs":
            heads, resting = solve_heads(features, self.labels, weight_decay=decay, **shared)
            self.num_restless += int((~resting).sum())
            return heads
        return train_heads(
            features,
            self.labels,
            lr=[setting["lr"] for setting in settings],
            weight_decay=decay,
            steps=self.grid.steps,
            batch_size=self.grid.batch_size,
            seed=self.seed,
            **shared,
        )


def standardizer(features: Tensor, rows: Tensor, *, batchnorm: bool) -> Standardizer:
    """BatchNorm without affine, fitted on rows of features (N, D), or features as they are."""
    return Standardizer.fit(features, rows) if batchnorm else Standardizer.identity(features.shape[1])


def hold_out(
    labels: np.ndarray, *, folds: int | None = None, fraction: float | None = None, seed: int = 0
) -> list[np.ndarray]:
    """The groups of images (sorted indices) by which heads are chosen: one stratified slice, or stratified folds.

    Without either setting 5 folds below 5,000 images, a tenth from there on. There are no more folds than images in the
    largest class. Raises ValueError where both are given or nothing can be held out.
    """
    if folds is not None and fraction is not None and folds != 1:
        raise ValueError(f"held_out={fraction} has no effect with folds={folds}; leave one of them out")
    if folds is not None and folds < 1:
        raise ValueError(f"folds must be 1 (a held-out slice) or more, got {folds}")
    if folds is None:
        folds = FOLDS if fraction is None and len(labels) < SMALL else 1
    _, rank, size = ranks_by_class(labels, seed, "held out")
    if size.max() < 2:
        raise ValueError(
            "heads are chosen on images that they were not trained on, so at least one class needs two images; got one "
            "image per class. Give more of them, or a grid of one head, such as lr=[0.1] weight_decay=[1.0]"
        )
    if folds == 1:
        return [split_held_out(labels, HELD_OUT if fraction is None else fraction, seed)[1]]
    folds = min(folds, int(size.max()))
    # Class by class, so that each fold gets its share of each, and the next class goes on where the last one ended.
    order = np.lexsort((rank, strata(labels)))
    group = np.empty(len(rank), np.int64)
    group[order] = np.arange(len(rank)) % folds
    return [np.flatnonzero(group == number) for number in range(folds)]


def average_scores(parts: list[HeadScores], sizes: list[int]) -> HeadScores:
    """Scores over several groups of rows, each weighted by its size. A head that diverged on one has diverged."""
    weight = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)  # (F,)
    metrics = {
        name: torch.stack([part.metrics[name] for part in parts], 1) @ weight
        for name in parts[0].metrics  # (H,)
    }
    loss = torch.stack([part.loss for part in parts], 1) @ weight
    return HeadScores(metrics, loss, torch.stack([part.finite for part in parts]).all(0))


def join_scores(parts: list[HeadScores]) -> HeadScores:
    """Scores of several groups of heads, one behind another."""
    metrics = {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics}
    return HeadScores(metrics, torch.cat([part.loss for part in parts]), torch.cat([part.finite for part in parts]))


def _held_out_scores(scores: HeadScores, head: int) -> dict[str, float | None]:
    """What the grid says of a head; null where it diverged, as JSON has no NaN."""
    finite = bool(scores.finite[head])
    name = "top1" if "top1" in scores.metrics else "map"
    found = {f"held_out_{name}": scores.metrics[name][head].item(), "held_out_loss": scores.loss[head].item()}
    return {key: value if finite else None for key, value in found.items()}


def _notes(chosen: dict[str, Any], scores: HeadScores, grid: Grid) -> list[str]:
    notes = []
    key, tried = ("lr", grid.lr) if grid.solver == "sgd" else ("weight_decay", grid.weight_decay)
    if len(tried) > 1 and chosen[key] in (min(tried), max(tried)):
        notes.append(
            f"the chosen {key}={chosen[key]:g} lies at the edge of the grid {list(tried)}; a wider one may score higher"
        )
    diverged = int((~scores.finite).sum())
    if diverged:
        notes.append(f"{diverged} of the {len(scores.finite)} heads diverged; the others are not affected")
    return notes


def _check_train(sets: Sequence[Tensor], labels: Tensor, *, num_classes: int) -> None:
    for features in sets:
        check_features("train", features, num_classes=num_classes)
    check_labels("train", labels, num_classes=num_classes)
    if labels.ndim == 1 and len(torch.unique(labels)) < 2:
        raise ValueError("a linear probe needs two classes or more in train, got one")


def check_features(what: str, features: Tensor, *, num_classes: int) -> None:
    """Refuse features that no head can be trained or tested on."""
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(
            f"{what} must be features (images, dimensions), at least one image; got {tuple(features.shape)}"
        )
    if not all(torch.isfinite(piece).all() for piece in features.split(8192)):
        raise ValueError(f"the features of {what} are not all finite; the backbone has diverged")


def check_labels(what: str, labels: Tensor, *, num_classes: int) -> None:
    """Refuse labels (N,) that are none of the classes, and multi-hot ones (N, C) of other shape or values."""
    if not len(labels):
        raise ValueError(f"{what} has no labelled image")
    if labels.ndim == 2:
        if labels.shape[1] != num_classes or labels.min() < 0 or labels.max() > 1:
            raise ValueError(f"labels of {what} must be 0 or 1 for each of {num_classes} classes")
        return
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels of {what} must lie in 0..{num_classes - 1}; got {int(labels.min())}..{int(labels.max())}"
        )


def _check_held_out(held_out: Sequence[Tensor], num: int, *, retrain: bool) -> None:
    sizes = [len(group) for group in held_out]
    if not sizes or min(sizes) == 0 or max(sizes) >= num:
        raise ValueError(
            "a linear probe needs images to train on and images held out to choose by; "
            f"got {num} in train of which {', '.join(map(str, sizes)) or 'none'} are held out. "
            "Give more labelled images"
        )
    if len(sizes) > 1 and not retrain:
        raise ValueError(
            f"retrain=false has no meaning with {len(sizes)} folds, of which each leaves out others; give folds=1"
        )
