"""What a run will be, said before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl.chips import device_peak
from ssl.methods.base import Batch, Method
from ssl.models.classifier import without_classifier


@torch.no_grad()
def flops_per_image(method: Method, augment: nn.Module, batch: Batch) -> float:
    """Floating-point operations of one training step per image: forward, and backward at twice the forward.

    Multiply-adds count as two. A frozen backbone goes forward only, and what little the heads on it add does not count.
    `batch` is a small one from the loader; statistics of normalisation layers are left alone.
    """
    views = augment(batch)
    return step_flops(method, lambda: method(views)) / len(batch["index"])


@torch.no_grad()
def step_flops(method: Method, forward: Callable[[], Any]) -> float:
    """The operations of a training step whose forward pass is `forward`, which is called once, with `method` in eval
    mode.
    """
    was_training = method.training
    method.eval()
    try:
        with FlopCounterMode(display=False) as counter:
            forward()
    finally:
        method.train(was_training)
    trained = any(parameter.requires_grad for parameter in without_classifier(method.backbone))
    return (3.0 if trained else 1.0) * counter.get_total_flops()


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def describe_plan(method: Method, flops: float, *, stop_step: int, steps_per_epoch: int) -> str:
    """One line: length, parameters and operations per image; `flops` is what `flops_per_image` says."""
    total, trainable = count_parameters(method)
    frozen = "" if trainable == total else f" ({trainable / 1e6:.2f} M trained)"
    return (
        f"{stop_step} steps = {stop_step / steps_per_epoch:.4g} epochs of {steps_per_epoch} steps; "
        f"{total / 1e6:.2f} M parameters{frozen}, backbone {count_parameters(method.backbone)[0] / 1e6:.2f} M; "
        f"{flops / 1e9:.3g} GFLOP per image and step"
    )


@dataclass(frozen=True)
class Utilization:
    """How much of what its chips can compute a run uses (MFU: Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Counted are the operations that the model needs, so that what accumulation computes twice does not flatter it.
    """

    device: str
    precision: str
    flops_per_image: float
    num_devices: int
    peak_tflops: float | None
    """Of one device; None where it is not known, on a CPU for one."""

    def mfu(self, images_per_second: float) -> float | None:
        """The share of the peak, in 0..1; None where the peak is not known."""
        if self.peak_tflops is None:
            return None
        return images_per_second * self.flops_per_image / (self.peak_tflops * 1e12 * self.num_devices)

    def describe(self) -> str | None:
        """One line on the chip's peak; None on a CPU."""
        if self.device == "cpu":
            return None
        if self.peak_tflops is None:
            return f"{self.device}: its peak in {self.precision} is not known to us, so no share of it is told"
        peak = f"{self.peak_tflops:g} TFLOP/s at most in {self.precision}"
        return f"{self.device}: {peak}, of which mfu is the share that the model's own operations make"


def utilization(
    flops: float, *, device: torch.device, dtype: torch.dtype, convolutional: bool, num_devices: int
) -> Utilization:
    """What a run's images per second are measured against."""
    name, precision, peak = device_peak(device, dtype, convolutional=convolutional)
    return Utilization(name, precision, flops, num_devices, peak)
