"""What a run really does, as arithmetic and as a table: batch, learning rate, and each parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssl.optim import scaled_lr


@dataclass(frozen=True)
class BatchArithmetic:
    """How the global batch comes about; `global_batch_size` is the product of the other three."""

    global_batch_size: int
    world_size: int
    device_batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size} = {_count(self.world_size, 'rank')} x "
            f"{_count(self.device_batch_size, 'image')} x {_count(self.accumulation, 'accumulation step')}"
        )


def batch_arithmetic(
    global_batch_size: int, *, world_size: int, device_batch_size: int | None = None
) -> BatchArithmetic:
    """Split the global batch over ranks, and a rank's share into accumulation steps.

    `device_batch_size` is the most images that a device takes at once; null takes the whole share. Raises ValueError
    where something does not divide, naming what would.
    """
    if global_batch_size < 1:
        raise ValueError(f"trainer.global_batch_size must be at least 1, got {global_batch_size}")
    if device_batch_size is not None and device_batch_size < 1:
        raise ValueError(
            f"trainer.device_batch_size must be at least 1, or null for the share; got {device_batch_size}"
        )
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        near = sorted({max(share, 1) * world_size, (share + 1) * world_size})
        raise ValueError(
            f"trainer.global_batch_size={global_batch_size} does not divide over {_count(world_size, 'rank')}; "
            f"it must be a multiple of {world_size}, such as {' or '.join(map(str, near))}"
        )
    device = share if device_batch_size is None else min(device_batch_size, share)
    if share % device:
        allowed = [size for size in range(1, share + 1) if share % size == 0]
        raise ValueError(
            f"trainer.device_batch_size={device_batch_size} does not divide a rank's share of {_count(share, 'image')} "
            f"(global batch {global_batch_size} over {_count(world_size, 'rank')}); "
            f"it may be {', '.join(map(str, allowed))}"
        )
    return BatchArithmetic(global_batch_size, world_size, device, share // device)


def fit_batch(settings: Any, num_images: int, *, world_size: int) -> list[str]:
    """Take `settings.global_batch_size` down to what there is where it is more; the note that says so, if any.

    For published recipes on small sets: their batch may be larger than the set.
    """
    wanted = settings.global_batch_size
    if wanted <= num_images:
        return []
    settings.global_batch_size = max(num_images // world_size, 1) * world_size
    return [
        f"the batch is {settings.global_batch_size:,} images instead of {wanted:,}, as there are {num_images:,} to "
        "train on; the learning rate follows its rule"
    ]


def lr_arithmetic(base_lr: float, *, global_batch_size: int, scaling: str) -> str:
    """The peak learning rate as a line of arithmetic."""
    lr = scaled_lr(base_lr, global_batch_size=global_batch_size, scaling=scaling)
    rule = {
        "linear": f" x {global_batch_size} / 256 (linear)",
        "sqrt": f" x sqrt({global_batch_size}) (sqrt)",
        "none": " (not scaled with the batch)",
    }[scaling]
    return f"lr {_short(lr)} = base_lr {_short(base_lr)}{rule}"


def effective_recipe(optimizer: torch.optim.Optimizer, module: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """A row per parameter group, JSON-able: what of `module` it holds, and what it gets when the schedule is at `lr`.

    `drop_path` is the lowest and highest rate among the group's residual blocks that have one, null where none has.
    """
    rates = _drop_path_rates(module)
    rows: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        names: list[str] = group["names"]
        own = [rate for block, rate in rates.items() if any(name.startswith(block) for name in names)]
        rows.append(
            {
                "parts": list(dict.fromkeys(name.split(".", 1)[0] for name in names)),
                "layer": group["layer"],
                "tensors": len(names),
                "parameters": sum(parameter.numel() for parameter in group["params"]),
                "lr": lr * group["lr_scale"],
                "layer_factor": group["lr_scale"],
                "weight_decay": group["weight_decay"],
                "trust_ratio": bool(group.get("always_adapt", False)),
                "drop_path": [min(own), max(own)] if own else None,
            }
        )
    return rows


def _drop_path_rates(module: nn.Module) -> dict[str, float]:
    """Drop-path rate of each residual block that has one, by the block's name and a dot."""
    rates: dict[str, float] = {}
    for name, part in module.named_modules():
        rate = getattr(part, "drop_prob", None)
        if type(part).__name__ == "DropPath" and rate:
            block = name.rpartition(".")[0] + "."
            rates[block] = max(float(rate), rates.get(block, 0.0))
    return rates


def recipe_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `effective_recipe` as text, one line per group; columns that say nothing in this run are left out."""
    columns: dict[str, list[str]] = {
        "parameters of": [", ".join(row["parts"]) for row in rows],
        "layer": ["-" if row["layer"] is None else str(row["layer"]) for row in rows],
        "tensors": [str(row["tensors"]) for row in rows],
        "parameters": [f"{row['parameters']:,}" for row in rows],
        "lr": [_short(row["lr"]) for row in rows],
        "layer factor": [f"{row['layer_factor']:.3g}" for row in rows],
        "weight decay": [f"{row['weight_decay']:g}" for row in rows],
        "trust ratio": ["yes" if row["trust_ratio"] else "no" for row in rows],
        "drop path": [_span(row["drop_path"]) for row in rows],
    }
    silent = {"layer": "-", "layer factor": "1", "trust ratio": "no", "drop path": "none"}
    shown = {title: cells for title, cells in columns.items() if set(cells) != {silent.get(title)}}
    widths = {title: max(len(title), *map(len, cells)) for title, cells in shown.items()}
    lines = ["  ".join(title.rjust(widths[title]) for title in shown)]
    lines += ["  ".join(cells[i].rjust(widths[title]) for title, cells in shown.items()) for i in range(len(rows))]
    return "\n".join(lines)


def _span(rates: list[float] | None) -> str:
    if rates is None:
        return "none"
    low, high = rates
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _short(value: float) -> str:
    """Three digits, with an exponent below 0.01: 2.4e-3."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
