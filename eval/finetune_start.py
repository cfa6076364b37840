"""What a fine-tuning run starts from: its settings, its images, and a model with the right weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

import eval.low_shot as low_shot
from eval.head_file import load_head
from eval.layers import FeatureSet
from eval.splits import Splits
from eval.subject import BASELINES
from ssl.checkpoint import LoadedBackbone, read_state, steps_saved
from ssl.config import plain
from ssl.data.image_size import choose_image_size
from ssl.data.sources import Source
from ssl.data.subset import Subset, split_held_out
from ssl.models.backbones import BackboneSpec, build_backbone, is_token_model, model_name
from ssl.models.classifier import head_names, make_classifier, put_weights
from ssl.models.initialize import initialize


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for settings that do not go together, or would have no effect."""
    if config.trainer.plan:
        raise ValueError("trainer.plan=true has no effect on fine-tuning; only python -m ssl.pretrain can be planned")
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
    if config.patience is not None and config.trainer.swa_start_epoch is not None:
        raise ValueError(
            "patience keeps the best weights of one evaluation, trainer.swa_start_epoch averages over many; give one"
        )
    if config.head is not None and (config.train_amount is not None or config.held_out):
        raise ValueError(
            f"head={config.head} was trained on all labels of train: with train_amount= or held_out= they would leak; "
            "leave one of them out"
        )
    if config.held_out and not config.trainer.eval_every_epochs:
        raise ValueError(f"held_out={config.held_out} has no effect with trainer.eval_every_epochs=null")


def divide(config: DictConfig, splits: Splits) -> tuple[Source, Source | None]:
    """(what is trained on, what is watched) of the train split."""
    source = splits.train
    if config.train_amount is not None:
        source = Subset(source, low_shot.draw(source.labels, config.train_amount, seed=config.seed))
    if not config.held_out:
        return source, None
    kept, out = split_held_out(source.labels, config.held_out, config.seed)
    return Subset(source, kept), Subset(source, out)


def started_from(loaded: LoadedBackbone | None) -> str:
    """What tells the weights that a run starts from."""
    return "random weights" if loaded is None else loaded.hash


def check_start(out: Path, config: DictConfig, loaded: LoadedBackbone | None) -> None:
    """Raise ValueError where `out` holds a run that started from other weights than those of `ckpt=` now."""
    for _, folder in steps_saved(out):
        if read_state(folder).get("started_from") != started_from(loaded):
            raise ValueError(
                f"{out} holds a run that started from other weights than ckpt={config.ckpt} has now, such as an "
                "earlier step of the same run; give another out=, or remove that folder"
            )


def make_model(
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
            model_name(plain(config.model)),
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
        initialize(model, plain(config.model)["init"], leave=head_names(model))
        return model, spec, list(data["mean"]), list(data["std"]), []
    if config.recipe in ("mae", "scratch_vit") and config.pooling == "avg" and not is_token_model(loaded.model):
        raise ValueError(
            f"recipe={config.recipe} is for vision transformers, got {loaded.spec.architecture}; give recipe=simclr"
        )
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
    if head.data != splits.identity():
        raise ValueError(
            f"{folder} was trained on {head.data}, this is {splits.identity()}: it may have seen images that are "
            "tested on here; probe on these first"
        )
    if list(head.classes) != splits.classes or not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"{folder} names other classes than {splits.train.name}, or the model has no linear classifier"
        )
    with torch.no_grad():
        classifier.weight.copy_(head.weight)
        classifier.bias.copy_(head.bias)
    return f"the classifier starts as {folder}"
