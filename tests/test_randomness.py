"""Random numbers are functions of (seed, epoch, index, use), uniform and independent."""

from __future__ import annotations

import time
from zlib import crc32

import numpy as np
import pytest

from ssl.randomness import philox, shuffle, step_seed, uniforms, uniforms_by_use


# Random123's kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    assert tuple(philox(counter, key)) == expected
    many = philox((np.full(5, counter[0]), *counter[1:]), key)
    assert many.shape == (5, 4)
    assert (many == expected).all()


def test_uniforms_agree_with_a_scalar_philox():
    index = 7 * 2**33 + 5
    values = uniforms(3, 2, np.array([index]), "crop", 6)[0]
    words = [*philox((index & 0xFFFFFFFF, index >> 32, 0, 2), (3, crc32(b"crop")))]
    words += [*philox((index & 0xFFFFFFFF, index >> 32, 1, 2), (3, crc32(b"crop")))]
    assert values.tolist() == [float(word >> 8) / 2**24 for word in words[:6]]


def test_uniforms_do_not_depend_on_batch_composition_or_order():
    index = np.arange(100)
    together = uniforms(0, 3, index, "flip", 5)
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(uniforms(0, 3, index[order], "flip", 5), together[order])
    np.testing.assert_array_equal(uniforms(0, 3, index[17:18], "flip", 5), together[17:18])
    np.testing.assert_array_equal(uniforms(0, 3, index, "flip", 2), together[:, :2])


def test_uniforms_of_many_uses_at_once_are_those_of_each():
    index = np.array([5, 0, 2**40])
    counts = {"crop": 22, "flip": 1, "nothing": 0, "jitter_order": 4, "noise": 9}
    together = uniforms_by_use(1, 2, index, counts)
    assert list(together) == list(counts)
    for use, count in counts.items():
        np.testing.assert_array_equal(together[use], uniforms(1, 2, index, use, count))
    assert uniforms_by_use(1, 2, index, {}) == {}


def test_uniforms_are_float32_in_the_half_open_unit_interval():
    values = uniforms(1, 0, np.arange(50_000), "noise", 4)
    assert values.dtype == np.float32
    assert values.shape == (50_000, 4)
    assert values.min() >= 0
    assert values.max() < 1
    assert uniforms(1, 0, np.arange(0), "noise", 4).shape == (0, 4)
    assert uniforms(1, 0, np.arange(3), "noise", 0).shape == (3, 0)


@pytest.mark.parametrize("along", ["images", "numbers", "epochs", "seeds", "uses"])
def test_uniforms_are_uniform_along_every_argument(along):
    some = np.array([12345])
    values = {
        "images": lambda: uniforms(0, 0, np.arange(20_000), "a", 1),
        "numbers": lambda: uniforms(0, 0, some, "a", 20_000),
        "epochs": lambda: np.concatenate([uniforms(0, epoch, some, "a", 8) for epoch in range(500)]),
        "seeds": lambda: np.concatenate([uniforms(seed, 0, some, "a", 8) for seed in range(500)]),
        "uses": lambda: np.concatenate([uniforms(0, 0, some, f"use {n}", 8) for n in range(500)]),
    }[along]()
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    chi_square = ((counts - values.size / 50) ** 2 / (values.size / 50)).sum()
    assert 23 < chi_square < 85  # 49 degrees of freedom: 0.1 % on either side


def test_uses_epochs_seeds_views_and_neighbours_are_uncorrelated():
    index = np.arange(20_000)
    base = uniforms(0, 0, index, "view 0 crop", 2)
    others = [
        base[:, 1],
        np.roll(base[:, 0], 1),
        uniforms(0, 0, index, "view 1 crop", 1)[:, 0],
        uniforms(0, 0, index, "view 0 flip", 1)[:, 0],
        uniforms(0, 1, index, "view 0 crop", 1)[:, 0],
        uniforms(1, 0, index, "view 0 crop", 1)[:, 0],
    ]
    for other in others:
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < 4 / np.sqrt(index.size)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_outside_one_word_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must lie in 0..4294967295, got {seed}"):
        uniforms(seed, 0, np.arange(2), "a", 1)


def test_negative_indices_are_refused():
    with pytest.raises(ValueError, match="image indices"):
        uniforms(0, 0, np.array([3, -1]), "a", 1)


@pytest.mark.parametrize("size", [*range(1, 40), 97, 100, 101, 255, 256, 257, 1000, 4095, 5000, 9973])
def test_shuffle_is_a_bijection(size):
    for seed, epoch in [(0, 0), (5, 3)]:
        assert sorted(shuffle(seed, epoch, size, np.arange(size))) == list(range(size))


def test_shuffle_does_not_depend_on_which_positions_are_asked_for():
    order = shuffle(1, 2, 1003, np.arange(1003))
    some = np.array([[1002, 0, 500], [7, 7, 3]])
    np.testing.assert_array_equal(shuffle(1, 2, 1003, some), order[some])


def test_shuffle_differs_by_seed_epoch_and_size():
    orders = [shuffle(*key, np.arange(1000)) for key in [(0, 0, 1000), (0, 1, 1000), (1, 0, 1000), (0, 0, 1001)]]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


@pytest.mark.parametrize("size", [3, 4])
def test_shuffle_reaches_every_order_of_few_images_about_equally_often(size):
    num_epochs = 4800
    orders = [tuple(shuffle(0, epoch, size, np.arange(size)).tolist()) for epoch in range(num_epochs)]
    num_orders = {3: 6, 4: 24}[size]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == num_orders
    assert counts.min() > 0.5 * num_epochs / num_orders
    assert counts.max() < 1.6 * num_epochs / num_orders


@pytest.mark.parametrize("size", [30, 37])
def test_shuffle_puts_each_image_at_each_position_equally_often(size):
    num_epochs = 3000
    orders = np.stack([shuffle(0, epoch, size, np.arange(size)) for epoch in range(num_epochs)])  # (E, size)
    counts = np.stack([np.bincount(orders[:, position], minlength=size) for position in range(size)])
    expected = num_epochs / size
    freedom = (size - 1) ** 2
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)
    # Neighbours in an epoch are no more often neighbours in the set than chance has it.
    neighbours = (np.abs(np.diff(orders, axis=1)) == 1).mean()
    assert abs(neighbours - 2 / size) < 0.1 * 2 / size


def test_shuffle_of_a_thousand_million_images_costs_no_more_than_of_a_thousand():
    for size in (10**9, 2**40 + 7):
        order = shuffle(0, 0, size, np.arange(size - 4096, size))
        assert len(set(order.tolist())) == 4096
        assert order.min() >= 0
        assert order.max() < size
        assert abs(order.mean() / size - 0.5) < 0.03

    def seconds(size):
        started = time.perf_counter()
        shuffle(0, 0, size, np.arange(512))
        return time.perf_counter() - started

    assert min(seconds(10**9) for _ in range(5)) < 20 * min(seconds(1000) for _ in range(5))


def test_shuffle_refuses_positions_outside_the_set():
    with pytest.raises(ValueError, match=r"order of 10 images must lie in 0..9, got 3..10"):
        shuffle(0, 0, 10, np.array([3, 10]))


def test_step_seeds_are_63_bits_and_differ():
    seeds = [
        step_seed(seed, step, rank, part) for seed in (0, 1) for step in range(20) for rank in (0, 1) for part in (0, 1)
    ]
    seeds += [step_seed(0), step_seed(0, 0), step_seed(0, 0, 0), step_seed(0, 2**40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60
    assert step_seed(0, 5, 1) == step_seed(0, 5, 1)
