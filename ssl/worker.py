"""One of the processes that `launch=auto` starts: `python -m ssl.worker <folder of this start>`.

It does what the task in the folder says, with the config that the parent has composed, and leaves its result there or
how else it ended. It prints no mistake: the parent does that, once for all ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from textwrap import shorten
from typing import Any

from ssl.launch_files import Task, read_task, write_report, write_whole

COMMANDS = {
    "ssl.pretrain": ("PretrainConfig", True),
    "eval.finetune": ("FinetuneConfig", True),
    "eval.linear_probe": ("LinearProbeConfig", False),
}
"""Modules whose `run(config)` may be asked for: the name of the config's schema, and whether `run` takes `out`."""


def main() -> None:
    """The process, from its first word to its exit code."""
    place = Path(sys.argv[1])
    _heed_signals()
    write_whole(place / f"rank_{os.environ['RANK']}.pid", str(os.getpid()))
    task, config = read_task(place.parent)
    try:
        _end_with(task.launcher, task.shutdown_seconds)
        code = _attempt(place, task, config)
    except SystemExit as end:
        code = _report_signal(place, end)
    if os.getppid() != task.launcher:
        shutil.rmtree(place.parent, ignore_errors=True)  # nobody is there to read it
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # the usual way out may wait for the other ranks for ever


def _heed_signals() -> None:
    """From here on a signal ends this process in order; the parent has held them back until now.

    The training loop has handlers of its own while it runs.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    for number in signals:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _end_with(launcher: int, seconds: float) -> None:
    """Once the launcher is gone, killed perhaps: ask this process to save and stop, and end it where it does not."""

    def watch() -> None:
        while os.getppid() == launcher:  # not of who is the parent by now: it may have died before this process began
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _attempt(place: Path, task: Task, config: Path) -> int:
    """Do the task; returns the exit code that elastic is told: 0 for every end that all ranks come to together."""
    # After the first word, because torch takes seconds to load.
    import ssl.distributed as distributed
    from ssl.stopping import LOST_CONTACT, Stopped, count_time_from

    count_time_from(task.began)
    try:
        result = _run(task, config)
        write_report(place, code=0, result=result)
    except Stopped as stopped:
        write_report(place, code=stopped.exit_code, message=str(stopped), step=stopped.step)
    except Exception as error:
        fault, lost = distributed.is_device_fault(error), distributed.is_lost_contact(error)
        heard = distributed.mistake_of_another() if lost else None
        if heard is not None:
            write_report(place, code=1, message=heard, is_heard=True)
            return 1
        if fault or lost:
            write_report(place, code=LOST_CONTACT, message=shorten(str(error), 160), is_fault=fault)
            return LOST_CONTACT
        said = _said(error)
        write_report(place, code=1, **said)
        distributed.tell_mistake(said["message"])
        return 1
    with contextlib.suppress(RuntimeError):  # what this process did is done, whatever has become of the others
        distributed.stop()
    return 0  # after a stop too: else elastic would end the others, who may still be writing


def _report_signal(place: Path, end: SystemExit) -> int:
    """Of a signal that came where no step could be saved."""
    if not isinstance(end.code, int) or end.code <= 128:
        raise end
    name = signal.Signals(end.code - 128).name
    write_report(place, code=end.code, message=f"stopped by {name} outside of training; what was saved stays")
    return 0


def _said(error: Exception) -> dict[str, Any]:
    """A mistake of the user's in its words; of anything else the traceback is printed here."""
    import traceback

    from ssl.command import FULL_ERROR

    mistake = isinstance(error, ValueError | OSError)
    if not mistake or os.environ.get(FULL_ERROR) == "1":
        print(f"[rank {os.environ['RANK']}] {traceback.format_exc()}", file=sys.stderr, flush=True)
    return {"message": str(error) if mistake else f"{type(error).__name__}: {error}", "is_plain": mistake}


def _run(task: Task, config: Path) -> Any:
    import importlib
    import logging
    import warnings

    from omegaconf import OmegaConf

    is_first = os.environ["RANK"] == "0"
    if not is_first:
        warnings.simplefilter("ignore")  # the first rank's are printed
    level = task.log_level if is_first else max(task.log_level, logging.WARNING)
    form = "%(message)s" if is_first else f"[rank {os.environ['RANK']}] %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stdout)
    schema, takes_out = COMMANDS[task.command]
    module = importlib.import_module(task.command)
    merged = OmegaConf.merge(OmegaConf.structured(getattr(module, schema)), OmegaConf.load(config))
    return module.run(merged, **({"out": Path(task.out)} if takes_out else {}))


if __name__ == "__main__":
    main()
