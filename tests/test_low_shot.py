"""Few images per class: how many, which, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from eval.low_shot import draw

LABELS = np.repeat([0, 1, 2], [1000, 130, 3])[np.random.default_rng(0).permutation(1133)]


def counts(indices: np.ndarray) -> list[int]:
    return np.bincount(LABELS[indices], minlength=3).tolist()


@pytest.mark.parametrize(
    ("amount", "expected"),
    [("1%", [10, 1, 1]), ("10%", [100, 13, 1]), ("0.5 %", [5, 1, 1]), (1, [1, 1, 1]), ("20", [20, 20, 3])],
)
def test_each_class_gives_its_share_or_its_number_and_at_least_one(amount, expected):
    indices = draw(LABELS, amount, seed=0)
    assert counts(indices) == expected
    assert (np.diff(indices) > 0).all()


def test_the_seed_decides_and_a_larger_amount_keeps_the_images_of_a_smaller():
    ten = draw(LABELS, 10, seed=3)
    assert np.array_equal(ten, draw(LABELS, 10, seed=3))
    assert not np.array_equal(ten, draw(LABELS, 10, seed=4))
    assert np.isin(draw(LABELS, 5, seed=3), ten).all()


def test_over_seeds_each_image_of_a_class_is_drawn_equally_often():
    labels = np.repeat([0, 1], 10)
    drawn = np.bincount(np.concatenate([draw(labels, 3, seed=seed) for seed in range(1000)]), minlength=20)
    assert drawn.sum() == 6000
    assert np.abs(drawn - 300).max() < 5 * np.sqrt(1000 * 0.3 * 0.7)


def test_multi_label_images_count_for_their_rarest_class():
    labels = np.zeros((90, 3), np.int64)
    labels[:, 0] = 1  # every image is of class 0, a third also of class 1, six also of class 2
    labels[:30, 1] = 1
    labels[:6, 2] = 1
    drawn = labels[draw(labels, 4, seed=0)]
    assert len(drawn) == 12
    assert drawn[:, 2].sum() == 4
    assert drawn[:, 1].sum() == 8


@pytest.mark.parametrize("amount", ["0%", "100%", 0, -1, "many", "1.5", ""])
def test_other_amounts_are_refused(amount):
    with pytest.raises(ValueError, match="no amount of images per class"):
        draw(LABELS, amount, seed=0)


def test_an_amount_that_takes_every_image_is_refused():
    with pytest.raises(ValueError, match="all of the 1133 images, the largest class has 1000"):
        draw(LABELS, 1000, seed=0)
