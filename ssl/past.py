"""What a run goes on from: the newest whole checkpoint in its folder, where it has one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import ssl.checkpoint as checkpoint
import ssl.distributed as distributed
from ssl.averaging import Average
from ssl.methods.base import Method
from ssl.online import Evaluation, StopRun, load_evaluations
from ssl.optim import tensors_to_state
from ssl.rank_dependence import rank_dependence
from ssl.same_run import same_images, same_recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Past:
    """Where a run is, and what is known of the way there. That of a new run is empty."""

    step: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last line that was logged."""
    seconds: float = 0.0
    """Spent on training."""
    scaler: dict[str, Any] = field(default_factory=dict)
    guard: list[float | str] | None = None
    unlogged: list[Any] = field(default_factory=list)
    bad_images: dict[int, str] = field(default_factory=dict)


def take_up(
    config: DictConfig,
    out: Path,
    *,
    schema: type,
    method: Method,
    average: Average | None,
    optimizer: torch.optim.Optimizer,
    images: tuple[int, int],
    where: str,
    evaluations: Mapping[str, Evaluation],
    stop_step: int,
) -> Past:
    """Load a run's newest whole checkpoint into its parts; returns the rest of what it holds.

    `images` are the number of the data's images and their checksum, `where` is how the data is called. Raises
    ValueError where the run in `out` has another recipe or other images, or where no checkpoint of it is whole, and
    StopRun where an evaluation had ended it.
    """
    resumed = checkpoint.resume(
        out,
        method=method,
        ema=None if average is None else average.tensors,
        warn=log.warning,
        check=lambda folder: None if config.accept_changes else same_recipe(config, folder, schema),
    )
    past = Past()
    if resumed is not None:
        state, optimizer_tensors = resumed
        load_evaluations(evaluations, state.get("evaluations", {}))
        if not config.accept_changes:
            same_images(state, images, where, out)
        if state.get("ended"):
            if not config.accept_changes or state["step"] >= stop_step:
                raise StopRun(state["ended"])
            log.warning("going on with a run that was ended: %s", state["ended"])
        num_before = state.get("world_size", distributed.world_size())
        _warn_of_ranks(method, config, then=num_before, now=distributed.world_size())
        tensors_to_state(optimizer, optimizer_tensors)
        known = (state["num_images"], state["images"]) == images
        past = Past(
            step=state["step"],
            metrics=dict(state["metrics"]),
            seconds=state.get("train_seconds", 0.0),
            scaler=state["scaler"],
            guard=state.get("guard"),
            unlogged=state.get("unlogged", []),
            bad_images={int(index): why for index, why in state.get("bad_images", {}).items()} if known else {},
        )
    steps = distributed.from_every(past.step)
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks would continue from different steps, {steps}: out={out} must be one shared folder")
    return past


def _warn_of_ranks(method: Method, config: DictConfig, *, then: int, now: int) -> None:
    otherwise = rank_dependence(method, config.trainer, then=then, now=now) if then != now else []
    if otherwise and distributed.is_main():
        log.warning(
            "the run had %d ranks and has %d now; it goes on otherwise than it would have: %s",
            *(then, now, "; ".join(otherwise)),
        )
