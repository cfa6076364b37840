"""Where the true class stands among the scores of all classes."""

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
