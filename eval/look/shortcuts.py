"""What a single patch gives away: linear probes for its place in the image and for a colour channel that was shifted.

Doersch et al. 2015 (arXiv:1505.05192), section 3.1: a lens does not focus all colours alike, so a channel is displaced
against the others by an amount that grows away from the optical axis; a network that sees the displacement knows where
a patch lies without knowing what it shows. They found it by training a network to tell absolute coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from eval.heads import Standardizer, choose, score_heads
from eval.lbfgs import solve_heads
from eval.look.estimate import Estimate
from eval.look.result import DoesNotApply
from ssl.methods.relative_location import cut
from ssl.randomness import uniforms

WEIGHT_DECAY = (1e-2, 1e-1, 1.0, 1e1)
RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
GRID = 3
FEWEST_IMAGES = 20
SHUFFLES = 5
MOST_ITERATIONS = 60

Size = tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """Rows of patches by what they are for: to fit a head, to choose its decay, to judge it; no image is in two."""

    fitted: Tensor
    chosen_on: Tensor
    judged: Tensor


@dataclass(frozen=True)
class ClassProbe:
    """Accuracy of a linear classifier on images that it was not fitted on, with its standard error over images."""

    top1: float
    error: float
    chance: float
    shuffled: float
    """The same fitted to shuffled labels, the mean of SHUFFLES: what the procedure finds where there is nothing."""
    shuffled_error: float
    """How far one shuffling's accuracy lies from another's: a standard deviation."""
    num_patches: int
    num_images: int


@dataclass(frozen=True)
class PlaceProbe:
    """How much of the variance of a patch's place a linear map explains on other images: 1 all, 0 or less nothing."""

    r2_x: float
    r2_y: float
    error_x: float
    error_y: float
    """Standard errors over images."""
    shuffled_x: float
    shuffled_y: float
    """Fitted to shuffled places, the mean of SHUFFLES."""


def divide(image: np.ndarray, *, seed: int = 0) -> Parts:
    """Rows of patches whose images are `image` (N,): 60 % of the images to fit, 20 % to choose, 20 % to judge.

    Raises DoesNotApply for fewer than FEWEST_IMAGES images.
    """
    names = np.unique(image)
    if len(names) < FEWEST_IMAGES:
        raise DoesNotApply(
            f"a probe needs {FEWEST_IMAGES} images or more, got {len(names)}; set pretext.sample larger, or where "
            "there are no more give another split= or data="
        )
    order = names[np.argsort(uniforms(seed, 0, np.arange(len(names)), "probe parts", 1)[:, 0], kind="stable")]
    bounds = np.cumsum([round(0.6 * len(names)), round(0.2 * len(names))])
    fitted, chosen_on, judged = (
        torch.from_numpy(np.flatnonzero(np.isin(image, part))) for part in np.split(order, bounds)
    )
    return Parts(fitted, chosen_on, judged)


def probe_class(features: Tensor, label: Tensor, image: np.ndarray, *, num_classes: int, seed: int = 0) -> ClassProbe:
    """Tell `label` (N,) from features (N, D) of patches of the images `image` (N,), by logistic regression.

    The weight decay is chosen on images of its own. Labels are taken to be drawn evenly: chance is 1 in `num_classes`.
    """
    parts = divide(image, seed=seed)
    estimate = Estimate(f"a linear probe of {len(label):,} patches, and {SHUFFLES} of shuffled labels", 1 + SHUFFLES)
    hits = _class_hits(features, label, parts, num_classes)
    shuffled = []
    for number in range(SHUFFLES):
        estimate.at(1 + number)
        shuffled.append(_class_hits(features, _shuffled(label, parts, seed, number), parts, num_classes).mean())
    judged = image[parts.judged.numpy()]
    by_image = np.array([hits[judged == name].mean() for name in np.unique(judged)])
    return ClassProbe(
        top1=float(hits.mean()),
        error=float(by_image.std(ddof=1) / len(by_image) ** 0.5),
        chance=1 / num_classes,
        shuffled=float(np.mean(shuffled)),
        shuffled_error=float(np.std(shuffled, ddof=1)),
        num_patches=len(label),
        num_images=len(np.unique(image)),
    )


def probe_place(features: Tensor, place: Tensor, image: np.ndarray, *, seed: int = 0) -> PlaceProbe:
    """Tell `place` (N, 2), x and y of each patch's middle, from features (N, D) by ridge regression in closed form."""
    parts = divide(image, seed=seed)
    remaining, total = _left(features, place, parts)  # (n, 2) each
    r2 = 1 - remaining.sum(0) / total.sum(0)
    # Of a ratio of sums over images, by the delta method: how much each image's own pair departs from the ratio.
    judged = image[parts.judged.numpy()]
    names = np.unique(judged)
    departs = np.array([(remaining - (1 - r2) * total)[judged == name].sum(0) for name in names])  # (images, 2)
    error = departs.std(0, ddof=1) * len(names) ** 0.5 / total.sum(0)
    shuffled = []
    for number in range(SHUFFLES):
        remaining, total = _left(features, _shuffled(place, parts, seed, number), parts)
        shuffled.append(1 - remaining.sum(0) / total.sum(0))
    return PlaceProbe(*map(float, (*r2, *error, *np.mean(shuffled, axis=0))))


def grid_cell(place: Tensor, cells: int = GRID) -> Tensor:
    """Which cell of a `cells` x `cells` grid over the range of places (N, 2), x and y in 0..1, each lies in: (N,)."""
    column, row = (place * cells).long().clamp(0, cells - 1).unbind(1)
    return row * cells + column


def random_corners(index: np.ndarray, num: int, *, image_size: Size, patch_size: Size, seed: int = 0) -> Tensor:
    """Top left corners int64 (B, num, 2), row and column, of patches anywhere in the images `index` (B,)."""
    share = torch.from_numpy(uniforms(seed, 0, index, "probed patches", 2 * num)).view(-1, num, 2)
    room = torch.tensor([side - patch + 1 for side, patch in zip(image_size, patch_size)])
    return (share.double() * room).long()


def middles(corners: Tensor, *, image_size: Size, patch_size: Size) -> Tensor:
    """x and y of each corner (..., 2) as shares of the way that a patch can go, float32 (..., 2), 0 left and top."""
    room = torch.tensor([max(side - patch, 1) for side, patch in zip(image_size, patch_size)], device=corners.device)
    return (corners / room).flip(-1).float()


def shifted_patches(image: Tensor, corners: Tensor, size: Size, channel: Tensor, *, shift: int) -> Tensor:
    """Patches (B, P, C, h, w) of `size` cut at `corners` (B, P, 2), one channel of each `shift` pixels to the right.

    `channel` (B, P) says which, -1 for none. What would come from beyond the image repeats its edge.
    """
    moved = pad(image, (shift, 0, 0, 0), mode="replicate")[..., : image.shape[3]]
    place = torch.arange(image.shape[1], device=image.device)
    chosen = (place == channel[..., None])[..., None, None]  # (B, P, C, 1, 1)
    return torch.where(chosen, cut(moved, corners, size), cut(image, corners, size))


def random_channels(index: np.ndarray, num: int, *, channels: int, seed: int = 0) -> Tensor:
    """Which channel of each of `num` patches of images `index` (B,) is to be shifted, -1 for none: int64 (B, num)."""
    share = torch.from_numpy(uniforms(seed, 0, index, "shifted channel", num)).double()
    return (share * (channels + 1)).long() - 1


@torch.no_grad()
def features_of(patches: Tensor, features: Callable[[Tensor], Tensor], *, batch_size: int) -> Tensor:
    """Vectors (B*P, D), float32 on the CPU, of patches (B, P, C, h, w)."""
    every = patches.flatten(0, 1)  # (B*P, C, h, w)
    estimate = Estimate(f"features of {len(every):,} patches", len(every))
    found = []
    for some in every.split(batch_size):
        found.append(features(some).float().cpu())
        estimate.at(sum(map(len, found)))
    return torch.cat(found)


def _class_hits(features: Tensor, label: Tensor, parts: Parts, num_classes: int) -> np.ndarray:
    """Which of the judged patches are named right, bool (n,)."""
    standardize = Standardizer.fit(features, parts.fitted)
    heads, _ = solve_heads(
        features,
        label,
        weight_decay=WEIGHT_DECAY,
        num_classes=num_classes,
        rows=parts.fitted,
        standardize=standardize,
        max_iterations=MOST_ITERATIONS,
    )
    scores = score_heads(heads, features, label, rows=parts.chosen_on, standardize=standardize)
    head = heads.only(choose(scores, num_images=len(parts.chosen_on)))
    named = head.logits(standardize(features[parts.judged]))[:, :, 0].argmax(1)  # (n,)
    return (named == label[parts.judged]).numpy()


def _left(features: Tensor, wanted: Tensor, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of the judged patches' places (n, 2), and their squared distances from the mean (n, 2)."""
    standardize = Standardizer.fit(features, parts.fitted)
    x = standardize(features).double()  # (N, D)
    y = wanted.double()
    mean = y[parts.fitted].mean(0)
    own = x[parts.fitted]
    moment, with_y = own.T @ own / len(own), own.T @ (y[parts.fitted] - mean) / len(own)  # (D, D), (D, 2)
    identity = torch.eye(len(moment), dtype=moment.dtype)
    weights = [torch.linalg.solve(moment + decay * identity, with_y) for decay in RIDGE]  # (D, 2) each
    left = [(y - mean - x @ weight)[parts.chosen_on].square().sum().item() for weight in weights]
    weight = weights[int(np.argmin(left))]
    true = y[parts.judged]
    remaining = (true - mean - x[parts.judged] @ weight).square()
    return remaining.numpy(), (true - true.mean(0)).square().numpy()


def _shuffled(values: Tensor, parts: Parts, seed: int, number: int) -> Tensor:
    """`values` (N, ...) with those that are fitted and chosen on in another order; the judged ones stay."""
    rows = torch.cat([parts.fitted, parts.chosen_on])
    drawn = uniforms(seed, number, np.arange(len(rows)), "shuffled", 1)[:, 0]
    order = torch.from_numpy(np.argsort(drawn, kind="stable"))
    result = values.clone()
    result[rows] = values[rows[order]]
    return result
