"""Images that cannot be read: each is replaced by another, told once, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ssl.randomness import step_seed

if TYPE_CHECKING:
    from ssl.data.sources import Source

log = logging.getLogger(__name__)

NUM_LISTED = 20
NUM_ATTEMPTS = 1000
IN_SOME_ROWS = " (crops of other rows are shown)"
"""The end of a message; kept in it, other ranks and a resumed run know it too."""


class BadImages(ValueError):
    """More images could not be decoded than `data.max_bad_fraction` allows."""


class BadList:
    """The images that could not be read so far, and what stands in for each.

    The replacement is a pure function of (seed, index, attempt), so it is the same for any number of threads and
    ranks and after a resume.

    `messages` has the path and the reason of all that are known, also to threads that work ahead of the batches.
    `counted` has those that the batches handed out so far did without: a function of the step, not of the threads'
    speed. With what other ranks found, and earlier starts (`news`, `learn`), it is the whole run's.
    """

    def __init__(self, source: Source, *, seed: int, max_fraction: float):
        self.messages: dict[int, str] = {}
        self.counted: dict[int, str] = {}
        self._news: dict[int, str] = {}
        self._source = source
        self._seed = seed
        self._max_fraction = max_fraction
        self._lock = threading.Lock()

    def candidate(self, index: int, attempt: int) -> int:
        """The image to show for `index` after `attempt` failures. Raises BadImages when a thousand have failed."""
        if attempt >= NUM_ATTEMPTS:
            raise self._too_many(self.messages)
        return index if attempt == 0 else step_seed(self._seed, index, attempt) % len(self._source)

    def replacement(self, index: int, missed: set[int]) -> int:
        """The image to show for `index`, given the images known to be bad; those passed over are added to `missed`."""
        attempt = 0
        while (shown := self.candidate(index, attempt)) in self.messages:
            missed.add(shown)
            attempt += 1
        return shown

    def is_given_up(self, index: int) -> bool:
        """Whether it is known that no crop can show an image."""
        message = self.messages.get(index)
        return message is not None and not message.endswith(IN_SOME_ROWS)

    def add(self, index: int, error: Exception, *, in_some_rows: bool = False) -> None:
        """Remember and log a bad image, once; `in_some_rows`: one that crops of other rows may show.

        Raises BadImages when there are too many.
        """
        with self._lock:
            if index in self.messages:
                return
            self.messages[index] = f"{self._source.describe(index)}: {error}{IN_SOME_ROWS * in_some_rows}"
            log.warning("cannot decode %s; another image takes its place", self.messages[index])
            self._check(self.messages)

    def count(self, indices: Iterable[int]) -> None:
        """Note the bad images that a batch which is handed out did without."""
        for index in indices:
            if index not in self.counted:
                self.counted[index] = self._news[index] = self.messages[index]

    def news(self) -> dict[int, str]:
        """What was counted here since the last call."""
        news, self._news = self._news, {}
        return news

    def learn(self, messages: Mapping[int, str]) -> None:
        """Count what other ranks have, or an earlier start of the run; what no crop can show is not read again.

        Raises BadImages when there are too many, on all ranks alike if all learn the same.
        """
        with self._lock:
            self.messages |= messages
        self.counted |= messages
        self._check(self.counted)

    def _check(self, messages: Mapping[int, str]) -> None:
        if len(messages) > self._max_fraction * len(self._source):
            raise self._too_many(messages)

    def _too_many(self, messages: Mapping[int, str]) -> BadImages:
        listed = [f"  {message}" for message in list(messages.values())[:NUM_LISTED]]
        if len(messages) > NUM_LISTED:
            listed.append(f"  ... and {len(messages) - NUM_LISTED} more")
        return BadImages(
            f"{len(messages)} of {len(self._source)} images of {self._source.name} could not be decoded, more "
            f"than data.max_bad_fraction={self._max_fraction:g} allows; mend or remove these files, or raise "
            "data.max_bad_fraction:\n" + "\n".join(listed)
        )
