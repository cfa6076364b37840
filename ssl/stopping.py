"""What asks a run to stop before its end, a signal or its time limit, and how all ranks agree on a step to stop at."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import ssl.distributed as distributed
from ssl.durations import seconds_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What asks for a stop: a person, a scheduler (Slurm warns by SIGUSR1 or SIGUSR2), a terminal that closes."""

TIME_IS_UP = 124
"""The code of a time limit, and its exit code, as of timeout(1). Signals have their numbers, below it."""

LOST_CONTACT = 75
"""Exit code of a rank that lost the others, or waited too long for them: EX_TEMPFAIL, worth a restart."""

Handler = Callable[[int, Any], Any] | int | None


class Stopped(Exception):
    """The run was asked to stop, and has saved the step that it had completed; raised on all ranks at the same step."""

    def __init__(self, step: int, code: int, *, earlier: Handler = None) -> None:
        super().__init__(f"stopped by {_name(code)} after step {step}, which is saved; the same command continues")
        self.step, self.code = step, code
        self._earlier = earlier

    @property
    def exit_code(self) -> int:
        """As shells and schedulers read it: 128 + the signal's number, 124 for the time limit."""
        return self.code if self.code == TIME_IS_UP else 128 + self.code

    def pass_on(self) -> None:
        """Call who handled the signal before the run did, such as a job launcher that now puts the job in the queue
        again; it may not return.
        """
        if callable(self._earlier) and self._earlier is not signal.default_int_handler:
            self._earlier(self.code, None)


def _name(code: int) -> str:
    return "its time limit, trainer.max_time," if code == TIME_IS_UP else signal.Signals(code).name


_launched: float | None = None


def count_time_from(began: float) -> None:
    """Let `trainer.max_time` count from `began`, in seconds of time.monotonic(), whenever this process began: a run
    that lost a process and was started again has no more time for that.
    """
    global _launched
    _launched = began


def deadline_of(max_time: str | None) -> float | None:
    """When a run's `trainer.max_time` is over, in seconds of time.monotonic(); None where it has none. It counts from
    the start of the launcher, or of this process's run where none started it.
    """
    if max_time is None:
        return None
    began = distributed.began() if _launched is None else _launched
    return began + seconds_of(max_time, key="trainer.max_time")


class StopRequests:
    """Notes signals and the time limit while it is entered, so that the loop stops at the end of a step.

    After a first Ctrl-C the next one ends the process at once, whatever it is waiting for. A signal that was ignored
    before (nohup) stays ignored. Outside the main thread nothing is installed.
    """

    def __init__(self, *, deadline: float | None = None) -> None:
        """`deadline` is in seconds of time.monotonic()."""
        self.deadline = deadline
        self._caught = 0
        self._earlier: dict[int, Handler] = {}

    @property
    def code(self) -> int:
        """What this process was asked by: a signal's number, TIME_IS_UP, or 0 for nothing."""
        if self._caught == 0 and self.deadline is not None and time.monotonic() >= self.deadline:
            return TIME_IS_UP
        return self._caught

    def stopped(self, step: int, code: int) -> Stopped:
        """The exception for what was agreed on, which knows the handler that this process had before."""
        return Stopped(step, code, earlier=self._earlier.get(code))

    def __enter__(self) -> StopRequests:
        try:
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread
            self._earlier.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: Any) -> None:
        if not self._caught and distributed.is_main():
            text = (
                f"{signal.Signals(number).name}: saving the step under way, then leaving; a second Ctrl-C ends at once"
            )
            os.write(2, f"\n{text}\n".encode())  # print may have been interrupted just here
        self._caught = self._caught or number  # launchers may send another on top
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


class Agreement:
    """Lets all ranks learn at the end of a step whether one of them was asked to stop.

    Each step's exchange runs beside the next step, on the host, and is looked at when that one ends: ranks stop one
    step later than a lone process would, and no step waits for it.
    """

    def __init__(self) -> None:
        self._exchange = distributed.HostMax() if distributed.world_size() > 1 else None

    def reached(self, code: int) -> int:
        """What all ranks stop for now, 0 for nothing; `code` is what this one was asked by."""
        return code if self._exchange is None else self._exchange.swap(code)
