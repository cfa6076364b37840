"""What a run will be, said before its first step."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl.methods.base import Batch, Method


@torch.no_grad()
def flops_per_image(method: Method, augment: nn.Module, batch: Batch) -> float:
    """Floating-point operations of one training step per image: forward, and backward at twice the forward.

    Multiply-adds count as two. A frozen backbone goes forward only, and what little the heads on it add does not count.
    `batch` is a small one from the loader; statistics of normalisation layers are left alone.
    """
    was_training = method.training
    method.eval()
    try:
        views = augment(batch)
        with FlopCounterMode(display=False) as counter:
            method(views)
    finally:
        method.train(was_training)
    trained = any(parameter.requires_grad for parameter in method.backbone.parameters())
    return (3.0 if trained else 1.0) * counter.get_total_flops() / len(batch["index"])


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def describe_plan(method: Method, augment: nn.Module, few: Batch, *, stop_step: int, steps_per_epoch: int) -> str:
    """One line: length, parameters and operations per image."""
    total, trainable = count_parameters(method)
    frozen = "" if trainable == total else f" ({trainable / 1e6:.2f} M trained)"
    return (
        f"{stop_step} steps = {stop_step / steps_per_epoch:.4g} epochs of {steps_per_epoch} steps; "
        f"{total / 1e6:.2f} M parameters{frozen}, backbone {count_parameters(method.backbone)[0] / 1e6:.2f} M; "
        f"{flops_per_image(method, augment, few) / 1e9:.3g} GFLOP per image and step"
    )
