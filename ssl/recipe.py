"""What a run really does: batch and rate as arithmetic, the parts that act, and a table of the parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssl.models.backbones import DROPOUTS
from ssl.optim import OPTIONS, scaled_lr
from ssl.schedules import READS, Schedule


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

    `drop_path` and `dropout` are the lowest and highest rate among the group's blocks, and what is around them, that
    have one, null where none has.
    """
    path_rates, dropout_rates = _block_rates(module, _path_rate), _block_rates(module, _dropout_rate)
    rows: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        names: list[str] = group["names"]
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
                "drop_path": _span_of(path_rates, names),
                "dropout": _span_of(dropout_rates, names),
            }
        )
    return rows


def _path_rate(part: nn.Module) -> float:
    return float(getattr(part, "drop_prob", 0.0) or 0.0) if type(part).__name__ == "DropPath" else 0.0


def _dropout_rate(part: nn.Module) -> float:
    """The rate of a dropout, or of a part that applies one without a module; 0 where there is none."""
    rate = part.p if isinstance(part, DROPOUTS) else getattr(part, "drop_rate", 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


def _block_rates(module: nn.Module, rate_of: Callable[[nn.Module], float]) -> dict[str, float]:
    """The highest rate of each block that has one, by the beginning of its parameters' names.

    A dropout's block is the nearest module around it that has parameters: in front of a backbone's classifier, and at
    its end where it has none, this may be the whole backbone.
    """
    names = [name for name, _ in module.named_parameters()]
    rates: dict[str, float] = {}
    for name, part in module.named_modules():
        rate = rate_of(part)
        if not rate:
            continue
        block = f"{name}." if name else ""
        while block and not any(parameter.startswith(block) for parameter in names):
            above = block[:-1].rpartition(".")[0]
            block = f"{above}." if above else ""
        rates[block] = max(rate, rates.get(block, 0.0))
    return rates


def _span_of(rates: Mapping[str, float], names: Sequence[str]) -> list[float] | None:
    own = [rate for block, rate in rates.items() if any(name.startswith(block) for name in names)]
    return [min(own), max(own)] if own else None


def active_parts(
    settings: Mapping[str, Any],
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    lr: float,
) -> dict[str, Any]:
    """Every part of the recipe that acts, JSON-able, by its name; what is off is left out.

    `settings` is a run's plain config, of pretraining, fine-tuning or a probe; of the optimizer every option is there
    with the value that it has, set or not, and of the schedule its lengths in steps. Dropout is what `module` has, one
    rate or the list of its rates.
    """
    optim, trainer = settings["optim"], settings["trainer"]
    group = optimizer.param_groups[0]
    model = settings.get("model") or {}
    mix = dict(settings.get("mix") or {})
    kind = str(mix.pop("_target_", "")).rpartition(".")[2]
    trained = settings.get("train")
    averages = ("ema_decay", "swa_start_epoch", "swa_every_epochs", "swa_lr_factor")
    averaged = trainer["ema_decay"] is not None or trainer["swa_start_epoch"] is not None
    average = {key: trainer[key] for key in averages if trainer[key] is not None}
    if trainer["swa_start_epoch"] is None:
        average.pop("swa_every_epochs", None)
    rates = sorted({rate for rate in map(_dropout_rate, module.modules()) if rate})
    parts = {
        "optimizer": {"name": optim["name"], **{key: group[key] for key in sorted(OPTIONS[optim["name"]])}},
        "lr": {"peak": lr, "base_lr": optim["base_lr"], "scaling": optim["scaling"]},
        "weight_decay": optim["weight_decay"],
        "layer_decay": optim["layer_decay"],
        "schedule": _schedule_values(schedule),
        "average": average if averaged else None,
        "clip_grad_norm": trainer["clip_grad_norm"],
        "init": model.get("init"),
        "drop_path": settings.get("drop_path") or model.get("drop_path"),
        "dropout": rates[0] if len(rates) == 1 else rates or None,
        "label_smoothing": settings.get("label_smoothing"),
        "mixing": {"name": kind, **mix} if kind not in ("", "Mixing") else None,
        "augment": settings["augment"]["views"],
        "train": None if trained == "all" else trained,
        "train_amount": settings.get("train_amount"),
        "early_stopping": {"patience": settings["patience"]} if settings.get("patience") else None,
        "held_out": settings.get("held_out"),
        "bad_steps": {"most_in_a_row": trainer["max_bad_steps"], "spike_deviations": trainer["spike_deviations"]},
    }
    return {name: value for name, value in parts.items() if value not in (None, 0, 0.0)}


def _schedule_values(schedule: Schedule) -> dict[str, Any]:
    steps = {"every_epochs": "every_steps", "restart_epochs": "restart_steps"}
    read = sorted(steps.get(key, key) for key in READS[schedule.name])
    values = {key: getattr(schedule, key) for key in read}
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {
        "name": schedule.name,
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        **{key: value for key, value in kept.items() if value not in (None, [])},
    }


def parts_line(parts: Mapping[str, Any]) -> str:
    """The parts of `active_parts` in one line, but for those that the lines of rate, schedule and groups tell."""
    elsewhere = ("lr", "weight_decay", "layer_decay", "schedule", "average", "augment", "bad_steps")
    told = [_told(name, value) for name, value in parts.items() if name not in elsewhere]
    for view in parts["augment"]:
        told += [f"{key} {view[key]}" for key in ("policy", "erase") if view.get(key)]
    spikes = parts["bad_steps"]["spike_deviations"]
    most = _count(parts["bad_steps"]["most_in_a_row"], "bad step")
    told.append(f"at most {most} in a row" + (f", spikes of {spikes:g} deviations among them" if spikes else ""))
    return f"with {', '.join(dict.fromkeys(told))}"


def _told(name: str, value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{name} {value}"
    inner = {key: each for key, each in value.items() if each not in (None, False, 0)}
    title = f"{inner.pop('name')}" if "name" in inner else name
    return f"{title} ({', '.join(f'{key} {_plain_value(each)}' for key, each in inner.items())})" if inner else title


def _plain_value(value: Any) -> str:
    return " and ".join(f"{each:g}" for each in value) if isinstance(value, tuple | list) else f"{value}"


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
        "dropout": [_span(row["dropout"]) for row in rows],
    }
    silent = {"layer": "-", "layer factor": "1", "trust ratio": "no", "drop path": "none", "dropout": "none"}
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
