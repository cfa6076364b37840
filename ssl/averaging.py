"""Averages of the weights that training passes through: exponential, and stochastic weight averaging."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl.schedules import Schedule
from ssl.sharding import exchange, is_cut, local


class Average(Protocol):
    """An average of a module's parameters and buffers, by name; floating ones are averaged, others are the latest."""

    tensors: dict[str, Tensor]

    def update(self, module: nn.Module, done: int, *, unless: Tensor | None = None) -> None:
        """Take in the weights after `done` steps. `unless` is a bool on the device: whether the last was skipped."""
        ...

    def ready(self, done: int) -> bool:
        """Whether the average says more than the weights themselves after `done` steps."""
        ...


def averaged_copy(module: nn.Module) -> dict[str, Tensor]:
    """The start of an average: a copy of every parameter and buffer, by name."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@dataclass
class MovingAverage:
    """Exponential moving average: after each step `decay` of what it was and 1 - `decay` of the weights."""

    tensors: dict[str, Tensor]
    decay: float

    def update(self, module: nn.Module, done: int, *, unless: Tensor | None = None) -> None:
        _move(self.tensors, module, 1 - self.decay, unless)

    def ready(self, done: int) -> bool:
        return True


@dataclass
class StochasticWeightAverage:
    """The plain mean of the weights after step `start_step` and every `every_steps` steps from there (Izmailov et al.
    2018, arXiv:1803.05407, algorithm 1). How many went in is a function of the step, so nothing beside it is stored.
    """

    tensors: dict[str, Tensor]
    start_step: int
    every_steps: int

    def update(self, module: nn.Module, done: int, *, unless: Tensor | None = None) -> None:
        since = done - self.start_step  # the mean counts steps, skipped ones too: the weights stood where they are
        if since >= 0 and since % self.every_steps == 0:
            _move(self.tensors, module, 1 / (since // self.every_steps + 1), None)  # the first replaces the start

    def ready(self, done: int) -> bool:
        return done >= self.start_step


@torch.no_grad()
def _move(tensors: dict[str, Tensor], module: nn.Module, weight: float, unless: Tensor | None) -> None:
    state = {name: local(tensor) for name, tensor in module.state_dict().items()}
    own = {name: local(tensor) for name, tensor in tensors.items()}
    floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
    if unless is None:
        torch._foreach_lerp_([own[name] for name in floats], [state[name] for name in floats], weight)
    else:
        for name in floats:
            own[name].lerp_(state[name], torch.where(unless, 0.0, weight).to(own[name].dtype))
    for name in state.keys() - set(floats):
        own[name].copy_(state[name])


@contextlib.contextmanager
def weights_of(module: nn.Module, tensors: dict[str, Tensor] | None) -> Iterator[None]:
    """Let `module` compute with `tensors` in the place of its own weights and buffers; None changes nothing.

    Meanwhile `tensors` holds what the module has, where both are cut over ranks.
    """
    if tensors is None:
        yield
        return
    own = module.state_dict(keep_vars=True)
    cut = [name for name, tensor in tensors.items() if is_cut(tensor)]  # FSDP knows where its pieces lie
    kept = {name: own[name].data for name in tensors.keys() - set(cut)}
    try:
        for name in cut:
            exchange(own[name], tensors[name])
        for name in kept:
            own[name].data = tensors[name]
        yield
    finally:
        for name in cut:
            exchange(own[name], tensors[name])
        for name, tensor in kept.items():
            own[name].data = tensor


def has_batchnorm(module: nn.Module) -> bool:
    """Whether `module` has normalisation layers that keep statistics of what they have seen."""
    return any(isinstance(part, _BatchNorm) and part.track_running_stats for part in module.modules())


@contextlib.contextmanager
def fresh_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers that train forget their statistics and take the plain mean over the batches that follow.

    Those in eval mode, as frozen ones are, keep what they have.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    norms = [part for part in norms if part.training]
    momenta = [part.momentum for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # torch's word for the mean over all batches
    try:
        yield
    finally:
        for part, momentum in zip(norms, momenta, strict=True):
            part.momentum = momentum


@contextlib.contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers use a batch's statistics without moving their running ones: for images that are seen twice
    in a step.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    kept = [
        (norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


@torch.no_grad()
def renew_statistics(module: nn.Module, average: Average, batches: Iterable[dict[str, Any]]) -> None:
    """Give the averaged weights BatchNorm statistics of their own, from one pass over the views of all images as they
    are trained on (Izmailov et al. 2018, section 3.2). Ranks that see the same batches get the same.
    """
    if not has_batchnorm(module):
        return
    training = module.training
    module.train()
    with weights_of(module, average.tensors), fresh_statistics(module):
        size = 0
        for batch in batches:
            size = size or len(batch["index"])
            if len(batch["index"]) == size:  # a smaller rest would count as much as a whole batch
                module(batch)
    module.train(training)


def make_average(method: nn.Module, settings: Any, *, steps_per_epoch: int, span: int) -> Average | None:
    """The average of the weights that the trainer's settings ask for, if any, in a schedule of `span` steps."""
    if settings.ema_decay is not None:
        return MovingAverage(averaged_copy(method), settings.ema_decay)
    if settings.swa_start_epoch is None:
        return None
    start = round(settings.swa_start_epoch * steps_per_epoch)
    if not 0 < start <= span:
        raise ValueError(
            f"trainer.swa_start_epoch={settings.swa_start_epoch:g} must lie within the run, above 0 and at most "
            f"{span / steps_per_epoch:g}"
        )
    every = max(round(settings.swa_every_epochs * steps_per_epoch), 1)
    return StochasticWeightAverage(averaged_copy(method), start_step=start, every_steps=every)


def averaged_lr(
    schedule: Schedule, peak_lr: float, average: Average | None, swa_lr_factor: float | None
) -> Callable[[int], float]:
    """A step's learning rate: the schedule's, and where asked for a constant one once the weights are averaged."""
    if swa_lr_factor is None:
        return lambda step: peak_lr * schedule.factor(step)
    assert isinstance(average, StochasticWeightAverage)
    start = average.start_step
    return lambda step: peak_lr * (schedule.factor(step) if step < start else swa_lr_factor)


def average_note(average: Average | None, settings: Any) -> str:
    """What is averaged, behind the schedule's line."""
    if isinstance(average, MovingAverage):
        return f"; moving average of the weights, {average.decay:g}"
    if isinstance(average, StochasticWeightAverage):
        rate = "" if settings.swa_lr_factor is None else f", from there at {settings.swa_lr_factor:g} of the peak"
        return f"; weights averaged every {average.every_steps} steps from step {average.start_step}{rate}"
    return ""
