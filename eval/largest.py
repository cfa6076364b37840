"""The largest scores of each query, out of scores that come tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
LIFT = 4  # the bar is raised before more than `count` / LIFT groups per query are taken from a tile
WAIT = 4  # and what waits is settled once it is more than WAIT * `count` groups per query,
MOST_WAIT = 2**19  # or more than this many groups
ALIKE = 4  # of a tile of which more than 1 / ALIKE is taken nothing waits

Margin = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Groups:
    """Groups of scores (g, G), of which one or more reach the bar: of which query (g,), and at which place (g,) each
    begins; its scores are `step` places apart.
    """

    score: Tensor
    row: Tensor
    place: Tensor
    step: int


class Largest:
    """Collects the scores of each query that may belong to its `count` largest, and their places; at most `most`.

    Those may that reach the bar, which lies a margin below the count-th largest of some of the scores: of maxima over
    groups of them. Maxima also find the few scores that reach the bar, so that each score is read about once. Groups
    wait as they are until the bar is final, since by then most of what they hold is below. `value` (B, m) is in falling
    order, then -inf; `place` (B, m) belongs to it; no score that was left out is larger than `bar` (B,).

    Where `most` have been found the bar is the largest that found no room. Scores equal to it would find none either:
    they are not taken, since where all scores are alike that would be all of them.
    """

    def __init__(self, num: int, count: int, most: int, device: torch.device) -> None:
        self.count, self.most = count, most
        self.bar = torch.full((num,), -torch.inf, device=device)  # (B,)
        self.enter = self.bar.clone()  # (B,): the least that is taken, the bar or what comes after it
        self.top = torch.full((num, count), -torch.inf, device=device)  # (B, k): no two are one and the same score
        self.value = torch.empty(num, 0, device=device)  # (B, m)
        self.place = torch.empty(num, 0, dtype=torch.int64, device=device)
        self.waiting: list[Groups] = []
        self.num_waiting = 0

    def offer(self, score: Tensor, first: int, margin: Margin) -> None:
        """Scores (B, n) of places `first`, `first` + 1, ...; `margin` tells how far below a score (B,) the bar lies."""
        whole = score.shape[1] - score.shape[1] % GROUP
        if whole:
            self._offer(score[:, :whole], first, margin, GROUP)
        if whole < score.shape[1]:
            self._offer(score[:, whole:], first + whole, margin, 1)
        if self.num_waiting > min(WAIT * self.count * len(score), MOST_WAIT):
            self.settle(margin)

    def _offer(self, score: Tensor, first: int, margin: Margin, size: int) -> None:
        groups = score.unflatten(1, (size, -1))  # (B, G, n/G)
        maxima = self._maxima(groups)  # (B, n/G)
        row, column = self._reach_bar(maxima)
        if LIFT * len(row) > self.count * len(score):  # so many that it pays to raise the bar first
            some = maxima if maxima.shape[1] >= 2 * self.count else score
            top = torch.cat([self.top, some.float()], 1).topk(self.count, dim=1).values  # (B, k)
            self._raise_bar(top, margin, score.dtype)
            row, column = self._reach_bar(maxima)
        if ALIKE * len(row) > maxima.numel() and ALIKE * self._share_taken(score) > 1:
            self._take_at_once(score, first, margin)
            return
        self.waiting.append(Groups(groups.transpose(1, 2)[row, column], row, first + column, maxima.shape[1]))
        self.num_waiting += len(row)

    def _maxima(self, groups: Tensor) -> Tensor:
        """Of groups of scores (B, G, n/G) the maximum where it reaches the bar, else any of them: (B, n/G).

        What is positive in bfloat16 has the order of its bits, of which a CPU finds the largest four times as fast.
        """
        if groups.dtype == torch.bfloat16 and groups.device.type == "cpu" and bool((self.bar > 0).all()):
            return groups.view(torch.int16).amax(1).view(torch.bfloat16)
        return groups.amax(1)

    def _reach_bar(self, maxima: Tensor) -> tuple[Tensor, Tensor]:
        """Row (g,) and column (g,) of the maxima (B, n/G) that are taken."""
        row, column = (maxima >= self.enter[:, None].to(maxima.dtype)).nonzero().unbind(1)
        return row, column

    def _share_taken(self, score: Tensor, every: int = 16) -> float:
        """Which share of scores (B, n) is taken, as far as every 16th row tells."""
        taken = score[::every] >= self.enter[::every, None].to(score.dtype)  # (B/16, n)
        return int(taken.count_nonzero()) / taken.numel()

    def _take_at_once(self, score: Tensor, first: int, margin: Margin) -> None:
        """Put scores (B, n) in order without a list of those that are taken: it would be several times their size."""
        self.settle(margin)
        place = torch.arange(first, first + score.shape[1], device=score.device).expand(len(score), -1)  # (B, n)
        value = torch.cat([self.value, score.float()], 1)  # (B, m+n)
        self.value, order = value.topk(min(self.most + 1, value.shape[1]), dim=1)
        self.place = torch.cat([self.place, place], 1).gather(1, order)
        self._leave_out(margin, score.dtype)

    def _raise_bar(self, top: Tensor, margin: Margin, dtype: torch.dtype) -> None:
        """To the margin below the least of each row of `top` (B, k), as the scores' `dtype` can hold it."""
        self.top, least = top, top[:, -1]
        bar = torch.where(least > -torch.inf, least - margin(least), least)  # (B,)
        self.bar = torch.maximum(self.bar, bar.to(dtype).float())
        self.enter = torch.maximum(self.enter, self.bar)

    def settle(self, margin: Margin) -> None:
        """Put what waits in order, raise the bar by it, and leave out what does not reach it then."""
        if not self.waiting:
            return
        num, dtype = len(self.bar), self.waiting[0].score.dtype
        row, place, value = self._reaching()  # (h,), (h,), (h,)
        order = ((row << 32) - in_order(value)).argsort()
        row, place, value = (each.index_select(0, order) for each in (row, place, value))
        counts = torch.bincount(row, minlength=num)  # (B,)
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts).index_select(0, row)  # (h,)
        width = min(int(counts.max()), self.most + 1)
        fits = (slot < width).nonzero()[:, 0]
        at = (row * width + slot).index_select(0, fits)
        self.value = value.new_full((num * width,), -torch.inf)
        self.place = place.new_zeros(num * width)
        self.value = self.value.scatter_(0, at, value.index_select(0, fits)).view(num, width)
        self.place = self.place.scatter_(0, at, place.index_select(0, fits)).view(num, width)
        self.waiting, self.num_waiting = [], 0
        self._leave_out(margin, dtype)

    def _leave_out(self, margin: Margin, dtype: torch.dtype) -> None:
        """Raise the bar by what is in order, and leave out what does not reach it then, or finds no room."""
        width = self.value.shape[1]
        if width > self.most:
            without_room = self.value[:, self.most].to(dtype)  # (B,): the largest, or -inf
            self.bar = torch.maximum(self.bar, without_room.float())
            above = torch.nextafter(without_room, torch.full_like(without_room, torch.inf))
            self.enter = torch.maximum(self.enter, above.float())
        if width >= self.count:
            self._raise_bar(self.value[:, : self.count], margin, dtype)
        self.value = self.value.masked_fill(self.value < self.bar[:, None], -torch.inf)[:, : self.most]
        width = int((self.value > -torch.inf).sum(1).max())
        self.value, self.place = self.value[:, :width].contiguous(), self.place[:, :width].contiguous()

    def _reaching(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row (h,), place (h,) and value (h,) of all scores that wait and are taken, or are in order."""
        known = (self.value > -torch.inf).flatten().nonzero()[:, 0]
        rows = [known // max(self.value.shape[1], 1)]
        places, values = [self.place.flatten().index_select(0, known)], [self.value.flatten().index_select(0, known)]
        for groups in self.waiting:
            enter = self.enter.index_select(0, groups.row).to(groups.score.dtype)  # (g,)
            hit = (groups.score >= enter[:, None]).flatten().nonzero()[:, 0]  # (h,)
            group, number = hit // groups.score.shape[1], hit % groups.score.shape[1]
            rows.append(groups.row.index_select(0, group))
            places.append(groups.place.index_select(0, group) + groups.step * number)
            values.append(groups.score.flatten().index_select(0, hit).float())
        return torch.cat(rows), torch.cat(places), torch.cat(values)


def in_order(value: Tensor) -> Tensor:
    """Whole numbers, int64 of 32 bits, in the same order as fp32 values: sorting them is several times as fast."""
    bits = (value + 0.0).view(torch.int32)  # the sum makes -0.0 and 0.0 the same
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
