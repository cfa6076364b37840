"""`python -m ssl.replay failed=runs/<run>`: the step again for which a run ended, by its loss or gradient.

It says which images, which module and which parameter the first numbers that are not finite come from, and what may
help. The weights are those from before the step; the batch, its cut into parts and its random numbers are the run's.
"""

from __future__ import annotations

import ssl.interrupted  # before what takes seconds
import ssl.runtime  # before torch  # noqa: F401

# isort: split
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

import ssl.distributed as distributed
from ssl.command import run_command
from ssl.config import Device, Precision, check
from ssl.failed_step import STEP_FILE
from ssl.not_finite import MOST_FOUND, is_finite
from ssl.pictures import save_png, views_panel
from ssl.replayed_step import Outcome, Replay, cut_like_the_run, load
from ssl.trainer import choose_dtype


@dataclass
class ReplayTrainerConfig:
    precision: Precision | None = None  # null: the run's, and fp32 beside it where that fails
    device: Device = Device.auto
    device_batch_size: int | None = None


@dataclass
class ReplayConfig:
    """What `python -m ssl.replay` takes."""

    failed: str = MISSING
    trust: list[str] = field(default_factory=list)
    out: str | None = None
    trainer: ReplayTrainerConfig = field(default_factory=ReplayTrainerConfig)


def run(config: DictConfig) -> dict[str, Any]:
    """Do the step that `config.failed` names again; returns what replay.json says.

    Raises ValueError where there is no such step, where it is damaged, and where its config names code that is not
    trusted.
    """
    check(config, ReplayConfig)
    if distributed.world_size() > 1:
        raise ValueError("a step is done again on one process; start python -m ssl.replay without a launcher")
    step = load(find_failed(Path(config.failed).expanduser()), trust=list(config.trust))
    given = config.trainer.precision
    device = distributed.start(config.trainer.device.name)
    dtype = choose_dtype(step.failed.precision if given is None else given.name, device)
    cut = cut_like_the_run(step, config.trainer.device_batch_size)
    replay = Replay(step, cut, device=device, dtype=dtype)

    outcomes = [replay.outcome()]
    if given is None and not outcomes[0].finite and dtype != torch.float32:
        outcomes.append(Replay(step, cut, device=device, dtype=torch.float32).outcome())
    weights = [name for name, tensor in step.method.state_dict().items() if not is_finite(tensor)]
    views = replay.rows_with_bad_views()
    at_fault = views if views or outcomes[0].finite or weights else replay.at_fault()
    losses = replay.losses() if outcomes[0].finite else {}
    shown = at_fault or list(losses) or list(range(min(MOST_FOUND, len(replay))))

    said = advice(outcomes, weights=weights, views=views, num_at_fault=len(at_fault), num_images=len(replay))
    result = {
        "step": step.failed.step,
        "reason": step.failed.reason,
        "device": str(device),
        "images": len(replay),
        "parts": cut.num_parts,
        "outcomes": [_as_json(asdict(outcome)) for outcome in outcomes],
        "weights_not_finite": weights,
        "views_not_finite": [replay.image(row) for row in views],
        "at_fault": [replay.image(row) for row in at_fault],
        "largest_losses": [{**replay.image(row), "loss": loss} for row, loss in losses.items()],
        "advice": said,
    }
    out = Path(config.out).expanduser() if config.out else step.folder
    out.mkdir(parents=True, exist_ok=True)
    (out / "replay.json").write_text(json.dumps(result, indent=2) + "\n")
    save_png(views_panel(replay.views(shown[:MOST_FOUND]), mean=step.mean, std=step.std), out / "views.png")
    print(
        "\n".join([*_lines(result, outcomes, step.folder), f"written: {out / 'replay.json'}, {out / 'views.png'}"]),
        flush=True,
    )
    return result


def find_failed(path: Path) -> Path:
    """The folder of the failed step that `failed=path` means: that folder, or the last one of a run.

    Raises ValueError where there is none.
    """
    if (path / STEP_FILE).is_file():
        return path
    found = [each.parent for each in path.glob(f"**/step_*/{STEP_FILE}")]
    if not found:
        raise ValueError(
            f"failed={path} holds no failed step: looked for step_*/{STEP_FILE} in it and below; a run that ends for "
            "its loss or gradient writes one and names it"
        )
    return max(found, key=lambda folder: folder.name)


def advice(
    outcomes: Sequence[Outcome], *, weights: Sequence[str], views: Sequence[int], num_at_fault: int, num_images: int
) -> list[str]:
    """What may help, most likely first."""
    first = outcomes[0]
    if weights:
        return [f"the weights were not finite before this step ({weights[0]}): take an earlier checkpoint"]
    if views:
        return ["the views are not finite before the model sees them: look at those images, data.mean and data.std"]
    said = []
    if first.finite:
        said.append(
            "here loss and gradient are finite: were they not in the run, its device or another kernel is at fault, "
            "or its precision; the same command goes on from the last checkpoint"
        )
        said.append("for a spike: trainer.clip_grad_norm=1, a lower optim.base_lr, a longer schedule.warmup_epochs")
        return said
    if len(outcomes) > 1 and outcomes[1].finite:
        said.append(f"the step is finite in fp32: trainer.precision=fp32{' or bf16' * (first.precision == 'fp16')}")
    if 0 < num_at_fault < min(MOST_FOUND, num_images):
        said.append("look at the images at fault, in views.png: an image of one colour, or a broken one, may be moved")
    elif num_at_fault:
        said.append(f"{num_at_fault} images or more fail alone, so it is no matter of single images")
    else:
        said.append("no part of the batch fails alone: the loss fails over the whole batch, see the method's settings")
    said.append("trainer.clip_grad_norm=1, a lower optim.base_lr, a longer schedule.warmup_epochs")
    return said


def _lines(result: dict[str, Any], outcomes: Sequence[Outcome], folder: Path) -> list[str]:
    lines = [f"step {result['step']}, kept in {folder}: {result['reason']}"]
    for each in outcomes:
        lines.append(
            f"  in {each.precision} on {result['device']}: loss {each.loss:.6g}, gradient norm {each.grad_norm:.6g}"
        )
        if each.module is not None:
            lines.append(f"    first module whose output is not finite: {each.module}")
        if each.parameter is not None:
            lines.append(f"    first parameter whose gradient is not finite: {each.parameter}")
    for each in result["at_fault"]:
        lines.append(f"  at fault: image {each['index']}, {each['image']}")
    for each in result["largest_losses"]:
        lines.append(f"  largest losses: {each['loss']:.4g} of image {each['index']}, {each['image']}")
    return [*lines, *(f"what may help: {line}" for line in result["advice"])]


def _as_json(value: Any) -> Any:
    """Numbers that JSON has not stand by their names."""
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """The command line."""
    ConfigStore.instance().store(name="replay_schema", node=ReplayConfig)
    run_command(run, config_name="replay")


if __name__ == "__main__":
    main()
