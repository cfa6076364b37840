"""How every command starts and ends: Hydra composes, a mistake of the user's becomes one message, a signal one exit
code.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import ssl.distributed as distributed
import ssl.sweeps as sweeps
from ssl.config import CONF, suggest
from ssl.plugin_defaults import register_plugin_defaults
from ssl.ranks import adopt_slurm
from ssl.slurm_settings import check_submitted, register_resolvers
from ssl.stopping import LOST_CONTACT, TIME_IS_UP, Stopped
from ssl.sweep import FAILED, STOPPED, Outcome, Sweep, state_of
from ssl.sweep_devices import take_devices
from ssl.sweep_signals import sigterm_raises

FULL_ERROR = "HYDRA_FULL_ERROR"
USAGE_ERROR = 2
"""Exit code of a command that was not told what to do, which no run of a sweep would be."""


@dataclass(frozen=True)
class Ending:
    """How a command's task ended. `code` is what the process would exit with."""

    code: int
    outcome: Outcome | None = None
    message: str | None = None
    is_said: bool = False
    """Whether the message is that of another rank, which says it."""
    pass_on: Callable[[], None] = lambda: None
    """Hands a signal on to who handled it before the run did; it may not return."""


def run_command(task: Callable[[DictConfig], Any], *, config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and hand it to `task`.

    ValueError and OSError end the command with their message and exit code 1, a signal with 128 and its number, a time
    limit with 124; HYDRA_FULL_ERROR=1 shows where they arose. In a sweep a failed run is reported and the next one
    starts; a signal ends the sweep; its table is printed in any case. `task` may return an Outcome, for the table.
    """
    entered = False

    def entry(config: DictConfig) -> float | None:
        nonlocal entered
        entered = True
        adopt_slurm()
        sweep = sweeps.current()
        if sweep is not None:
            return _run_of_sweep(task, config, sweep)
        ending = _attempt(task, config, catch=(ValueError, OSError, RuntimeError))
        if ending.message and not ending.is_said and not distributed.is_said_by_first(ending.message):
            _say(ending.message)
        ending.pass_on()
        if ending.code:
            raise SystemExit(ending.code)
        return None

    register_resolvers()
    register_plugin_defaults()
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(entry)()
    except AssertionError:
        if entered or sweeps.is_on():
            raise
        words = ", ".join(argument for argument in sys.argv[1:] if "." in argument.split("=")[0])
        _say(f"{words} cannot be set here: its group is empty; choose one first, such as data=<name>")
        raise SystemExit(1) from None
    except SystemExit as end:
        if not entered and end.code == 1 and not isinstance(end, sweeps.Refused):
            hint = _suggest(
                config_name, [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
            )
            if hint:
                _say(hint)
        raise
    finally:
        code = sweeps.finish()
    if code:
        raise SystemExit(code)


def _attempt(task: Callable[[DictConfig], Any], config: DictConfig, *, catch: tuple[type[Exception], ...]) -> Ending:
    try:
        check_submitted()
        _check_in_pod()
        result = task(config)
    except Stopped as stopped:
        return Ending(stopped.exit_code, message=str(stopped), pass_on=stopped.pass_on)
    except KeyboardInterrupt:
        return Ending(130, message="interrupted; what was saved stays, and the same command continues from it")
    except Exception as error:
        if distributed.is_device_fault(error):
            return Ending(LOST_CONTACT, message=f"error: a device failed: {error}")
        if distributed.is_lost_contact(error):
            heard = distributed.mistake_of_another()
            if heard is not None:
                return Ending(1, message=heard, is_said=True)
            return Ending(LOST_CONTACT, message=f"error: the other ranks are lost: {error}")
        mistake = isinstance(error, ValueError | OSError)
        message = f"error: {error}" if mistake else f"error: {type(error).__name__}: {error}"
        distributed.tell_mistake(message)
        if not isinstance(error, catch):
            raise
        if not mistake or os.environ.get(FULL_ERROR) == "1":  # not the user's, as far as we know: show where
            traceback.print_exc()
        code = getattr(error, "exit_code", 1)
        return Ending(code, message=message)
    return Ending(0, outcome=result if isinstance(result, Outcome) else Outcome({}))


def _run_of_sweep(task: Callable[[DictConfig], Any], config: DictConfig, sweep: Sweep) -> float | None:
    """One run of a sweep, in whatever process the launcher has for it; returns its objective, None where it failed."""
    if sweep.end_code and not sweep.on_cluster:
        return None
    if sweep.is_above:
        take_devices(sweep, at_once=HydraConfig.get().launcher.get("n_jobs", 1))
    if "wandb" in config and config.wandb.group is None:
        config.wandb.group = sweep.name
    job = sweeps.open_job(sweep)
    try:
        with sigterm_raises():
            ending = _attempt(task, config, catch=(Exception,))
    except SystemExit as end:  # the signal came where no run was training, or a launcher of ours says how it ended
        code = end.code if isinstance(end.code, int) else 1
        if code == USAGE_ERROR:
            raise
        ending = Ending(code)
    except BaseException as error:
        job.tell(FAILED, message=f"error: {type(error).__name__}: {error}")
        raise
    job.tell(state_of(ending.code), message=ending.message, outcome=ending.outcome)
    if ending.message and not ending.is_said:
        _say(ending.message)
    if ending.outcome is not None:
        return ending.outcome.objective
    if sweep.on_cluster and ending.code not in (0, 1, TIME_IS_UP):  # the job's script may put it in the queue again
        ending.pass_on()
        raise SystemExit(ending.code)
    if state_of(ending.code) == STOPPED:
        sweep.end(ending.code)
        if not sweep.is_above:  # else the others are still saving, and what leaves here would end them
            ending.pass_on()
            raise SystemExit(ending.code)
    return None


def run_folder(default: Path, given: str | None) -> Path:
    """`given`, or the default, in a sweep with what the run overrides: no two runs of a sweep share a folder."""
    folder = default if given is None else Path(given).expanduser()
    hydra_config = HydraConfig.get()
    if given is None and hydra_config.mode == RunMode.MULTIRUN:
        suffix = as_name(_identity())
        folder = default.with_name(f"{default.name}_{suffix}") if suffix else default
    sweeps.note_folder(folder)
    return folder


def _identity() -> str:
    """What this run of a sweep overrides, but for keys that the config excludes and for where it runs (`launch`)."""
    hydra_config = HydraConfig.get()
    excluded = hydra_config.job.config.override_dirname.exclude_keys
    keys = {word: word.split("=")[0].lstrip("+~") for word in hydra_config.overrides.task}
    words = [word for word, key in keys.items() if key not in excluded and key.split(".")[0] != "launch"]
    return "_".join(sorted(words)).replace("=", "-")


def as_name(text: str) -> str:
    """Text as a part of a file's name: no signs that a shell or a file system reads, and not too long."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in text)
    return f"{name[:90]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}" if len(name) > 100 else name


def swept_words(*, without: Container[str]) -> str:
    """In a sweep, this run's own words as a part of a file's name, but for keys in `without`; else nothing."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    words = [word for word in HydraConfig.get().overrides.task if word.split("=")[0].split(".")[0] not in without]
    return "_".join(re.sub("-+", "-", as_name(word)).strip("-") for word in words)


def _check_in_pod() -> None:
    """Raise ValueError where pods were described and this process is in none."""
    if choices().get("launch") == "kubernetes" and "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise ValueError(
            "launch=kubernetes describes pods, and this is none; python -m launch.kubernetes with the same words "
            "prints the manifest that makes them"
        )


def choices() -> dict[str, str]:
    """Which option each config group has, such as method: mae."""
    return {str(group): str(option) for group, option in HydraConfig.get().runtime.choices.items()}


def _suggest(config_name: str, overrides: list[str]) -> str | None:
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        accepted = []
        for override in overrides:
            try:
                config = compose(config_name, overrides=[*accepted, override])
                accepted.append(override)
            except (HydraException, OmegaConfBaseException):
                continue
        try:
            config = compose(config_name, overrides=accepted)
        except (HydraException, OmegaConfBaseException):
            return None
    return suggest(config, [override for override in overrides if override not in accepted])


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    print(message if rank is None else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
