"""How signals end a sweep: the runs that go on save and stop, and no other starts."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from ssl.stopping import SIGNALS
from ssl.sweep import Sweep


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


def in_session_of_its_own() -> None:
    """Take this process, a worker of the one that started a sweep, out of that one's process group and terminal.

    A Ctrl-C, and whatever else is sent to the group, then comes to the first process alone, which hands it on once.
    """
    if os.getsid(0) != os.getpid():
        with contextlib.suppress(PermissionError):  # it leads a group already, which nobody else sends signals to
            os.setsid()


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
