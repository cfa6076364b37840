"""Logistic regressions that differ in weight decay alone, solved together by L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from eval.heads import Heads, Standardizer, pieces, targets
from ssl.products import product

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
    tolerance: float = 1e-3,
    device: torch.device | str = "cpu",
) -> tuple[Heads, Tensor]:
    """The heads that minimise mean loss + weight_decay[h] / 2 * |weight|^2 over `rows` of features (N, D).

    Labels (N,) give multinomial logistic regression, multi-hot ones (N, C) a binary one per class. scikit-learn's C is
    1 / (N * weight_decay). Returns the heads and which of them came to rest (H,): their largest gradient fell to
    `tolerance` times what it was at zero (scikit-learn stops at about as much), or no step makes the loss smaller in
    fp32.

    L-BFGS (Liu and Nocedal 1989) with its own curvature, step and end per head; one product with the features serves
    the gradients of all that still move. Steps are halved until the loss falls enough (Armijo), or, where the fall
    drowns in rounding, until the slope shows it (Hager and Zhang 2005, approximate Wolfe). Of a convex loss every step
    has positive curvature, so that is all a line search has to see to.
    """
    device = torch.device(device)
    num_heads, dim = len(weight_decay), features.shape[1]
    images = _Images(features, labels, rows, standardize, num_classes=num_classes, num_heads=num_heads, device=device)
    solved = torch.zeros(num_classes, num_heads, dim + 1, device=device)  # the last column is the bias
    moving = torch.arange(num_heads, device=device)  # (M,)
    decay = torch.tensor(weight_decay, dtype=torch.float32, device=device)  # (M,)
    point = solved.clone()  # (C, M, D+1), as are gradient, direction and history
    loss, gradient = images.loss_and_gradient(point, decay)  # (M,), (C, M, D+1)
    enough = tolerance * gradient.abs().amax((0, 2))  # (M,)
    history: list[tuple[Tensor, Tensor]] = []
    stuck = torch.zeros(num_heads, dtype=torch.bool, device=device)
    for _ in range(max_iterations):
        go = (gradient.abs().amax((0, 2)) > enough) & ~stuck
        if not go.all():
            solved[:, moving[~go]] = point[:, ~go]
            moving, decay, loss, enough, stuck = (each[go] for each in (moving, decay, loss, enough, stuck))
            point, gradient = point[:, go], gradient[:, go]
            history = [(step[:, go], change[:, go]) for step, change in history]
        if not len(moving):
            break
        direction = -_apply_inverse(gradient, history)
        slope = _dot(direction, gradient)  # (M,)
        length = torch.ones_like(slope) if history else 1.0 / _dot(gradient, gradient).sqrt().clamp_min(1.0)
        stuck = torch.ones_like(stuck)
        for _ in range(HALVINGS):
            moved_loss, moved_gradient = images.loss_and_gradient(point + _each(length) * direction, decay)
            falls = moved_loss <= loss + 1e-4 * length * slope
            flat = (moved_loss <= loss + ROUNDING * loss.abs()) & (_dot(moved_gradient, direction) <= -0.9998 * slope)
            stuck &= ~(falls | flat)  # a NaN is halved, too
            if not stuck.any():
                break
            length = torch.where(stuck, length / 2, length)
        else:
            length = torch.where(stuck, 0.0, length)
            moved_loss, moved_gradient = images.loss_and_gradient(point + _each(length) * direction, decay)
        history = [*history, (_each(length) * direction, moved_gradient - gradient)][-HISTORY:]
        point, loss, gradient = point + history[-1][0], moved_loss, moved_gradient
    solved[:, moving] = point
    resting = torch.ones(num_heads, dtype=torch.bool)
    resting[moving.cpu()] = False
    solved = solved.flatten(0, 1)  # (C*H, D+1)
    return Heads(solved[:, :-1].T.contiguous(), solved[:, -1].clone(), num_classes), resting


def _apply_inverse(gradient: Tensor, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian that the last steps and changes of the gradient tell of, times the gradient (C, M, D+1).

    The two-loop recursion (Nocedal and Wright 2006, algorithm 7.4), for each head by itself. Pairs without curvature
    count for nothing.
    """
    q, passed = gradient.clone(), []
    for step, change in reversed(history):
        curvature = _dot(step, change)  # (M,)
        rho = torch.where(curvature > 1e-10 * _dot(change, change), 1.0 / curvature, 0.0)
        alpha = rho * _dot(step, q)
        q -= _each(alpha) * change
        passed.append((rho, alpha, step, change))
    if passed:
        rho, _, _, change = passed[0]
        q *= _each(torch.where(rho > 0, 1.0 / (rho * _dot(change, change)), 1.0))
    for rho, alpha, step, change in reversed(passed):
        q += _each(alpha - rho * _dot(change, q)) * step
    return q


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Each head's inner product, (C, M, D+1) twice to (M,)."""
    return torch.einsum("cmd,cmd->m", a, b)


def _each(values: Tensor) -> Tensor:
    """A number per head (M,) beside (C, M, D+1)."""
    return values[:, None]


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
        """Of M heads (C, M, D+1) with decays (M,): the loss (M,) in float64 and its gradient (C, M, D+1).

        Images stand in the last dimension of the logits, so that every sum over classes runs along whole rows.
        """
        weight = point.flatten(0, 1)  # (C*M, D+1)
        loss = torch.zeros(point.shape[1], dtype=torch.float64, device=self.device)
        gradient = torch.zeros_like(weight)
        of_logits = _binary if self.labels.ndim == 2 else _softmax
        for x, wanted in self.kept if self.kept is not None else self._pieces():
            logits = product(weight, x).view(*point.shape[:2], -1)  # (C, M, B)
            norm, said = of_logits(logits)  # (M, B), (C, M, B)
            loss += (norm - (logits * wanted[:, None]).sum(0)).sum(1, dtype=torch.float64)
            gradient += product((said - wanted[:, None]).flatten(0, 1), x.T)
        gradient = gradient.view_as(point).div_(self.num)
        gradient[:, :, :-1] += _each(decay) * point[:, :, :-1]
        squares = _dot(point[:, :, :-1], point[:, :, :-1]).double()  # (M,)
        return loss / self.num + 0.5 * decay.double() * squares, gradient

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features with a 1 for the bias (B, D+1), and what the heads shall say of each (C, B)."""
        features, labels = (pieces(each, self.rows, size=self.chunk) for each in (self.features, self.labels))
        for x, y in zip(features, labels):
            x = functional.pad(self.standardize(x.to(self.device)), (0, 1), value=1.0)
            yield x, targets(y.to(self.device), self.num_classes).T.contiguous()


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log of the sum of exponents (M, B) and the softmax of logits (C, M, B)."""
    largest = logits.amax(0)
    said = (logits - largest).exp_()
    total = said.sum(0)
    return largest + total.log(), said.div_(total)


def _binary(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The softplus of logits (C, M, B), summed over classes (M, B), and their sigmoid."""
    return functional.softplus(logits).sum(0), logits.sigmoid()
