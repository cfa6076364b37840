"""The weights that a checkpoint's run started from, as far as they can be had, for what training changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from eval.finetune_start import started_from
from ssl.checkpoint import LoadedBackbone, load_backbone, steps_saved
from ssl.checkpoint_card import read_state
from ssl.loaded import is_foreign
from ssl.method_file import untrained_method
from ssl.models.backbones import backbone_from_spec
from ssl.models.classifier import head_names, make_classifier, put_weights
from ssl.models.initialize import initialize
from ssl.tensor_files import load_strictly

BEFORE_TRAINING, BEFORE_FINETUNING, RANDOM = "before training", "before fine-tuning", "random weights"


def start_weights(loaded: LoadedBackbone, *, seed: int, trust: Sequence[str] = ()) -> tuple[nn.Module, str]:
    """The backbone of `loaded` with the weights that its run started from, on the CPU, and what they are.

    That is BEFORE_TRAINING of pretraining and of fine-tuning from random weights, BEFORE_FINETUNING where the weights
    that were fine-tuned are still there. Where nobody knows, random weights of the run's seed, else of `seed`, and
    RANDOM.
    """
    with torch.random.fork_rng(devices=[]):
        if loaded.layout == "ssl" and isinstance(loaded.config.get("method"), dict):
            return untrained_method(loaded.spec, loaded.config, trust=trust).backbone, BEFORE_TRAINING
        if loaded.layout == "ssl" and loaded.classifier is not None and "ckpt" in loaded.config:
            before = None if loaded.config["ckpt"] == "random" else _before_finetuning(loaded)
            if loaded.config["ckpt"] == "random" or before is not None:
                return _start_of_finetuning(loaded, before), BEFORE_TRAINING if before is None else BEFORE_FINETUNING
        torch.manual_seed(int(seed if loaded.config.get("seed") is None else loaded.config["seed"]))
        return backbone_from_spec(loaded.spec), RANDOM


def _start_of_finetuning(loaded: LoadedBackbone, before: LoadedBackbone | None) -> nn.Module:
    """What `eval.finetune_start.make_model` made of random weights, or of `before`, without its classifier."""
    config, classifier = loaded.config, loaded.classifier
    assert classifier is not None
    names = ("pooling", "drop_path", "dropout", "head_std")
    settings: dict[str, Any] = {name: config[name] for name in names if name in config}
    torch.manual_seed(int(config.get("seed") or 0))
    model, spec = make_classifier(
        loaded.spec if before is None else before.spec, num_classes=len(classifier.classes), **settings
    )
    heads = head_names(model)
    if before is None:
        initialize(model, (config.get("model") or {}).get("init"), leave=heads)
    else:
        put_weights(model, before.model.state_dict())
    backbone = backbone_from_spec(spec)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in heads}
    load_strictly(backbone, tensors, loaded.path)
    return backbone


def _before_finetuning(loaded: LoadedBackbone) -> LoadedBackbone | None:
    """The very weights that were fine-tuned: their digest is in the checkpoint. None where they are not found."""
    wanted = read_state(loaded.path).get("started_from")
    for place, model in _places(loaded):
        try:
            found = load_backbone(place, model=model, image_size=loaded.spec.image_size)
        except (ValueError, OSError):
            continue
        if started_from(found) == wanted:
            return found
    return None


def _places(loaded: LoadedBackbone) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """Where they may be: what `ckpt=` said, the run whose folder this run lies in, and earlier steps of both.

    Nothing is downloaded for what a checkpoint says.
    """
    given = str(loaded.config["ckpt"])
    if given.startswith("timm:"):
        return
    if is_foreign(given):
        yield given, loaded.config.get("model")
        return
    yield given, None
    above = [run.parent for run in loaded.run_dir.absolute().parents if run.name == "finetune"]
    for run in above[:1]:
        for _, folder in reversed(steps_saved(run)):
            yield str(folder), None
