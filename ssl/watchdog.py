"""Ends a run in which a step does not end, and says which rank holds it up and where.

Each rank tells the others, through the store that the processes found each other by, which step and which part of it it
is in. The main thread only notes where it is: one thread talks to the store, which may not answer any more, and another
one judges, which no store, no full disk and no collective can hold up.

What is not seen: one process alone whose main thread keeps Python's interpreter lock for ever. Of several, the others
see it as silent.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import ssl.distributed as distributed
from ssl.hang_report import DATA, GATHER, LOG, STARTING, STEP, Report, explain, line_of
from ssl.stopping import LOST_CONTACT

__all__ = ["DATA", "GATHER", "LOG", "STEP", "Watchdog", "group_timeout"]

FIRST_STEP = 2.0
"""The first step, which compiles, opens files and starts libraries, may take so many times as long."""


def group_timeout(hang_timeout: float) -> timedelta:
    """How long a collective may wait: longer than the watchdog, whose message says more, gives even a first step.

    It is what ends a hang in an evaluation or a save, of which the watchdog cannot know how long they may take.
    """
    return max(distributed.TIMEOUT, timedelta(seconds=1.5 * FIRST_STEP * hang_timeout))


@dataclass(frozen=True)
class _Beat:
    step: int | None
    phase: str
    phase_since: float
    step_since: float
    first: bool
    paused: bool = False


class Watchdog:
    """Ends the run, exit code LOST_CONTACT, once it has not finished a step for `timeout` seconds, or a first step for
    twice as long.

    Before that it says on stderr which rank is behind, and writes every thread's stack to `out`/hang/rank<r>.txt. All
    ranks make one together. `beat`, `paused` and `close` are for the thread that made it; `close` must also be called
    where that thread leaves with an error, such as a connection that another rank closed when it ended.
    """

    def __init__(self, timeout: float, out: Path | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"trainer.hang_timeout is in seconds and must be above 0, got {timeout}")
        self.timeout = timeout
        self.out = out
        self.interval = min(timeout / 20, 10.0)
        now = time.monotonic()
        self._beat = _Beat(None, STARTING, now, now, first=True)
        self._resumed = now  # when this process last came back from being stopped
        self._thread = threading.get_ident()
        self._stopping, self._ending = threading.Event(), threading.Event()
        store = distributed.shared_store("watchdog")
        self._board = None if store is None else _Board(store, self._report, self.interval)
        self._judge = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._judge.start()

    def beat(self, step: int, phase: str) -> None:
        """Note that this rank is in `phase` of `step`, as metrics count steps, from now on."""
        now, before = time.monotonic(), self._beat
        if step == before.step:
            self._beat = _Beat(step, phase, now, before.step_since, before.first)
        else:
            self._beat = _Beat(step, phase, now, now, first=before.step is None)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """A part of the run of unknown length, such as an evaluation: told to the others, and not judged."""
        before, now = self._beat, time.monotonic()
        self._beat = _Beat(before.step, phase, now, now, before.first, paused=True)
        try:
            yield
        finally:
            now = time.monotonic()
            self._beat = _Beat(before.step, before.phase, now, now, before.first, before.paused)

    def close(self) -> None:
        """Stop judging; the others learn that this rank has left."""
        if self._ending.is_set():  # what this thread ran into comes of the other ranks' end: this one's is the answer
            self._judge.join()
        self._stopping.set()
        if self._board is not None:
            self._board.close()
        self._judge.join(timeout=2)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _allowed(self) -> float:
        return self.timeout * (FIRST_STEP if self._beat.first else 1.0)

    def _late(self) -> float:
        """Seconds since a step was finished, without a time in which this process was stopped."""
        beat = self._beat
        return 0.0 if beat.paused else time.monotonic() - max(beat.step_since, self._resumed)

    def _report(self) -> Report:
        beat = self._beat
        return Report(
            distributed.rank(),
            socket.gethostname(),
            os.getpid(),
            beat.step,
            beat.phase,
            round(time.monotonic() - beat.phase_since, 1),
            where=line_of(sys._current_frames().get(self._thread)),
            left=round(self._allowed() - self._late(), 1),
            paused=beat.paused,
            ended=self._stopping.is_set(),
            time=time.time(),
        )

    def _run(self) -> None:
        polled = time.monotonic()
        self._prepare_stacks()
        while not self._stopping.wait(self.interval):
            now = time.monotonic()
            if now - polled > self.interval + self.timeout / 4:  # Ctrl-Z, or suspended by a scheduler
                self._resumed = now
            polled = now
            late, allowed = self._late(), self._allowed()
            if self._board is None:
                if late >= allowed:
                    self._end(explain([self._report()], silent={}, late=late))
                continue
            self._prepare_stacks()
            self._board.reading = late >= allowed / 2
            if self._board.verdict is not None:
                self._end(self._board.verdict, told=distributed.local_rank() != 0)
            if late >= allowed:
                self._ask_the_others(late)
        if self._board is not None:
            faulthandler.cancel_dump_traceback_later()

    def _prepare_stacks(self) -> None:
        """Have this rank's stacks written from C, unless this is called again in time: where the interpreter lock is
        held, no thread of Python runs, and the others end this rank.
        """
        if self._board is not None:
            faulthandler.dump_traceback_later(0.75 * self._allowed(), file=sys.__stderr__ or 2)

    def _ask_the_others(self, late: float) -> None:
        """End the run, unless this rank may be waiting for one that answers and is in a pause or still has time."""
        assert self._board is not None
        grace = max(5 * self.interval, 1.0)
        reports = self._board.fresh(within=grace)
        if reports is None:
            self._end(explain([self._report()], silent={}, late=late) + f"\n  {self._board.lost()}")
        silent = self._board.silent(self.timeout / 3, since=self._resumed, late=late)
        living = [report for report in reports if report.rank not in silent and not report.ended]
        if any(report.paused or report.left > 2 * self.interval for report in living):
            return
        text = explain(reports, silent=silent, late=late, world_size=distributed.world_size())
        if distributed.rank() == min((report.rank for report in living), default=0):
            self._board.tell(text)
            self._end(text)
        said = self._board.wait_for_verdict(within=grace)
        self._end(said or text, told=said is not None and distributed.local_rank() != 0)

    def _end(self, text: str, *, told: bool = False) -> NoReturn:
        """Leave without what Python does at exit: it would wait for threads that hang. `told`: by another rank here."""
        self._ending.set()
        text = f"{text}\nexit code {LOST_CONTACT}; the same command continues from the last checkpoint"

        def last_words() -> None:  # in a thread of its own: a file system that hangs does not answer either
            if not told:
                print(text, file=sys.__stderr__, flush=True)
            if self.out is not None:
                _write_stacks(self.out / "hang" / f"rank{distributed.rank()}.txt", text)

        writer = threading.Thread(target=last_words, daemon=True)
        writer.start()
        writer.join(timeout=5)
        if self._board is not None:
            time.sleep(3 * self.interval)  # no rank goes before each has learned why
        os._exit(LOST_CONTACT)


class _Board:
    """Where each rank writes its report and reads the others', in a thread of its own and on a connection of its own:
    one that the main thread uses is taken while it waits there.
    """

    def __init__(self, store: Any, report: Callable[[], Report], interval: float) -> None:
        self.reading = False
        self.verdict: str | None = None
        self._own_report, self._interval = report, interval
        self._answered = time.monotonic()
        self._read_at = 0.0
        self._reports: dict[int, tuple[Report, float]] = {}  # and when this one was first seen
        self._outgoing: str | None = None
        self._stopping = threading.Event()
        self._address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        self._store = store
        self._store.set_timeout(timedelta(seconds=max(interval, 5.0)))
        self._thread = threading.Thread(target=self._run, name="watchdog's reports", daemon=True)
        self._thread.start()

    def fresh(self, *, within: float) -> list[Report] | None:
        """All reports, read after this call; None where the store does not answer in so many seconds."""
        asked = time.monotonic()
        self.reading = True
        while self._read_at < asked:
            if time.monotonic() > asked + within:
                return None
            time.sleep(self._interval / 4)
        return [report for report, _ in self._reports.values()]

    def silent(self, seconds: float, *, since: float, late: float) -> dict[int, float]:
        """Ranks whose report has not changed for so many seconds, and how long ago it was written.

        Nobody looked before this rank was late itself. Then the report's own clock tells, which may be wrong, but no
        rank is silent for longer than all have waited.
        """
        now = time.monotonic()
        unchanged = {rank: (report, now - max(seen, since)) for rank, (report, seen) in list(self._reports.items())}
        return {
            rank: max(for_seconds, min(time.time() - report.time, late))
            for rank, (report, for_seconds) in unchanged.items()
            if for_seconds > seconds and not report.ended
        }

    def lost(self) -> str:
        seconds = time.monotonic() - self._answered
        return f"the store at {self._address} has not answered for {seconds:.0f} s: its process or machine may be gone"

    def tell(self, verdict: str) -> None:
        self._outgoing = verdict

    def wait_for_verdict(self, *, within: float) -> str | None:
        until = time.monotonic() + within
        while self.verdict is None and time.monotonic() < until:
            time.sleep(self._interval / 4)
        return self.verdict

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while self.verdict is None and not self._stopping.wait(self._interval / 2):
            # Any error of the store is one and the same here: it has not answered. Its types changed between versions.
            with contextlib.suppress(RuntimeError):
                self._exchange()
        if self.verdict is None:
            with contextlib.suppress(RuntimeError):
                self._write_own()

    def _exchange(self) -> None:
        self._write_own()
        if self._outgoing is not None:
            self._store.set("verdict", self._outgoing)
            self.verdict = self._outgoing
        elif self._store.check(["verdict"]):
            self.verdict = self._store.get("verdict").decode()
        self._answered = time.monotonic()
        if self.reading:
            self._read_all()

    def _write_own(self) -> None:
        self._store.set(str(distributed.rank()), json.dumps(asdict(self._own_report())))

    def _read_all(self) -> None:
        began = time.monotonic()
        keys = [str(rank) for rank in range(distributed.world_size()) if self._store.check([str(rank)])]
        for value in self._store.multi_get(keys):
            report = Report(**json.loads(value))
            seen = self._reports.get(report.rank)
            if seen is None or seen[0] != report:
                self._reports[report.rank] = (report, time.monotonic())
        self._read_at = began


def _write_stacks(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
        print(file=file)
