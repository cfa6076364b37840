"""Scenes for the tests of looks: small runs on the embedded images, and the config that looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from eval.config import register
from eval.look.scene import Scene
from eval.look.settings import LookConfig
from eval.look.table import LOOKS
from ssl import pretrain
from ssl.config import CONF, register_schemas

TINY_RESNET = ["model=resnet18", "+model.args.layers=[1,1,1,1]", "+model.args.channels=[8,8,16,16]"]
TINY_VIT = ["model=vit_micro", "model.args.depth=2", "model.args.embed_dim=32", "model.args.num_heads=2"]
TINY_DECODER = ["method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_heads=2"]
EMBEDDED = ["data=embedded", "data.source.num_train=64", "data.source.num_test=24"]
FEW = {"sample": 48, "num_images": 4}
SHORT = [
    *["trainer.device=cpu", "trainer.precision=fp32", "trainer.global_batch_size=16", "trainer.steps=2"],
    *["online=none", "launch=none", "wandb.mode=disabled", "loader.threads=1"],
]


def compose_config(name: str, words: list[str]) -> DictConfig:
    """The config of a command as the words of its command line make it."""
    GlobalHydra.instance().clear()
    register_schemas()
    register(LookConfig)
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, overrides=words)


def pretrained(out: Path, method: str, *words: str) -> Path:
    """A run of two steps: `method` on a tiny vision transformer for MAE, else a tiny ResNet."""
    backbone = [*TINY_VIT, *TINY_DECODER] if method == "mae" else TINY_RESNET
    pretrain.run(compose_config("pretrain", [f"method={method}", *backbone, *EMBEDDED, *SHORT, *words]), out=out)
    return out


def look_config(ckpt: Path | str, what: Any, *words: str) -> DictConfig:
    """The config of `python -m eval.look`, on one thread of the CPU, of few images where the look reads how many."""
    config = compose_config("look", [f"ckpt={ckpt}", f"what={what}", "device=cpu", "threads=1"])
    names = [config.what] if isinstance(config.what, str) else config.what
    read = {key for name in names for key in (LOOKS[name].reads if name in LOOKS else FEW)}  # of `all` too
    if any(word.startswith(("images=", "indices=")) for word in words):
        read -= {"num_images"}
    few = [f"{key}={number}" for key, number in FEW.items() if key in read]
    return compose_config("look", [f"ckpt={ckpt}", f"what={what}", "device=cpu", "threads=1", *few, *words])


def scene(ckpt: Path | str, what: Any = "views", *words: str) -> Scene:
    """What a look gets."""
    return Scene(look_config(ckpt, what, *words))
