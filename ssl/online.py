"""What is evaluated while a run goes on: named in the config, called on every rank, off the path of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ssl.methods.base import Method
from ssl.sharding import gathered_weights


class StopRun(ValueError):
    """An evaluation's verdict that the run shall end here, in words. What the run has made is saved first.

    `metrics` are those that led to it, to be logged.
    """

    def __init__(self, message: str, metrics: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.metrics = dict(metrics or {})


@dataclass(frozen=True)
class OnlineSubject:
    """A run in progress, as an evaluation sees it: in eval mode, without gradients, with the weights that a checkpoint
    of this step would be judged by (the average, where the run keeps one).
    """

    method: Method
    image_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    data: dict[str, Any]
    """The plain data config of the run."""
    device: torch.device
    dtype: torch.dtype
    seed: int
    step: int
    """Completed steps."""
    last: bool
    """Whether the schedule ends with this step; a run that is cut before goes on another time."""
    epoch: float
    threads: int | None
    warn: Callable[[str], None]
    """Shows one warning, on the first rank."""

    @property
    def backbone(self) -> nn.Module:
        return self.method.backbone


class Evaluation(Protocol):
    """What the group `online` names by `_target_`.

    One that keeps something over the run, such as the best value so far, also offers `state() -> dict` of JSON values
    and `load(dict)`, which a checkpoint carries. One that compares with the untrained model offers `begin(subject)`.
    """

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        """Metrics, the same on every rank. Raises StopRun where the run shall end, on every rank alike."""
        ...


def evaluate_all(evaluations: Mapping[str, Evaluation], subject: OnlineSubject, ended: list[str]) -> dict[str, float]:
    """What all evaluations find. One that ends the run is heard when the others are done."""
    metrics: dict[str, float] = {}
    verdict: StopRun | None = None
    for evaluation in evaluations.values():
        try:
            with gathered_weights(subject.method):  # a rank may have more batches than another
                metrics |= evaluation(subject)
        except StopRun as stop:
            metrics |= stop.metrics
            verdict = verdict or stop
    if verdict is not None:
        ended.append(str(verdict))
        verdict.metrics = metrics
        raise verdict
    return metrics


@torch.no_grad()
def show_start(evaluations: Mapping[str, Evaluation], subject: OnlineSubject) -> None:
    """Let evaluations that compare with it see the model before its first step."""
    subject.method.eval()
    for evaluation in evaluations.values():
        if hasattr(evaluation, "begin"):
            with gathered_weights(subject.method):
                evaluation.begin(subject)  # pyright: ignore[reportAttributeAccessIssue]
    subject.method.train()


def load_evaluations(evaluations: Mapping[str, Evaluation], states: Mapping[str, Any]) -> None:
    """Give each evaluation what the checkpoint kept of it."""
    for name, evaluation in evaluations.items():
        if name in states and hasattr(evaluation, "load"):
            evaluation.load(states[name])  # pyright: ignore[reportAttributeAccessIssue]
