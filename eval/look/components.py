"""Principal components of features, of tokens and of filters, with signs that do not change from one map to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """Principal components of rows (N, D), the first first."""

    score: Tensor
    """(N, k) of each row along each component; their means are 0."""
    direction: Tensor
    """(k, D) of length 1; its largest entry is positive."""
    explained: Tensor
    """(k,) shares of the rows' variance."""


def principal_components(rows: Tensor, num: int = 3) -> Components:
    """The first `num` principal components of rows (N, D), in float64; all there are where they are fewer.

    A component's sign is free: it is chosen so that its largest entry is positive.
    """
    centred = rows.double() - rows.double().mean(0)  # (N, D)
    _, length, direction = torch.linalg.svd(centred, full_matrices=False)
    total = length.square().sum()
    direction, length = direction[:num], length[:num]
    largest = direction.gather(1, direction.abs().argmax(1, keepdim=True))  # (k, 1)
    direction = direction * largest.sign()
    explained = length.square() / total if total > 0 else torch.zeros_like(length)
    return Components(centred @ direction.T, direction, explained)


def principal_plane(rows: Tensor) -> tuple[np.ndarray, list[float]]:
    """Places (N, 2) of rows (N, D) on their first two principal components, and the share of the variance of each.

    A component that there is not, as of one dimension, is 0 everywhere.
    """
    found = principal_components(rows, 2)
    place = np.zeros((len(rows), 2))
    place[:, : found.score.shape[1]] = found.score.numpy()
    return place, [*found.explained.tolist(), 0.0, 0.0][:2]
