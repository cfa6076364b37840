"""A failed step as it is read, and its forward and backward as the run did them, on one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl.checkpoint_card import CARD, read_config, read_state, statistics, verify
from ssl.data.augment import Augment
from ssl.data.views import make_views
from ssl.failed_step import FailedStep, read_failed_step
from ssl.method_file import described_method
from ssl.methods.base import Batch, Method
from ssl.models.backbones import BackboneSpec, is_token_model
from ssl.not_finite import BadModule, FiniteWatch, find_at_fault, is_finite
from ssl.randomness import step_seed
from ssl.recipe import batch_arithmetic
from ssl.tensor_files import load_strictly, load_tensors
from ssl.trainer import Trainer, dtype_name, rows_of

LARGEST = 5
"""Images named where every number is finite: those with the largest loss."""


@dataclass(frozen=True)
class Step:
    """A failed step as it is read, with the model as it was before it."""

    folder: Path
    failed: FailedStep
    method: Method
    augment: Augment
    batch: Batch
    state: dict[str, Any]
    config: dict[str, Any]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Outcome:
    """What one attempt at the step gave."""

    precision: str
    loss: float
    grad_norm: float
    module: BadModule | None
    """The first whose output is not finite."""
    parameter: str | None
    """The first whose gradient is not finite."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def load(folder: Path, *, trust: Sequence[str] = ()) -> Step:
    """A failed step with its method, which is built from the checkpoint's own config: only of code that is trusted."""
    failed, batch = read_failed_step(folder)
    state = read_state(folder)
    verify(folder, state)
    config = read_config(folder)
    method = described_method(folder, state, config, trust=trust)
    tensors = {f"backbone.{name}": tensor for name, tensor in load_tensors(folder / "model.safetensors").items()}
    load_strictly(method, {**tensors, **load_tensors(folder / "method.safetensors")}, folder)
    channels = BackboneSpec.from_dict(state["backbone"]).in_chans
    mean, std = statistics((state.get("mean"), state.get("std")), channels=channels, where=folder / CARD)
    augment = Augment(make_views(config["augment"]["views"]), mean=mean, std=std)
    return Step(folder, failed, method, augment, batch, state, config, mean, std)


@dataclass(frozen=True)
class Cut:
    """How the global batch is done: its rows in the order of its parts, and each part's key of random numbers."""

    order: Tensor  # (B,)
    keys: list[tuple[int, int]]
    """(rank, number of the part on it) of the run."""

    @property
    def num_parts(self) -> int:
        return len(self.keys)


def cut_like_the_run(step: Step, device_batch_size: int | None = None) -> Cut:
    """The parts that the run's ranks did one after the other, as parts of one process.

    Where BatchNorm's statistics were those of all ranks, the ranks' parts of the same number are one part here; their
    dropout then has other random numbers. Raises ValueError where `device_batch_size` does not divide the batch.
    """
    settings = step.config["trainer"]
    size, world_size = len(step.batch["index"]), int(step.state["world_size"])
    if device_batch_size is not None:
        cut = batch_arithmetic(size, world_size=1, device_batch_size=device_batch_size)
        return Cut(torch.arange(size), [(0, number) for number in range(cut.accumulation)])
    cut = batch_arithmetic(size, world_size=world_size, device_batch_size=settings.get("device_batch_size"))
    order = torch.arange(size).view(world_size, cut.accumulation, cut.device_batch_size)  # (W, A, b)
    if settings.get("sync_batchnorm", True) and has_batchnorm(step.method):
        return Cut(order.transpose(0, 1).flatten(), [(0, number) for number in range(cut.accumulation)])
    return Cut(order.flatten(), [(rank, number) for rank in range(world_size) for number in range(cut.accumulation)])


def has_batchnorm(method: nn.Module) -> bool:
    """Whether an image's output depends on the others' of its part."""
    return any(isinstance(module, _BatchNorm) for module in method.modules())


class Replay(Trainer):
    """The trainer's own forward and backward on one process, under the run's random numbers; it updates nothing."""

    def __init__(self, step: Step, cut: Cut, *, device: torch.device, dtype: torch.dtype) -> None:
        method = step.method.to(device)
        channels_last = not is_token_model(method.backbone)
        if channels_last:
            method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        super().__init__(
            method,
            step.augment.to(device),
            torch.optim.SGD(method.parameters(), lr=0.0),
            lr=lambda number: 0.0,
            set_lr=lambda optimizer, lr: None,
            device=device,
            dtype=dtype,
            seed=int(step.state["seed"]),
            accumulation=cut.num_parts,
            channels_last=channels_last,
        )
        if self.scaler.is_enabled() and step.state.get("scaler"):
            self.scaler.load_state_dict(step.state["scaler"])
        self.method.train()
        self.failed, self.keys = step.failed, cut.keys
        self.batch: Batch = rows_of(step.batch, cut.order)
        self.images = [step.failed.images[row] for row in cut.order.tolist()]

    def __len__(self) -> int:
        return len(self.images)

    def seed_part(self, step: int, part: int) -> None:
        torch.manual_seed(step_seed(self.seed, step, *self.keys[part]))

    def outcome(self) -> Outcome:
        """Forward and backward of the whole batch."""
        self.method.zero_grad(set_to_none=True)
        with FiniteWatch(self.method) as watch:
            loss = self.backward(self.batch, self.failed.step - 1)["loss"].item()
        norm = nn.utils.get_total_norm(self._gradients()).item() / self.scaler.get_scale()
        return Outcome(dtype_name(self.dtype), loss, norm, watch.module, watch.parameter)

    def at_fault(self) -> list[int]:
        """Rows of the images without which loss and gradients are finite; empty where it takes several parts."""
        alone = not self.method.couples_images and not has_batchnorm(self.method)
        return find_at_fault(self._is_bad, torch.arange(len(self)).tensor_split(self.accumulation), alone=alone)

    def losses(self) -> dict[int, float]:
        """The largest losses by row, each image done alone; none where the loss of an image depends on the others."""
        if self.method.couples_images or has_batchnorm(self.method):
            return {}
        with torch.no_grad():
            losses = torch.stack([self._loss(torch.tensor([row])).detach().float() for row in range(len(self))])
        values, rows = losses.cpu().topk(min(LARGEST, len(self)))
        return dict(zip(rows.tolist(), values.tolist()))

    def rows_with_bad_views(self) -> list[int]:
        """Rows of which a view holds a number that is not finite before the model sees it."""
        bad: list[int] = []
        for rows in torch.arange(len(self)).tensor_split(self.accumulation):
            finite = torch.stack([view.flatten(1).isfinite().all(1) for view in self._views(rows)])  # (V, b)
            bad += rows[~finite.all(0).cpu()].tolist()
        return bad

    def views(self, rows: list[int]) -> list[Tensor]:
        """V times (B, C, h, w), normalised."""
        return self._views(torch.tensor(rows))

    def image(self, row: int) -> dict[str, Any]:
        """What is known of an image of the batch."""
        return {"index": int(self.batch["index"][row]), "image": self.images[row]}

    def _views(self, rows: Tensor) -> list[Tensor]:
        return self.prepare(rows_of(self.batch, rows))["views"]

    def _loss(self, rows: Tensor) -> Tensor:
        self.seed_part(self.failed.step - 1, 0)
        views = self.prepare(rows_of(self.batch, rows))
        with self.autocast():
            return self.method(views)["loss"]

    def _is_bad(self, rows: Tensor) -> bool:
        self.method.zero_grad(set_to_none=True)
        loss = self._loss(rows)
        self.scaler.scale(loss).backward()
        return not is_finite([loss, self._gradients()])

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
