"""A grid of linear classifiers on fixed features, trained at once as one batched problem."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eval.accuracy import average_precision, rank_of_label
from ssl.products import product

MOMENTUM = 0.9
MOVED_BYTES = 2**33  # features up to here are put on the GPU whole


@dataclass
class Heads:
    """H linear heads on D features for C classes, side by side: weight (D, C*H), bias (C*H,), class by class.

    The heads of one class stand together: the softmax over the classes then runs over whole rows of heads, which is
    fifteen times as fast as over ten neighbouring numbers.
    """

    weight: Tensor
    bias: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.bias) // self.num_classes

    def logits(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, C, H)."""
        return product(features, self.weight.T, self.bias).unflatten(1, (self.num_classes, -1))

    def only(self, head: int) -> Heads:
        """One head of the grid."""
        columns = slice(head, None, len(self))
        return Heads(self.weight[:, columns].clone(), self.bias[columns].clone(), self.num_classes)


@dataclass(frozen=True)
class HeadScores:
    """Per head, (H,) float64 each: `metrics` as fractions, mean loss; not `finite` where a head diverged.

    Of single-label images `top1` and `top5` and cross-entropy; of multi-label ones `map`, the mean over classes of
    their average precision, and binary cross-entropy summed over classes.
    """

    metrics: dict[str, Tensor]
    loss: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Standardizer:
    """Features with the mean and deviation of the rows it was fitted on taken out: a BatchNorm without affine.

    Dimensions that never change there are set to zero.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, features: Tensor, rows: Tensor | None = None) -> Standardizer:
        """Statistics of `rows` of features (N, D), of all where None; summed in float64 in pieces."""
        total, square = (torch.zeros(features.shape[1], dtype=torch.float64) for _ in range(2))
        num = 0
        for piece in pieces(features, rows):
            total += piece.sum(0, dtype=torch.float64)
            num += len(piece)
        mean = total / num
        for piece in pieces(features, rows):
            square += (piece.double() - mean).square().sum(0)
        deviation = (square / num).sqrt()
        # What is constant up to fp32 rounding would be noise of size 1 after the division.
        moves = deviation > 1e-6 * mean.abs().clamp_min(1e-6)
        scale = torch.where(moves, 1.0 / deviation.clamp_min(1e-30), torch.zeros_like(deviation))
        return cls(mean.float(), scale.float())

    @classmethod
    def identity(cls, dim: int) -> Standardizer:
        """Features of `dim` dimensions as they are."""
        return cls(torch.zeros(dim), torch.ones(dim))

    def to(self, device: torch.device | str) -> Standardizer:
        return Standardizer(self.mean.to(device), self.scale.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale  # (N, D)


def pieces(values: Tensor, rows: Tensor | None, *, size: int = 8192) -> Iterator[Tensor]:
    """`rows` of (N, ...), all where None, `size` at once, so that no second copy of the whole is made."""
    if rows is None:
        yield from values.split(size)
    else:
        for some in rows.split(size):
            yield values[some]


def targets(labels: Tensor, num_classes: int) -> Tensor:
    """What the heads shall say of each image, float32 (B, C): labels (B,) as one-hot, multi-hot ones as they are."""
    return (functional.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float()


def residuals(logits: Tensor, wanted: Tensor, *, multi_label: bool) -> Tensor:
    """The loss's gradient for the logits (B, C, H) of each image: softmax or sigmoid less what is wanted (B, C)."""
    said = logits.sigmoid() if multi_label else logits.softmax(dim=1)
    return said.sub_(wanted[:, :, None])


def losses(logits: Tensor, wanted: Tensor, *, multi_label: bool) -> Tensor:
    """Cross-entropy of each image and head, or the classes' binary ones summed: (B, C, H), (B, C) to (B, H)."""
    norm = functional.softplus(logits).sum(1) if multi_label else logits.logsumexp(1)
    return norm - (logits * wanted[:, :, None]).sum(1)


def train_heads(
    features: Tensor,
    labels: Tensor,
    *,
    lr: Sequence[float],
    weight_decay: Sequence[float],
    num_classes: int,
    steps: int,
    batch_size: int,
    seed: int,
    rows: Tensor | None = None,
    standardize: Standardizer | None = None,
    device: torch.device | str = "cpu",
) -> Heads:
    """Train head h with `lr[h]` and `weight_decay[h]` on `rows` of features (N, D), all heads on the same batches.

    SGD with momentum 0.9, cosine to zero, weights from zero: the problem is convex, so the seed decides only the order
    of the images. Labels (N,) give the softmax's cross-entropy, multi-hot ones (N, C) a binary one per class, summed.
    No head reads another's numbers, so one that diverges leaves the others as they are. The gradient is written out:
    the residual through one matrix product for all heads.
    """
    device = torch.device(device)
    standardize = (standardize or Standardizer.identity(features.shape[1])).to(device)
    rate = torch.tensor(lr, dtype=torch.float32).repeat(num_classes).to(device)  # (C*H,)
    decay = torch.tensor(weight_decay, dtype=torch.float32).repeat(num_classes).to(device)
    weight = torch.zeros(features.shape[1], num_classes * len(lr), device=device)  # (D, C*H)
    heads = Heads(weight, torch.zeros_like(rate), num_classes)
    weight_step, bias_step = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    rows = torch.arange(len(features)) if rows is None else rows
    if device.type == "cuda" and features.nbytes <= MOVED_BYTES:
        features, labels, rows = features.to(device), labels.to(device), rows.to(device)
    batch_size = min(batch_size, len(rows))
    order = torch.Generator().manual_seed(seed)
    queue = rows[torch.randperm(len(rows), generator=order).to(rows.device)]
    for step in range(steps):
        if len(queue) < batch_size:  # the rest of an epoch that fills no batch is left out
            queue = rows[torch.randperm(len(rows), generator=order).to(rows.device)]
        chosen, queue = queue[:batch_size], queue[batch_size:]
        x = standardize(features[chosen].to(device))  # (B, D)
        wanted = targets(labels[chosen].to(device), num_classes)  # (B, C)
        residual = residuals(heads.logits(x), wanted, multi_label=labels.ndim == 2)  # (B, C, H)
        residual = residual.flatten(1).div_(len(x))  # (B, C*H)
        factor = 0.5 * (1.0 + math.cos(math.pi * step / steps))
        weight_step.mul_(MOMENTUM).add_(product(x.T, residual.T)).addcmul_(heads.weight, decay)  # (D, C*H)
        bias_step.mul_(MOMENTUM).add_(residual.sum(0))
        heads.weight.addcmul_(weight_step, rate, value=-factor)
        heads.bias.addcmul_(bias_step, rate, value=-factor)
    return heads


def score_heads(
    heads: Heads,
    features: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    standardize: Standardizer | None = None,
    chunk: int = 1024,
) -> HeadScores:
    """How good every head is on `rows` of features (N, D). Of equal logits the lower class wins; NaN is never a hit.

    Classes that none of the rows has are left out of `map`.
    """
    device, num = heads.weight.device, len(features) if rows is None else len(rows)
    standardize = (standardize or Standardizer.identity(features.shape[1])).to(device)
    multi_label = labels.ndim == 2
    hits = torch.zeros(2, len(heads), dtype=torch.float64)
    loss, kept = torch.zeros(len(heads), dtype=torch.float64), []
    for x, y in zip(pieces(features, rows, size=chunk), pieces(labels, rows, size=chunk)):
        logits = heads.logits(standardize(x.to(device)))  # (B, C, H)
        wanted = targets(y.to(device), heads.num_classes)
        loss += losses(logits, wanted, multi_label=multi_label).double().sum(0).cpu()
        if multi_label:
            kept.append(logits.cpu())
            continue
        label = y.to(device)[:, None].expand(-1, len(heads))  # (B, H)
        rank = rank_of_label(logits.transpose(1, 2).flatten(0, 1), label.flatten()).unflatten(0, label.shape)
        hits += torch.stack([(rank < 1).sum(0), (rank < 5).sum(0)]).cpu()
    columns = torch.isfinite(heads.weight).all(0) & torch.isfinite(heads.bias)  # (C*H,)
    finite = columns.unflatten(0, (-1, len(heads))).all(0).cpu() & loss.isfinite()
    if multi_label:
        precision = mean_precision(torch.cat(kept), labels if rows is None else labels[rows])
        metrics = {"map": torch.where(finite, precision, 0.0)}
    else:
        metrics = {"top1": hits[0] / num, "top5": hits[1] / num}
    return HeadScores(metrics, loss / num, finite)


def mean_precision(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean average precision of each head over the classes that some image has: (N, C, H), (N, C) to (H,)."""
    some = labels.any(0)  # (C,)
    if not some.any():
        raise ValueError(f"none of the {len(labels)} images has any of the {labels.shape[1]} classes: there is no mAP")
    each = [average_precision(head[:, some], labels[:, some]).mean() for head in logits.unbind(2)]
    return torch.stack(each)


def choose(scores: HeadScores, *, num_images: int) -> int:
    """The best head on `num_images` held-out images; ValueError where all diverged.

    By top-1: the lowest loss among the heads within one standard error of the highest. A small held-out slice cannot
    tell such heads apart by top-1 (150 images: 3.5 points), the loss can: over 24 draws of made problems this rule came
    0.4 to 0.75 points nearer the best head than the highest top-1 did. By mAP: the highest.
    """
    if not scores.finite.any():
        raise ValueError("every head of the grid diverged; give smaller learning rates (lr=[...])")
    name = "top1" if "top1" in scores.metrics else "map"
    value = torch.where(scores.finite, scores.metrics[name], -1.0)  # (H,)
    best = value.max().item()
    slack = math.sqrt(best * (1.0 - best) / num_images) if name == "top1" else 0.0
    return int(torch.where(value >= best - slack, scores.loss, torch.inf).argmin())
