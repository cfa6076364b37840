"""From the scores of all classes to accuracies: ranks, confusions, average precision."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of_label(scores: Tensor, label: Tensor) -> Tensor:
    """How many classes stand before the true one: (B, C), (B,) -> (B,). Ties go to the lower class number.

    A true class with a score of -inf or NaN stands after all.
    """
    true = scores.gather(1, label[:, None])  # (B, 1)
    lower = torch.arange(scores.shape[1], device=scores.device) < label[:, None]  # (B, C)
    rank = (scores > true).sum(1) + ((scores == true) & lower).sum(1)  # (B,)
    unranked = true[:, 0].isnan() | (true[:, 0] == -torch.inf)
    return torch.where(unranked, scores.shape[1], rank)


def confusion_matrix(truth: Tensor, predicted: Tensor, *, num_classes: int) -> Tensor:
    """How many images of each class (row) were taken for each class (column): (N,), (N,) to int64 (C, C)."""
    return torch.bincount(truth * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class over the images: (N, C), (N, C) of 0 and 1 to float64 (C,).

    The sum over thresholds of the step in recall times the precision, without interpolation, as scikit-learn's
    `average_precision_score`; images of equal scores stand on one threshold. NaN for a class that no image has.
    """
    ordered, order = scores.sort(dim=0, descending=True)  # (N, C)
    positive = labels.gather(0, order).double()  # (N, C)
    place = torch.arange(len(scores), device=scores.device)[:, None]
    last = torch.ones_like(order, dtype=torch.bool)
    last[:-1] = ordered[:-1] != ordered[1:]  # of the images of its threshold
    end = torch.where(last, place, len(scores)).flip(0).cummin(0).values.flip(0)  # (N, C)
    precision = positive.cumsum(0).gather(0, end) / (end + 1)
    return (positive * precision).sum(0) / positive.sum(0)  # (C,)
