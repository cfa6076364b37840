"""How far one set of images lies from another, by the statistics of their features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPLITS = 5


@dataclass(frozen=True)
class Similarity:
    """Where new images lie between those of pretraining (0) and random pixels (1), and the squared distances behind it.

    `relative` is (new - floor) / (ceiling - floor), `error` its standard deviation over `SPLITS` random halvings;
    `floor` is the distance between two halves of the pretraining images, `ceiling` that of a half from random pixels.
    All sets have `num_images` images, because the distance of few images is biased upwards.
    """

    relative: float
    error: float
    new: float
    floor: float
    ceiling: float
    num_images: int


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance between the Gaussians that have the moments of features a (N, D) and b (M, D).

    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances over N - 1 (Dowson and Landau 1982; of features:
    Heusel et al. 2017, arXiv:1706.08500, equation 6). With A = R'R and B = S'S the trace of the root is the sum of
    the singular values of R S', so that fewer images than dimensions need no correction. Raises ValueError for fewer
    than two images, and for features of different dimensions or that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            "a Frechet distance is taken between features (images, dimensions) of equal dimensions, two images or "
            f"more of each; got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("a Frechet distance needs finite features; the backbone has diverged")
    a, b = a.double(), b.double()
    r, s = _root_of_covariance(a), _root_of_covariance(b)  # (R, D), (S, D)
    spread = r.square().sum() + s.square().sum() - 2 * torch.linalg.svdvals(r @ s.T).sum()
    return max(((a.mean(0) - b.mean(0)).square().sum() + spread).item(), 0.0)


def similarity(
    pretraining: Tensor, new: Tensor, random: Tensor, *, most: int = 1000, seed: int = 0
) -> Similarity | None:
    """Where features `new` (M, D) lie between those of pretraining (N, D) and of random pixels (L, D).

    Of each as many images, at most `most`, drawn anew for each halving of the pretraining images. None where random
    pixels are no further away than one half from the other: the features tell nothing apart then.
    """
    num = min(len(pretraining) // 2, len(new), len(random), most)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SPLITS):
        order = torch.randperm(len(pretraining), generator=generator)  # (N,)
        half, other = pretraining[order[:num]], pretraining[order[num : 2 * num]]
        some = new[torch.randperm(len(new), generator=generator)[:num]]
        found.append([frechet_distance(half, each) for each in (some, other, random[:num])])
    distances = torch.tensor(found, dtype=torch.float64)  # (SPLITS, 3)
    place, floor, ceiling = distances.unbind(1)
    if (ceiling <= floor).any():
        return None
    relative = (place - floor) / (ceiling - floor)
    return Similarity(
        relative=relative.mean().item(),
        error=relative.std().item(),
        new=place.mean().item(),
        floor=floor.mean().item(),
        ceiling=ceiling.mean().item(),
        num_images=num,
    )


def _root_of_covariance(features: Tensor) -> Tensor:
    """R with R'R the covariance of features (N, D): (min(N, D), D)."""
    centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)
    return centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R
