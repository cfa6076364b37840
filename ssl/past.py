"""What a run goes on from: the newest whole checkpoint in its folder, where it has one."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import ssl.checkpoint as checkpoint
import ssl.distributed as distributed
from ssl.averaging import Average
from ssl.config import plain
from ssl.methods.base import Method
from ssl.online import Evaluation, StopRun, load_evaluations
from ssl.optim import tensors_to_state
from ssl.rank_dependence import rank_dependence
from ssl.same_run import flat, same_images, same_recipe

log = logging.getLogger(__name__)


OWN = (
    "out",  # one folder, which machines may reach by different names
    "ckpt",
    "device",
    "threads",
    "wandb",
    "loader",
    "launch",
    "trainer.device",
    "trainer.devices",
    "trainer.fallback",
    "trainer.max_time",  # that of any rank ends all
    "trainer.profile_steps",
    "data.root",  # the images themselves are compared
    "data.source.root",
    "data.source.held_gib",
    "data.source.readers",
    "data.source.retries",
    "data.source.storage_options",
    "data.in_memory_gib",
)
"""Settings that may be another on each rank."""


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
    ValueError where the ranks have different images or settings, where the run in `out` has another recipe or other
    images, or where no checkpoint of it is whole, and StopRun where an evaluation had ended it.
    """
    _check_same_on_all_ranks(config, images, where)
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


def _check_same_on_all_ranks(config: DictConfig, images: tuple[int, int], where: str) -> None:
    """Raise ValueError, on every rank, where one has other images than another, or another setting that is no OWN."""
    settings = {
        key: value
        for key, value in flat(plain(config)).items()
        if not any(key == own or key.startswith(f"{own}.") for own in OWN)
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    everywhere = distributed.from_every((images, digest, where))
    if len({seen for seen, _, _ in everywhere}) > 1:
        told = _by_rank([f"{name}, {number:,} with checksum {total}," for (number, total), _, name in everywhere])
        raise ValueError(
            f"the ranks see different images: {told}; copy the same files to every machine, or read them from one "
            "shared folder"
        )
    if len({digest for _, digest, _ in everywhere}) > 1:
        each = distributed.from_every(settings)
        keys = sorted({key for one in each for key in one})
        told = [f"{key}: {_by_rank([one.get(key) for one in each])}" for key in keys]
        differing = [line for line, key in zip(told, keys) if any(one.get(key) != each[0].get(key) for one in each)]
        raise ValueError(
            "the ranks were given different settings:\n  " + "\n  ".join(differing) + "\nStart all with the same words"
        )


def _by_rank(values: Sequence[Any]) -> str:
    """`48 on rank 0, 2; 80 on rank 1`."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"{value} on rank {', '.join(those)}" for value, those in ranks.items())


def _warn_of_ranks(method: Method, config: DictConfig, *, then: int, now: int) -> None:
    otherwise = rank_dependence(method, config.trainer, then=then, now=now) if then != now else []
    if otherwise and distributed.is_main():
        log.warning(
            "the run had %d ranks and has %d now; it goes on otherwise than it would have: %s",
            *(then, now, "; ".join(otherwise)),
        )
