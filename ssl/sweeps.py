"""A sweep (`-m`): what each of its runs leaves behind, what ends it before its time, and the table at its end.

Hydra's launchers run a sweep's runs in this process, in others beside it (joblib) or on other machines (submitit). So
each run keeps its outcome in a file in its folder of the sweep, and the process that started the sweep reads them all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from ssl.objective import check_direction
from ssl.stopping import SIGNALS, TIME_IS_UP
from ssl.tables import Table, metric_columns

OUTCOME = "outcome.json"
RESULTS = "results.csv"
HEADLINES = ("top1", "map", "knn_top1", "rankme", "loss")
"""Metrics that the printed table shows, where they are; the CSV has all."""
MESSAGE_WIDTH = 80

RUNNING, DONE, FAILED, STOPPED, OUT_OF_TIME, LOST = "running", "done", "failed", "stopped", "out of time", "lost"


@dataclass(frozen=True)
class Outcome:
    """What a command made: metrics, where they or the run lie, and the number that a sweep optimizes."""

    metrics: Mapping[str, Any]
    out: str | Path | None = None
    objective: float | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep as each of its runs knows it, in whatever process."""

    folder: Path
    id: str
    """Tells its outcomes from those of an earlier sweep in the same folder."""
    host: str
    pid: int
    on_cluster: bool
    """Whether its runs are jobs of a scheduler, which live on without the process that submitted them."""
    direction: str | None
    """What an optimizing sweeper does with the objective, maximize or minimize."""
    swept: tuple[str, ...]
    """The settings in which its runs differ."""

    @property
    def name(self) -> str:
        """What the sweep is called, as the group of its runs on wandb."""
        return self.folder.name

    @property
    def is_here(self) -> bool:
        """Whether this is the process that started the sweep."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())

    @property
    def is_above(self) -> bool:
        """Whether this process is a worker of the one that started the sweep, as joblib's are."""
        return (self.host, self.pid) == (socket.gethostname(), os.getppid())

    def end(self, code: int) -> None:
        """Let no further run start, and say with which exit code the sweep ends."""
        with contextlib.suppress(OSError):
            self._end_file.write_text(f"{code}\n")

    @property
    def end_code(self) -> int:
        """The exit code that a signal gave the sweep, 0 while it may go on."""
        try:
            return int(self._end_file.read_text())
        except (OSError, ValueError):
            return 0

    def outcomes(self) -> list[dict[str, Any]]:
        """What its runs have left so far, in their order."""
        found = []
        for path in [*self.folder.glob(f"*/{OUTCOME}"), *self.folder.glob(f"*/*/{OUTCOME}")]:
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text()))
        return sorted((each for each in found if each["sweep"] == self.id), key=lambda each: each["run"])

    def running_beside(self) -> list[int]:
        """Processes of this machine, other than this one, in which runs go on."""
        here = [each for each in self.outcomes() if each["state"] == RUNNING and each["host"] == socket.gethostname()]
        return [each["pid"] for each in here if each["pid"] != os.getpid() and _is_alive(each["pid"])]

    @property
    def _end_file(self) -> Path:
        return self.folder / f"ended_{self.id}"


@dataclass
class Job:
    """One run of a sweep, as its file tells of it; only the first process of several writes."""

    path: Path
    about: dict[str, Any]
    began: float = field(default_factory=time.monotonic)

    def tell(self, state: str, *, message: str | None = None, outcome: Outcome | None = None) -> None:
        """Write how the run is or ended. A disk that is full costs the row of the table, not the run."""
        self.about |= {"state": state, "message": message, "seconds": round(time.monotonic() - self.began, 2)}
        if outcome is not None:
            self.about |= {"metrics": _plain(outcome.metrics), "objective": outcome.objective}
            self.about["out"] = self.about["out"] if outcome.out is None else str(outcome.out)
        if os.environ.get("RANK", "0") != "0":
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.about, indent=2) + "\n")
            os.replace(partial, self.path)
        except OSError as error:
            print(f"the sweep's table will lack this run: {self.path}: {error.strerror}", file=sys.stderr, flush=True)


class Refused(SystemExit):
    """A sweep that does not begin; why was said."""


_sweep: Sweep | None = None
_job: Job | None = None
_watch: SignalWatch | None = None
_share: IO[str] | None = None
"""Those of this process: a run is told of its sweep by Hydra's callback, before it starts."""


class SweepCallback(Callback):
    """Hydra keeps one for each command (conf/hydra/callbacks/sweep.yaml) and sends it along with each run."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Begin the sweep, in the process that starts it. What is no SystemExit Hydra keeps."""
        try:
            check_direction(config)
            self.sweep = _open(config)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise Refused(1) from None
        begin(self.sweep)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell this process, whichever it is, of the sweep."""
        global _sweep
        _sweep = self.sweep


def current() -> Sweep | None:
    """The sweep that this process runs a part of."""
    return _sweep


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


def take_devices(sweep: Sweep, *, at_once: int) -> None:
    """Give this process, one of `at_once` that do a sweep's runs beside each other, its share of the visible GPUs.

    A share is kept until the process ends, whose lock on a file of the sweep then goes too. Nothing where there is at
    most one GPU.
    """
    global _share
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    if _share is not None or len(visible) < 2:
        return
    at_once = at_once if at_once > 0 else os.cpu_count() or 1
    for slot in range(at_once):
        lock = (sweep.folder / f"devices_{slot}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _share = lock
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(visible, slot, at_once))
        return


def share_of(devices: Sequence[str], slot: int, at_once: int) -> Sequence[str]:
    """The devices of the process `slot` of `at_once`: disjoint, or one each, in turn, where there are too few."""
    return devices[slot::at_once] if at_once <= len(devices) else [devices[slot % len(devices)]]


def finish() -> int:
    """In the process that started a sweep, print and write its table; returns the exit code, 0 where all is well."""
    global _watch, _sweep, _job
    watch, _watch, _sweep, _job = _watch, None, None, None
    if watch is None:
        return 0
    watch.remove()
    return report(watch.sweep)


def report(sweep: Sweep) -> int:
    """Print the table of a sweep and write results.csv beside its outcomes; returns the exit code."""
    outcomes = sweep.outcomes() if sweep.on_cluster else [_settled(each) for each in sweep.outcomes()]
    code = sweep.end_code
    if not outcomes or os.environ.get("RANK", "0") != "0":
        return code
    path = sweep.folder / RESULTS
    full_table(outcomes).write(path)
    print(f"\n{short_table(outcomes, sweep.swept).text()}\n")
    best = best_of(outcomes, sweep.direction)
    if best is not None:
        words = shlex.join(_swept(best, sweep.swept))
        print(f"best: run {best['run']}, objective {best['objective']:.6g}: {words}")
    print(f"written: {path}", flush=True)
    failed = [each for each in outcomes if each["state"] not in (DONE, RUNNING, STOPPED)]
    if failed:
        lines = "\n  ".join(f"run {each['run']}, {shlex.join(_swept(each, sweep.swept))}" for each in failed)
        print(f"{len(failed)} of the sweep's runs failed:\n  {lines}", file=sys.stderr, flush=True)
    if code and sweep.on_cluster:
        jobs = sorted({each["job"].partition("_")[0] for each in outcomes if each["state"] == RUNNING})
        how = f"scancel {' '.join(jobs)}" if jobs else "squeue --me shows them, scancel"
        print(f"the sweep's jobs go on in the queue; {how} ends them", file=sys.stderr, flush=True)
    return code or (1 if failed else 0)


def full_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """Every override, metric and message of every run."""
    words = [_by_key(each["overrides"]) for each in outcomes]
    keys = list(dict.fromkeys(key for each in words for key in each))
    metrics = metric_columns(each["metrics"] for each in outcomes)
    columns = ["run", *keys, "objective", *metrics, "state", "seconds", "out", "message"]
    rows = [
        [
            each["run"],
            *(own.get(key) for key in keys),
            each["objective"],
            *(each["metrics"].get(name) for name in metrics),
            *(each[name] for name in ("state", "seconds", "out", "message")),
        ]
        for each, own in zip(outcomes, words)
    ]
    return Table(columns, rows)


def short_table(outcomes: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> Table:
    """What differs between the runs, and what came of it, for a terminal."""
    whole = full_table(outcomes)
    values = {name: [row[place] for row in whole.rows] for place, name in enumerate(whole.columns)}
    shown = [key for key in swept if key in values]
    shown += [name for name in ("objective", *HEADLINES) if any(value is not None for value in values.get(name, []))]
    values["message"] = [_first_line(message) for message in values["message"]]
    last = ["message"] if any(values["message"]) else []
    columns = ["run", *shown, "state", "seconds", "out", *last]
    return Table(columns, [[values[name][row] for name in columns] for row in range(len(outcomes))])


def best_of(outcomes: Sequence[Mapping[str, Any]], direction: str | None) -> Mapping[str, Any] | None:
    """The outcome that an optimizing sweeper was looking for; None where there is no direction, or no number."""
    found = [each for each in outcomes if each["objective"] is not None and math.isfinite(each["objective"])]
    if direction is None or not found:
        return None
    choose = max if direction == "maximize" else min
    return choose(found, key=lambda each: each["objective"])


class SignalWatch:
    """In the process that started a sweep: the first signal lets no further run start, reaches the runs beside this
    process, which save and stop, and then ends the sweep; a second one ends it at once.

    A run within this process handles signals itself while it trains, and hands them on to here.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._caught = False
        self._earlier: dict[int, Any] = {}
        self._handling = threading.Lock()  # held while a signal is sent here, or is no longer to be

    def install(self) -> None:
        """Handle signals, but for those that are ignored (nohup); nothing outside the main thread."""
        with contextlib.suppress(ValueError):
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self)

    def remove(self) -> None:
        """Give the signals back to who had them."""
        with self._handling:
            for number, handler in self._earlier.items():
                signal.signal(number, handler)
            self._earlier.clear()

    def __call__(self, number: int, frame: Any) -> None:
        beside = [] if self._caught or self.sweep.on_cluster else self.sweep.running_beside()
        self._caught = True
        self.sweep.end(128 + number)
        if not beside:
            raise SystemExit(128 + number)
        if not from_terminal(number):
            for pid in beside:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        threading.Thread(target=self._end_after_them, args=(number,), daemon=True).start()

    def _end_after_them(self, number: int) -> None:
        while self._earlier and self.sweep.running_beside():
            time.sleep(0.1)
        with self._handling:
            if self._earlier:
                os.kill(os.getpid(), number)


def from_terminal(number: int) -> bool:
    """Whether the signal may be a Ctrl-C, which the terminal itself sends to every process in its foreground."""
    if number != signal.SIGINT:
        return False
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within it SIGTERM, where it would kill this process without a word, raises SystemExit(143)."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def state_of(code: int) -> str:
    """How a run ended, by the exit code of a run of its own."""
    if code == 0:
        return DONE
    if code == TIME_IS_UP:
        return OUT_OF_TIME
    return STOPPED if code > 128 else FAILED


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


def _settled(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome as it is when all runs have ended: one that did not say how is lost."""
    if outcome["state"] != RUNNING:
        return outcome
    message = "its process was killed; out of memory? What it saved stays, and the same command continues"
    return {**outcome, "state": LOST, "message": message}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _by_key(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in overrides)
    return {key: value for key, _, value in pairs}


def _swept(outcome: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Of a run's overrides those that not all runs have."""
    return [word for word in outcome["overrides"] if word.partition("=")[0] in keys]


def _first_line(message: str | None) -> str | None:
    if not message:
        return None
    line = message.splitlines()[0]
    return line if len(line) <= MESSAGE_WIDTH else f"{line[: MESSAGE_WIDTH - 3]}..."


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them."""
    return {
        name: value if isinstance(value, int | str) else float(value)
        for name, value in metrics.items()
        if value is not None
    }
