"""`python -m eval.report runs/<run>`: the page of a run from its folder; of several runs one that compares them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from eval.compare import spell_out
from eval.config import EvalDataConfig, register
from eval.look.result import DoesNotApply, Look
from eval.look.settings import LookConfig
from eval.look.table import LOOKS
from eval.pages.page import write_page
from eval.report import comparison
from eval.report.gather import RunFolder, check_run_folder, gather
from eval.report.run_page import run_page
from ssl.command import run_command
from ssl.config import Device, check, plain

USAGE = """eval.report needs runs:
  python -m eval.report runs/<run>                 the run's page: <run>/report.html
  python -m eval.report runs/a runs/b              a page that compares them
  python -m eval.report runs/sweeps/<sweep>        the same of a sweep
  python -m eval.report runs/<run> out=/tmp/a.html looks=[]      elsewhere, and from what the folder has alone"""
REPORT, COMPARISON = "report.html", "comparison.html"
OF_PICTURES = ("sample", "data", "device", "threads")
"""Settings of the pictures of features."""
OF_ONE = ("looks", *OF_PICTURES)
"""Settings that only the page of one run has."""


@dataclass
class ReportConfig:
    """What `python -m eval.report` takes."""

    runs: list[str] = field(default_factory=list)  # run folders, sweeps; words without = on the command line
    looks: list[str] | None = None  # pictures of the last checkpoint; null: neighbours, map and the method's own
    sample: int = 1000  # images of neighbours and map
    data: EvalDataConfig = MISSING  # where the pictures' images lie, where that is not where the run had them
    device: Device = Device.auto  # auto: the GPU where there is one
    threads: int | None = None  # null: the cores that this process may use
    out: str | None = None  # file; null: report.html in the run folder, comparison.html beside the runs


def run(config: DictConfig) -> Path:
    """Write the page of what `config.runs` names; returns its path.

    Raises ValueError where a path is no run or a setting has no effect, OSError where the page cannot be written.
    """
    began = time.perf_counter()
    paths = [Path(given).expanduser() for given in config.runs]
    is_one = len(paths) == 1 and _is_run(paths[0])
    if is_one:
        _check_looks(config)
    else:
        _refuse(config, OF_ONE, "on the comparison of several runs; leave it out, or give one run")
    given = Path(config.out).expanduser() if config.out else None
    out = given or (paths[0] / REPORT if is_one else _beside(paths) / COMPARISON)
    _check_out(out)
    text = _page_of(paths[0], config) if is_one else None
    try:
        if text is None:
            comparison.write(paths, out)
        else:
            write_page(out, text)
    except OSError as error:
        raise OSError(_cannot(out, error)) from error
    size = out.stat().st_size / 1e6
    print(f"written: {out} ({size:.1f} MB, one file, {time.perf_counter() - began:.1f} s)")
    print(f"next: open {out.resolve().as_uri()} in a browser", flush=True)
    return out


def _is_run(path: Path) -> bool:
    """Whether a folder is a run, and no sweep or folder of runs. Raises ValueError where it is neither."""
    if any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints")):
        return True
    if path.is_dir() and any(path.glob("*/")):
        return False
    check_run_folder(path)
    return True


def _page_of(path: Path, config: DictConfig) -> str:
    check_run_folder(path)
    run = gather(path)
    made, left_out = _looks(run, config)
    for why in dict.fromkeys(left_out.values()):
        print(f"{', '.join(name for name in left_out if left_out[name] == why)} left out: {why}", flush=True)
    return run_page(run, made=made, left_out=left_out)


def _looks(run: RunFolder, config: DictConfig) -> tuple[dict[str, Look], dict[str, str]]:
    """Looks at the last checkpoint by name, and of those that were left out the reason."""
    names = _method_looks(run) if config.looks is None else list(config.looks)
    if not names:
        return {}, {}
    if run.saved is None:
        return {}, dict.fromkeys(names, "the run has written no checkpoint yet")
    from eval.look.scene import Scene

    made: dict[str, Look] = {}
    left_out: dict[str, str] = {}
    try:
        scene = Scene(_look_config(run, config))
    except (ValueError, OSError) as error:
        return {}, dict.fromkeys(names, str(error))
    for name in names:
        began = time.perf_counter()
        try:
            made[name] = LOOKS[name].load()(scene)
        except (DoesNotApply, ValueError, OSError, RuntimeError, ImportError) as error:
            left_out[name] = str(error)
            continue
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return made, left_out


def _method_looks(run: RunFolder) -> list[str]:
    method = run.config.get("method")
    target = str(method.get("_target_", "")) if isinstance(method, dict) else ""
    own = ["pretext"] if target.endswith("RelativeLocation") else []
    return [*own, "neighbours", "map"]


def _look_config(run: RunFolder, config: DictConfig) -> DictConfig:
    look: Any = OmegaConf.structured(LookConfig)
    look.ckpt = str(run.path)
    look.what = "all"
    look.data = config.data
    look.sample = config.sample
    look.device = config.device
    look.threads = config.threads
    return look


def _check_looks(config: DictConfig) -> None:
    """Raise ValueError for looks that there are not, and settings out of range or without effect on those asked for."""
    names = list(LOOKS) if config.looks is None else list(config.looks)
    unknown = [name for name in names if name not in LOOKS]
    if unknown:
        raise ValueError(f"looks={names}: {unknown[0]} is no look; there are {', '.join(LOOKS)}")
    if config.sample < 1:
        raise ValueError(f"sample must be 1 image or more, got {config.sample}; looks=[] makes no pictures of features")
    if not names:
        _refuse(config, OF_PICTURES, "with looks=[], which makes no pictures of features; leave it out")
    elif not any("sample" in LOOKS[name].reads for name in names):
        _refuse(config, ("sample",), f"on looks={names}, which read no sample of the images; leave it out")


def _refuse(config: DictConfig, keys: Sequence[str], why: str) -> None:
    """Raise ValueError for the first of the settings that is not left as it is by itself."""
    defaults: Any = OmegaConf.structured(ReportConfig)
    for key in keys:
        given = config[key]
        if key == "data":
            own = {name: value for name, value in plain(given).items() if value is not None and name != "name"}
            name = "data" if given.name != "checkpoint" else f"data.{next(iter(own))}" if own else None
        else:
            name = key if given != defaults[key] else None
        if name is not None:
            raise ValueError(f"{name} has no effect {why}")


def _check_out(out: Path) -> None:
    """Raise ValueError or OSError, before anything is read, where the page cannot be written to `out`."""
    if out.is_dir():
        raise ValueError(f"out={out} is a folder; give a file, such as {out / REPORT}")
    probe = out.parent / f".writable_{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(_cannot(out, error)) from error


def _cannot(out: Path, error: OSError) -> str:
    return f"{out} cannot be written: {error.strerror or error}; give another out="


def _beside(paths: list[Path]) -> Path:
    """The folder of the only path, or the one that all paths lie in."""
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([path.resolve() for path in paths]))


def main() -> None:
    """The command line. Without runs it ends with exit code 2, a mistake with 1 and a message."""
    register(ReportConfig)

    def task(config: DictConfig) -> None:
        if not config.runs:
            print(USAGE, file=sys.stderr)
            raise SystemExit(2)
        check(config, ReportConfig)
        run(config)

    sys.argv[1:] = spell_out(sys.argv[1:], key="runs")
    run_command(task, config_name="report")
