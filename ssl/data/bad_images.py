"""Images that cannot be read: each is replaced by another, told once, and too many of them stop the run."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from ssl.randomness import step_seed

if TYPE_CHECKING:
    from ssl.data.sources import Source

log = logging.getLogger(__name__)

NUM_LISTED = 20
NUM_ATTEMPTS = 1000


class BadImages(ValueError):
    """More images could not be decoded than `data.max_bad_fraction` allows."""


class BadList:
    """The images that could not be read so far, and what stands in for each.

    The replacement is a pure function of (seed, index, attempt), so it is the same for any number of threads and
    ranks and after a resume.
    """

    def __init__(self, source: Source, *, seed: int, max_fraction: float):
        self.messages: dict[int, str] = {}
        self._source = source
        self._seed = seed
        self._max_fraction = max_fraction
        self._lock = threading.Lock()

    def candidate(self, index: int, attempt: int) -> int:
        """The image to show for `index` after `attempt` failures. Raises BadImages when a thousand have failed."""
        if attempt >= NUM_ATTEMPTS:
            raise self._too_many()
        return index if attempt == 0 else step_seed(self._seed, index, attempt) % len(self._source)

    def replacement(self, index: int) -> int:
        """The image to show for `index`, given the images known to be bad."""
        attempt = 0
        while (shown := self.candidate(index, attempt)) in self.messages:
            attempt += 1
        return shown

    def add(self, index: int, error: Exception) -> None:
        """Remember and log a bad image, once. Raises BadImages when there are too many."""
        with self._lock:
            if index in self.messages:
                return
            self.messages[index] = f"{self._source.describe(index)}: {error}"
            log.warning("cannot decode %s; another image takes its place", self.messages[index])
            if len(self.messages) > self._max_fraction * len(self._source):
                raise self._too_many()

    def _too_many(self) -> BadImages:
        listed = [f"  {message}" for message in list(self.messages.values())[:NUM_LISTED]]
        if len(self.messages) > NUM_LISTED:
            listed.append(f"  ... and {len(self.messages) - NUM_LISTED} more")
        return BadImages(
            f"{len(self.messages)} of {len(self._source)} images of {self._source.name} could not be decoded, more "
            f"than data.max_bad_fraction={self._max_fraction:g} allows; mend or remove these files, or raise "
            "data.max_bad_fraction:\n" + "\n".join(listed)
        )
