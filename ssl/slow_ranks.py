"""Names the ranks that keep the others waiting, without a hang: a slow disk, a busy or throttled host.

What is compared is what a rank does alone: it waits for data, copies, augments, and on the CPU runs the forward pass,
less the time of its exchanges with other ranks, as those of synchronised BatchNorm and of contrastive losses. A slow
device is not seen: its host only starts the work, and then waits as all others do. Nor are backward passes, where ranks
wait for each other's gradients, nor forward passes with trainer.shard=full or trainer.compile=true.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence

import torch

import ssl.distributed as distributed

FACTOR, LOGS, AGAIN = 1.5, 3, 20
"""A rank is slow that needs so many times the median, at so many logs in a row, and is named again after so many."""
NEGLIGIBLE = 0.05
"""Of the time between two logs: a delay below it is not worth a word."""


def slowness(seconds: Sequence[float]) -> list[float]:
    """How many times the median each rank needs, of two ranks times the faster one's; infinity where that is 0."""
    median = statistics.median_low(seconds)
    return [each / median if median > 0 else (1.0 if each == 0 else float("inf")) for each in seconds]


class SlowRanks:
    """Names the ranks that keep the others waiting. All ranks make one together."""

    def __init__(self) -> None:
        name = socket.gethostname().encode()[:64].ljust(64)
        self._hosts = [bytes(row).decode().strip() for row in distributed.gather_rows(torch.tensor([list(name)]))]
        self._slow_for = [0] * len(self._hosts)
        self._began = time.monotonic()

    def note(self, own_seconds: float, data_seconds: float) -> str | None:
        """Exchange what each rank needed since the last call; what there is to say about it, the same on all ranks.

        `own_seconds` are those in which this rank worked or waited for its data, without its waits for other ranks;
        `data_seconds` are part of them. Every rank calls this together, at logged steps.
        """
        now = time.monotonic()
        own = torch.tensor([[own_seconds, data_seconds, now - self._began]], dtype=torch.float64)
        self._began = now
        rows = distributed.gather_rows(own).tolist()  # (W, 3)
        total = statistics.median_low(row[2] for row in rows)
        seconds = [row[0] for row in rows]
        median = statistics.median_low(seconds)
        said = []
        for rank, factor in enumerate(slowness(seconds)):
            delay = seconds[rank] - median
            slow = factor > FACTOR and delay > NEGLIGIBLE * total
            self._slow_for[rank] = self._slow_for[rank] + 1 if slow else 0
            if self._slow_for[rank] % AGAIN == LOGS:
                data = rows[rank][1] - statistics.median_low(row[1] for row in rows)
                cause = "it waits for data" if data > delay / 2 else "it computes slowly"
                said.append(f"rank {rank} (host {self._hosts[rank]}) needs {factor:.1f} times the median: {cause}")
        return "; ".join(said) or None
