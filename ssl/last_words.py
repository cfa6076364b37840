"""What a rank that makes a mistake says to the others before it leaves: they did not lose it, and need not start again.

Each rank listens in a thread, so that it has heard while its main thread still waits for the one that leaves, whose
process may be where they all meet.
"""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any

POLL_SECONDS = 0.5
"""How often a rank looks."""
WAIT_SECONDS = 5.0
"""For so long the rank that leaves waits until all have heard: one of them may be gone."""


class LastWords:
    """The first mistake of any rank, as every rank learns of it. All ranks make one together, of an empty store that no
    other thread uses.
    """

    def __init__(self, store: Any, world_size: int) -> None:
        self.heard: str | None = None
        """The words of the rank that made the first mistake; None while there is none."""
        self._store, self._world_size = store, world_size
        self._store.set_timeout(timedelta(seconds=WAIT_SECONDS))
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="last words", daemon=True)
        self._thread.start()

    def tell(self, words: str) -> None:
        """Say why this rank leaves, and wait until all others know."""
        until = time.monotonic() + WAIT_SECONDS
        with contextlib.suppress(RuntimeError):  # where they meet is gone: then nobody listens
            with self._lock:
                self._note(self._store.compare_set("words", "", words).decode())
            while self._num_that_know() < self._world_size and time.monotonic() < until:
                time.sleep(POLL_SECONDS / 10)

    def of_another(self) -> str | None:
        """Why another rank left, once this one has lost contact with it; None where it was lost without a word."""
        with contextlib.suppress(RuntimeError):
            self._look()
        return self.heard

    def close(self) -> None:
        """Listen no longer."""
        self._closed.set()
        self._thread.join(timeout=WAIT_SECONDS)

    def _listen(self) -> None:
        while self.heard is None and not self._closed.wait(POLL_SECONDS):
            try:
                self._look()
            except RuntimeError:  # the store is gone, and nothing will be said there any more
                return

    def _look(self) -> None:
        with self._lock:
            if self.heard is None and self._store.check(["words"]):
                self._note(self._store.get("words").decode())

    def _note(self, words: str) -> None:
        if self.heard is None:
            self.heard = words
            self._store.add("heard", 1)

    def _num_that_know(self) -> int:
        with self._lock:
            return self._store.add("heard", 0)
