"""From logits of a whole split to what a result reports: headline metrics, and the details beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eval.accuracy import average_precision, confusion_matrix, rank_of_label

LARGEST_CONFUSION = 200  # classes; a matrix of more is no longer read by people


def headline(logits: Tensor, labels: Tensor, *, multi_label: bool) -> dict[str, float]:
    """`top1`, and `top5` where there are more than five classes, of logits (N, C) and labels (N,); `map`, the mean over
    classes of average precision, for multi-hot labels (N, C). Classes without an image do not count.
    """
    if multi_label:
        return {"map": average_precision(logits, labels).nanmean().item()}
    rank = rank_of_label(logits, labels)  # (N,)
    metrics = {"top1": (rank < 1).double().mean().item()}
    if logits.shape[1] > 5:
        metrics["top5"] = (rank < 5).double().mean().item()
    return metrics


def details(logits: Tensor, labels: Tensor, classes: list[str], *, multi_label: bool) -> dict[str, Any]:
    """Accuracy, or average precision, of each class by name (null for one without an image), and the confusion matrix:
    rows are the true classes, columns the predicted ones, up to 200 classes.
    """
    if multi_label:
        precision = average_precision(logits, labels).tolist()
        return {"average_precision": {name: _number(value) for name, value in zip(classes, precision, strict=True)}}
    matrix = confusion_matrix(labels, logits.argmax(1), num_classes=len(classes))  # (C, C)
    accuracy = (matrix.diag() / matrix.sum(1)).tolist()  # nan without an image
    per_class = {name: _number(value) for name, value in zip(classes, accuracy, strict=True)}
    if len(classes) > LARGEST_CONFUSION:
        return {"per_class": per_class}
    return {"per_class": per_class, "confusion": {"classes": classes, "rows": matrix.tolist()}}


def _number(value: float) -> float | None:
    return None if torch.tensor(value).isnan() else value
