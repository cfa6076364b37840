"""A published linear-probe protocol, augmentation and optimizer included, through the training loop:
`python -m eval.linear_probe ckpt=runs/<run> protocol=mae`.

The heads of the last step are reported. Where there are several, the one that is best on images held out of train meets
the test split, which is read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

import ssl.distributed as distributed
from eval.command import report, same_subject
from eval.head_file import save_head
from eval.heads import Heads, HeadScores, choose, score_heads
from eval.layers import GRID_DIM, FeatureSet, parse_sets, resolve_sets
from eval.probe import HELD_OUT, average_scores, join_scores
from eval.probe_heads import ProbeHeads
from eval.probe_protocol import check_published, departures
from eval.scores import details, headline
from eval.subject import Judged, pooling, read_features, variant
from ssl.checkpoint import read_state, steps_saved
from ssl.config import check_trainer, plain
from ssl.data.sources import Source
from ssl.data.subset import Subset, split_held_out
from ssl.launch import launch
from ssl.models.backbones import BackboneSpec, is_token_model
from ssl.optim import scaled_lr
from ssl.recipe import fit_batch
from ssl.run_lock import RunLock
from ssl.trainer import choose_dtype
from ssl.training import Images, train

PIECE = 16384
"""Held-out images whose features are in memory at once."""


@dataclass(frozen=True)
class Choice:
    """The head that meets the test split, and how all of them did on the held-out images."""

    head: int
    row: dict[str, Any]
    grid: list[dict[str, Any]]
    num_held_out: int


def run(config: DictConfig, *, schema: type) -> dict[str, Any]:
    """Judge what `config.ckpt` names by the protocol that `config` was composed with, from the last step of an earlier
    start where there is one; returns the metrics and the protocol.

    Where torch sees several devices there is one process for each. Raises ValueError for settings that
    the protocol does not read, and for what it cannot judge.
    """
    check_published(config, schema)
    given, config = config.copy(), config.copy()
    settings = config.trainer
    settings.device, settings.precision, config.loader.threads = config.device, config.precision, config.threads
    check_trainer(settings)
    judged, sets, notes = open_subject(config)

    def here() -> dict[str, Any]:
        return train_and_report(config, judged, sets, notes, schema=schema)

    given.name = judged.name  # which the words of a sweep may be part of
    return launch(given, run=here, command="eval.linear_probe", out=judged.folder / judged.name)


def open_subject(config: DictConfig) -> tuple[Judged, list[FeatureSet], list[str]]:
    """(what is judged, the features that the heads read, notes), before any image is read."""
    protocol = config.protocol
    usual = config.copy()
    usual.layers, usual.pooling = "last", "model"
    if "grid_dim" in usual:
        usual.grid_dim = GRID_DIM
    judged = read_features(usual, command="eval.linear_probe", multi_label=True)
    model = judged.subject.model
    if model is None:
        raise ValueError(f"protocol={protocol} puts images through a backbone; ckpt=pixels has none: protocol=cached")
    if judged.splits.multi_label:
        raise ValueError(
            f"protocol={protocol} is for one class per image, and {judged.splits.train.name} has several; give "
            "protocol=cached, which reports mAP"
        )
    changed = departures(config)
    own, notes = not {"layers", "pooling"} & set(changed), []
    if own and not is_token_model(model) and plain(config.pooling) != "model":
        sets = [FeatureSet()]
        notes.append(
            f"{type(model).__name__} has no tokens as protocol={protocol} reads; its pooled last stage is read"
        )
    else:
        sets = resolve_sets(model, parse_sets(config.layers, config.pooling, grid_dim=config.get("grid_dim", GRID_DIM)))
    name = judged.name.replace("linear_probe", f"linear_probe_{protocol}", 1) + ("" if own else variant(config))
    # With a record of its own of what was read: it trains on other rows of train than an evaluation beside it.
    return replace(judged, name=config.name or name, kept={}, counts={}), sets, notes


def train_and_report(
    config: DictConfig, judged: Judged, sets: list[FeatureSet], notes: list[str], *, schema: type
) -> dict[str, Any]:
    """Train the heads, choose one, judge it on the test split and write what came out."""
    device = distributed.start(config.device.name)
    dtype = choose_dtype(config.precision.name, device)
    subject, splits = judged.subject, judged.splits
    assert subject.model is not None
    source, held_out = splits.train, None
    if len(sets) * max(len(config.head.lr), 1) > 1:
        fraction = HELD_OUT if config.held_out is None else config.held_out
        kept, rest = split_held_out(source.labels, fraction, config.seed)
        source, held_out = Subset(splits.train, kept), Subset(splits.train, rest)
    notes = notes + fit_batch(config.trainer, len(source), world_size=distributed.world_size())
    next_command = f"python -m eval.knn {same_subject(config)}"
    config.ckpt = _one_spelling(config.ckpt, judged)
    config.wandb.name = config.wandb.name or "/".join([*subject.folder.parts[-2:], judged.name])
    out = judged.folder / judged.name
    _check_backbone(out, judged)

    # ---- train -----------------------------------------------------------------------------------------------------
    method = ProbeHeads(
        subject.model,
        sets=sets,
        image_size=subject.image_size,
        in_chans=subject.channels,
        num_classes=len(splits.classes),
        rates=list(config.head.lr),
        batchnorm=config.head.batchnorm,
        batchnorm_eps=config.head.batchnorm_eps,
        init_std=config.head.init_std,
        batch_size=config.batch_size,
        device=device,
        dtype=dtype,
        seed=config.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out):
        last = train(
            config,
            schema=schema,
            out=out,
            method=method,
            spec=BackboneSpec.from_dict(subject.identity["backbone"]),
            images=Images(
                source,
                channels=subject.channels,
                mean=subject.mean,
                std=subject.std,
                in_memory_gib=judged.data["in_memory_gib"],
                max_bad_fraction=judged.data["max_bad_fraction"],
                settings=judged.data,
            ),
            device=device,
            dtype=dtype,
            evaluations={},
            next_command=None,
            card={"judged": _identity(judged)},
        )
    trained = read_state(steps_saved(out)[-1][1])
    judged.counts["train"] = {"num": len(source), "num_bad": int(last.get("bad_images", 0)), "seconds": 0.0}

    # ---- choose, and the test split once ---------------------------------------------------------------------------
    def score(config: DictConfig, judged: Judged) -> tuple[dict[str, float], dict[str, Any], str]:
        choice = choose_head(config, method, judged, held_out)
        chosen_set = sets[choice.head // len(method.rates)]
        weight, bias = method.folded(choice.head)
        test = judged.read("test", [chosen_set])[0]
        logits = torch.addmm(bias, test.features, weight.T)  # (N, C)
        settings = {
            **describe(config, judged, method, choice),
            "weights": {"run": str(out), "head": _save_head(judged, weight, bias, chosen_set)},
            "last_metrics": {name: value for name, value in last.items() if np.isfinite(value)},
            "train_seconds": trained["train_seconds"],
            "details": details(logits, test.labels, splits.classes, multi_label=False),
            "notes": notes,
        }
        return headline(logits, test.labels, multi_label=False), settings, title(config, choice)

    result = report(config, judged, score)
    if distributed.is_main():
        print(f"next: {next_command}", flush=True)
    return result


def choose_head(config: DictConfig, method: ProbeHeads, judged: Judged, held_out: Source | None) -> Choice:
    """The head that does best on the held-out images as an evaluation sees them; the only one where there is one."""
    optim = config.optim
    batch_size = config.trainer.global_batch_size
    peak = scaled_lr(optim.base_lr, global_batch_size=batch_size, scaling=optim.scaling.name)
    rows: list[dict[str, Any]] = [
        {**each.to_dict(), "base_lr": optim.base_lr * rate, "lr": peak * rate}
        for each in method.sets
        for rate in method.rates
    ]
    if held_out is None:
        return Choice(0, rows[0], [], 0)
    scores, num = score_held_out(method, judged, held_out)
    for number, row in enumerate(rows):
        finite = bool(scores.finite[number])
        row["held_out_top1"] = scores.metrics["top1"][number].item() if finite else None
        row["held_out_loss"] = scores.loss[number].item() if finite else None
    best = choose(scores, num_images=num)
    return Choice(best, rows[best], rows, num)


def score_held_out(method: ProbeHeads, judged: Judged, held_out: Source) -> tuple[HeadScores, int]:
    """How good every head is on the held-out images, and how many of them could be read."""
    count = len(method.rates)
    per_set = [
        _side_by_side([method.folded(place * count + head) for head in range(count)], judged.device)
        for place in range(len(method.sets))
    ]
    pieces: list[HeadScores] = []
    sizes: list[int] = []
    for rows in np.array_split(np.arange(len(held_out)), -(-len(held_out) // PIECE)):
        read = judged.read_source(Subset(held_out, rows), "held out", method.sets)
        pieces.append(
            join_scores([score_heads(heads, each.features, each.labels) for heads, each in zip(per_set, read)])
        )
        sizes.append(len(read[0].labels))
    return average_scores(pieces, sizes), sum(sizes)


def describe(config: DictConfig, judged: Judged, method: ProbeHeads, choice: Choice) -> dict[str, Any]:
    """How it was done, for the protocol."""
    features = judged.protocol["features"]
    if len(method.sets) == 1:
        pooled = pooling(method.backbone, method.sets)
        features = {**features, "layer": method.sets[0].layer, "dimensions": method.dimensions[0]}
    else:
        pooled = None
        read = [{**each.to_dict(), "dimensions": dim} for each, dim in zip(method.sets, method.dimensions)]
        features = {"sets": read, **{key: value for key, value in features.items() if key != "layer"}}
    found = {
        "protocol": config.protocol,
        "departures": departures(config),
        "pooling": pooled,
        "features": features,
        "head": ("BatchNorm without affine, then " if config.head.batchnorm else "") + "linear with bias",
        "num_heads": len(method.heads),
        "augment": plain(config.augment)["views"],
        "optimizer": plain(config.optim),
        "schedule": plain(config.schedule),
        "length": {"epochs": config.trainer.epochs, "steps": config.trainer.steps},
        "global_batch_size": config.trainer.global_batch_size,
        "choice": choice.row,
        "reported": "the head of the last step",
    }
    if not choice.num_held_out:
        return found
    return found | {
        "reported": "the chosen head of the last step, trained without held-out images",
        "choice_rule": "on held-out images of train: lowest loss within one standard error of the highest top-1",
        "num_held_out": choice.num_held_out,
        "grid": choice.grid,
    }


def title(config: DictConfig, choice: Choice) -> str:
    """How the probe is called in the printed line."""
    row, several = choice.row, ""
    if choice.grid:
        several = f", {len(choice.grid)} heads, lr={row['base_lr']:g} on {row['layer']} {row['pooling']} chosen"
    return f"linear probe (protocol {config.protocol}{several})"


def _identity(judged: Judged) -> str:
    """What tells the judged backbone from every other."""
    checkpoint = judged.subject.identity["checkpoint"]
    return checkpoint["sha256"] if checkpoint else judged.subject.title


def _one_spelling(ckpt: str, judged: Judged) -> str:
    """The checkpoint's whole path, so that a probe can be continued from another folder; as given where it has none."""
    checkpoint = judged.subject.identity["checkpoint"]
    path = Path(checkpoint["path"] if checkpoint else "")
    return str(path.resolve()) if checkpoint and path.exists() else ckpt


def _check_backbone(out: Path, judged: Judged) -> None:
    """Raise ValueError where the run folder holds heads on another backbone, which a continued run would judge."""
    for _, folder in steps_saved(out):
        if read_state(folder).get("judged") != _identity(judged):
            raise ValueError(
                f"{out} holds heads on another backbone than {judged.subject.title}, such as an earlier step of the "
                "same run; give name= to keep both, or remove that folder"
            )


def _side_by_side(heads: list[tuple[Tensor, Tensor]], device: torch.device) -> Heads:
    """Weights (classes, D) and biases (classes,) of several heads on the same features, on the device."""
    weight = torch.stack([weight.T for weight, _ in heads], dim=2)  # (D, C, H)
    bias = torch.stack([bias for _, bias in heads], dim=1)  # (C, H)
    return Heads(weight.flatten(1).to(device), bias.flatten().to(device), num_classes=len(bias))


def _save_head(judged: Judged, weight: Tensor, bias: Tensor, chosen_set: FeatureSet) -> str | None:
    """Write the head beside the JSON, for prediction, and say where; None for an untrained backbone."""
    checkpoint = judged.subject.identity["checkpoint"]
    if checkpoint is None:
        return None
    folder = judged.folder / f"{judged.name}.head"
    if distributed.is_main():
        save_head(
            folder,
            weight=weight,
            bias=bias,
            classes=judged.splits.classes,
            checkpoint=checkpoint["path"],
            sha256=checkpoint["sha256"],
            features=chosen_set.to_dict(),
            image_size=judged.subject.image_size,
            data=judged.splits.identity(),
        )
    return str(folder)
