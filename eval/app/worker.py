"""One thread that has the model, and a short queue before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from eval.app.uploads import Refused

T = TypeVar("T")
RETRY_AFTER = 2  # seconds
STOPPING = "the server is being stopped"


class Worker:
    """Runs one job at a time, in a thread of its own; at most `queue` more wait, each caller for `seconds` at most."""

    def __init__(self, *, queue: int, seconds: float) -> None:
        self.seconds = seconds
        self._places = threading.Semaphore(1 + queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._waiting: set[asyncio.Timeout] = set()
        self._running: Future | None = None
        self._closed = False

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        """What `job(*args)` returns. Raises Refused (503) where no place is free, and where it takes too long.

        A job that has begun cannot be stopped: it keeps its place until it is done, whoever has stopped waiting.
        """
        if self._closed:
            raise Refused(503, STOPPING)
        if not self._places.acquire(blocking=False):
            raise Refused(503, "the model is busy with other images; try again in a moment", retry_after=RETRY_AFTER)
        future = self._running = self._thread.submit(job, *args)
        future.add_done_callback(lambda _: self._places.release())
        try:
            async with asyncio.timeout(self.seconds) as limit:
                self._waiting.add(limit)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if self._closed:
                raise Refused(503, STOPPING) from None
            words = f"this took longer than {self.seconds:g} seconds and was given up"
            raise Refused(503, f"{words}; start the server with a larger seconds=") from None
        finally:
            self._waiting.discard(limit)

    def close(self) -> None:
        """Take no more jobs, and send away those who wait: from within the loop in which they do."""
        self._closed = True
        for limit in self._waiting:
            limit.reschedule(asyncio.get_running_loop().time())
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def is_idle(self) -> bool:
        """Whether no job is under way."""
        return self._running is None or self._running.done()
