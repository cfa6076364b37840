"""Work done by threads ahead of its consumer: in order, bounded, with a clean stop."""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch

ShouldStop = Callable[[], bool]


class Job(Protocol):
    """Work that is cut into chunks: any thread does any chunk, then one of them calls `finish`."""

    chunks: Sequence[tuple[int, int]]

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None: ...

    def finish(self) -> Any: ...


def available_cores() -> int:
    """The cores this process may use: its affinity, its container's quota, and the ranks on this machine counted in."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, math.floor(quota + 0.5)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container's quota allows (cgroup v2, then v1); None where there is no quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        return quota / int((root / "cpu" / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None


def chunk_bounds(size: int, *, num_threads: int, smallest: int, largest: int) -> list[tuple[int, int]]:
    """Cut `size` items into equal chunks: one per thread or more, none above `largest`, few below `smallest`."""
    num_chunks = max(1, math.ceil(size / largest), min(num_threads, size // smallest))
    return [(size * k // num_chunks, size * (k + 1) // num_chunks) for k in range(num_chunks)]


class _Running:
    """A job that threads are working on."""

    def __init__(self, job: Job):
        self.job = job
        self.num_left = len(job.chunks)
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = threading.Event()


class Crew:
    """Threads that do jobs chunk by chunk. Use it as a context manager: none is alive once it is closed.

    The threads are daemons, so that they never keep a failing program alive, and are joined at exit, because a daemon
    that is inside torch while the interpreter ends can abort the process.
    """

    def __init__(self, num_threads: int):
        self._tasks: SimpleQueue[tuple[_Running, int, int] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        caller_threads = torch.get_num_threads()
        ready = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._run, args=(ready,), name=f"loader-{k}", daemon=True)
            for k in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            ready.acquire()
        torch.set_num_threads(caller_threads)  # what threads that start later inherit; the crew's own stay at 1
        _open_crews.add(self)

    def submit(self, job: Job) -> _Running:
        """Queue all of a job's chunks."""
        running = _Running(job)
        for start, stop in job.chunks:
            self._tasks.put((running, start, stop))
        return running

    def wait(self, running: _Running) -> Any:
        """The result of a job's `finish`. Raises what a chunk raised."""
        running.done.wait()
        if running.error is not None:
            raise running.error
        return running.result

    def close(self) -> None:
        """Stop at the next image and wait until every thread has ended."""
        self._stopped.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        _open_crews.discard(self)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, ready: threading.Semaphore) -> None:
        # Each thread works alone on its chunk: an OpenMP team per thread would only compete with the other threads.
        # torch's count is per thread once read, so the consumer keeps its own.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.release()
        while (task := self._tasks.get()) is not None:
            if not self._stopped.is_set():
                self._do(*task)

    def _do(self, running: _Running, start: int, stop: int) -> None:
        try:
            if running.error is None:
                running.job.work(start, stop, self._stopped.is_set)
        except BaseException as error:  # raised again by `wait`, in the consumer
            running.error = error
        with self._lock:
            running.num_left -= 1
            is_last = running.num_left == 0
        if not is_last:
            return
        try:
            if running.error is None and not self._stopped.is_set():
                running.result = running.job.finish()
        except BaseException as error:
            running.error = error
        running.done.set()


_open_crews: weakref.WeakSet[Crew] = weakref.WeakSet()


@atexit.register
def _close_crews() -> None:
    for crew in list(_open_crews):
        crew.close()


def run_ahead(jobs: Iterable[Job], *, num_threads: int, ahead: int) -> Generator[Any, None, None]:
    """Yield each job's result in order while the threads work on up to `ahead` jobs after it.

    At most `ahead` + 1 jobs exist beside the one that the consumer holds. Threads start at the first result asked for
    and have ended when the iterator is exhausted, closed, or left by an exception.
    """
    with Crew(num_threads) as crew:
        running: deque[_Running] = deque()
        for job in jobs:
            running.append(crew.submit(job))
            if len(running) > ahead:
                yield crew.wait(running.popleft())
        while running:
            yield crew.wait(running.popleft())
