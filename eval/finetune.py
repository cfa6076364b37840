"""`python -m eval.finetune ckpt=runs/<run>`: train the whole model on labels, and judge it on the test split, once.

`run` is the table of contents; the training loop is the one of pretraining (`ssl.training.train`).
"""

from __future__ import annotations

import ssl.openmp  # before torch  # noqa: F401

# isort: split
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING, DictConfig
from torch import nn

import eval.low_shot as low_shot
import ssl.distributed as distributed
from eval.classifier import Classifier
from eval.command import USAGE, same_subject
from eval.config import EvalDataConfig, register
from eval.finetuning import FineTuning, describe
from eval.head_file import load_head
from eval.held_out import HeldOut, classify
from eval.layers import FeatureSet
from eval.mixing import Mixing
from eval.results import environment, open_folder, write_results
from eval.scores import details, headline
from eval.splits import Splits, data_settings, make_splits
from eval.subject import BASELINES, load
from ssl.checkpoint import LoadedBackbone, classifier_model, find, load_backbone, read_state
from ssl.command import choices, run_command, run_folder
from ssl.config import ModelConfig, TrainingConfig, build, check, check_trainer, plain
from ssl.data.image_size import choose_image_size
from ssl.data.sources import Source
from ssl.data.subset import Subset, split_held_out
from ssl.launch import launch
from ssl.models.backbones import BackboneSpec, build_backbone
from ssl.models.classifier import freeze, make_classifier, pooling_name, put_weights
from ssl.online import Evaluation, StopRun
from ssl.trainer import choose_dtype
from ssl.training import Images, train


@dataclass
class FinetuneConfig(TrainingConfig):
    """What `python -m eval.finetune` takes."""

    ckpt: str | None = None
    model: ModelConfig | None = None  # with ckpt=random
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    train: Any = "all"  # all, head, or the number of last stages that are trained with it
    head: str | None = None  # folder of a probed head to start from, or `probe` for the run's own; null: small random
    head_std: float = 0.01  # of the classifier's random weights, where head= does not bring some
    pooling: str = "auto"  # of a vision transformer: token, avg; auto: the checkpoint's
    drop_path: float = 0.0
    dropout: float = 0.0  # before the classifier
    label_smoothing: float = 0.0
    mix: Any = MISSING  # how images and labels are mixed: a file in conf/mix
    train_amount: Any = None  # 1%, 10%, or a number of images per class; null: all
    held_out: float = 0.0  # share of each class of train that is watched and not trained on
    patience: int | None = None  # evaluations without a better held-out accuracy, after which the run ends
    batch_size: int = 256  # images that the model takes at once when it is evaluated


def run(config: DictConfig, *, out: Path | None = None) -> dict[str, Any]:
    """Fine-tune as `config` says, in the run folder `out` (null: `<judged run>/finetune/...`), from its last checkpoint
    if it has one; returns metrics and protocol, which `<out>/eval/finetune.json` holds too.
    """
    began = time.perf_counter()
    check(config, FinetuneConfig)
    check_trainer(config.trainer)
    _check(config)
    device = distributed.start(config.trainer.device.name)
    dtype = choose_dtype(config.trainer.precision.name, device)

    # ---- the backbone, the images and what of them is trained on ---------------------------------------------------
    loaded = load(config)
    own = config.data.name == "checkpoint" and loaded is not None
    data = data_settings(plain(config.data), loaded.config.get("data", {}) if loaded else None, subject=config.ckpt)
    seed = int(loaded.config.get("seed", 0)) if own and loaded else int(config.seed)
    splits = make_splits(data, own=own, seed=seed, command="eval.finetune", multi_label=True)
    source, held_out = _divide(config, splits)
    out = out or default_folder(config, loaded, data["name"])
    open_folder(out)

    # ---- the model -------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model, spec, mean, std, notes = _make_model(config, loaded, source, data, splits)
    frozen = freeze(model, config.train)
    mixing: Mixing = build(
        config.mix,
        num_classes=len(splits.classes),
        smoothing=config.label_smoothing,
        multi_label=splits.multi_label,
    )
    method = FineTuning(model, image_size=spec.image_size, mixing=mixing, std=std)
    if distributed.is_main():
        print("\n".join(["fine-tuning " + _what(config, loaded), f"with {_acting(config) or 'nothing added'}", *notes]))

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
        last = train(
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
            evaluations={**evaluations, **({"held_out": watch} if watch else {})},
            next_command=f"python -m eval.predict ckpt={out} images=PATH",
            card={
                "classifier": {
                    "classes": splits.classes,
                    "pooling": pooling_name(model),
                    "multi_label": splits.multi_label,
                }
            },
        )
    except StopRun as stop:
        if watch is None or not watch.ended:
            raise
        ended, last = str(stop), {}
        notes.append(ended)

    # ---- the test split, once --------------------------------------------------------------------------------------
    folder = find(out)
    state = read_state(folder)
    judged = load_finetuned(folder)
    found = classify(judged.model.to(device), splits.test, title="test", **shown)  # pyright: ignore[reportAttributeAccessIssue]
    labels = splits.in_classes_of_train(found.labels)
    metrics = headline(found.features, labels, multi_label=splits.multi_label)
    protocol = {
        "command": "eval.finetune",
        "subject": _what(config, loaded),
        "checkpoint": _identity(loaded),
        "backbone": spec.to_dict(),
        "recipe": choices_of(config),
        "settings": _settings(config),
        "pooling": state["classifier"]["pooling"],
        "frozen": len(frozen),
        "reported": f"the weights of step {state['step']}" + (f"; {ended}" if ended else ", the last"),
        "weights": {"step": state["step"], "epoch": state["epoch"], "average": (folder / "ema.safetensors").exists()},
        "data": {
            "name": data["name"],
            "root": data.get("root"),
            "pretrained_on_it": own,
            "train": source.name,
            "test": splits.test.name,
            "test_split": splits.test_split,
            "num_train": len(source),
            "num_held_out": 0 if held_out is None else len(held_out),
            "num_test": len(found.labels),
            "num_undecodable": found.num_bad,
            "num_classes": len(splits.classes),
            "classes": splits.classes,
            "multi_label": splits.multi_label,
        },
        "last_metrics": {name: value for name, value in last.items() if np.isfinite(value)},
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
        print(f"next: python -m eval.predict ckpt={out} images=PATH   # or {same_subject(config)} with another recipe=")
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
    chosen = choices_of(config)
    if loaded is None:
        return Path("runs") / f"supervised_{config.model.name}_{data}_{chosen}" / f"seed{config.seed}"
    other = "" if config.data.name == "checkpoint" else f"_{data}"
    return loaded.run_dir / "finetune" / f"{chosen}{other}" / f"seed{config.seed}"


def choices_of(config: DictConfig) -> str:
    """The recipe's name; `own` where the config was composed by other code."""
    try:
        return choices().get("recipe", "own")
    except ValueError:
        return "own"


def _check(config: DictConfig) -> None:
    if config.ckpt == "pixels":
        raise ValueError("ckpt=pixels has no backbone to fine-tune; give a checkpoint, or ckpt=random model=<preset>")
    if config.ckpt in BASELINES and config.model is None:
        raise ValueError("ckpt=random needs a backbone to build: model=resnet18, model=vit_s, ...")
    if config.ckpt in BASELINES and (config.train != "all" or config.head is not None):
        raise ValueError("train= and head= need pretrained weights: with ckpt=random everything is trained")
    if config.train not in ("all", "head") and not (isinstance(config.train, int) and config.train >= 1):
        raise ValueError(f"train must be all, head, or a number of last stages, got {config.train!r}")
    if config.train == "head" and (config.drop_path or config.optim.layer_decay is not None):
        raise ValueError(
            "drop_path and optim.layer_decay have no effect with train=head; set drop_path=0 optim.layer_decay=null"
        )
    if config.patience is not None and not config.held_out:
        raise ValueError("patience needs images to watch: give held_out=0.1, a share of train that is not trained on")
    if config.patience is not None and config.patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, got {config.patience}")
    if config.held_out and not config.trainer.eval_every_epochs:
        raise ValueError(f"held_out={config.held_out} has no effect with trainer.eval_every_epochs=null")


def _divide(config: DictConfig, splits: Splits) -> tuple[Source, Source | None]:
    """(what is trained on, what is watched) of the train split."""
    source = splits.train
    held_out = None
    if config.held_out:
        kept, out = split_held_out(source.labels, config.held_out, config.seed)
        source, held_out = Subset(source, kept), Subset(source, out)
    if config.train_amount is not None:
        source = Subset(source, low_shot.draw(source.labels, config.train_amount, seed=config.seed))
    return source, held_out


def _make_model(
    config: DictConfig, loaded: LoadedBackbone | None, source: Source, data: dict[str, Any], splits: Splits
) -> tuple[nn.Module, BackboneSpec, list[float], list[float], list[str]]:
    """(model, its description, mean, std, notes): the pretrained weights, or random ones, with a classifier."""
    settings: dict[str, Any] = {
        "num_classes": len(splits.classes),
        "pooling": config.pooling,
        "drop_path": config.drop_path,
        "dropout": config.dropout,
        "head_std": config.head_std,
    }
    if loaded is None:
        _, spec = build_backbone(
            config.model.name,
            image_size=choose_image_size(data.get("image_size"), source),
            in_chans=int(data["channels"]),
            patch_size=config.model.patch_size,
            stem=config.model.stem.name,
            model_args=plain(config.model.args),
        )
        if config.model.drop_path:
            raise ValueError("model.drop_path is set by drop_path= here; leave it out")
        torch.manual_seed(config.seed)
        model, spec = make_classifier(spec, **settings)
        return model, spec, list(data["mean"]), list(data["std"]), []
    model, spec = make_classifier(loaded.spec, **settings)
    notes = loaded.notes + put_weights(model, loaded.model.state_dict())
    if config.head is not None:
        notes.append(_put_head(config, model, loaded, splits))
    return model, spec, loaded.mean, loaded.std, notes


def _put_head(config: DictConfig, model: Any, loaded: LoadedBackbone, splits: Splits) -> str:
    """Start from a probed head: linear probing, then fine-tuning (Kumar et al. 2022, arXiv:2202.10054)."""
    folder = loaded.run_dir / "eval" / "linear_probe.head" if config.head == "probe" else Path(config.head).expanduser()
    if not folder.exists():
        raise ValueError(
            f"head={config.head}: there is no {folder}; make it by python -m eval.linear_probe ckpt={config.ckpt}"
        )
    head = load_head(folder)
    classifier = model.get_classifier()
    if head.sha256 != loaded.hash:
        raise ValueError(f"{folder} belongs to other weights than ckpt={config.ckpt}; probe them again")
    if FeatureSet(**head.features) != FeatureSet() or config.pooling != "auto":
        raise ValueError(
            f"{folder} reads {FeatureSet(**head.features)}, the classifier what the checkpoint's own pooling gives; "
            "probe with layers=last pooling=model, and give pooling=auto here"
        )
    if list(head.classes) != splits.classes or not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"{folder} names other classes than {splits.train.name}, or the model has no linear classifier"
        )
    with torch.no_grad():
        classifier.weight.copy_(head.weight)
        classifier.bias.copy_(head.bias)
    return f"the classifier starts as {folder}"


def _settings(config: DictConfig) -> dict[str, Any]:
    """Everything that was set, but for where and how fast it ran."""
    without = ("ckpt", "model", "data", "wandb", "out", "accept_changes", "loader", "online", "seed")
    return {name: value for name, value in plain(config).items() if name not in without}


def _acting(config: DictConfig) -> str:
    names = ("train", "drop_path", "dropout", "label_smoothing", "train_amount", "held_out", "patience")
    mix = plain(config.mix)
    kind = mix.pop("_target_").rpartition(".")[2]
    acting = describe({name: config[name] for name in names})
    return acting if kind == "Mixing" else ", ".join(filter(None, [acting, f"{kind} ({describe(mix)})"]))


def _what(config: DictConfig, loaded: LoadedBackbone | None) -> str:
    return str(loaded.path) if loaded is not None else f"{config.model.name} from random weights"


def _identity(loaded: LoadedBackbone | None) -> dict[str, Any] | None:
    if loaded is None:
        return None
    return {
        "path": str(loaded.path),
        "sha256": loaded.hash,
        "step": loaded.step,
        "weights": loaded.weights,
        "method": str((loaded.config.get("method") or {}).get("_target_", "")).rpartition(".")[2] or None,
        "pretraining_data": (loaded.config.get("data") or {}).get("name"),
    }


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

    def task(config: DictConfig) -> float | None:
        if config.ckpt is None:
            print(USAGE.format(command="eval.finetune"), file=sys.stderr)
            raise SystemExit(2)
        check(config, FinetuneConfig)
        _check(config)
        loaded = load(config)
        name = config.data.name
        if loaded is None and name == "checkpoint":
            name = "embedded"
        out = run_folder(default_folder(config, loaded, name), config.out)
        result = launch(config, run=lambda: run(config, out=out), module="eval.finetune", out=out)
        return None if result is None else result["metrics"].get("held_out_top1")

    run_command(task, config_name="finetune")


if __name__ == "__main__":
    main()
