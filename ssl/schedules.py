"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

READS: dict[str, set[str]] = {
    "cosine": {"min_factor"},
    "cosine_restarts": {"min_factor", "restart_epochs", "restart_factor"},
    "step": {"milestones", "every_epochs", "gamma"},
    "multi_step": {"milestones", "gamma"},
    "exponential": {"min_factor"},
    "inverse": {"gamma"},
    "polynomial": {"min_factor", "power"},
    "constant": set(),
}
"""The settings that each shape reads, beside the warm-up."""
NAMES = tuple(READS)
LEVELLING = tuple(name for name, settings in READS.items() if "min_factor" in settings)
"""The shapes that fall to `min_factor`."""


@dataclass(frozen=True)
class Schedule:
    """A factor on the peak learning rate for each step from 0 to total_steps - 1.

    Warm-up is the line that would be 0 one step before the first and is 1 at step `warmup_steps`.
    MAE's and SimCLR's code start that line at the first step itself, which spends it at a rate of 0; in a short run
    that step counts. After warm-up, with t = step - warmup_steps, p = t / (total_steps - warmup_steps) and the decays
    between 1 and m = min_factor:

    - `cosine` is m + (1 - m) * (1 + cos(pi p)) / 2; `cosine_restarts` takes for p the part of the present cycle, of
      which the first has `restart_steps` and each `restart_factor` times those before it (arXiv:1608.03983, eq. 5)
    - `polynomial` is m + (1 - m) * (1 - p) ** power, and `exponential` is m ** p
    - `inverse` is 1 / (1 + gamma * t / steps_per_epoch)

    and counted from step 0, as their milestones are: `multi_step` is gamma ** (milestones passed), `step` is
    gamma ** floor(step / every_steps), or as `multi_step` where it has milestones. `constant` is 1.
    """

    name: str
    total_steps: int
    warmup_steps: int = 0
    min_factor: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    every_steps: int | None = None
    power: float = 1.0
    restart_steps: int | None = None
    restart_factor: int = 1
    steps_per_epoch: int = 1

    def factor(self, step: int) -> float:
        """The learning rate of `step`, relative to the peak. From total_steps on it stays where the schedule ends."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        since = min(step, self.total_steps) - self.warmup_steps
        progress = since / max(self.total_steps - self.warmup_steps, 1)
        if self.name == "cosine":
            return self._above_min((1 + math.cos(math.pi * progress)) / 2)
        if self.name == "cosine_restarts":
            return self._above_min((1 + math.cos(math.pi * self._cycle_progress(step))) / 2)
        if self.name == "polynomial":
            return self._above_min((1 - progress) ** self.power)
        if self.name == "exponential":
            return self.min_factor**progress
        if self.name == "inverse":
            return 1 / (1 + self.gamma * since / self.steps_per_epoch)
        if self.every_steps is not None:
            return self.gamma ** (min(step, self.total_steps - 1) // self.every_steps)
        return self.gamma ** sum(milestone <= step for milestone in self.milestones)  # 1 where there are none

    def _above_min(self, decay: float) -> float:
        return self.min_factor + (1 - self.min_factor) * decay

    def _cycle_progress(self, step: int) -> float:
        assert self.restart_steps is not None
        since, length = min(step, self.total_steps - 1) - self.warmup_steps, self.restart_steps
        while since >= length:
            since, length = since - length, length * self.restart_factor
        return since / length

    def restarts(self) -> list[int]:
        """The steps at which the rate jumps back to its peak."""
        found, length = [], self.restart_steps
        at = self.warmup_steps
        while length is not None and at + length < self.total_steps:
            found.append(at := at + length)
            length *= self.restart_factor
        return found

    def describe(self) -> str:
        """One line for a person: shape, warm-up and length in steps."""
        low = f"to {self.min_factor:g} of the peak"
        shape = {
            "cosine": f"cosine {low}",
            "cosine_restarts": f"cosine {low}, again from the peak at steps {', '.join(map(str, self.restarts()))}",
            "step": f"x {self.gamma:g} every {self.every_steps} steps",
            "exponential": f"exponential {low}",
            "inverse": f"1 / (1 + {self.gamma:g} per epoch)",
            "polynomial": f"(1 - progress) ^ {self.power:g} {low}",
            "constant": "constant",
        }.get(self.name, "")
        if self.milestones:
            shape = f"x {self.gamma:g} at steps {', '.join(map(str, self.milestones))}"
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
    every_epochs: float | None = None,
    power: float | None = None,
    restart_epochs: float | None = None,
    restart_factor: int | None = None,
) -> Schedule:
    """A schedule from durations in epochs: warm-up (null: a tenth of the run), milestones (below 1: parts of the run),
    steps and cycles.

    `power` and `restart_factor` are 1 where they are null. Raises ValueError on an unknown name, on warm-up,
    milestones, steps or cycles that do not fit the run, on a value that `name` does not read, and on one that changes
    no rate.
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
    _check_read(
        name,
        min_factor=min_factor or None,
        milestones=list(milestones) or None,
        gamma=None if gamma == 0.1 else gamma,
        every_epochs=every_epochs,
        power=power,
        restart_epochs=restart_epochs,
        restart_factor=restart_factor,
    )
    if not 0 <= min_factor <= 1:
        raise ValueError(f"schedule.min_factor is a part of the peak learning rate, from 0 to 1; got {min_factor}")
    if name == "exponential" and min_factor == 0:
        raise ValueError("schedule.name=exponential never reaches 0: give schedule.min_factor, such as 0.001")
    if name in LEVELLING and min_factor == 1:
        raise ValueError(
            f"schedule.min_factor=1 keeps schedule.name={name} at its peak; set a lower one, or schedule.name=constant"
        )
    if name in ("step", "multi_step") and not 0 < gamma < 1:
        raise ValueError(f"schedule.gamma is the factor of each step, above 0 and below 1; got {gamma:g}")
    for key, value in (("gamma", gamma), ("power", power)):
        if value is not None and not value > 0:
            raise ValueError(f"schedule.{key} must be above 0, got {value}")
    every_steps = _length("every_epochs", every_epochs, steps_per_epoch, total_steps)
    restart_steps = _length("restart_epochs", restart_epochs, steps_per_epoch, total_steps - warmup_steps)
    if name == "cosine_restarts" and restart_steps is None:
        raise ValueError("schedule.name=cosine_restarts needs schedule.restart_epochs, the length of its first cycle")
    if restart_factor is not None and restart_factor < 1:
        raise ValueError(f"schedule.restart_factor must be a whole number of at least 1, got {restart_factor}")
    return Schedule(
        name,
        total_steps,
        warmup_steps,
        min_factor,
        _milestone_steps(name, milestones, every_epochs, steps_per_epoch, total_steps),
        gamma,
        every_steps,
        1.0 if power is None else power,
        restart_steps,
        1 if restart_factor is None else restart_factor,
        steps_per_epoch,
    )


def _check_read(name: str, **given: Any) -> None:
    for key, value in given.items():
        if value is not None and key not in READS[name]:
            unset = {"min_factor": "0", "milestones": "[]", "gamma": "0.1"}.get(key, "null")
            raise ValueError(f"schedule.{key}={value} has no effect with schedule.name={name}; set it to {unset}")


def _length(key: str, epochs: float | None, steps_per_epoch: int, total_steps: int) -> int | None:
    if epochs is None:
        return None
    steps = round(epochs * steps_per_epoch)
    if not 1 <= steps < total_steps:
        raise ValueError(
            f"schedule.{key}={epochs:g} must be at least one step and shorter than the "
            f"{total_steps / steps_per_epoch:g} epochs that it divides; else nothing ever changes"
        )
    return steps


def _milestone_steps(
    name: str, milestones: Sequence[float], every_epochs: float | None, steps_per_epoch: int, total_steps: int
) -> tuple[int, ...]:
    if name == "step" and bool(milestones) == (every_epochs is not None):
        raise ValueError(
            "schedule.name=step needs schedule.every_epochs, or else schedule.milestones: epochs, or fractions of the "
            f"run below 1; got every_epochs={every_epochs} and milestones={list(milestones)}"
        )
    if name == "multi_step" and not milestones:
        raise ValueError("schedule.name=multi_step needs schedule.milestones: epochs, or fractions of the run below 1")
    steps = tuple(round(at * total_steps) if at < 1 else round(at * steps_per_epoch) for at in milestones)
    for at, step in zip(milestones, steps, strict=True):
        if at <= 0 or (at >= 1 and step >= total_steps):
            raise ValueError(
                f"schedule.milestones={list(milestones)}: {at:g} does not lie within the run of "
                f"{total_steps / steps_per_epoch:g} epochs; numbers below 1 are fractions of the run, whatever its "
                "length"
            )
        if not 0 < step < total_steps:
            raise ValueError(
                f"schedule.milestones={list(milestones)}: {at:g} is step {step} of a run of {total_steps} steps, where "
                f"it changes nothing; it must come to a step from 1 to {total_steps - 1}"
            )
    if len(set(steps)) < len(steps):
        raise ValueError(
            f"schedule.milestones={list(milestones)} come to steps {list(steps)}, some twice; give each once, or run "
            "longer"
        )
    return tuple(sorted(steps))
