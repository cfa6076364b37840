"""How a backbone's features are spread, without labels: ranks, spectra and spreads of features (N, D).

All are computed in float64 on the CPU. Features that are constant, or all zero, have values too, never NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANKME_EPSILON = 1e-7  # Garrido et al. 2022, equation 1, for features in float32
LIDAR_DELTA, LIDAR_EPSILON = 1e-4, 1e-8
FIT_FROM, FIT_TO = 4, 100
"""The eigenvalues that alpha-ReQ's power law is fitted to, counted from 1: those of the authors' own runs."""
FIT_AT_LEAST = 3
DEAD = 1e-3
"""A dimension is dead where its standard deviation is at most this share of the features' root mean square."""


def health(features: Tensor) -> dict[str, float]:
    """What features (N, D) of N images tell without labels.

    `rankme` and `alpha_req`, see the functions of these names; `alpha_req` is left out where no power law can be
    fitted. `feature_std`: the standard deviation of the features at unit length, averaged over the dimensions (Chen and
    He 2020, arXiv:2011.10566, figure 2): 1 / sqrt(D) where they are isotropic, 0 where they have collapsed to a point.
    `mean_cosine`: the mean cosine similarity between two images; features of zeros count as equal to each other and as
    orthogonal to all else. `dead_dimensions`: the share of dimensions that hardly differ between images.
    Raises ValueError for fewer than two images, and for features that are not finite.
    """
    x = _checked(features, ndim=2)  # (N, D)
    alpha = alpha_req(features)
    unit = _unit_length(x)  # (N, D)
    num_zero = int((unit == 0).all(dim=1).sum())
    num = len(x)
    pairs = unit.sum(dim=0).square().sum().item() - (num - num_zero) + num_zero * (num_zero - 1)
    dead = x.std(dim=0, correction=0) <= DEAD * x.square().mean().sqrt()  # (D,)
    return {
        "rankme": rankme(x),
        **({} if alpha is None else {"alpha_req": alpha}),
        "feature_std": unit.std(dim=0, correction=0).mean().item(),
        "mean_cosine": pairs / (num * (num - 1)),
        "dead_dimensions": dead.double().mean().item(),
    }


def rankme(features: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of features (N, D), which are not centred.

    Garrido et al. 2022 (arXiv:2210.02885), equation 1. Between 1 (all on one line, constant ones included) and
    min(N, D); 0 where all features are zero.
    """
    return _effective_rank(torch.linalg.svdvals(_checked(features, ndim=2)), epsilon=RANKME_EPSILON)


def alpha_req(features: Tensor) -> float | None:
    """The exponent of the power law by which the eigenvalues of the covariance of features (N, D) fall.

    Agrawal et al. 2022 (alpha-ReQ, NeurIPS): about 1 is best; far above, few directions hold all variance. Fitted to
    eigenvalues 4 to 100 with weights 1 / rank, as in the authors' code (the paper leaves both open), or as far as there
    are eigenvalues above rounding. None where fewer than three of those are left.
    """
    x = _checked(features, ndim=2)
    smallest = max(x.shape) * torch.finfo(features.dtype).eps * x.norm(dim=1).max()  # what rounding alone could make
    singular = torch.linalg.svdvals(x - x.mean(dim=0))
    spectrum = singular[singular > smallest].square() / len(x)  # eigenvalues of the covariance, falling
    fitted = spectrum[FIT_FROM - 1 : FIT_TO]
    if len(fitted) < FIT_AT_LEAST:
        return None
    place = torch.arange(FIT_FROM, FIT_FROM + len(fitted), dtype=torch.float64)
    weight = 1 / place
    log_place, log_value = place.log(), fitted.log()
    log_place = log_place - (weight * log_place).sum() / weight.sum()
    return -((weight * log_place * log_value).sum() / (weight * log_place.square()).sum()).item()


def lidar(features_by_view: Tensor, *, delta: float = LIDAR_DELTA, epsilon: float = LIDAR_EPSILON) -> float:
    """The effective rank of the linear discriminant analysis whose classes are the images, from features (N, V, D) of
    V views of N images.

    Thilak et al. 2023 (arXiv:2312.04000), equations 1 to 4: directions in which images differ count, relative to how
    much views of one image differ there. Between 1 and min(N - 1, D); 0 where all images are alike. It takes more
    images than dimensions to exhaust the rank. `delta` is added to the within-image covariance, in the features' own
    units. Raises ValueError for fewer than two images or views.
    """
    x = _checked(features_by_view, ndim=3)  # (N, V, D)
    num, views, dimensions = x.shape
    if views < 2:
        raise ValueError(f"LiDAR compares views of the same image and needs two or more, got {views}; give views=10")
    if num * views < dimensions:  # all differences lie in a space of that many dimensions: the rest adds nothing
        centred = (x - x.mean(dim=(0, 1))).flatten(0, 1)  # (N*V, D)
        x = (centred @ torch.linalg.qr(centred.T).Q).unflatten(0, (num, views))  # (N, V, N*V)
    mean = x.mean(dim=1)  # (N, D)
    between = (mean - mean.mean(dim=0)) / (num - 1) ** 0.5  # (N, D), whose product is the covariance between images
    within = (x - mean[:, None]).flatten(0, 1) / (num * (views - 1)) ** 0.5  # (N*V, D)
    values, directions = torch.linalg.eigh(within.T @ within)  # (D,), (D, D)
    whitened = (between @ directions) / (values.clamp(min=0) + delta).sqrt()  # (N, D)
    return _effective_rank(torch.linalg.svdvals(whitened).square(), epsilon=epsilon)


def _effective_rank(values: Tensor, *, epsilon: float) -> float:
    """The exponential of the entropy of values >= 0 over their sum, plus epsilon; 0 where all are 0."""
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + epsilon
    return (-(share * share.log()).sum()).exp().item()


def _unit_length(x: Tensor) -> Tensor:
    """Rows at length 1; a row of zeros stays one. Scaled by the largest entry first, so that nothing under- or
    overflows.
    """
    largest = x.abs().amax(dim=1, keepdim=True)  # (N, 1)
    scaled = x / torch.where(largest > 0, largest, 1.0)
    norm = scaled.norm(dim=1, keepdim=True)  # (N, 1)
    return scaled / torch.where(norm > 0, norm, 1.0)


def _checked(features: Tensor, *, ndim: int) -> Tensor:
    """`features` in float64 on the CPU; ValueError where nothing can be said of them."""
    if features.ndim != ndim or features.shape[0] < 2 or 0 in features.shape:
        shape = "(images, dimensions)" if ndim == 2 else "(images, views, dimensions)"
        raise ValueError(f"features must be {shape} of two images or more, got {tuple(features.shape)}")
    x = features.detach().double().cpu()
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum())
        raise ValueError(f"{bad} of {len(x)} images have features that are not finite; the backbone has diverged")
    return x
