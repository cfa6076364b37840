"""Steps that must not move the weights: a loss or gradient that is not finite, or a loss far above the recent ones.

What is decided is the same on all ranks, and is decided before the optimizer and the average of the weights move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ssl.distributed as distributed

MEMORY = 100
"""Good steps over which the recent losses' mean and variance are taken; as many must pass before a spike is called."""


@dataclass(frozen=True)
class BadSteps:
    """What a guard has seen: steps skipped in all and in a row up to now, and of these the first and its numbers."""

    total: int
    counted: int
    """Of all, those that are not a loss scaler's search."""
    in_a_row: int
    first: int  # counted from 1; 0 before there is one
    loss: float
    grad_norm: float
    deviations: float  # how far the loss lay above the recent mean, in standard deviations; 0 before there is one

    def why(self) -> str:
        """The first of the row in words."""
        finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        numbers = f"the loss was {self.loss:.6g} and the gradient's norm {self.grad_norm:.4g} at step {self.first}"
        return numbers + (f", {self.deviations:.1f} deviations above the recent losses" if finite else "")


class StepGuard:
    """Judges each step by its loss and its gradient's norm; the numbers stay on the device until `read`."""

    def __init__(self, device: torch.device, *, spike_deviations: float | None = None) -> None:
        self.spike_deviations = spike_deviations
        # Recent losses: mean, variance, how many steps went in. Then: skipped, of these counted, in a row, and the
        # first of the row with its numbers.
        self._state = torch.zeros(9, dtype=_accurate(device), device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor, step: int, *, tolerant: bool = False) -> Tensor:
        """Whether `step`, counted from 0, is to be skipped: a bool on the device, the same on all ranks.

        `loss` is this rank's, `grad_norm` that of the gradients which all ranks share. A `tolerant` judgement does not
        count a gradient that is not finite while the loss is: a loss scaler that looks for its scale makes those.
        """
        state = self._state
        loss, grad_norm = loss.detach().to(state.dtype), grad_norm.detach().to(state.dtype)
        own = torch.stack([loss, (~loss.isfinite()).to(state.dtype)])
        mean_loss, broken = distributed.mean_over_ranks(own)  # NaN of one rank is NaN for all
        mean, variance, count, total, all_counted, in_a_row, first, first_loss, first_norm = state
        infinite = (broken > 0) | ~mean_loss.isfinite()
        excess = (mean_loss - mean) / variance.sqrt().clamp(min=1e-12)
        bad = infinite | ~grad_norm.isfinite()
        if self.spike_deviations is not None:
            bad = bad | ((count >= MEMORY) & (excess > self.spike_deviations))
        counted = infinite | (bad & grad_norm.isfinite()) if tolerant else bad

        weight = (1 / (count + 1)).clamp(min=1 / MEMORY)
        difference = mean_loss - mean
        starts_row = counted & (in_a_row == 0)
        self._state = torch.stack(
            [
                torch.where(bad, mean, mean + weight * difference),
                torch.where(bad, variance, (1 - weight) * (variance + weight * difference.square())),
                torch.where(bad, count, count + 1),
                total + bad,
                all_counted + counted,
                torch.where(counted, in_a_row + 1, torch.where(bad, in_a_row, torch.zeros_like(in_a_row))),
                torch.where(starts_row, torch.full_like(first, step + 1), first),
                torch.where(starts_row, mean_loss, first_loss),
                torch.where(starts_row, grad_norm, first_norm),
            ]
        )
        return bad

    def read(self) -> BadSteps:
        """What has been seen so far; waits for the device."""
        mean, variance, _, total, counted, in_a_row, first, loss, grad_norm = self._state.tolist()
        deviations = (loss - mean) / max(variance**0.5, 1e-12) if first else 0.0
        return BadSteps(int(total), int(counted), int(in_a_row), int(first), loss, grad_norm, deviations)

    def state(self) -> list[float | str]:
        """What a checkpoint keeps, exact; numbers that JSON has not stand by their names."""
        return [number if math.isfinite(number) else str(number) for number in self._state.tolist()]

    def load(self, state: list[float | str]) -> None:
        """Go on from `state`."""
        self._state = torch.tensor(
            [float(number) for number in state], dtype=self._state.dtype, device=self._state.device
        )


class RunningStatistics:
    """A copy of what normalisation layers keep of all batches, so that a step can be taken back."""

    def __init__(self, module: nn.Module) -> None:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
        self._live = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Copy them as they are before a step."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were at the last `keep`."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)

    @torch.no_grad()
    def put_back_where(self, bad: Tensor) -> None:
        """The same where `bad`, a bool on the device, is true, without a wait for it."""
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(torch.where(bad, kept, live))


def _accurate(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
