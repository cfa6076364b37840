"""What `conf/hydra/launcher/slurm.yaml` derives from `launch`, as resolvers: minutes, tasks, shell lines.

timeout_min: ${slurm.minutes:${launch.time}}
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from ssl.durations import seconds_of

ROOT = Path(__file__).resolve().parent.parent
NO_JOBS = ("auto", "none", "kubernetes")
"""Options of the group `launch` that describe no Slurm job."""


def register_resolvers() -> None:
    """Make `slurm.*` known to configs. Needed where Hydra starts a sweep's launcher."""
    for name, resolver in RESOLVERS.items():
        OmegaConf.register_new_resolver(f"slurm.{name}", resolver, replace=True)


def check_submitted() -> None:
    """Raise ValueError where the settings of a Slurm job were given and no Slurm job is made of them."""
    hydra = HydraConfig.get()
    if "SLURM_JOB_ID" in os.environ:
        return
    if hydra.runtime.choices.get("hydra/launcher") == "slurm" and hydra.mode != RunMode.MULTIRUN:
        raise ValueError("hydra/launcher=slurm submits what `-m` starts; add -m, also for a single run")
    if hydra.runtime.choices.get("launch") == "slurm":
        raise ValueError(
            "launch=slurm describes a Slurm job, and this is none: submit it by -m hydra/launcher=slurm, or by "
            "sbatch launch/slurm.sbatch, which has these settings in its head"
        )


def check_launcher(config: DictConfig) -> None:
    """Raise ValueError where a sweep's jobs cannot be what `launch` says. Hydra would show a traceback."""
    if config.hydra.runtime.choices.get("hydra/launcher") != "slurm":
        return
    if "launch" not in config:
        raise ValueError(
            "hydra/launcher=slurm reads the settings of a job from `launch`, which this command does not have; "
            "ssl.pretrain, eval.finetune and eval.linear_probe do"
        )
    chosen = config.hydra.runtime.choices.get("launch")
    if chosen in NO_JOBS:
        raise ValueError(
            f"hydra/launcher=slurm submits Slurm jobs, of which launch={chosen} says nothing: add launch=slurm, and "
            "what the job needs, such as launch.time=12h launch.devices=8 launch.partition=<name>"
        )
    try:
        OmegaConf.to_container(config.hydra.launcher, resolve=True)
    except InterpolationResolutionError as error:
        raise ValueError(str(error).splitlines()[0].rpartition("resolving interpolation: ")[2]) from error


def _minutes(time: Any) -> int:
    """Slurm counts in minutes: 90s are 2."""
    if time is None:
        raise ValueError("a Slurm job needs a time limit: give launch.time, as 12h or 2d; the run goes on in the next")
    return math.ceil(seconds_of(str(time), key="launch.time") / 60)


def _tasks(devices: int | None) -> int:
    """One process per device."""
    if devices is not None and devices < 1:
        raise ValueError(f"launch.devices, processes per node, must be at least 1; got {devices}")
    return devices or 1


def _gpus(devices: int | None, device: Any) -> int | None:
    """As many as processes, unless the run is on CPUs."""
    return None if getattr(device, "name", device) == "cpu" else _tasks(devices)


def _srun_args(container: str | None, shutdown_seconds: int) -> list[str]:
    """Ranks may leave one after another; what has not left in time after the first is taken for hanging."""
    inside = [] if container is None else [f"--container-image={container}", f"--container-mounts={ROOT}:{ROOT}"]
    return ["--kill-on-bad-exit=0", f"--wait={shutdown_seconds}", *inside]


def _setup(lines: Any, cpus_per_device: int | None) -> list[str]:
    """Shell lines before srun. A SIGTERM for the ranks does not end the script, which has to see how they ended."""
    cores = [] if cpus_per_device is None else [f"export SRUN_CPUS_PER_TASK={cpus_per_device}"]  # else srun takes one
    return ["trap : TERM", *lines, f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH", *cores]


def _teardown(max_restarts: int) -> list[str]:
    return [f"{shlex.quote(sys.executable)} -m ssl.slurm $? --max-restarts={max_restarts}"]


def _options(options: Any) -> dict[str, Any]:
    """Whatever the cluster's default is, the job may be put in the queue again."""
    return {"requeue": True, **options}


RESOLVERS = {
    "minutes": _minutes,
    "tasks": _tasks,
    "gpus": _gpus,
    "name": lambda name, job: name or job,
    "srun_args": _srun_args,
    "setup": _setup,
    "teardown": _teardown,
    "options": _options,
}
