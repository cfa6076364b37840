"""The embedded data: deterministic, balanced, and hard for raw pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ssl.data.embedded import SHAPES, Embedded, render

CONF = Path(__file__).resolve().parents[1] / "conf" / "data"


def knn_accuracy(train: Embedded, test: Embedded, *, k: int = 20, temperature: float = 0.07) -> float:
    """Weighted cosine kNN on centred raw pixels."""
    features = [
        np.stack([source.read(i) for i in range(len(source))]).reshape(len(source), -1) for source in (train, test)
    ]
    mean = features[0].mean(0)
    features = [part - mean for part in features]
    bank, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in features)
    similarity = queries @ bank.T
    nearest = np.argsort(-similarity, axis=1)[:, :k]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    votes = np.stack([(weight * (train.labels[nearest] == label)).sum(1) for label in range(len(SHAPES))], axis=1)
    return float((votes.argmax(1) == test.labels).mean())


def test_an_image_depends_on_nothing_but_seed_split_and_index():
    index = np.array([5, 300, 131])
    together = Embedded(num_train=400)
    alone = [render(index[i : i + 1], split="train", size=32, seed=0)[0] for i in range(3)]
    np.testing.assert_array_equal(np.stack([together.read(i) for i in index]), np.stack(alone))
    np.testing.assert_array_equal(together.read(5), Embedded(num_train=6).read(5))
    assert (together.read(5) != Embedded(num_train=6, seed=1).read(5)).any()
    assert (together.read(5) != Embedded("test", num_test=6).read(5)).any()


def test_pixels_are_those_of_the_first_release():
    """A golden sum, within the rounding of other processors: changing the pictures changes every reported figure."""
    images = render(np.arange(24), split="train", size=32, seed=0)
    assert images.mean() == pytest.approx(123.850, abs=0.02)
    golden = [[49, 48, 52, 51], [46, 58, 52, 127], [46, 130, 49, 135], [49, 49, 50, 52]]
    assert np.abs(images[7, ::8, ::8, 1].astype(int) - golden).max() <= 1


def test_classes_are_balanced_in_every_prefix():
    source = Embedded(num_train=100)
    assert source.classes == list(SHAPES)
    assert len(source.classes) >= 10
    for count in (12, 37, 100):
        counts = np.bincount(source.labels[:count], minlength=len(SHAPES))
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("size", [8, 33, 96, 224])
def test_any_size_shows_the_same_pictures(size):
    images = render(np.arange(4), split="train", size=size, seed=0)
    assert images.shape == (4, size, size, 3)
    assert images.dtype == np.uint8
    coarse = render(np.arange(4), split="train", size=32, seed=0)
    assert np.abs(images.mean((1, 2)) - coarse.mean((1, 2))).max() < 12


def test_images_that_do_not_fit_in_memory_are_made_when_read(monkeypatch):
    held = Embedded(num_train=20)
    monkeypatch.setattr("ssl.data.embedded._HELD_BYTES", 0)
    made = Embedded(num_train=20)
    for index in (0, 7, 19):
        np.testing.assert_array_equal(held.read(index), made.read(index))


def test_knn_on_raw_pixels_does_poorly():
    accuracy = knn_accuracy(Embedded(), Embedded("test", num_test=600))
    assert accuracy < 0.40
    assert accuracy > 1.5 / len(SHAPES)  # the classes are in the pixels


def test_colour_says_nothing_about_the_class():
    source = Embedded(num_train=2400)
    colour = np.stack([source.read(i).mean((0, 1)) for i in range(len(source))])
    by_class = np.stack([colour[source.labels == label].mean(0) for label in range(len(SHAPES))])
    assert np.abs(by_class - colour.mean(0)).max() < 12  # of 255; the spread within a class is about 30


def test_every_shape_covers_several_cells_of_a_grid():
    axis = np.linspace(-1, 1, 201)
    u, v = np.meshgrid(axis, axis)
    for name, shape in SHAPES.items():
        inside = shape(u, v) < 0
        assert 0.15 < inside.mean() < 0.7, name
        assert np.ptp(u[inside]) > 1.3, name
        assert np.ptp(v[inside]) > 0.75, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "one of train, test"),
        ({"size": 4}, "at least 8 pixels"),
        ({"num_train": 0}, "at least 1 image"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Embedded(**arguments)


def test_config_builds_it():
    node = OmegaConf.load(CONF / "embedded.yaml")
    source = instantiate(OmegaConf.create({"data": node}).data.source, split="test")
    assert len(source) == node.source.num_test
    pixels = np.stack([source.read(i) for i in range(len(source))]) / 255
    np.testing.assert_allclose(node.mean, pixels.mean((0, 1, 2)), atol=0.02)
    np.testing.assert_allclose(node.std, pixels.std((0, 1, 2)), atol=0.02)
