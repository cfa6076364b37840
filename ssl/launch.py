"""One process per device on this machine, through torch elastic, where the command was not already started by a
launcher.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ssl.data.threads import available_cores

ROOT = Path(__file__).resolve().parent.parent


def num_processes(device: str, devices: int | None) -> int:
    """How many processes to start: every GPU that torch sees or `devices` of them; on the CPU `devices`, else one.

    One where a launcher (torchrun, srun through it) has already given this process a rank. Raises ValueError where
    there are fewer GPUs than asked for.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return 1
    if devices is not None and devices < 1:
        raise ValueError(f"trainer.devices must be at least 1, or null for every GPU; got {devices}")
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if num_gpus == 0:
        return devices or 1
    if devices is not None and devices > num_gpus:
        raise ValueError(f"trainer.devices={devices}, but torch sees {num_gpus} GPUs")
    return devices or num_gpus


def launch(config: DictConfig, *, run: Callable[[], Any], module: str, out: Path) -> Any:
    """What `run` returns, where one process is enough or a launcher has started several; else None, after the same
    command has run in one process per device.

    Raises ChildProcessError where that ended badly.
    """
    count = num_processes(config.trainer.device.name, config.trainer.devices)
    if count == 1:
        return run()
    overrides = HydraConfig.get().overrides
    words = [word for word in overrides.task if not word.startswith("out=")]
    words += [word for word in overrides.hydra if word.startswith("hydra.searchpath")]
    quoted = str(out).replace("'", "\\'")
    code = run_processes(count, [*hydra_flags(sys.argv[1:]), *words, f"out='{quoted}'"], module=module)
    if code:
        raise ChildProcessError(f"the run on {count} processes ended with exit code {code}; what was saved is in {out}")
    return None


def run_processes(count: int, words: Sequence[str], *, module: str = "ssl.pretrain") -> int:
    """Run `python -m <module> <words>` on `count` processes and wait; returns the exit code.

    Raises KeyboardInterrupt where a signal ended them.

    Ctrl-C and SIGTERM reach the processes, which save and stop; this one waits for them.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(available_cores() // count, 1)))
    # Seconds that torch elastic leaves the processes to save and stop; 30 may be less than a few large steps.
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    child = subprocess.Popen([*launcher, "-m", module, *words], env=environment)
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if number == signal.SIGTERM:  # Ctrl-C the terminal sends to the children itself
            child.send_signal(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
    return code


def hydra_flags(arguments: Sequence[str]) -> list[str]:
    """Of a command line, the flags that say where configs lie: `--config-dir DIR` and the like."""
    names = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
    flags: list[str] = []
    for position, argument in enumerate(arguments):
        if argument.partition("=")[0] in names:
            flags += list(arguments[position : position + (1 if "=" in argument else 2)])
    return flags
