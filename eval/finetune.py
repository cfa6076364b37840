"""`python -m eval.finetune ckpt=runs/<run>`: train the whole model on labels, and judge it on the test split, once.

`run` is the table of contents; the training loop is the one of pretraining (`ssl.training.train`).
"""

from __future__ import annotations

import ssl.interrupted  # before what takes seconds
import ssl.runtime  # before torch  # noqa: F401

# isort: split
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING, DictConfig, OmegaConf

import ssl.distributed as distributed
from eval.classifier import Classifier
from eval.command import USAGE
from eval.config import EvalDataConfig, register
from eval.extract import centre_view
from eval.finetune_start import check_settings, check_start, divide, make_model, started_from
from eval.finetuning import FineTuning
from eval.held_out import NAME, HeldOut, classify
from eval.mixing import Mixing
from eval.results import environment, open_folder, write_results
from eval.scores import details, headline
from eval.splits import data_settings, make_splits
from eval.subject import checkpoint_identity, load
from eval.untrained import backbone_words
from ssl.checkpoint import LoadedBackbone, classifier_model, find, load_backbone, read_state
from ssl.command import as_name, run_command, run_folder
from ssl.config import ModelConfig, TrainingConfig, build, check, check_trainer, plain
from ssl.launch import launch
from ssl.models.classifier import freeze, pooling_name
from ssl.online import Evaluation, StopRun
from ssl.recipe import fit_batch
from ssl.run_lock import RunLock
from ssl.starts import note_command
from ssl.sweep import Outcome
from ssl.trainer import choose_dtype, dtype_name
from ssl.training import Images, train
from ssl.watchdog import group_timeout


@dataclass
class FinetuneConfig(TrainingConfig):
    """What `python -m eval.finetune` takes."""

    ckpt: str | None = None  # a run folder, a checkpoint in it, an export, timm:<name>, a file, or `random`
    model: ModelConfig | None = None  # with ckpt=random
    data: EvalDataConfig = field(default_factory=EvalDataConfig)  # what it is trained and judged on
    train: Any = "all"  # all, head, or the number of last stages that are trained with it
    head: str | None = None  # folder of a probed head to start from, or `probe` for the run's own; null: small random
    head_std: float = 0.01  # of the classifier's random weights, where head= does not bring some
    pooling: str = "auto"  # of a vision transformer: token, avg; auto: the checkpoint's
    drop_path: float = 0.0  # rate of stochastic depth at the last block, growing from 0 at the first
    dropout: float = 0.0  # before the classifier
    label_smoothing: float = 0.0  # share of the target that all classes get
    mix: Any = MISSING  # how images and labels are mixed: a file in conf/mix
    train_amount: Any = None  # 1%, 10%, or a number of images per class; null: all
    held_out: float = 0.0  # share of each class of train that is watched and not trained on
    recipe: str = "own"  # its name: a file in conf/recipe
    patience: int | None = None  # evaluations without a better held-out accuracy, after which the run ends
    batch_size: int = 256  # images that the model takes at once when it is evaluated


def run(config: DictConfig, *, out: Path | None = None, loaded: LoadedBackbone | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, in the run folder `out` (null: `<judged run>/finetune/...`), from its last checkpoint
    if it has one; returns metrics and protocol, which `<out>/eval/finetune.json` holds too.

    `loaded` is what `ckpt=` names, where it has been read already.
    """
    began = time.perf_counter()
    check(config, FinetuneConfig)
    check_trainer(config.trainer)
    check_settings(config)
    device = distributed.start(config.trainer.device.name, timeout=group_timeout(config.trainer.hang_timeout))
    dtype = choose_dtype(config.trainer.precision.name, device)

    # ---- the backbone, the images and what of them is trained on ---------------------------------------------------
    loaded = loaded or load(config)
    own = config.data.name == "checkpoint" and loaded is not None
    data = data_settings(plain(config.data), loaded.config.get("data", {}) if loaded else None, subject=config.ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)
    splits = make_splits(data, own=own, seed=seed, command="eval.finetune", multi_label=True)
    source, held_out = divide(config, splits)
    out = out or default_folder(config, loaded, data["name"])
    # Instead of `checkpoint`, what that means: whoever judges this run has no other place to learn it from.
    config.data = OmegaConf.merge(OmegaConf.structured(EvalDataConfig), data)
    check_start(out, config, loaded)
    fitted = fit_batch(config.trainer, len(source), world_size=distributed.world_size())

    # ---- the model -------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model, spec, mean, std, notes = make_model(config, loaded, source, data, splits)
    frozen = freeze(model, config.train)
    mixing: Mixing = build(
        config.mix,
        num_classes=len(splits.classes),
        smoothing=config.label_smoothing,
        multi_label=splits.multi_label,
    )
    notes = fitted + notes
    method = FineTuning(model, image_size=spec.image_size, mixing=mixing, std=std)
    open_folder(out)
    if distributed.is_main():
        print("\n".join(["fine-tuning " + _what(config, loaded), *notes]))

    # ---- train -----------------------------------------------------------------------------------------------------
    shown = {
        "size": spec.image_size,
        "channels": spec.in_chans,
        "mean": mean,
        "std": std,
        "batch_size": config.batch_size,
        "threads": config.loader.threads,
        "max_bad_fraction": data["max_bad_fraction"],
        "device": device,
        "dtype": dtype,
    }
    watch = None
    if held_out is not None:
        watch = HeldOut(held_out, folder=out, patience=config.patience, **_without(shown, "device", "dtype"))
    evaluations: dict[str, Evaluation] = {name: build(node) for name, node in config.online.items()}
    ended = None
    try:
        with RunLock(out):
            train(
                config,
                schema=FinetuneConfig,
                out=out,
                method=method,
                spec=spec,
                images=Images(
                    source,
                    channels=spec.in_chans,
                    mean=mean,
                    std=std,
                    in_memory_gib=data["in_memory_gib"],
                    max_bad_fraction=data["max_bad_fraction"],
                    settings=dict(data),
                ),
                device=device,
                dtype=dtype,
                evaluations={**evaluations, **({NAME: watch} if watch else {})},
                next_command=None,
                card={
                    "started_from": started_from(loaded),
                    "classifier": {
                        "classes": splits.classes,
                        "pooling": pooling_name(model),
                        "multi_label": splits.multi_label,
                    },
                },
            )
    except StopRun as stop:
        if watch is None or not watch.ended:
            raise
        ended = str(stop)
        notes.append(ended)

    # ---- the test split, once --------------------------------------------------------------------------------------
    folder = find(out)
    state = read_state(folder)
    judged = load_backbone(folder)
    kept = watch if ended is not None else None  # what early stopping has put back
    best = None if kept is None else kept.best_step
    found = classify(classifier_model(judged).to(device), splits.test, title="test", **shown)
    labels = splits.in_classes_of_train(found.labels)
    metrics = headline(found.features, labels, multi_label=splits.multi_label)
    protocol = {
        "command": "eval.finetune",
        "subject": _what(config, loaded),
        "started_from": started_from(loaded),
        "checkpoint": None if loaded is None else checkpoint_identity(loaded),
        "backbone": spec.to_dict(),
        "recipe": config.recipe,
        "settings": _settings(config),
        "features": {
            "precision": dtype_name(dtype),
            "crop": "center",
            "crop_fraction": centre_view(spec.image_size).fraction,
            "image_size": list(spec.image_size),
            "channels": spec.in_chans,
            "mean": mean,
            "std": std,
        },
        "pooling": state["classifier"]["pooling"],
        "frozen": len(frozen),
        "reported": "the weights of "
        + ("the last step" if kept is None else f"step {best}, the best on held-out images"),
        "weights": {
            "path": str(folder),
            "sha256": judged.hash,
            "step": best or state["step"],
            "last_step": state["step"],
            "average": judged.weights == "ema",
            "held_out": None if kept is None else kept.best,
        },
        "data": {
            "name": data["name"],
            "root": data.get("root"),
            "pretrained_on_it": own,
            "train": source.name,
            "test": splits.test.name,
            "images": splits.images,
            "test_split": splits.test_split,
            "num_train": len(source),
            "num_held_out": 0 if held_out is None else len(held_out),
            "num_test": len(found.labels),
            "num_undecodable": found.num_bad + int(state["metrics"].get("bad_images", 0)),
            "num_classes": len(splits.classes),
            "classes": splits.classes,
            "multi_label": splits.multi_label,
        },
        "last_metrics": {name: value for name, value in state["metrics"].items() if np.isfinite(value)},
        "train_seconds": state["train_seconds"],
        "seed": config.seed,
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 1),
        "notes": splits.notes + notes,
        **environment(),
    }
    path = open_folder(out / "eval") / "finetune.json"
    if distributed.is_main():
        more = details(found.features, labels, splits.classes, multi_label=splits.multi_label)
        write_results(path, metrics=metrics, protocol=protocol, details=more)
        _say(metrics, protocol, path)
        print(f"next: python -m eval.predict ckpt={out} images=PATH")
    distributed.stop()
    return {"metrics": metrics, "protocol": protocol, "path": str(path)}


def load_finetuned(path: str | Path) -> Classifier:
    """The fine-tuned model of a run folder or a checkpoint in it, in eval mode on the CPU, with its average's weights
    where the run kept one. Raises ValueError where there is none, or where it is damaged.
    """
    loaded = load_backbone(path)
    model = classifier_model(loaded)
    assert loaded.classifier is not None
    return Classifier(
        model=model,
        classes=loaded.classifier.classes,
        image_size=loaded.spec.image_size,
        mean=loaded.mean,
        std=loaded.std,
        channels=loaded.spec.in_chans,
        multi_label=loaded.classifier.multi_label,
        title=str(loaded.path),
    )


def default_folder(config: DictConfig, loaded: LoadedBackbone | None, data: str) -> Path:
    """Beside the judged run where one is judged, else in `runs`."""
    chosen = config.recipe
    if loaded is None:
        name = as_name(f"supervised_{backbone_words(config)}_{data}_{chosen}")
        return Path("runs") / name / f"seed{config.seed}"
    other = "" if config.data.name == "checkpoint" else f"_{data}"
    return loaded.run_dir / "finetune" / f"{chosen}{other}" / f"seed{config.seed}"


def _settings(config: DictConfig) -> dict[str, Any]:
    """Everything that was set, but for where and how fast it ran."""
    without = ("ckpt", "model", "data", "wandb", "out", "accept_changes", "loader", "online", "report", "seed")
    return {name: value for name, value in plain(config).items() if name not in without}


def _what(config: DictConfig, loaded: LoadedBackbone | None) -> str:
    return str(loaded.path) if loaded is not None else f"{backbone_words(config)} from random weights"


def _say(metrics: dict[str, float], protocol: dict[str, Any], path: Path) -> None:
    data = protocol["data"]
    named = "mAP" if data["multi_label"] else "top-1"
    value = metrics["map" if data["multi_label"] else "top1"]
    print(
        f"fine-tuned ({protocol['recipe']}): {named} {value:.1%} of {data['num_test']:,} test images, "
        f"{data['num_classes']} classes, from {data['num_train']:,} of train; {data['name']}, {protocol['subject']}"
    )
    for note in protocol["notes"]:
        print(f"note: {note}")
    print(f"written: {path}", flush=True)


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def main() -> None:
    """The command line."""
    register(FinetuneConfig)

    def task(config: DictConfig) -> Outcome:
        if config.ckpt is None:
            print(USAGE.format(command="eval.finetune"), file=sys.stderr)
            raise SystemExit(2)
        check(config, FinetuneConfig)
        check_settings(config)
        loaded = load(config)
        name = config.data.name
        if loaded is None and name == "checkpoint":
            name = "embedded"
        out = run_folder(default_folder(config, loaded, name), config.out)
        note_command("eval.finetune", out)
        result = launch(config, run=lambda: run(config, out=out, loaded=loaded), command="eval.finetune", out=out)
        last = result["protocol"]["last_metrics"]
        held_out = last.get("held_out_top1", last.get("held_out_map"))
        return Outcome(result["metrics"], out, held_out)  # a sweeper never hears of the test split

    run_command(task, config_name="finetune")


if __name__ == "__main__":
    main()
