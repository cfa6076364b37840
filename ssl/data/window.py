"""The order of images that are stored in groups: shuffled across and within groups, and each group is needed once.

A pure function of (seed, epoch): ranks, threads, the speed of reads and a resume do not enter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ssl.randomness import shuffle, uniforms

_BITS = 24
"""Uniform numbers are multiples of 2**-24, so keys that are integers in this unit are exact."""

Use = tuple[int, int, int]
"""(epoch, lane, group): a group in one place of the order."""


@dataclass(frozen=True)
class Step:
    """The images `index` (B,) of one batch, the groups that they lie in, and those that no later batch needs."""

    epoch: int
    index: np.ndarray
    needs: list[Use]
    over: list[Use]


@dataclass(frozen=True)
class _Lane:
    """A part of an epoch's row of groups; the first and the last of its groups may be cut."""

    group: np.ndarray  # (S,)
    first: np.ndarray  # (S,) the index of each group's first image here
    start: np.ndarray  # (S+1,) its place in the lane


@dataclass(frozen=True)
class _Block:
    """A lane's images whose keys lie in one stretch, in order."""

    rank: int  # place in the lane's order of the first of them
    index: np.ndarray  # (n,)
    place: np.ndarray  # (n,) of each image's group in the lane
    key: np.ndarray  # (n,)


class WindowOrder:
    """Batches of the images in groups `starts` (G+1,), group g being the images starts[g] to starts[g+1].

    An epoch lays its groups one behind another in a random order, and cuts that row of images into lanes of equal
    length. In a lane each image moves back from the start of its group by up to `reach` = `window` / lanes places,
    drawn uniformly: a window that slides, as in MosaicML Streaming's py1e. So a batch mixes the images of about
    `window` / (images per group) groups, or `lanes` groups where those are larger, and groups come into play one by
    one. At both ends of an epoch the window is narrower.

    A batch takes equally many images from each lane, and the ranks take contiguous shares of it, that is, lanes: the
    images of a batch do not depend on the number of ranks, and where that divides the number of lanes each group is
    needed by one rank, but for those that the border of two lanes cuts, fewer than there are lanes. There are
    gcd(`lanes`, `global_batch_size`) lanes. Starting an epoch takes time for its groups, a step for its batch, and the
    first step for a window.
    """

    def __init__(self, starts: np.ndarray, *, seed: int, window: int, lanes: int, global_batch_size: int) -> None:
        self.starts = np.asarray(starts, np.int64)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.num_lanes = math.gcd(lanes, global_batch_size)
        self.num_images = int(self.starts[-1])
        self.steps_per_epoch = self.num_images // global_batch_size
        self.reach = max(min(window, self.num_images) // self.num_lanes, 1)
        self._lanes = lru_cache(maxsize=2)(self._make_lanes)
        self._block = lru_cache(maxsize=4 * self.num_lanes)(self._make_block)

    def steps(self, start_step: int, stop_step: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Step]:
        """A rank's share of each step's batch."""
        return (self.step(step, rank=rank, world_size=world_size) for step in range(start_step, stop_step))

    def step(self, step: int, *, rank: int = 0, world_size: int = 1) -> Step:
        """A rank's share of one step's batch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        share, of_lane = self.global_batch_size // world_size, self.global_batch_size // self.num_lanes
        low, high = rank * share, (rank + 1) * share  # places in the batch
        first, last = number * of_lane, (number + 1) * of_lane  # places in each lane
        index, needs, over = [], [], []
        for lane in range(low // of_lane, -(-high // of_lane)):
            begin, end = max(low - lane * of_lane, 0), min(high - lane * of_lane, of_lane)
            images, places = self._take(epoch, lane, first + begin, first + end)
            group = self._lanes(epoch)[lane].group
            index.append(images)
            needs += [(epoch, lane, g) for g in group[np.unique(places)].tolist()]
            passed = slice(self._num_over(epoch, lane, first), self._num_over(epoch, lane, last))
            over += [(epoch, lane, g) for g in group[passed].tolist()]
        return Step(epoch, np.concatenate(index), needs, over)

    def lanes_of_a_rank(self, world_size: int) -> int:
        """The lanes that a rank takes images from, at most."""
        return -(-self.num_lanes // world_size)

    def _make_lanes(self, epoch: int) -> list[_Lane]:
        number = len(self.starts) - 1
        group = shuffle(self.seed, epoch, number, np.arange(number))  # (G,)
        end = np.cumsum(np.diff(self.starts)[group])
        begin = np.r_[0, end[:-1]]
        lanes = []
        for lane in range(self.num_lanes):
            low, high = (self.num_images * border // self.num_lanes for border in (lane, lane + 1))
            part = slice(np.searchsorted(end, low, "right"), np.searchsorted(begin, high, "left"))
            start = np.maximum(begin[part], low)  # (S,)
            first = self.starts[group[part]] + start - begin[part]
            lanes.append(_Lane(group[part], first, np.append(start, high) - low))
        return lanes

    def _make_block(self, epoch: int, lane: int, number: int) -> _Block:
        """The images with keys in [number, number + 1) times the reach.

        An image's key is the start of its group plus a draw from [0, reach), and orders its lane.
        """
        row = self._lanes(epoch)[lane]
        low, high = (border * self.reach << _BITS for border in (number, number + 1))
        earliest = np.searchsorted(row.start[:-1], (number - 1) * self.reach)
        latest = np.searchsorted(row.start[:-1], (number + 1) * self.reach)
        sizes = row.start[earliest + 1 : latest + 1] - row.start[earliest:latest]
        place = np.repeat(np.arange(earliest, latest), sizes)  # (n,) of groups that may have an image here
        index = row.first[place] + np.arange(row.start[earliest], row.start[latest]) - row.start[place]
        draw = (uniforms(self.seed, epoch, index, "window", 1)[:, 0] * np.float32(2**_BITS)).astype(np.int64)
        key = (row.start[place] << _BITS) + self.reach * draw
        inside = np.flatnonzero((key >= low) & (key < high))
        inside = inside[np.argsort(key[inside], kind="stable")]
        return _Block(int(row.start[earliest] + (key < low).sum()), index[inside], place[inside], key[inside])

    def _block_of(self, epoch: int, lane: int, rank: int) -> int:
        """The number of the block that holds the image at a place in the lane's order.

        Images before block k lie in groups that start before k * reach, so the block in which the group at this place
        starts does not begin behind it; all images of that group have come before the next but one.
        """
        start = self._lanes(epoch)[lane].start
        number = int(start[np.searchsorted(start, rank, "right") - 1]) // self.reach
        block = self._block(epoch, lane, number)
        return number if rank < block.rank + len(block.index) else number + 1

    def _take(self, epoch: int, lane: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The images at the places [first, last) of a lane's order, and their groups' places in the lane."""
        index, place = [], []
        number = self._block_of(epoch, lane, first)
        while first < last:
            block = self._block(epoch, lane, number)
            part = slice(first - block.rank, last - block.rank)
            index.append(block.index[part])
            place.append(block.place[part])
            first += len(index[-1])
            number += 1
        return np.concatenate(index), np.concatenate(place)

    def _num_over(self, epoch: int, lane: int, rank: int) -> int:
        """How many of a lane's groups have no image at this place of its order or behind; all where the epoch ends."""
        row = self._lanes(epoch)[lane]
        if rank == self.steps_per_epoch * (self.global_batch_size // self.num_lanes):
            return len(row.group)
        block = self._block(epoch, lane, self._block_of(epoch, lane, rank))
        key = int(block.key[rank - block.rank])
        return int(np.searchsorted(row.start[:-1], (key >> _BITS) - self.reach, "right"))


def sequential_steps(starts: np.ndarray, batch_size: int, first: int, last: int, *, epoch: int) -> Iterator[Step]:
    """The images [first, last) in order, in batches."""
    starts = np.asarray(starts, np.int64)
    for start in range(first, last, batch_size):
        stop = min(start + batch_size, last)
        lowest = int(np.searchsorted(starts, start, "right")) - 1
        highest = int(np.searchsorted(starts, stop, "left"))
        needs = [(epoch, 0, group) for group in range(lowest, highest)]
        over = [use for use in needs if stop == last or starts[use[2] + 1] <= stop]
        yield Step(epoch, np.arange(start, stop), needs, over)
