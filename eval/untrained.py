"""What a backbone without a checkpoint is called: by its preset as it was typed, and by what was changed of it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ssl.command import as_name, choices
from ssl.config import ModelConfig, plain


def untrained_title(config: DictConfig) -> str:
    """Such as `untrained resnet10, init=kaiming_normal`."""
    return ", ".join([f"untrained {_preset(config)}", *_changes(config)])


def untrained_folder(config: DictConfig, *, data: str) -> Path:
    """Where results of ckpt=random lie; no two backbones share a folder."""
    return Path("runs") / as_name(f"random_{backbone_words(config)}_{data}") / f"seed{config.seed}"


def backbone_words(config: DictConfig) -> str:
    """Part of a folder's name: the preset, and what was changed of it."""
    words = [re.sub("-+", "-", as_name(word)).strip("-") for word in _changes(config)]
    return "_".join([_preset(config), *words])


def _preset(config: DictConfig) -> str:
    """The file of conf/model that was chosen on a command line, else the model's own name."""
    return choices()["model"] if HydraConfig.initialized() else str(config.model.name)


def _changes(config: DictConfig) -> list[str]:
    """`key=value` of the settings beside the preset, sorted."""
    if HydraConfig.initialized():
        words = [word.lstrip("+~") for word in HydraConfig.get().overrides.task]
        return sorted(word.removeprefix("model.") for word in words if word.startswith("model."))
    settings, defaults = plain(config.model), ModelConfig(name=config.model.name)
    changed = {}
    for field in fields(ModelConfig):
        usual = getattr(defaults, field.name)
        if settings[field.name] != getattr(usual, "value", usual):
            changed[field.name] = settings[field.name]
    args = {f"args.{key}": value for key, value in changed.pop("args", {}).items()}
    return sorted(f"{key}={value}" for key, value in (changed | args).items())
