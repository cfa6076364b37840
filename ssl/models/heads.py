"""Heads that only pretraining needs: SimCLR's projector and relative location's pair classifier."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Projector(nn.Sequential):
    """MLP from features (B, D) to embeddings (B, Z), BatchNorm behind each linear layer, ReLU between them.

    As in google-research/simclr, `projection_head`: no linear layer has a bias, BatchNorm's stands in for it, and the
    last BatchNorm scales but does not shift. There the hidden layers are as wide as the features. Depth 2 is SimCLR's
    (arXiv:2002.05709, section 2.1), depth 3 SimCLR v2's (arXiv:2006.10029) and that repository's default.
    Raises ValueError for a depth below 1, and for a hidden width where depth 1 has no hidden layer.
    """

    def __init__(self, in_dim: int, *, out_dim: int, hidden_dim: int | None = None, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"a projector needs a depth of at least 1 layer, got {depth}; SimCLR's is 2")
        if depth == 1 and hidden_dim is not None:
            raise ValueError(
                f"a projector of depth 1 has no hidden layer, but its width is given as {hidden_dim}; "
                "set projection_hidden_dim=null or projection_depth=2"
            )
        widths = [in_dim] + [hidden_dim or in_dim] * (depth - 1)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.ReLU(inplace=True)]
        last_norm = nn.BatchNorm1d(out_dim)
        last_norm.bias.requires_grad_(False)  # stays 0
        super().__init__(*layers, nn.Linear(widths[-1], out_dim, bias=False), last_norm)


class PairClassifier(nn.Module):
    """Tells where a patch lies beside another one: features of both to scores of the eight places.

    Linear on both patches' features side by side, BatchNorm, ReLU, dropout, linear: the head of
    google/revisiting-self-supervised and open-mmlab/mmselfsup, with the latter's initial weights and momentum.
    """

    def __init__(self, in_dim: int, *, hidden_dim: int = 4096, dropout: float = 0.5, num_places: int = 8) -> None:
        super().__init__()
        self.pair = nn.Linear(2 * in_dim, hidden_dim)
        self.norm = nn.BatchNorm1d(hidden_dim, momentum=0.003)
        self.dropout = nn.Dropout(dropout)
        self.places = nn.Linear(hidden_dim, num_places)
        for layer, std in ((self.pair, 0.01), (self.places, 0.005)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, neighbours: Tensor, centre: Tensor) -> Tensor:
        """Scores (B, 8, C) of `neighbours` (B, 8, D), each beside its image's `centre` (B, D)."""
        of_neighbour, of_centre = self.pair.weight.chunk(2, dim=1)  # (hidden, D) each
        # A sum of two maps equals the map of both side by side; the centre's is computed once instead of eight times.
        hidden = F.linear(neighbours, of_neighbour) + F.linear(centre, of_centre, self.pair.bias)[:, None]
        num_images, num_pairs, width = hidden.shape
        hidden = self.norm(hidden.reshape(-1, width))  # (8B, hidden)
        hidden = self.dropout(F.relu(hidden))
        return self.places(hidden).view(num_images, num_pairs, -1)  # (B, 8, C)
