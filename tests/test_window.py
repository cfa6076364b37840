"""The order of images in groups, against the same order written out as loops."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from ssl.data.window import WindowOrder, sequential_steps
from ssl.randomness import shuffle, uniforms


def order_of(sizes: list[int], *, window: int, lanes: int, batch: int, seed: int = 0) -> WindowOrder:
    starts = np.concatenate(([0], np.cumsum(sizes)))
    return WindowOrder(starts, seed=seed, window=window, lanes=lanes, global_batch_size=batch)


ORDERS = [
    ([13] * 24, 64, 4, 8),
    ([1, 40, 2, 3, 90, 5, 7, 12], 16, 2, 10),  # groups larger than the window
    ([5] * 30, 10**6, 5, 15),  # a window larger than the set
    ([100], 7, 4, 4),
    ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 9] * 4, 1, 8, 4),
]


@pytest.mark.parametrize(("sizes", "window", "lanes", "batch"), ORDERS)
def test_every_image_comes_once_per_epoch_but_for_the_rest_of_the_batches(sizes, window, lanes, batch):
    order = order_of(sizes, window=window, lanes=lanes, batch=batch)
    for epoch in range(3):
        steps = order.steps(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = np.concatenate([step.index for step in steps])
        assert len(seen) == sum(sizes) // batch * batch
        assert len(np.unique(seen)) == len(seen)
        assert set(seen.tolist()) <= set(range(sum(sizes)))


@pytest.mark.parametrize(("sizes", "window", "lanes", "batch"), ORDERS)
def test_a_lane_is_its_groups_images_sorted_by_group_start_plus_a_draw(sizes, window, lanes, batch):
    order = order_of(sizes, window=window, lanes=lanes, batch=batch, seed=9)
    num, num_lanes, epoch = sum(sizes), order.num_lanes, 2
    reach = max(min(window, num) // num_lanes, 1)
    row, begins = [], []  # the shuffled groups' images one behind another, and where each one's group begins
    for group in shuffle(9, epoch, len(sizes), np.arange(len(sizes))).tolist():
        begins += [len(row)] * sizes[group]
        row += range(sum(sizes[:group]), sum(sizes[: group + 1]))
    lists = []
    for lane in range(num_lanes):
        low, high = num * lane // num_lanes, num * (lane + 1) // num_lanes
        draw = uniforms(9, epoch, np.array(row[low:high]), "window", 1)[:, 0].astype(float)
        keys = [max(begin, low) - low + reach * number for begin, number in zip(begins[low:high], draw.tolist())]
        lists.append([row[low + place] for place in np.argsort(keys, kind="stable")])
    of_lane = batch // num_lanes
    for number in range(order.steps_per_epoch):
        expected = [image for images in lists for image in images[number * of_lane : (number + 1) * of_lane]]
        assert order.step(epoch * order.steps_per_epoch + number).index.tolist() == expected


@pytest.mark.parametrize(("sizes", "window", "lanes", "batch"), ORDERS)
def test_no_batch_after_a_group_is_over_has_an_image_of_it(sizes, window, lanes, batch):
    order = order_of(sizes, window=window, lanes=lanes, batch=batch)
    over: set = set()
    for step in order.steps(0, 2 * order.steps_per_epoch):
        assert not over & set(step.needs)
        in_groups = np.searchsorted(order.starts, step.index, "right") - 1
        assert set(in_groups.tolist()) == {group for _, _, group in step.needs}
        over |= set(step.over)
    assert {use for step in order.steps(0, 2 * order.steps_per_epoch) for use in step.needs} <= over


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_a_batchs_images_do_not_depend_on_the_number_of_ranks(world_size):
    order = order_of([5] * 30, window=40, lanes=4, batch=24)
    for step in range(12):
        shares = [order.step(step, rank=rank, world_size=world_size).index for rank in range(world_size)]
        assert np.concatenate(shares).tolist() == order.step(step).index.tolist()


def test_a_step_does_not_depend_on_the_steps_before():
    first = order_of([13] * 24, window=64, lanes=4, batch=8)
    alone = [order_of([13] * 24, window=64, lanes=4, batch=8).step(step).index.tolist() for step in (60, 3, 38)]
    assert [first.step(step).index.tolist() for step in (60, 3, 38)] == alone


def test_orders_differ_by_epoch_and_by_seed():
    order, other = (order_of([13] * 24, window=64, lanes=4, batch=8, seed=seed) for seed in (0, 1))
    assert order.step(0).index.tolist() != order.step(order.steps_per_epoch).index.tolist()
    assert order.step(0).index.tolist() != other.step(0).index.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_divide_the_lanes_need_different_groups_but_for_the_cut_ones(world_size):
    order = order_of([13] * 40, window=104, lanes=4, batch=8)
    needed = Counter()
    for rank in range(world_size):
        steps = order.steps(0, order.steps_per_epoch, rank=rank, world_size=world_size)
        needed.update({use[2] for step in steps for use in step.needs})
    assert set(needed) == set(range(40))
    assert sum(needed.values()) <= 40 + world_size - 1


def test_the_images_of_a_batch_come_from_as_many_groups_as_the_window_says():
    """Of groups of 10 images a window of 400 has 40: in the middle of an epoch 100 draws find nearly all of them."""
    order = order_of([10] * 400, window=400, lanes=4, batch=100)
    middle = [order.step(step) for step in range(15, 25)]
    distinct = [len({group for _, _, group in step.needs}) for step in middle]
    assert 30 < np.mean(distinct) < 50


def test_an_image_comes_at_most_a_window_after_its_group():
    order = order_of([10] * 100, window=100, lanes=1, batch=10)
    places = {int(index): place for place, index in enumerate(np.concatenate([s.index for s in order.steps(0, 100)]))}
    begin = {int(group): 10 * place for place, group in enumerate(shuffle(0, 0, 100, np.arange(100)))}
    moved = [places[index] - begin[index // 10] for index in range(1000)]
    assert min(moved) > -100
    assert 50 < max(moved) < 110


def test_a_step_of_a_billion_images_is_made_without_a_list_of_them():
    order = order_of([10_000] * 100_000, window=20_000, lanes=4, batch=1024)
    tracemalloc.start()
    step = order.step(3 * order.steps_per_epoch + 700_123)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(step.index)) == 1024
    assert peak < 64 * 2**20


def test_sequential_steps_read_each_group_once_and_let_it_go():
    starts, seen = np.array([0, 4, 5, 11, 12]), []
    over: set = set()
    for step in sequential_steps(starts, 3, 2, 12, epoch=0):
        seen += step.index.tolist()
        assert not over & set(step.needs)
        assert [g for *_, g in step.needs] == sorted(set((np.searchsorted(starts, step.index, "right") - 1).tolist()))
        over |= set(step.over)
    assert seen == list(range(2, 12))
    assert over == {(0, 0, group) for group in range(4)}
