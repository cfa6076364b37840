"""A sweep from beginning to end: Hydra's callback begins it and tells each run of it, `finish` prints its table."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ssl.objective import check_direction
from ssl.slurm_settings import check_launcher
from ssl.sweep import OUTCOME, RUNNING, Job, Sweep
from ssl.sweep_signals import SignalWatch, in_session_of_its_own
from ssl.sweep_table import report


class Refused(SystemExit):
    """A sweep that does not begin; why was said."""


_sweep: Sweep | None = None
_job: Job | None = None
_watch: SignalWatch | None = None
"""Those of this process: a run is told of its sweep by Hydra's callback, before it starts."""


class SweepCallback(Callback):
    """Hydra keeps one for each command (conf/hydra/callbacks/sweep.yaml) and sends it along with each run."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the sweep, in the process that starts it. What is no SystemExit Hydra keeps."""
        try:
            check_direction(config)
            check_launcher(config)
            self.sweep = _open(config)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise Refused(1) from None
        begin(self.sweep)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell this process, whichever it is, of the sweep."""
        global _sweep
        _sweep = self.sweep
        if _sweep is not None and _sweep.is_above:
            in_session_of_its_own()


def current() -> Sweep | None:
    """The sweep that this process runs a part of."""
    return _sweep


def begun() -> Sweep | None:
    """The sweep that this process started, until its end."""
    return None if _watch is None else _watch.sweep


def end_search() -> None:
    """Let no further run of a sweep that optimizes start, unless one could be judged before: they would fail alike."""
    if _sweep is not None and _sweep.direction is not None and not _sweep.has_objective():
        _sweep.end(1)


def is_on() -> bool:
    """Whether this process started a sweep that has not come to its end."""
    return _watch is not None


def begin(sweep: Sweep) -> None:
    """From now to `finish` a signal ends the sweep."""
    global _watch
    _watch = SignalWatch(sweep)
    _watch.install()


def open_job(sweep: Sweep) -> Job:
    """This process's run, told as running."""
    global _job
    hydra = HydraConfig.get()
    about = {
        "sweep": sweep.id,
        "run": int(hydra.job.num),
        "overrides": list(hydra.overrides.task),
        "out": None,
        "objective": None,
        "metrics": {},
        "job": str(hydra.job.id),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    _job = Job(Path(hydra.runtime.output_dir) / OUTCOME, about)
    _job.tell(RUNNING)
    return _job


def note_folder(out: Path) -> None:
    """Where this process's run lies, for the table, also if it fails."""
    if _job is not None:
        _job.about["out"] = str(out)
        _job.tell(RUNNING)


def finish() -> int:
    """In the process that started a sweep, print and write its table; returns the exit code, 0 where all is well."""
    global _watch, _sweep, _job
    watch, _watch, _sweep, _job = _watch, None, None, None
    if watch is None:
        return 0
    watch.remove()
    return report(watch.sweep)


def _open(config: DictConfig) -> Sweep:
    folder = Path(config.hydra.sweep.dir).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the sweep's folder {folder} cannot be made: {error.strerror}; give another hydra.sweep.dir="
        ) from error
    direction = OmegaConf.select(config, "hydra.sweeper.direction")
    return Sweep(
        folder=folder,
        id=secrets.token_hex(4),
        host=socket.gethostname(),
        pid=os.getpid(),
        on_cluster=str(config.hydra.launcher._target_).endswith("SlurmLauncher"),
        direction=direction if isinstance(direction, str) else None,
        swept=tuple(_swept_keys(config)),
    )


def _swept_keys(config: DictConfig) -> list[str]:
    typed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    chosen = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return list(
        dict.fromkeys([*map(str, chosen), *(each.get_key_element() for each in typed if each.is_sweep_override())])
    )
