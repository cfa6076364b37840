"""The rows of a bank as the metric wants them, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

METRICS = ("cosine", "euclidean")
BLOCK_BYTES = 2**28  # of the bank that are held at once
PIECES = {"cpu": 512, "cuda": 2**16}  # rows: what is made on the way stays in a core's cache, a third of the time


@dataclass(frozen=True)
class Rows:
    """The rows of a bank (N, D), in memory or mapped from a file, as the metric wants them, block by block."""

    bank: Tensor
    metric: str
    device: torch.device
    mean: Tensor | None = None
    """(1, D), subtracted first."""

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def dim(self) -> int:
        return self.bank.shape[1]

    @cached_property
    def whole(self) -> Tensor:
        """All rows (N, D), prepared: kept where they are one block, since several scans of them follow one another."""
        return self.prepare(self.bank)

    def prepare(self, features: Tensor) -> Tensor:
        """Features (N, D) in fp32 on the device, centred where asked, for cosine similarity of length 1."""
        features = features.to(self.device, torch.float32)
        if self.mean is not None:
            features = features - self.mean.to(self.device)
        return unit_length(features) if self.metric == "cosine" else features

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Prepared rows (n, D), each block with the place of its first."""
        step = self._block_rows()
        if len(self) <= step:
            yield 0, self.whole
            return
        for first in range(0, len(self), step):
            yield first, self.prepare(self.bank[first : first + step])

    def first_block(self) -> Rows:
        """Those of the first block alone."""
        return self if len(self) <= self._block_rows() else replace(self, bank=self.bank[: self._block_rows()])

    def _block_rows(self) -> int:
        return max(BLOCK_BYTES // (4 * self.dim), 1)


def unit_length(features: Tensor) -> Tensor:
    """Features (N, D) scaled to length 1 in fp32; a feature of zeros stays zero and is equally far from all."""
    features = features.float()
    result, size = torch.empty_like(features), PIECES[features.device.type]
    for some, out in zip(features.split(size), result.split(size)):
        norm = torch.linalg.vector_norm(some, dim=1, keepdim=True, dtype=torch.float64)  # (n, 1)
        torch.div(some, norm.clamp_min(1e-12).float(), out=out)  # (n, D)
    return result
