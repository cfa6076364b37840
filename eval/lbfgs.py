"""Logistic regressions that differ in weight decay alone, solved together by L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eval.heads import Heads, Standardizer, losses, pieces, residuals, targets

HISTORY = 10
HALVINGS = 20
ROUNDING = 1e-6  # of an fp32 loss
KEPT_BYTES = 2**30
LOGITS = 2**24  # computed at once


def solve_heads(
    features: Tensor,
    labels: Tensor,
    *,
    weight_decay: Sequence[float],
    num_classes: int,
    rows: Tensor | None = None,
    standardize: Standardizer | None = None,
    max_iterations: int = 500,
    tolerance: float = 1e-5,
    device: torch.device | str = "cpu",
) -> tuple[Heads, Tensor]:
    """The heads that minimise mean loss + weight_decay[h] / 2 * |weight|^2 over `rows` of features (N, D).

    Labels (N,) give multinomial logistic regression, multi-hot ones (N, C) a binary one per class. scikit-learn's C is
    1 / (N * weight_decay). Returns the heads and which of them came to rest (H,): their largest gradient fell to
    `tolerance` times what it was at zero, or no step makes the loss smaller in fp32.

    L-BFGS (Liu and Nocedal 1989) with its own curvature, step and end per head; one product with the features serves
    the gradients of all. Steps are halved until the loss falls enough (Armijo), or, where the fall drowns in rounding,
    until the slope shows it (Hager and Zhang 2005, approximate Wolfe). Of a convex loss every step has positive
    curvature, so that is all a line search has to see to.
    """
    device = torch.device(device)
    dim, num_heads = features.shape[1], len(weight_decay)
    decay = torch.tensor(weight_decay, dtype=torch.float32, device=device)  # (H,)
    images = _Images(features, labels, rows, standardize, num_classes=num_classes, num_heads=num_heads, device=device)
    point = torch.zeros((dim + 1) * num_classes, num_heads, device=device)  # (P, H): weights, then biases
    loss, gradient = images.loss_and_gradient(point, decay)  # (H,), (P, H)
    enough = tolerance * gradient.abs().amax(0)  # (H,)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    resting = torch.zeros(num_heads, dtype=torch.bool, device=device)
    for _ in range(max_iterations):
        resting |= gradient.abs().amax(0) <= enough
        if resting.all():
            break
        direction = -_apply_inverse(gradient, steps, changes)  # (P, H)
        direction[:, resting] = 0.0
        slope = (direction * gradient).sum(0)  # (H,)
        length = torch.ones_like(slope) if steps else 1.0 / gradient.norm(dim=0).clamp_min(1.0)  # (H,)
        todo = ~resting
        for _ in range(HALVINGS):
            moved_loss, moved_gradient = images.loss_and_gradient(point + length * direction, decay)
            falls = moved_loss <= loss + 1e-4 * length * slope
            flat = (moved_loss <= loss + ROUNDING * loss.abs()) & (
                (moved_gradient * direction).sum(0) <= -0.9998 * slope
            )
            todo = todo & ~(falls | flat)  # NaN goes on, too
            if not todo.any():
                break
            length = torch.where(todo, length / 2, length)
        else:
            length = torch.where(todo, 0.0, length)
            moved_loss, moved_gradient = images.loss_and_gradient(point + length * direction, decay)
        resting |= todo
        step, change = length * direction, moved_gradient - gradient
        point, loss, gradient = point + step, moved_loss, moved_gradient
        steps, changes = [*steps, step][-HISTORY:], [*changes, change][-HISTORY:]
    weight = point[: dim * num_classes].reshape(dim, num_classes * num_heads)
    return Heads(weight, point[dim * num_classes :].flatten(), num_classes), resting.cpu()


def _apply_inverse(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The inverse Hessian that the last steps (P, H) and changes of the gradient tell of, times the gradient (P, H).

    The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), for each head by itself. Pairs without curvature,
    as of a head that rests, count for nothing.
    """
    q, pairs = gradient.clone(), []
    for step, change in zip(reversed(steps), reversed(changes)):
        curvature = (step * change).sum(0)  # (H,)
        rho = torch.where(curvature > 1e-10 * change.square().sum(0), 1.0 / curvature, 0.0)
        alpha = rho * (step * q).sum(0)
        q -= alpha * change
        pairs.append((rho, alpha, step, change))
    if pairs:
        rho, _, _, change = pairs[0]
        q *= torch.where(rho > 0, 1.0 / (rho * change.square().sum(0)), 1.0)
    for rho, alpha, step, change in reversed(pairs):
        q += (alpha - rho * (change * q).sum(0)) * step
    return q


class _Images:
    """The images that the heads are fitted to, standardised once where that takes little memory."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        rows: Tensor | None,
        standardize: Standardizer | None,
        *,
        num_classes: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.features, self.labels, self.rows = features, labels, rows
        self.standardize = (standardize or Standardizer.identity(features.shape[1])).to(device)
        self.num_classes, self.device = num_classes, device
        self.chunk = min(max(LOGITS // (num_classes * num_heads), 64), 8192)
        self.num = len(features) if rows is None else len(rows)
        self.kept = list(self._pieces()) if self.num * features.shape[1] * 4 <= KEPT_BYTES else None

    def loss_and_gradient(self, point: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        """Of heads side by side: (P, H), (H,) to the loss (H,) float64 and its gradient (P, H)."""
        num_weights = self.features.shape[1] * self.num_classes
        weight = point[:num_weights].view(self.features.shape[1], -1)  # (D, C*H)
        heads = Heads(weight, point[num_weights:].flatten(), self.num_classes)
        loss = torch.zeros(point.shape[1], dtype=torch.float64, device=self.device)
        gradient = torch.zeros_like(point)
        of_weight, of_bias = gradient[:num_weights].view_as(weight), gradient[num_weights:].view(-1)
        multi_label = self.labels.ndim == 2
        for x, wanted in self.kept if self.kept is not None else self._pieces():
            logits = heads.logits(x)  # (B, C, H)
            loss += losses(logits, wanted, multi_label=multi_label).sum(0, dtype=torch.float64)
            residual = residuals(logits, wanted, multi_label=multi_label).flatten(1).div_(self.num)  # (B, C*H)
            of_weight.addmm_(x.T, residual)
            of_bias.add_(residual.sum(0))
        squares = point[:num_weights].double().square().sum(0)  # (H,)
        gradient[:num_weights] += decay * point[:num_weights]
        return loss / self.num + 0.5 * decay.double() * squares, gradient

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) as the heads read them, and what these shall say (B, C)."""
        features, labels = (pieces(each, self.rows, size=self.chunk) for each in (self.features, self.labels))
        for x, y in zip(features, labels):
            yield self.standardize(x.to(self.device)), targets(y.to(self.device), self.num_classes)
