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

from ssl.config import CONF, suggest
from ssl.ranks import adopt_slurm
from ssl.stopping import Stopped

FULL_ERROR = "HYDRA_FULL_ERROR"


def run_command(task: Callable[[DictConfig], Any], *, config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and hand it to `task`.

    ValueError and OSError end the command with their message and exit code 1, a signal with 128 and its number, a time
    limit with 124; HYDRA_FULL_ERROR=1 shows where they arose. In a sweep a failed run is reported and the next one
    starts; a signal ends the sweep.
    """
    entered = False
    failures: list[str] = []

    def entry(config: DictConfig) -> Any:
        nonlocal entered
        entered = True
        adopt_slurm()
        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        try:
            return task(config)
        except Stopped as stopped:
            _say(str(stopped))
            stopped.pass_on()
            raise SystemExit(stopped.exit_code) from None
        except KeyboardInterrupt:
            _say("interrupted; what was saved stays, and the same command continues from it")
            raise SystemExit(130) from None
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get(FULL_ERROR) == "1":
                raise
            if isinstance(error, RuntimeError):  # not the user's mistake, as far as we know: show where
                traceback.print_exc()
            _say(f"error: {error}")
            if not sweeping:
                raise SystemExit(1) from None
            failures.append(" ".join(HydraConfig.get().overrides.task))
            return None

    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(entry)()
    except AssertionError:
        if entered:
            raise
        words = ", ".join(argument for argument in sys.argv[1:] if "." in argument.split("=")[0])
        _say(f"{words} cannot be set here: its group is empty; choose one first, such as data=<name>")
        raise SystemExit(1) from None
    except SystemExit as end:
        if not entered and end.code == 1:
            hint = _suggest(
                config_name, [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
            )
            if hint:
                _say(hint)
        raise
    if failures:
        _say(f"{len(failures)} of the sweep's runs failed:\n  " + "\n  ".join(failures))
        raise SystemExit(1)


def run_folder(default: Path, given: str | None) -> Path:
    """`given`, or the default, in a sweep with what the run overrides: no two runs of a sweep share a folder."""
    if given is not None:
        return Path(given).expanduser()
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return default
    suffix = as_name(hydra_config.job.override_dirname)
    return default.with_name(f"{default.name}_{suffix}") if suffix else default


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
