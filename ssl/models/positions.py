"""Fixed sine-cosine positions of a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(embed_dim: int, grid_h: int, grid_w: int) -> Tensor:
    """Return the positions of a grid's patches, row by row: (grid_h * grid_w, embed_dim), float32.

    Vaswani et al. 2017 (section 3.5) along each axis, with all sines before all cosines. The first half of a vector
    holds the column, the second half the row, as in MAE's published weights. Raises ValueError unless 4 divides
    `embed_dim`.
    """
    if embed_dim % 4:
        raise ValueError(f"2-d sine-cosine positions need a width that 4 divides, got {embed_dim}.")
    quarter = embed_dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # (D/4,)
    row, column = torch.meshgrid(
        torch.arange(grid_h, dtype=torch.float64), torch.arange(grid_w, dtype=torch.float64), indexing="ij"
    )
    halves = []
    for coordinate in (column, row):
        angle = coordinate.flatten()[:, None] * frequency  # (N, D/4)
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, dim=1).float()  # (N, D)
