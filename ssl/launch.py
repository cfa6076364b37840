"""Where a run's processes are: in the group that a launcher has made, in this process alone, or one per device, started
through torch elastic and looked after here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

import ssl.sweeps as sweeps
from ssl.checkpoint import is_whole, steps_saved
from ssl.data.threads import available_cores
from ssl.elastic import Agent, Machines
from ssl.launch_files import Report, Task, Workers, write_task
from ssl.ranks import adopt_slurm
from ssl.stopping import LOST_CONTACT, SIGNALS, Handler, Stopped

ROOT = Path(__file__).resolve().parent.parent
TO_APPEAR = 15.0
"""Seconds that a process has between its start and its first word, when it is asked to stop."""


class GroupLost(ChildProcessError):
    """A process of the group was lost, and with it the group, more often than it may be started again."""

    exit_code = LOST_CONTACT


def launch(config: DictConfig, *, run: Callable[[], Any], command: str, out: Path) -> Any:
    """What `run` returns: called here, where one process is enough or a launcher has started several; else what
    `command` (a name in `ssl.worker.COMMANDS`) returns on the first of one process per device.

    A process that is lost takes the others with it, and all begin again from the last checkpoint in the run folder
    `out`. Raises ValueError and OSError with the message of a process that ended by a mistake, Stopped where all were
    asked to stop, GroupLost where processes were lost more than `launch.max_restarts` times without a new checkpoint.
    """
    adopt_slurm()
    machines = find_machines(config)
    if machines is None:
        return run()
    folder = Path(tempfile.mkdtemp(prefix="ssl_launch_"))
    try:
        task = Task(
            command,
            str(out),
            config.launch.shutdown_seconds,
            logging.getLogger().level,
            launcher=os.getpid(),
            began=time.monotonic(),
        )
        write_task(folder, task, OmegaConf.to_yaml(config, resolve=True))
        return _run_and_restart(machines, folder, config.launch, out=out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_machines(config: DictConfig) -> Machines | None:
    """The processes to start, None where this one is to do the work: alone, or as a rank that a launcher has started.

    Raises ValueError for settings that would have no effect, and where there are fewer GPUs than asked for.
    """
    settings = config.launch
    devices = config.trainer.devices if settings.devices is None else settings.devices
    if devices is not None and devices < 1:
        raise ValueError(f"trainer.devices must be at least 1, or null for every GPU; got {devices}")
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        _check_joined(devices)
        return None
    if settings.mode.name == "none":
        if settings.nodes > 1 or (devices or 1) > 1:
            raise ValueError(
                f"launch=none is this process alone; launch.nodes={settings.nodes} and trainer.devices={devices} have "
                "no effect on it; give launch=auto, or start it by torchrun or srun"
            )
        return None
    devices = num_devices(config.trainer.device.name, devices)
    if settings.nodes > 1:
        return _several_machines(settings.nodes, devices)
    return None if devices == 1 and not _is_beside_others() else Machines(devices)


def _is_beside_others() -> bool:
    """Whether this process is one of joblib's, which takes the runs in the others with it when it is lost: then the run
    gets a process of its own, and its loss is no other's.
    """
    sweep = sweeps.current()
    return sweep is not None and sweep.is_above


def num_devices(device: str, devices: int | None) -> int:
    """How many processes this machine has: every GPU that torch sees, or `devices` of them; on the CPU `devices`, else
    one.
    """
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if num_gpus == 0:
        return devices or 1
    if devices is not None and devices > num_gpus:
        raise ValueError(f"trainer.devices={devices}, but torch sees {num_gpus} GPUs")
    return devices or num_gpus


def _check_joined(devices: int | None) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here and devices is not None and devices != here:
        raise ValueError(
            f"trainer.devices={devices} has no effect: a launcher has started {here} processes on this machine; "
            "leave it out, or tell the launcher"
        )


def _several_machines(nodes: int, devices: int) -> Machines:
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"launch.nodes={nodes} needs {', '.join(missing)} in the environment, on each machine its own NODE_RANK; "
            "launch/several_machines.sh sets them"
        )
    node_rank = int(os.environ["NODE_RANK"])
    if not 0 <= node_rank < nodes:
        raise ValueError(f"NODE_RANK={node_rank} must be from 0 to {nodes - 1}: there are launch.nodes={nodes}")
    return Machines(devices, nodes, node_rank, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


# ---- one start after the other ---------------------------------------------------------------------------------------


def _run_and_restart(machines: Machines, folder: Path, settings: Any, *, out: Path) -> Any:
    """The result of the first start that comes to an end; one that is lost is followed by another."""
    attempt, losses, step, lost = 0, 0, 0, None
    with _Requests() as requests, _environment(machines):
        while True:
            ending = _start_once(
                machines, folder / str(attempt), settings, requests, attempt=attempt, out=out, lost=lost
            )
            result = ending.result()
            if not ending.is_lost:
                return result
            before, step = step, _last_whole_step(out, unless=step)
            losses = 1 if step > before else losses + 1
            lost = ending.lost_at, step
            requests.end_if_asked()  # after the processes had gone
            if losses > settings.max_restarts:
                raise GroupLost(
                    f"{ending.how()}; that is {losses} times since step {step}, and launch.max_restarts="
                    f"{settings.max_restarts}; what was saved stays, and the same command continues from it"
                )
            _say(f"{ending.how()}; starting all again from step {step} ({losses} of {settings.max_restarts} restarts)")
            attempt += 1


def _start_once(
    machines: Machines,
    place: Path,
    settings: Any,
    requests: _Requests,
    *,
    attempt: int,
    out: Path,
    lost: tuple[float, int] | None,
) -> Ending:
    """Start the processes and wait until all have ended. `lost` says when and at which step those before were lost."""
    place.mkdir()
    workers = Workers(place)
    agent = Agent(place, machines, attempt=attempt)
    if lost is not None:
        _time_to_next_step(out, lost)
    agent.start()
    _look_after(agent, workers, requests, seconds=settings.shutdown_seconds)
    return Ending(
        workers.reports(),
        agent.exit_codes,
        agent.error,
        workers.lost_at(),
        requests.number,
        requests.at_once,
        requests.earlier,
    )


def _look_after(agent: Agent, workers: Workers, requests: _Requests, *, seconds: float) -> None:
    """Wait until all processes have ended, and hand on to them what this one is asked."""
    asked = None
    while agent.is_alive():
        agent.join(0.05)
        workers.look()
        if not requests.number:
            continue
        asked = asked or time.monotonic()
        waited = time.monotonic() - asked
        if requests.at_once or waited > seconds:
            if waited > seconds and not requests.at_once:
                _say(f"not saved within launch.shutdown_seconds={seconds:g}; the processes are ended")
                requests.at_once = True
            workers.send(signal.SIGKILL)
        workers.send(requests.number)
        if not workers.pids and waited > TO_APPEAR:
            return  # they wait for other machines, and there is nobody to tell


@dataclass(frozen=True)
class Ending:
    """What became of the processes of one start."""

    reports: Mapping[int, Report]
    """By rank, of those that could say how they ended."""
    exit_codes: Mapping[int, int] = field(default_factory=dict)
    """By rank, of those that failed; a signal's number is negative."""
    error: Exception | None = None
    """Why none was started."""
    lost_at: float = 0.0
    asked: int = 0
    """The signal that this process was sent, 0 for none."""
    at_once: bool = False
    earlier: Callable[[int], Handler] = lambda number: None
    """Who handled a signal before the launcher did."""

    @property
    def is_lost(self) -> bool:
        """Whether a process was killed, or says that it lost the others, and no process says why all shall end."""
        return bool(self.exit_codes)

    def result(self) -> Any:
        """The first process's result; None where the group was lost. Raises what the processes ended by."""
        mistakes = [report for _, report in sorted(self.reports.items()) if report.code == 1]
        if mistakes:
            _raise_mistake(mistakes)
        if self.at_once and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        for _, report in sorted(self.reports.items()):
            if report.code not in (0, LOST_CONTACT) and (report.step is not None or self.asked or not self.exit_codes):
                _raise_stop(report, self.earlier)  # else elastic sent the signal, because another rank is lost
        if self.asked:
            _end_by(self.asked)
        if self.error is not None:
            raise ChildProcessError(f"the processes could not be started: {self.error}") from self.error
        for rank, code in sorted(self.exit_codes.items()):
            if 0 < code < 128 and code != LOST_CONTACT and rank not in self.reports:
                raise ChildProcessError(f"rank {rank} ended with exit code {code}; what it said stands above")
        return None if self.is_lost else self.reports[min(self.reports)].result

    def how(self) -> str:
        """`rank 1 on node7 was killed by SIGSEGV, 0.3 s ago`, of the process that was lost first as far as is known."""
        here, ago = os.uname().nodename, f"{time.time() - self.lost_at:.1f} s ago"
        silent = {rank: code for rank, code in sorted(self.exit_codes.items()) if rank not in self.reports}
        for rank, code in silent.items():
            if code < 0 and -code != signal.SIGTERM:  # which elastic sends to the others
                memory = ", as the system does where memory is short" if -code == signal.SIGKILL else ""
                return f"rank {rank} on {here} was killed by {signal.Signals(-code).name}{memory}, {ago}"
        for rank, report in sorted(self.reports.items()):
            if report.is_fault:
                return f"rank {rank} on {report.host} ended by a fault of its device, {ago} ({report.message})"
        for rank in silent:
            return f"rank {rank} on {here} gave up, {ago}"
        for rank, report in sorted(self.reports.items()):
            if report.code == LOST_CONTACT:
                return f"rank {rank} on {report.host} lost the others, {ago} ({report.message})"
        return f"the processes were lost, {ago}"


def _raise_mistake(reports: list[Report]) -> None:
    """Raise the first rank's; another rank's is printed where it says something else."""
    first, *others = sorted(reports, key=lambda report: report.is_heard)
    for report in others:
        if not report.is_heard and report.message != first.message:
            _say(f"[rank {report.rank}] {report.message}")
    raise ValueError(first.message) if first.is_plain else ChildProcessError(f"rank {first.rank}: {first.message}")


def _raise_stop(report: Report, earlier: Callable[[int], Handler]) -> None:
    if report.step is None:
        _say(f"{report.message}")
        raise SystemExit(report.code)
    code = report.code - 128 if report.code > 128 else report.code
    raise Stopped(report.step, code, earlier=earlier(code) if report.code > 128 else None)


def _end_by(number: int) -> NoReturn:
    _say(f"ended by {signal.Signals(number).name} before the processes had saved; what was saved stays")
    raise SystemExit(128 + number)


class _Requests:
    """Notes the signals that this process is sent while it is entered, also between two starts of the processes; a
    second Ctrl-C ends them at once.

    Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self.number = 0
        self.at_once = False
        self._num_interrupts = 0
        self._earlier: dict[int, Handler] = {}

    def earlier(self, number: int) -> Handler:
        """Who handled a signal before this did."""
        return self._earlier.get(number)

    def end_if_asked(self) -> None:
        """Raise SystemExit where a signal has come."""
        if self.number:
            _end_by(self.number)

    def __enter__(self) -> _Requests:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        self._num_interrupts += number == signal.SIGINT
        self.at_once = self.at_once or self._num_interrupts > 1
        self.number = self.number or number


@contextlib.contextmanager
def _environment(machines: Machines) -> Iterator[None]:
    """What the processes find in their environment, which elastic takes from this one's."""
    added = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(available_cores() // machines.devices, 1))),
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _last_whole_step(out: Path, *, unless: int) -> int:
    """The step that the processes will go on from; `unless` where the folder cannot be listed, which may pass."""
    try:
        saved = steps_saved(out)
    except (ValueError, OSError):
        return unless
    return next((step for step, folder in reversed(saved) if is_whole(folder)), 0)


def _time_to_next_step(out: Path, lost: tuple[float, int]) -> None:
    """Say, once it is there, when the first step after a loss was done: `lost` is (when, the step to begin from)."""

    def watch() -> None:
        when, step = lost
        while threading.main_thread().is_alive() and time.time() - when < 3600:
            time.sleep(0.2)
            done = _logged_since(out / "metrics.jsonl", when)
            if done is not None and done > step:
                _say(f"training again: step {done} was done {time.time() - when:.1f} s after the loss")
                return

    threading.Thread(target=watch, name="time to next step", daemon=True).start()


def _logged_since(path: Path, when: float) -> int | None:
    """The last step in a metrics file that was written to after `when`."""
    try:
        if path.stat().st_mtime <= when:
            return None
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 65536, 0))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, LookupError):
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
