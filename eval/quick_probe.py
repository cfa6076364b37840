"""A quick look at the layers of a backbone on train alone: linear heads and nearest neighbours, by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.heads import Heads, Standardizer, pieces
from eval.knn import knn
from eval.lbfgs import solve_heads

WEIGHT_DECAY = (1e-3, 1e-1, 1e1)
K = 20
ERROR_RULE = "of a difference: the larger of that over images and, corrected for shared training images, over folds"


@dataclass(frozen=True)
class LayerScore:
    """What one layer's features are worth: top-1 of a linear head on folds that it was not trained on.

    `hit` (N,) says of each image whether it was named right while held out; `train_top1` is the same heads' on the
    images they were trained on, `knn_top1` that of the nearest neighbours in the other folds.
    """

    layer: str
    dimensions: int
    top1: float
    train_top1: float
    knn_top1: float
    weight_decay: float
    hit: Tensor


@dataclass(frozen=True)
class Difference:
    """`value` of top-1, with its standard error."""

    value: float
    error: float


def probe_layer(
    name: str,
    features: Tensor,
    labels: Tensor,
    *,
    folds: Sequence[Tensor],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> LayerScore:
    """Features (N, D) of images with labels (N,), judged by `folds`: disjoint rows that together are all N.

    Heads are logistic regressions on features standardised by the rows they are trained on, solved by L-BFGS; of the
    weight decays the one with the highest top-1 on the held-out rows, of equal ones the largest.
    """
    rows = torch.arange(len(labels))
    hit = torch.zeros(len(labels), len(WEIGHT_DECAY), dtype=torch.bool)  # (N, H)
    on_train = torch.zeros(len(WEIGHT_DECAY), dtype=torch.float64)  # (H,)
    near = 0.0
    for fold in folds:
        fitted = rows[~torch.isin(rows, fold)]
        standardize = Standardizer.fit(features, fitted)
        heads, _ = solve_heads(
            features,
            labels,
            weight_decay=WEIGHT_DECAY,
            num_classes=num_classes,
            rows=fitted,
            standardize=standardize,
            device=device,
        )
        hit[fold] = _hits(heads, features, labels, fold, standardize, device)
        on_train += _hits(heads, features, labels, fitted, standardize, device).double().mean(0) / len(folds)
        scores = knn(
            features[fitted],
            labels[fitted],
            features[fold],
            labels[fold],
            k=[K],
            num_classes=num_classes,
            device=device,
        )
        near += scores.first()["top1"] * len(fold) / len(labels)
    top1 = hit.double().mean(0)  # (H,)
    best = int((top1 == top1.max()).nonzero()[-1])
    return LayerScore(
        layer=name,
        dimensions=features.shape[1],
        top1=top1[best].item(),
        train_top1=on_train[best].item(),
        knn_top1=near,
        weight_decay=WEIGHT_DECAY[best],
        hit=hit[:, best],
    )


def difference(a: LayerScore, b: LayerScore, folds: Sequence[Tensor]) -> Difference:
    """How much more a gets right than b on the same held-out images, and the standard error.

    The error is the larger of two: that of the difference per image, which knows of the images only; and that of the
    difference per fold, corrected for the images that the folds' training sets share, sqrt(1/K + 1/(K-1)) deviations
    (Nadeau and Bengio 2003, section 3).
    """
    each = a.hit.double() - b.hit.double()  # (N,)
    of_images = (each.std() / math.sqrt(len(each))).item()
    by_fold = torch.stack([each[fold].mean() for fold in folds])  # (K,)
    num = len(folds)
    of_folds = (by_fold.std() * math.sqrt(1 / num + 1 / (num - 1))).item()
    return Difference(each.mean().item(), max(of_images, of_folds))


def _hits(
    heads: Heads, features: Tensor, labels: Tensor, rows: Tensor, standardize: Standardizer, device: torch.device | str
) -> Tensor:
    """Which of `rows` (M,) each head names right: (M, H)."""
    standardize = standardize.to(device)
    named = [heads.logits(standardize(some.to(device))).argmax(1).cpu() for some in pieces(features, rows)]  # (B, H)
    return torch.cat(named) == labels[rows, None]
