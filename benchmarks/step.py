"""A training step as the peers write it, and ours, which is `Trainer.step` as `ssl/training.py` sets it up.

On a CPU the peers' step is fp32; on a GPU it is their mixed precision, fp16 with a scaled loss. It lays images out
channel by channel, reads the loss back at each step, and takes torch's optimizer as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Way, timed
from ssl.methods.base import Batch, Method
from ssl.models.backbones import is_token_model
from ssl.optim import make_optimizer, parameter_groups, set_lr
from ssl.trainer import Trainer

LR = 1e-4

Step = Callable[[Batch], Any]


def peers_step(
    method: Method, loss_of: Callable[[Method, Batch], Tensor], optimizer: torch.optim.Optimizer, device: str
) -> Step:
    """Forward, backward and update; the loss as a number."""
    method.to(device).train()
    mixed = device == "cuda"
    scaler = torch.amp.GradScaler(device, enabled=mixed)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16) if mixed else nullcontext():
            loss = loss_of(method, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def our_step(method: Method, *, optimizer: str, options: dict[str, Any], device: str, dtype: torch.dtype) -> Step:
    """The trainer's own step, without augmentation; the loss stays on the device."""
    channels_last = not is_token_model(method.backbone)
    method.to(device).train()
    if channels_last:
        method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    trainer = Trainer(
        method,
        dict,  # pyright: ignore[reportArgumentType] instead of Augment: the batch has its views already
        make_optimizer(parameter_groups(method, weight_decay=0.05), name=optimizer, lr=LR, **options),
        lr=lambda step: LR,
        set_lr=set_lr,
        device=torch.device(device),
        dtype=dtype,
        seed=0,
        channels_last=channels_last,
    )
    return lambda batch: trainer.step(batch, 0)["loss"]


def made_batch(num_images: int, size: tuple[int, int], *, views: int, num_noise: int, device: str) -> Batch:
    """Views of noise that lie on the device."""
    generator = torch.Generator().manual_seed(0)
    return {
        "views": [torch.randn(num_images, 3, *size, generator=generator).to(device) for _ in range(views)],
        "noise": torch.rand(num_images, num_noise, generator=generator).to(device),
    }


def steps_in_a_round(step: Step, batch: Batch, *, num: int, device: str) -> Way:
    """The way that does `num` steps and waits for the device."""

    def work() -> None:
        for _ in range(num):
            step(batch)

    return timed(work, finish=torch.cuda.synchronize if device == "cuda" else lambda: None)


def add_options(parser: Any, *, model: str, batch_size: int) -> None:
    """The options of every step's benchmark."""
    parser.add_argument("--model", default=model, help="a name of timm's")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=1, help="in a round; on a GPU 20 or more")
