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


class Worker:
    """Runs one job at a time, in a thread of its own; at most `queue` more wait, each caller for `seconds` at most."""

    def __init__(self, *, queue: int, seconds: float) -> None:
        self.seconds = seconds
        self._places = threading.Semaphore(1 + queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, job: Callable[..., T], *args: Any) -> T:
        """What `job(*args)` returns. Raises Refused (503) where no place is free, and where it takes too long.

        A job that has begun cannot be stopped: it keeps its place until it is done, whoever has stopped waiting.
        """
        if not self._places.acquire(blocking=False):
            raise Refused(503, "the model is busy with other images; try again in a moment", retry_after=RETRY_AFTER)
        future = self._thread.submit(job, *args)
        future.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self.seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Refused(
                503,
                f"this took longer than {self.seconds:g} seconds and was given up; try a smaller image, or start "
                "the server with a larger seconds=",
                retry_after=RETRY_AFTER,
            ) from None

    def close(self) -> None:
        """Take no more jobs; those that wait are dropped, the one that has begun is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: Future) -> None:
        self._places.release()
