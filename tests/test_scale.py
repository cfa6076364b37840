"""The order of the data for 1,024 ranks over a billion images, made by the loader itself and counted, not timed."""

from __future__ import annotations

import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from math import gcd

import numpy as np
import pytest

import ssl.randomness as randomness
from ssl.data.loader import Loader
from ssl.data.views import View
from ssl.data.window import WindowOrder

RANKS = 1024
MANY = 10**9


class Dots:
    """Images of one pixel; a set of any size takes no memory."""

    name = "dots"
    classes = None
    num_ignored = 0

    def __init__(self, size: int) -> None:
        self.labels = np.broadcast_to(np.int64(-1), size)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        return np.full((1, 1, 3), index % 256, np.uint8)

    def describe(self, index: int) -> str:
        return f"dot {index}"


class Orders(Loader):
    """The loader without its threads: what it would read, `index` (B,) of each batch."""

    def _start(self, jobs) -> Iterator:
        return (job.index for job in jobs)


def loader_of(size: int, kind: type[Loader] = Orders) -> Loader:
    view = View(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    return kind(Dots(size), [view], size=(1, 1), channels=3, seed=5, threads=1, in_memory_gib=0, prefetch=0)


def share(loader: Loader, step: int, rank: int, *, batch: int = 4096, ranks: int = RANKS) -> np.ndarray:
    steps = loader.batches(start_step=step, stop_step=step + 1, global_batch_size=batch, rank=rank, world_size=ranks)
    return np.asarray(next(steps))


def place_of(image: np.ndarray, *, seed: int, epoch: int, size: int) -> np.ndarray:
    """Where images stand in an epoch's order: the Feistel network of `shuffle`, its rounds undone last to first."""
    rounds = np.arange(8, dtype=np.uint64)
    words = randomness.philox((rounds, size & 0xFFFFFFFF, size >> 32, epoch), (seed, zlib.crc32(b"shuffle")))
    keys = (words.astype(np.uint64)[:, 0] << np.uint64(32)) | words.astype(np.uint64)[:, 1]
    rows = int(np.ceil(np.sqrt(size)))
    columns = -(-size // rows)
    places = []
    for cell in image.tolist():
        while True:
            row, column = divmod(cell, columns)
            for number in reversed(range(8)):
                if number % 2:
                    column = (column - int(randomness._mix(np.array([row], np.uint64), keys[number])[0])) % columns
                else:
                    row = (row - int(randomness._mix(np.array([column], np.uint64), keys[number])[0])) % rows
            cell = row * columns + column
            if cell < size:
                break
        places.append(cell)
    return np.array(places)


@pytest.fixture
def mixed(monkeypatch) -> list[int]:
    """How many numbers each round of the shuffle has worked on, in the order of the rounds."""
    counts: list[int] = []
    mix = randomness._mix

    def counted(value: np.ndarray, key: np.uint64) -> np.ndarray:
        counts.append(value.size)
        return mix(value, key)

    monkeypatch.setattr(randomness, "_mix", counted)
    return counts


def test_1024_ranks_see_every_image_of_an_epoch_at_most_once_and_whole_batches_of_them():
    size, batch = 3 * 2048 + 7, 2048
    loader = loader_of(size)
    for epoch in (0, 3):
        counted = np.zeros(size, int)
        for rank in range(RANKS):
            steps = loader.batches(
                start_step=epoch * 3, stop_step=epoch * 3 + 3, global_batch_size=batch, rank=rank, world_size=RANKS
            )
            np.add.at(counted, np.concatenate(list(steps)), 1)
        assert counted.max() == 1
        assert counted.sum() == 3 * batch


def test_ranks_and_steps_drawn_from_an_epoch_of_a_billion_images_share_none_and_stand_where_they_should():
    loader = loader_of(MANY)
    draw = np.random.default_rng(0)
    per_epoch = MANY // 4096
    chosen = {(int(draw.integers(per_epoch)), int(draw.integers(RANKS))) for _ in range(400)}
    taken = {(step, rank): share(loader, step, rank) for step, rank in chosen}
    seen = np.concatenate(list(taken.values()))
    assert len(np.unique(seen)) == 4 * len(chosen)
    assert seen.min() >= 0
    assert seen.max() < MANY
    (step, rank), images = next(iter(taken.items()))
    assert place_of(images, seed=5, epoch=0, size=MANY).tolist() == [step * 4096 + rank * 4 + i for i in range(4)]


def test_each_image_of_a_billion_has_a_place_in_each_epoch():
    images = np.random.default_rng(1).integers(MANY, size=50)
    for epoch in (0, 7):
        places = place_of(images, seed=5, epoch=epoch, size=MANY)
        assert randomness.shuffle(5, epoch, MANY, places).tolist() == images.tolist()


def test_the_ranks_shares_are_the_batch_of_one_process():
    loader = loader_of(MANY)
    step = 123_456
    whole = share(loader, step, 0, ranks=1)
    for rank in (0, 511, 1023):
        assert share(loader, step, rank).tolist() == whole[4 * rank : 4 * rank + 4].tolist()


def test_a_ranks_work_on_a_batch_does_not_grow_with_images_ranks_or_steps(mixed):
    work = {}
    for size, ranks, step in ((10**6, 1, 0), (MANY, 1, 0), (MANY, RANKS, 0), (MANY, RANKS, 40 * (MANY // 4096) - 1)):
        mixed.clear()
        share(loader_of(size), step, ranks - 1, batch=4 * ranks if ranks == 1 else 4096, ranks=ranks)
        work[size, ranks, step] = sum(mixed)
    assert set(work.values()) == {4 * 8}  # one pass of eight rounds over the share's four images


def test_a_batch_far_into_a_billion_images_is_resumed_without_a_list_of_anything():
    loader = loader_of(MANY, Loader)  # as it is, with its threads and pixels
    step = 90 * (MANY // 4096) - 2
    tracemalloc.start()
    batches = loader.batches(start_step=step, stop_step=step + 2, global_batch_size=4096, rank=700, world_size=RANKS)
    first = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first["index"].tolist() == share(loader_of(MANY), step, 700).tolist()
    assert (first["crops"][0][:, 0, 0, 0] == first["index"] % 256).all()
    assert len(list(batches)) == 1
    assert peak < 2**20


def test_streamed_1024_ranks_see_every_image_once_and_share_no_group_but_the_cut_ones():
    starts = np.r_[0, np.cumsum([9, 13] * 1024)]
    order = WindowOrder(starts, seed=2, window=4 * RANKS, lanes=RANKS, global_batch_size=2 * RANKS)
    counted = np.zeros(starts[-1], int)
    needed: Counter[int] = Counter()
    for rank in range(RANKS):
        groups = set()
        for step in order.steps(0, order.steps_per_epoch, rank=rank, world_size=RANKS):
            np.add.at(counted, step.index, 1)
            groups |= {group for _, _, group in step.needs}
        needed.update(groups)
    assert counted.max() == 1
    assert counted.sum() == order.steps_per_epoch * 2 * RANKS
    assert sum(needed.values()) <= 2048 + RANKS - 1


def test_streamed_a_rank_of_1024_holds_its_own_windows_groups_and_no_list_of_images():
    starts = np.arange(0, MANY + 1, 10_000)
    window, num_groups = RANKS * 20_000, len(starts) - 1
    order = WindowOrder(starts, seed=2, window=window, lanes=RANKS, global_batch_size=4 * RANKS)
    assert gcd(RANKS, 4 * RANKS) == order.num_lanes
    middle = 5 * order.steps_per_epoch + order.steps_per_epoch // 2
    tracemalloc.start()
    held: set = set()
    most = 0
    for step in order.steps(middle, middle + 3000, rank=321, world_size=RANKS):
        held |= set(step.needs)
        most = max(most, len(held))
        held -= set(step.over)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most <= 20_000 // 10_000 + 3  # of its window, the one that enters, those that the lane's ends cut
    assert peak < 200 * num_groups + 400 * 4 * 20_000  # the groups' places and a few blocks of its lane, not images
