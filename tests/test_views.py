"""View parameters: torchvision's distributions, and functions of the image alone."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision.transforms import RandomResizedCrop

from ssl.data.views import JITTER_OPERATIONS, View, make_views

SIMCLR = View(
    flip=0.5,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
    solarize=0.1,
)
CONF = Path(__file__).resolve().parents[1] / "conf" / "augment"


def sample(view, *, num_images=4000, height=375, width=500, size=(224, 224), seed=0, epoch=0, number=0):
    index = np.arange(num_images)
    return view.sample(
        seed=seed,
        epoch=epoch,
        index=index,
        view=number,
        height=np.full(num_images, height),
        width=np.full(num_images, width),
        size=size,
    )


def distance(one, other):
    """The largest difference of the two samples' cumulative distributions (Kolmogorov and Smirnov)."""
    places = np.union1d(one, other)
    shares = [np.searchsorted(np.sort(numbers), places, side="right") / len(numbers) for numbers in (one, other)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (32, 32), (33, 47), (100, 1000), (1000, 60), (5, 200), (1, 1), (3, 2)]
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)])
def test_random_resized_boxes_are_distributed_as_torchvisions(height, width, scale):
    number = 2000
    ours = sample(View(scale=scale), num_images=number, height=height, width=width)["box"]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(number)])
    assert ours.dtype == np.int64
    # 1.95 sqrt(2 / n) is passed once in a thousand times.
    for column in range(4):
        assert distance(ours[:, column], theirs[:, column]) < 1.95 * np.sqrt(2 / number)
    assert distance(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]) < 1.95 * np.sqrt(2 / number)
    assert distance(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]) < 1.95 * np.sqrt(2 / number)
    top, left, box_height, box_width = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_height >= 1).all()
    assert (box_width >= 1).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


@pytest.mark.parametrize(("height", "width"), [(1000, 60), (60, 1000), (101, 10), (10, 101)])
def test_the_box_where_no_try_fits_is_torchvisions(height, width):
    scale = (0.9, 1.0)
    ours = sample(View(scale=scale), num_images=20, height=height, width=width)["box"]
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, (3 / 4, 4 / 3))
    assert (ours == theirs).all()


def test_the_place_of_a_box_is_uniform_and_independent_of_its_size():
    top, left, box_height, box_width = sample(View(), num_images=20_000)["box"].T
    down, across = (top + 0.5) / (375 - box_height + 1), (left + 0.5) / (500 - box_width + 1)  # shares of the free room
    for share in (down, across):
        counts, _ = np.histogram(share, bins=10, range=(0, 1))
        assert abs(counts / 20_000 - 0.1).max() < 0.012
    for one, other in [(down, across), (down, box_height), (down, box_width), (across, box_width)]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_views_do_not_depend_on_batch_composition_or_order():
    number = 200
    rng = np.random.default_rng(0)
    height, width = rng.integers(5, 600, (2, number))
    common = {"seed": 3, "epoch": 2, "view": 1, "size": (64, 96)}
    together = SIMCLR.sample(index=np.arange(number), height=height, width=width, **common)
    assert set(together) == {"box", "flip", "jitter", "jitter_order", *JITTER_OPERATIONS, "grayscale", "blur",
                             "blur_sigma", "solarize"}  # fmt: skip
    for rows in (rng.permutation(number), np.array([7]), np.arange(50, 60)):
        alone = SIMCLR.sample(index=rows, height=height[rows], width=width[rows], **common)
        for name, values in together.items():
            assert len(values) == number
            np.testing.assert_array_equal(alone[name], values[rows])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"number": 1}])
def test_another_seed_epoch_or_view_gives_unrelated_parameters(change):
    one, other = sample(SIMCLR), sample(SIMCLR, **change)
    for name in ("brightness", "hue", "blur_sigma", "flip", "blur", "grayscale"):
        assert abs(np.corrcoef(one[name], other[name])[0, 1]) < 0.06
    for column in range(4):
        assert abs(np.corrcoef(one["box"][:, column], other["box"][:, column])[0, 1]) < 0.06


def test_the_parts_of_a_view_are_independent_of_each_other():
    parameters = sample(SIMCLR)
    columns = np.stack(
        [parameters[name].astype(np.float64) for name in parameters if name not in ("box", "jitter_order")]
    )
    correlation = np.corrcoef(np.concatenate([columns, parameters["box"].T, parameters["jitter_order"].T[:1]]))
    box = slice(len(columns), len(columns) + 4)
    correlation[box, box] = 0  # a box's place depends on its size
    np.fill_diagonal(correlation, 0)
    assert abs(correlation).max() < 0.07


def test_probabilities_are_met():
    parameters = sample(SIMCLR, num_images=20_000)
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        assert parameters[name].dtype == bool
        assert abs(parameters[name].mean() - getattr(SIMCLR, name)) < 0.015


def test_factors_fill_torchvisions_ranges_uniformly():
    view = View(jitter=1, brightness=0.4, contrast=1.5, saturation=0.8, hue=0.1, blur=1, blur_sigma=(0.5, 3.0))
    parameters = sample(view, num_images=20_000)
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.0, 2.5),
        "saturation": (0.2, 1.8),
        "hue": (-0.1, 0.1),
        "blur_sigma": (0.5, 3.0),
    }
    for name, (low, high) in ranges.items():
        values = parameters[name]
        assert values.dtype == np.float32
        assert values.min() >= np.float32(low)
        assert values.max() <= np.float32(high)
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        assert abs(counts / 20_000 - 0.1).max() < 0.012
    assert parameters["jitter"].all()
    assert parameters["blur"].all()


def test_all_24_jitter_orders_are_equally_likely():
    orders = sample(SIMCLR, num_images=24_000)["jitter_order"]
    counts = Counter(map(tuple, orders.tolist()))
    assert set(counts) == set(permutations(range(4)))
    assert max(abs(count - 1000) for count in counts.values()) < 150


def test_what_a_view_does_not_have_is_neither_drawn_nor_returned(monkeypatch):
    drawn = []
    from ssl.data import views

    original = views.uniforms_by_use
    monkeypatch.setattr(views, "uniforms_by_use", lambda *given: drawn.extend(given[3]) or original(*given))
    plain = sample(View(crop="resize"), num_images=3)
    assert set(plain) == {"box", "flip"}
    assert not plain["flip"].any()
    assert drawn == []
    assert set(sample(View(jitter=1, hue=0.1), num_images=3)) == {"box", "flip", "jitter", "jitter_order", "hue"}
    assert drawn == ["view 0 crop", "view 0 jitter_order", "view 0 hue factor"]


def test_a_changed_flip_moves_no_other_part_of_the_view():
    one, other = sample(SIMCLR), sample(View(**{**vars(SIMCLR), "flip": 0.0, "blur": 0.0}))
    for name in set(one) & set(other) - {"flip"}:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_random_box_has_its_fraction_of_each_side_and_lies_anywhere():
    box = sample(View(crop="random", fraction=255 / 292), height=292, width=584, num_images=4000)["box"]
    assert (box[:, 2:] == (255, 510)).all()
    assert set(box[:, 0]) == set(range(38))
    assert set(box[:, 1]) == set(range(75))


@pytest.mark.parametrize(
    ("source", "size", "fraction", "box"),
    [
        ((375, 500), (224, 224), 0.875, (23, 86, 328, 328)),
        ((224, 224), (224, 224), 0.875, (0, 0, 224, 224)),
        ((100, 100), (50, 100), 1.0, (25, 0, 50, 100)),
        ((32, 32), (64, 64), 1.0, (0, 0, 32, 32)),
        ((1, 300), (8, 8), 0.5, (0, 149, 1, 1)),
    ],
)
def test_a_central_box_is_the_part_that_resize_and_center_crop_leave(source, size, fraction, box):
    height, width = source
    given = sample(View(crop="center", fraction=fraction), num_images=2, height=height, width=width, size=size)["box"]
    assert tuple(given[1].tolist()) == box


def test_a_resize_takes_the_whole_image():
    assert sample(View(crop="resize"), num_images=2, height=30, width=77)["box"].tolist() == [[0, 0, 30, 77]] * 2


def test_blur_kernels_have_simclrs_size():
    assert View(blur=1).blur_kernel_size((224, 224)) == 23
    assert View(blur=1).blur_kernel_size((96, 160)) == 9
    with pytest.raises(ValueError, match=r"kernel of 1 pixels for views of 16x16.*set blur=0"):
        View(blur=1).blur_kernel_size((16, 16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop": "middle"}, "crop='middle' is not known; choose one of random_resized, random, center, resize"),
        ({"interpolation": "nearest"}, "choose one of bicubic, bilinear"),
        ({"flip": 1.5}, r"flip is a probability and must lie in 0..1, got 1.5"),
        ({"blur": -0.1}, "blur is a probability"),
        ({"grayscale": "often"}, "grayscale must be a number, got 'often'"),
        ({"flip": None}, "flip must be a number"),
        ({"jitter": 0.8, "brightness": -1}, "brightness is a strength"),
        ({"jitter": 0.8, "hue": 0.6}, r"hue is a share of the colour circle and must lie in 0..0.5"),
        ({"jitter": 0.8}, r"jitter=0.8 has no effect without any of brightness, contrast"),
        ({"hue": 0.1}, "hue have no effect while jitter=0"),
        ({"scale": (0.5, 0.2)}, "scale must be two numbers, low and high"),
        ({"scale": (0.5, 1.2)}, "scale is a share of the image's area"),
        ({"scale": 0.5}, "scale must be two numbers"),
        ({"scale": ("a", "b")}, "scale must be two numbers"),
        ({"ratio": (0.0, 1.0)}, "ratio is width by height"),
        ({"blur_sigma": (0, 1)}, "blur_sigma is in pixels and must be above 0"),
        ({"blur_kernel": 0.0}, "blur_kernel is a share"),
        ({"solarize_threshold": 300}, r"solarize_threshold must lie in 0..255"),
        ({"crop": "center", "fraction": 0.0}, "fraction is a share"),
        ({"fraction": 0.5}, r"fraction=0.5 has no effect with crop=random_resized"),
        ({"crop": "center", "scale": (0.2, 1)}, "scale and ratio have no effect with crop=center"),
    ],
)
def test_values_out_of_range_or_without_effect_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        View(**values)


def test_a_recipe_lists_views_and_count_repeats_one():
    config = OmegaConf.create([{"count": 2, "crop": "random_resized", "scale": [0.2, 1], "flip": 0.5}, {"flip": 1}])
    assert make_views(config) == [View(scale=(0.2, 1.0), flip=0.5)] * 2 + [View(flip=1)]
    assert make_views([{}]) == [View()]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "augment.views is empty"),
        ([{"flipp": 0.5}], "a view has no key flipp; it has count, crop, scale"),
        ([{"count": 0}], "count is how many views"),
    ],
)
def test_a_recipe_that_is_empty_or_misspelt_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_views(config)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_recipe_of_the_repository_makes_its_views(path):
    views = make_views(OmegaConf.load(path).views)
    assert len(views) == (2 if path.stem.startswith("simclr") else 1)
    assert path.read_text().startswith("# ")
    sample(views[0], num_images=2)


def test_simclr_s_recipe_is_the_papers():
    views = make_views(OmegaConf.load(CONF / "simclr.yaml").views)
    assert views == [View(**{**vars(SIMCLR), "solarize": 0.0})] * 2
