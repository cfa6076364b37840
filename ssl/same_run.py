"""Whether a run folder holds the run that was asked for: the same recipe, the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from ssl.checkpoint_card import read_config
from ssl.config import plain

FREE = (
    "out",
    "ckpt",  # the weights themselves are compared
    "name",
    "accept_changes",
    "device",
    "threads",
    "batch_size",  # that of evaluations
    "wandb",
    "loader",
    "launch",
    "trainer.steps",
    "trainer.device",
    "trainer.devices",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_steps",
    "trainer.keep_last",
    "trainer.keep_every_steps",
    "trainer.pictures",
    "trainer.profile_steps",
    "trainer.compile",
    "trainer.eval_every_epochs",
    "trainer.max_time",
    "trainer.max_bad_steps",
    "trainer.max_failed_saves",
    "trainer.fallback",
    "trainer.hang_timeout",
    "trainer.shard",
    "trainer.activation_checkpointing",
    "trainer.plan",
    "online",
    "report",
    "objective",
    "data.root",  # the images themselves are compared
    "data.source.root",
    "data.source.download",
    "data.source.held_gib",
    "data.source.readers",
    "data.source.retries",
    "data.source.storage_options",
    "data.in_memory_gib",
    "data.max_bad_fraction",
)
"""Settings that may change between two starts of one run: it stays the same run."""


def same_recipe(config: DictConfig, folder: Path, schema: type) -> None:
    """Raise ValueError with the differences where the run in `folder` was made by another recipe.

    A setting that the run's version did not have yet counts as the default of `schema`.
    """
    before, now = flat(read_config(folder)), flat(plain(config))
    defaults = defaults_of(schema)
    before |= {key: defaults[key] for key in now.keys() - before.keys() if key in defaults}
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not is_free(key, now)
    ]
    if changed:
        raise ValueError(
            f"{folder.parent.parent} holds a run of another recipe:\n  "
            + "\n  ".join(changed)
            + "\nGive another out= for a new run, or accept_changes=true to continue this one under the new recipe"
        )


def is_free(key: str, config: Mapping[str, Any]) -> bool:
    """Whether the setting `key` of a run may change while it stays the same run; `config` is its flat config."""
    if key == "trainer.steps" and config.get("trainer.epochs") is None:  # then it is the length
        return False
    if key == "trainer.eval_every_epochs" and config.get("patience") is not None:  # counted in evaluations
        return False
    return any(key == name or key.startswith(f"{name}.") for name in FREE)


def defaults_of(schema: type) -> dict[str, Any]:
    """The defaults of a schema and of its groups, also of those that must be given, by dotted keys."""
    defaults = flat(plain(OmegaConf.structured(schema)))
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            defaults |= flat(plain(OmegaConf.structured(kind)), name)
    return defaults


def same_images(state: Mapping[str, Any], images: tuple[int, int], where: str, out: Path) -> None:
    """Raise ValueError where the run was trained on other images, by number and checksum, than `where` holds now."""
    if (state["num_images"], state["images"]) != images:
        raise ValueError(
            f"{out} holds a run on other images ({state['num_images']:,}; {where} has {images[0]:,}); "
            "give another out= for a new run, or accept_changes=true to continue on these"
        )


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
