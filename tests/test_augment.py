"""The batched photometric operations equal torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as torchvision

from ssl.data import augment
from ssl.data.augment import Augment, denormalize
from ssl.data.views import JITTER_OPERATIONS, View

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERYTHING = View(
    flip=0.5,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.5,
    grayscale=0.2,
    blur=0.5,
    blur_kernel=0.3,
)


def hard_pixels(batch=6, height=21, width=34, seed=0):  # height at least 19
    """Noise, few levels (ties between channels), greys, black, white and fully saturated pixels: uint8 (B, 3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    images[:, :, 3:9] = images[:, :, 3:9] // 64 * 85
    images[:, :, 9:12] = images[:, :1, 9:12]
    images[:, :, 12:15] = images[:, :, 12:15] // 128 * 255
    images[:, :, 15] = 0
    images[:, :, 16] = 255
    images[:, :, 17:19] = images[:, :, 17:19] // 128  # 0 or 1 of 255
    return images


def smooth_pictures(batch, size, seed=0):
    """Pictures with soft shapes, as photographs have: uint8 (B, 3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)


def sample(view, crops, **key):
    number, _, height, width = crops.shape
    arguments = {"seed": 0, "epoch": 0, "view": 0, "index": np.arange(number), **key}
    sides = {"height": np.full(number, height), "width": np.full(number, width), "size": (height, width)}
    return view.sample(**arguments, **sides)


def apply(view, crops, parameters, *, mean=(0, 0, 0), std=(1, 1, 1)):
    parameters = {name: torch.from_numpy(values) for name, values in parameters.items()}
    return Augment([view], mean=mean, std=std)({"crops": [crops], "parameters": [parameters]})["views"][0]


def by_torchvision(view, image, parameters, row):
    """The same operations one after another on one image (C, h, w), in its own type: uint8, or float in 0..1."""
    if parameters["flip"][row]:
        image = torchvision.hflip(image)
    if view.jitter and parameters["jitter"][row]:
        for kind in parameters["jitter_order"][row]:
            name = JITTER_OPERATIONS[kind]
            if name in parameters:
                image = getattr(torchvision, f"adjust_{name}")(image, float(parameters[name][row]))
    if view.grayscale and parameters["grayscale"][row]:
        image = torchvision.rgb_to_grayscale(image, 3)
    if view.blur and parameters["blur"][row]:
        size = view.blur_kernel_size(image.shape[-2:])
        image = torchvision.gaussian_blur(image, [size, size], [float(parameters["blur_sigma"][row])] * 2)
    if view.solarize and parameters["solarize"][row]:
        top = 255 if image.dtype == torch.uint8 else 1
        image = torchvision.solarize(image, view.solarize_threshold / 255 * top)
    return image


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("brightness", [0, 0.2, 0.9, 1, 1.3, 1.8]),
        ("contrast", [0, 0.2, 0.9, 1, 1.3, 1.8]),
        ("saturation", [0, 0.2, 0.9, 1, 1.3, 1.8]),
        ("hue", [-0.5, -0.21, -0.01, 0, 0.17, 0.5]),
    ],
)
def test_each_adjustment_equals_torchvisions(name, factors):
    images = hard_pixels().float() / 255
    expected = torch.stack([getattr(torchvision, f"adjust_{name}")(x, f) for x, f in zip(images, factors, strict=True)])
    getattr(augment, f"adjust_{name}_")(images, torch.tensor(factors)[:, None])
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_hue_equals_torchvisions_for_every_colour_of_a_coarse_cube():
    levels = torch.linspace(0, 1, 18)
    cube = torch.stack(torch.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 18, 18 * 18)
    for turn in torch.linspace(-0.5, 0.5, 25).tolist():
        turned = cube.clone()
        augment.adjust_hue_(turned, torch.tensor([[turn]]))
        torch.testing.assert_close(turned, torchvision.adjust_hue(cube, turn), rtol=0, atol=1e-5)


def test_grayscale_flip_and_solarize_equal_torchvisions():
    crops = hard_pixels()
    images = crops.float() / 255
    changed = images.clone()
    augment.grayscale_(changed)
    torch.testing.assert_close(changed, torchvision.rgb_to_grayscale(images, 3), rtol=0, atol=1e-6)
    for flip in ([True] * 6, [False, True, True, False, False, True], [False] * 6):
        expected = torch.stack([torchvision.hflip(x) if swap else x for x, swap in zip(crops, flip, strict=True)])
        assert torch.equal(augment.with_flips(crops, np.array(flip)), expected)
    thresholds = [0.0, 0.2, 128 / 255, 0.7, 254 / 255, 1.0]
    expected = torch.stack([torchvision.solarize(x, t) for x, t in zip(images, thresholds, strict=True)])
    augment.solarize_(images, torch.tensor(thresholds)[:, None])
    torch.testing.assert_close(images, expected, rtol=0, atol=0)


@pytest.mark.parametrize("blur", [augment._blur_by_slices, augment._blur_by_convolution, None])
@pytest.mark.parametrize("kernel_size", [3, 5, 23])
def test_blur_equals_torchvisions_with_a_sigma_per_image(blur, kernel_size):
    sigma = [0.1, 0.3, 0.8, 1.3, 2.0, 3.7]
    images = hard_pixels(width=15).float() / 255
    expected = torch.stack(
        [torchvision.gaussian_blur(x, [kernel_size] * 2, [s, s]) for x, s in zip(images, sigma, strict=True)]
    )
    weights = torch.from_numpy(augment.gaussian_weights(np.array(sigma), kernel_size))
    for rows in (slice(None), slice(0, 1), slice(2, 4)):  # what is left out depends on the widest of the batch
        part = images[rows].clone()
        if blur:
            part = blur(part, weights[rows])
        else:
            augment.blur_(part, weights[rows])
        torch.testing.assert_close(part, expected[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(72, 21, 34), (100, 32, 32), (5, 224, 200)])
def test_views_equal_torchvisions_float_operations_in_each_images_own_order(shape):
    crops = hard_pixels(*shape)
    parameters = sample(EVERYTHING, crops)
    views = apply(EVERYTHING, crops, parameters)
    assert views.dtype == torch.float32
    for row, crop in enumerate(crops):
        expected = by_torchvision(EVERYTHING, torchvision.to_dtype(crop, torch.float32, scale=True), parameters, row)
        torch.testing.assert_close(views[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", JITTER_OPERATIONS)
def test_each_adjustment_is_within_a_level_or_two_of_torchvisions_on_uint8(name):
    crops = smooth_pictures(40, (40, 40))
    factors = sample(View(jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1), crops)[name]
    rounded = torch.stack([getattr(torchvision, f"adjust_{name}")(x, float(f)) for x, f in zip(crops, factors)])
    images = crops / 255
    getattr(augment, f"adjust_{name}_")(images, torch.from_numpy(factors)[:, None])
    assert (images * 255 - rounded).abs().max() < 1.5


def test_views_are_within_a_level_or_two_of_torchvisions_uint8_operations_for_most_pixels():
    # On uint8, brightness, contrast and saturation drop the fraction, half a level each time: its pictures are darker.
    view = View(flip=0.5, jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5)
    crops = smooth_pictures(100, (40, 40))
    parameters = sample(view, crops)
    rounded = torch.stack([by_torchvision(view, crop, parameters, row) for row, crop in enumerate(crops)])
    levels = apply(view, crops, parameters) * 255 - rounded
    assert 1 < levels.mean() < 2
    assert (levels.abs() <= 3).float().mean() > 0.98
    assert levels.abs().max() < 6


def test_solarize_equals_torchvisions_in_a_view():
    view = View(flip=1, solarize=0.6, solarize_threshold=100, grayscale=0.3)
    crops = hard_pixels(40)
    parameters = sample(view, crops)
    views = apply(view, crops, parameters)
    for row, crop in enumerate(crops):
        expected = by_torchvision(view, torchvision.to_dtype(crop, torch.float32, scale=True), parameters, row)
        unsure = (expected - 100 / 255).abs().minimum((expected - 155 / 255).abs()) < 1e-6
        torch.testing.assert_close(views[row][~unsure], expected[~unsure], rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_the_order_of_the_jitter_is_kept(order):
    view = View(jitter=1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    crops = smooth_pictures(3, (16, 16))
    parameters = sample(view, crops)
    parameters["jitter_order"] = np.tile(order, (3, 1))
    expected = torch.stack(
        [by_torchvision(view, crop.float() / 255, parameters, row) for row, crop in enumerate(crops)]
    )
    torch.testing.assert_close(apply(view, crops, parameters), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cached_pixels", [1, 21 * 34 * 7, 10**9])
def test_views_do_not_depend_on_how_many_images_are_worked_on_at_once(cached_pixels, monkeypatch):
    crops = hard_pixels(64)
    parameters = sample(EVERYTHING, crops)
    expected = apply(EVERYTHING, crops, parameters)
    monkeypatch.setattr(augment, "_CACHED_PIXELS", cached_pixels)
    torch.testing.assert_close(apply(EVERYTHING, crops, parameters), expected, rtol=0, atol=1e-6)


def test_views_do_not_depend_on_batch_composition_or_order():
    crops = hard_pixels(60)
    together = apply(EVERYTHING, crops, sample(EVERYTHING, crops))
    for rows in (np.random.default_rng(0).permutation(60), np.array([31]), np.arange(5, 25)):
        alone = apply(EVERYTHING, crops[rows], sample(EVERYTHING, crops[rows], index=rows))
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-6)


def test_the_same_batch_gives_the_same_bits_and_leaves_its_crops_alone():
    crops = hard_pixels(30)
    before, parameters = crops.clone(), sample(EVERYTHING, crops)
    assert torch.equal(apply(EVERYTHING, crops, parameters), apply(EVERYTHING, crops, parameters))
    assert torch.equal(crops, before)


def test_views_are_normalised_as_torchvisions_and_denormalize_brings_pictures_back():
    crops = hard_pixels()
    view = View(flip=0.5)
    parameters = sample(view, crops)
    normalised = apply(view, crops, parameters, mean=MEAN, std=STD)
    expected = (
        torch.where(torch.from_numpy(parameters["flip"])[:, None, None, None], crops.flip(-1), crops).float() / 255
    )
    torch.testing.assert_close(normalised, torchvision.normalize(expected, MEAN, STD), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denormalize(normalised, MEAN, STD), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(denormalize(normalised[2], MEAN, STD), expected[2], rtol=0, atol=1e-6)


def test_each_view_has_its_own_recipe_and_other_keys_pass_through():
    crops = hard_pixels(4)
    views = [View(flip=1), View()]
    parameters = [{name: torch.from_numpy(values) for name, values in sample(view, crops).items()} for view in views]
    label = torch.arange(4)
    batch = {"crops": [crops, crops], "parameters": parameters, "label": label}
    result = Augment(views, mean=(0, 0, 0), std=(1, 1, 1))(batch)
    assert set(result) == {"views", "label"}
    assert result["label"] is label
    assert set(batch) == {"crops", "parameters", "label"}
    torch.testing.assert_close(result["views"][0], result["views"][1].flip(-1))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_brightness_contrast_and_blur_work_on_any_number_of_channels(channels):
    view = View(flip=0.5, jitter=1, brightness=0.5, contrast=0.5, blur=1, blur_kernel=0.3)
    crops = torch.randint(0, 256, (12, channels, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parameters = sample(view, crops)
    views = apply(view, crops, parameters, mean=[0] * channels, std=[1] * channels)
    assert views.shape == crops.shape
    if channels == 1:  # torchvision takes 1 or 3
        expected = torch.stack([by_torchvision(view, x.float() / 255, parameters, row) for row, x in enumerate(crops)])
        torch.testing.assert_close(views, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("view", "named"),
    [
        (View(jitter=1, hue=0.1, brightness=0.2), "hue"),
        (View(jitter=1, saturation=0.1), "saturation"),
        (View(grayscale=0.2), "grayscale"),
    ],
)
def test_colour_operations_on_other_than_three_channels_are_refused(view, named):
    with pytest.raises(ValueError, match=f"view 1 of the recipe has {named}, which need 3 channels.*the data has 1"):
        Augment([View(), view], mean=[0.5], std=[0.5])


def test_means_and_stds_that_do_not_fit_are_refused():
    for mean, std in [([0.5], [0.5, 0.5]), ([], []), ([0.5], [0.0])]:
        with pytest.raises(ValueError, match="mean and std need one number per channel"):
            Augment([View()], mean=mean, std=std)
    crops = hard_pixels(2)
    with pytest.raises(ValueError, match="crops have 3 channels, but mean and std have 1"):
        apply(View(), crops, sample(View(), crops), mean=[0.5], std=[0.5])


def test_a_blur_that_would_do_nothing_is_refused():
    crops = smooth_pictures(2, (16, 16))
    with pytest.raises(ValueError, match="kernel of 1 pixels"):
        apply(View(blur=1), crops, sample(View(blur=1), crops))


def test_mixed_precision_does_not_reach_the_views():
    crops = hard_pixels(20)
    parameters = sample(EVERYTHING, crops)
    expected = apply(EVERYTHING, crops, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        views = apply(EVERYTHING, crops, parameters)
        weights = torch.from_numpy(augment.gaussian_weights(np.ones(20), 5))
        assert augment._blur_by_convolution(expected, weights).dtype == torch.float32
    assert torch.equal(views, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_made_on_a_gpu_equal_those_made_on_the_cpu():
    crops = hard_pixels(64)
    parameters = sample(EVERYTHING, crops)
    expected = apply(EVERYTHING, crops, parameters)
    module = Augment([EVERYTHING], mean=(0, 0, 0), std=(1, 1, 1)).cuda()
    for place in ("cpu", "cuda"):
        given = {name: torch.from_numpy(values).to(place) for name, values in parameters.items()}
        views = module({"crops": [crops.cuda()], "parameters": [given]})["views"][0]
        torch.testing.assert_close(views.cpu(), expected, rtol=0, atol=1e-5)
