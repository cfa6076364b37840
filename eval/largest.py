"""The largest scores of each query, out of scores that come tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


class Largest:
    """Keeps the m largest of all scores offered, with their places: `value` (B, m) in falling order, `place` (B, m).

    Both are written in place. Once m are known, a tile holds few that are larger: maxima over groups of scores find
    them, and they wait beside the m until there are so many that sorting pays. That reads each score about once, where
    sorting every tile costs more than the matrix product that made it.
    """

    def __init__(self, value: Tensor, place: Tensor) -> None:
        self.value, self.place = value, place
        size = (len(value), max(value.shape[1], 256))
        self.waiting = torch.full(size, -torch.inf, device=value.device)  # (B, W)
        self.waiting_place = torch.zeros(size, dtype=torch.int64, device=value.device)
        self.count = torch.zeros(len(value), dtype=torch.int64, device=value.device)  # (B,)

    def offer(self, score: Tensor, first: int) -> None:
        """Scores (B, n) of places `first`, `first` + 1, ..."""
        if bool((self.value[:, -1] == -torch.inf).any()):
            self._sort_in(score, first)
            return
        row, column = larger(score, self.value[:, -1])  # (h,), (h,)
        count = torch.bincount(row, minlength=len(score))  # (B,)
        if int((self.count + count).max()) > self.waiting.shape[1]:
            self.sort()
        if int(count.max()) > self.waiting.shape[1]:  # as where a bank sorted by class comes to a query's own
            self._sort_in(score, first)
            return
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row] + self.count[row]  # (h,)
        self.waiting[row, slot] = score[row, column].float()
        self.waiting_place[row, slot] = column + first
        self.count += count

    def sort(self) -> None:
        """Bring those that wait among the m largest, or drop them."""
        num = int(self.count.max())
        self._keep(self.waiting[:, :num], self.waiting_place[:, :num])
        self.waiting[:, :num] = -torch.inf
        self.count.zero_()

    def _sort_in(self, score: Tensor, first: int) -> None:
        score, column = score.topk(min(self.value.shape[1], score.shape[1]), dim=1)  # (B, m)
        self._keep(score.float(), column + first)

    def _keep(self, value: Tensor, place: Tensor) -> None:
        largest, order = torch.cat([self.value, value], 1).topk(self.value.shape[1], dim=1)  # (B, m)
        self.place.copy_(torch.cat([self.place, place], 1).gather(1, order))
        self.value.copy_(largest)


def larger(score: Tensor, bar: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, row by row, of the scores (B, n) that are larger than their row's `bar` (B,)."""
    num = score.shape[1]
    if num % GROUP:
        row, column = (score > bar[:, None]).nonzero().unbind(1)  # (h,), (h,)
        return row, column
    grouped = score.view(len(score), GROUP, num // GROUP)  # (B, G, n/G)
    row, group = (grouped.amax(1) > bar[:, None]).nonzero().unbind(1)  # (g,), (g,)
    hit, place = (grouped.transpose(1, 2)[row, group] > bar[row, None]).nonzero().unbind(1)  # of (g, G)
    row, column = row[hit], place * (num // GROUP) + group[hit]
    order = row.argsort(stable=True) if len(row) else row
    return row[order], column[order]
