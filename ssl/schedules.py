"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = ("cosine", "step", "exponential", "constant")


@dataclass(frozen=True)
class Schedule:
    """A factor on the peak learning rate for each step from 0 to total_steps - 1.

    Warm-up is the line that would be `warmup_start_factor` one step before the first and is 1 at step `warmup_steps`.
    MAE's and SimCLR's code start that line at the first step itself, which spends it at a rate of 0; in a short run
    that step counts. After warm-up, with p = (step - warmup_steps) / (total_steps - warmup_steps): `cosine` is
    min_factor + (1 - min_factor) * (1 + cos(pi p)) / 2 (arXiv:1608.03983), `exponential` is min_factor ** p, `step` is
    gamma ** (milestones passed), with milestones counted from step 0, and `constant` is 1.
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    min_factor: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_start_factor: float = 0.0

    def factor(self, step: int) -> float:
        """The learning rate of `step`, relative to the peak. From total_steps on it stays where the schedule ends."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        if step < self.warmup_steps:
            return self.warmup_start_factor + (1 - self.warmup_start_factor) * (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        if self.name == "cosine":
            return self.min_factor + (1 - self.min_factor) * (1 + math.cos(math.pi * progress)) / 2
        if self.name == "exponential":
            return self.min_factor**progress
        if self.name == "step":
            return self.gamma ** sum(milestone <= step for milestone in self.milestones)
        return 1.0

    def describe(self) -> str:
        """One line for a person: shape, warm-up and length in steps."""
        shape = {
            "cosine": f"cosine to {self.min_factor:g} of the peak",
            "exponential": f"exponential to {self.min_factor:g} of the peak",
            "step": f"x {self.gamma:g} at steps {', '.join(map(str, self.milestones))}",
            "constant": "constant",
        }[self.name]
        return f"{self.total_steps} steps: linear warm-up over {self.warmup_steps}, then {shape}"


def make_schedule(
    name: str,
    *,
    steps_per_epoch: int,
    total_steps: int,
    warmup_epochs: float | None = None,
    min_factor: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    warmup_start_factor: float = 0.0,
) -> Schedule:
    """A schedule from durations in epochs: warm-up (null: a tenth of the run), milestones (below 1: parts of the run).

    Raises ValueError on an unknown name, on warm-up or milestones that do not fit the run, and on a value that `name`
    does not read.
    """
    if name not in NAMES:
        raise ValueError(f"schedule.name must be one of {', '.join(NAMES)}; got {name!r}")
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"a schedule needs at least one step, got {total_steps} steps and {steps_per_epoch} per epoch")
    epochs = total_steps / steps_per_epoch
    warmup_steps = total_steps // 10 if warmup_epochs is None else round(warmup_epochs * steps_per_epoch)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"schedule.warmup_epochs={warmup_epochs} must be at least 0 and shorter than the run of {epochs:g} epochs; "
            "schedule.warmup_epochs=null takes a tenth of the run"
        )
    if not 0 <= min_factor <= 1:
        raise ValueError(f"schedule.min_factor is a part of the peak learning rate, from 0 to 1; got {min_factor}")
    if name == "exponential" and min_factor == 0:
        raise ValueError("schedule.name=exponential never reaches 0: give schedule.min_factor, such as 0.001")
    if name in ("step", "constant") and min_factor:
        raise ValueError(f"schedule.min_factor={min_factor} has no effect with schedule.name={name}; set it to 0")
    if name != "step" and milestones:
        raise ValueError(
            f"schedule.milestones={list(milestones)} have no effect with schedule.name={name}; set them to []"
        )
    if name == "step" and not milestones:
        raise ValueError("schedule.name=step needs schedule.milestones: epochs, or fractions of the run below 1")
    steps = tuple(round(at * total_steps) if at < 1 else round(at * steps_per_epoch) for at in milestones)
    for at, step in zip(milestones, steps, strict=True):
        if at <= 0 or (at >= 1 and step >= total_steps):
            raise ValueError(
                f"schedule.milestones={list(milestones)}: {at:g} does not lie within the run of {epochs:g} epochs; "
                "numbers below 1 are fractions of the run, whatever its length"
            )
    return Schedule(name, total_steps, warmup_steps, min_factor, tuple(sorted(steps)), gamma, warmup_start_factor)
