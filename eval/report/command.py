"""`python -m eval.report runs/<run>`: the page of a run from its folder; of several runs one that compares them."""

from __future__ import annotations

import os
import sys
import time
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
from ssl.config import Device, check

USAGE = """eval.report needs runs:
  python -m eval.report runs/<run>                 the run's page: <run>/report.html
  python -m eval.report runs/a runs/b              a page that compares them
  python -m eval.report runs/sweeps/<sweep>        the same of a sweep
  python -m eval.report runs/<run> out=/tmp/a.html looks=[]      elsewhere, and from what the folder has alone"""
REPORT, COMPARISON = "report.html", "comparison.html"
OF_ONE = ("looks", "sample", "data", "device", "threads")
"""Settings of the pictures, which only the page of one run has."""


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

    Raises ValueError where a path is no run, OSError where the page cannot be written.
    """
    began = time.perf_counter()
    paths = [Path(given).expanduser() for given in config.runs]
    if len(paths) == 1 and _is_run(paths[0]):
        out = Path(config.out).expanduser() if config.out else paths[0] / REPORT
        _write(out, _page_of(paths[0], config))
    else:
        _check_unused(config)
        out = Path(config.out).expanduser() if config.out else _beside(paths) / COMPARISON
        out.parent.mkdir(parents=True, exist_ok=True)
        comparison.write(paths, out)
    size = out.stat().st_size / 1e6
    print(f"written: {out} ({size:.1f} MB, one file, {time.perf_counter() - began:.1f} s)")
    print(f"next: open {out.resolve().as_uri()} in a browser", flush=True)
    return out


def _is_run(path: Path) -> bool:
    """Whether a folder is a run, and no sweep or folder of runs. Raises ValueError where it is neither."""
    if any((path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        return True
    if path.is_dir() and any(path.glob("*/")):
        return False
    check_run_folder(path)
    return True


def _page_of(path: Path, config: DictConfig) -> str:
    check_run_folder(path)
    run = gather(path)
    made, said = _looks(run, config)
    for line in said:
        print(line, flush=True)
    return run_page(run, made=made, notes=said)


def _looks(run: RunFolder, config: DictConfig) -> tuple[dict[str, Look], list[str]]:
    """Looks at the last checkpoint by name, and what was left out and why."""
    names = _method_looks(run) if config.looks is None else list(config.looks)
    unknown = [name for name in names if name not in LOOKS]
    if unknown:
        raise ValueError(f"looks={names}: {unknown[0]} is no look; there are {', '.join(LOOKS)}")
    if not names:
        return {}, []
    if run.saved is None:
        return {}, ["no pictures of features: the run has written no checkpoint yet"]
    from eval.look.scene import Scene

    made: dict[str, Look] = {}
    said: list[str] = []
    try:
        scene = Scene(_look_config(run, config))
    except (ValueError, OSError) as error:
        return {}, [f"no pictures of features: {error}"]
    for name in names:
        began = time.perf_counter()
        try:
            made[name] = LOOKS[name].load()(scene)
        except DoesNotApply as error:
            said += [f"{name}: left out: {error}"] if config.looks is not None else []
            continue
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            said.append(f"{name} could not be made: {error}")
            continue
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return made, said


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


def _check_unused(config: DictConfig) -> None:
    """Raise ValueError for settings that the comparison does not have."""
    defaults: Any = OmegaConf.structured(ReportConfig)
    for key in OF_ONE:
        given = config[key]
        changed = given.name != "checkpoint" if key == "data" else given != defaults[key]
        if changed:
            raise ValueError(f"{key} has no effect on the comparison of several runs; leave it out, or give one run")


def _beside(paths: list[Path]) -> Path:
    """The folder of the only path, or the one that all paths lie in."""
    if len(paths) == 1:
        return paths[0]
    return Path(os.path.commonpath([path.resolve() for path in paths]))


def _write(out: Path, text: str) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_page(out, text)
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}; give another out=") from error


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
