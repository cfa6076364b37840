"""The command that looks: `python -m eval.look ckpt=runs/<run> what=[neighbours,map]`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from eval.command import same_subject
from eval.config import register
from eval.look.asked import USAGE, wanted
from eval.look.result import DoesNotApply, Look, write_look
from eval.look.scene import Scene
from eval.look.settings import LookConfig
from eval.look.table import LOOKS, OPTIONAL, listing
from eval.look.target import needs_classifier
from eval.results import environment, open_folder
from eval.subject import checkpoint_identity
from eval.untrained import untrained_folder
from ssl.command import run_command
from ssl.config import check, plain
from ssl.sweep import Outcome
from ssl.trainer import dtype_name


def run(config: DictConfig) -> dict[str, Any]:
    """Make the looks that `config.what` names and write them; returns their metrics and the folder.

    With `what=all` those that do not apply are named and left out. One of several that fails does not keep the others
    from being made: ValueError at the end names it. Raises ValueError for settings of looks that were not asked for,
    and OSError, before anything is computed, for a folder that cannot be written to.
    """
    names = wanted(config.what)
    check_unused(config, names)
    scene = Scene(config)
    folder = open_folder(_folder(config, scene))
    check_classifier(config, scene, names)
    metrics: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    for name in names:
        try:
            metrics |= _make(name, config, scene, folder)
        except (ValueError, OSError) as error:
            if len(names) == 1:
                raise
            if config.what == "all" and isinstance(error, DoesNotApply):
                print(f"{name}: left out: {error}", flush=True)
                continue
            print(f"{name}: failed: {error}", flush=True)
            failed[name] = error
    for note in dict.fromkeys(scene.notes):
        print(f"note: {note}")
    print(f"next: {_next(config, scene)}", flush=True)
    if failed:
        told = "".join(f"\n  {name}: {error}" for name, error in failed.items())
        raise ValueError(f"{len(failed)} of {len(names)} looks failed, what else there is was made:{told}")
    return {"metrics": metrics, "path": str(folder)}


def _make(name: str, config: DictConfig, scene: Scene, folder: Path) -> dict[str, float]:
    """Make and write one look; returns its metrics as `<name>.<metric>`."""
    began = time.perf_counter()
    look = LOOKS[name].load()(scene)
    seconds = time.perf_counter() - began
    paths = write_look(look, folder, name, about=_about(config, scene, name, seconds))
    _say(name, look, paths, seconds)
    return {f"{name}.{key}": value for key, value in look.metrics.items()}


def check_unused(config: DictConfig, names: Iterable[str]) -> None:
    """Raise ValueError for a setting that no look of those that are made reads."""
    defaults = OmegaConf.structured(LookConfig)
    read = {setting for name in names for setting in LOOKS[name].reads}
    for key in sorted(OPTIONAL - read):
        if plain(config[key]) != plain(defaults[key]):
            readers = ", ".join(name for name, entry in LOOKS.items() if key in entry.reads)
            raise ValueError(f"{key}= has no effect on {', '.join(names)}; leave it out. It is read by {readers}")
    samples = any("sample" in LOOKS[name].reads for name in names)
    if config.images is not None and config.split is not None and not samples:
        raise ValueError("split= has no effect beside images=, which names the images; leave one of them out")
    for each in fields(LookConfig):
        if each.name not in LOOKS or each.name in names or not is_dataclass(OmegaConf.get_type(config, each.name)):
            continue
        changed = [key for key, value in plain(config[each.name]).items() if value != plain(defaults[each.name])[key]]
        if changed:
            raise ValueError(
                f"{each.name}.{changed[0]} has no effect without what={each.name}, which is not asked for; leave it out"
            )


def check_classifier(config: DictConfig, scene: Scene, names: Iterable[str]) -> None:
    """Say before the first look which of them lack a classifier that cannot be chosen; DoesNotApply without `all`."""
    readers = [name for name in names if "head" in LOOKS[name].reads and needs_classifier(config[name])]
    if not readers:
        return
    try:
        scene.classifier()
    except DoesNotApply as error:
        if config.what != "all":
            raise
        print(f"{', '.join(readers)} will be left out: {error}", flush=True)


def _folder(config: DictConfig, scene: Scene) -> Path:
    if config.out:
        return Path(config.out).expanduser()
    if scene.run_dir is not None:
        return scene.run_dir / "look"
    return untrained_folder(config, data=scene.data_name) / "look"


def _about(config: DictConfig, scene: Scene, name: str, seconds: float) -> dict[str, Any]:
    """What the JSON says of how the look was made."""
    own = {name: plain(config[name])} if name in config else {}
    return {
        "what": name,
        "subject": scene.title,
        "checkpoint": None if scene.loaded is None else checkpoint_identity(scene.loaded),
        "backbone": scene.spec.to_dict(),
        "settings": {
            **own,
            **{key: plain(config[key]) for key in ("num_images", "images", "indices", "sample", "pooling", "seed")},
            "split": config.split,
            **({"precision": dtype_name(scene.dtype)} if "precision" in LOOKS[name].reads else {}),
        },
        "untrained": scene.compared_with,
        "notes": list(dict.fromkeys(scene.notes)),
        "seconds": round(seconds, 2),
        "device": str(scene.device),
        **environment(),
    }


def _say(name: str, look: Look, paths: list[Path], seconds: float) -> None:
    print(f"{name}: {seconds:.1f} s")
    for line in look.lines:
        print(f"  {line}")
    for path in paths:
        print(f"written: {path}")
    sys.stdout.flush()


def _next(config: DictConfig, scene: Scene) -> str:
    if scene.run_dir is not None and (scene.run_dir / "metrics.jsonl").exists():
        return shlex.join(["python", "-m", "eval.report", str(scene.run_dir)])
    other = "map" if config.what != "map" else "neighbours"
    return f"python -m eval.look {same_subject(config)} what={other}"


def main() -> None:
    """The command line. Without `ckpt` or `what` it ends with exit code 2 and the list of looks."""
    register(LookConfig)

    def task(config: DictConfig) -> Outcome:
        if config.ckpt is None or config.what is None:
            print(USAGE + listing(), file=sys.stderr)
            raise SystemExit(2)
        check(config, LookConfig)
        result = run(config)
        return Outcome(result["metrics"], result["path"])

    run_command(task, config_name="look")
