"""Looks from Python, as in a notebook:

from eval.look.python import look, open_scene
scene = open_scene("runs/<run>", "num_images=4")
look(scene, "neighbours").pictures[""]
"""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from eval.config import register
from eval.look.result import Look
from eval.look.scene import Scene
from eval.look.settings import LookConfig
from eval.look.table import LOOKS, listing
from ssl.config import CONF, check


def open_scene(ckpt: str | Path, *words: str) -> Scene:
    """What `python -m eval.look ckpt=<ckpt> <words>` looks at; `words` are settings as on a command line.

    Raises ValueError for a checkpoint or images that are not there, Hydra's own error for a setting that is none.
    """
    register(LookConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("look", overrides=[f"ckpt='{ckpt}'", *words])
    check(config, LookConfig)
    return Scene(config)


def look(scene: Scene, what: str) -> Look:
    """The look of this name: pictures, and the numbers behind them; nothing is written.

    Raises ValueError for a name that is none, DoesNotApply where it has nothing to show.
    """
    if what not in LOOKS:
        raise ValueError(f"{what!r} is no look; it is one of\n{listing()}")
    return LOOKS[what].load()(scene)
