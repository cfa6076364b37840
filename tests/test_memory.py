from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ssl.data.bad_images import BadList
from ssl.data.batched_resize import crop_resize_batch, resize_taps
from ssl.data.decode import crop_resize
from ssl.data.memory import common_size, hold
from tests.image_list import ImageList, png


def random_boxes(generator: np.random.Generator, num: int, height: int, width: int) -> np.ndarray:
    h, w = generator.integers(1, height + 1, num), generator.integers(1, width + 1, num)
    return np.stack((generator.integers(0, height - h + 1), generator.integers(0, width - w + 1), h, w), axis=1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "target"), [((32, 32), (32, 32)), ((40, 23), (17, 31)), ((9, 64), (32, 5)), ((64, 40), (260, 9))]
)
def test_batched_crops_equal_torchs_antialiased_resize_to_one_level(interpolation, source, target):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 3, *source), dtype=np.uint8)
    pixels[::2] = np.where(pixels[::2] > 127, 255, 0)  # the edges at which a cubic overshoots
    box = random_boxes(generator, 64, *source)
    ours = crop_resize_batch(torch.from_numpy(pixels), torch.from_numpy(box), target, interpolation=interpolation)
    for image, place, crop in zip(pixels, box, ours.numpy()):
        expected = crop_resize(
            np.ascontiguousarray(image.transpose(1, 2, 0)), tuple(place.tolist()), target, interpolation
        )
        assert np.abs(crop.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("length", "target"), [(1, 4), (7, 7), (13, 5), (16, 31)])
def test_weights_are_those_of_float_interpolate(interpolation, length, target):
    start, source = 3, 20
    unit = torch.eye(length)[:, None, :, None].repeat(1, 1, 1, 2)  # torch 2.15 resizes a single column wrongly
    expected = interpolate(unit, (target, 2), mode=interpolation, antialias=True)[:, 0, :, 0].T  # (target, length)
    (place,), (weight,) = resize_taps(
        torch.tensor([start]), torch.tensor([length]), source=source, target=target, interpolation=interpolation
    )
    weights = torch.zeros(target, source).scatter_add_(1, place.long(), weight)
    torch.testing.assert_close(weights[:, start : start + length], expected, atol=1e-5, rtol=0)
    assert weights[:, :start].abs().max() == 0
    assert weights[:, start + length :].abs().max() == 0


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_the_target_size_are_copies(interpolation):
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (5, 3, 16, 12), dtype=np.uint8)
    box = np.array([[k, 4 - k, 10, 8] for k in range(5)])
    ours = crop_resize_batch(torch.from_numpy(pixels), torch.from_numpy(box), (10, 8), interpolation=interpolation)
    for image, (top, left, height, width), crop in zip(pixels, box, ours.numpy()):
        np.testing.assert_array_equal(crop, image[:, top : top + height, left : left + width])


def test_unknown_interpolation_is_refused():
    box = torch.tensor([[0, 0, 2, 2]])
    with pytest.raises(ValueError, match="bilinear or bicubic, got 'area'"):
        crop_resize_batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), box, (2, 2), interpolation="area")


def held(images: list, *, limit_gib: float = 1.0, threads: int = 2, max_fraction: float = 0.5):
    source = ImageList(images)
    bad = BadList(source, seed=0, max_fraction=max_fraction)
    return hold(source, channels=3, limit_gib=limit_gib, num_threads=threads, bad=bad), bad


def test_equal_images_are_held_as_one_tensor():
    generator = np.random.default_rng(2)
    images = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(70)]
    memory, _ = held([png(image) for image in images])
    assert memory.pixels.shape == (70, 3, 6, 8)
    np.testing.assert_array_equal(memory.pixels, np.stack(images).transpose(0, 3, 1, 2))


def test_images_of_different_sizes_are_held_flat():
    generator = np.random.default_rng(3)
    images = [generator.integers(0, 256, (5 + k % 3, 7 + k % 4, 3), dtype=np.uint8) for k in range(70)]
    memory, _ = held([png(image) for image in images])
    assert memory.pixels.ndim == 1
    assert memory.num_bytes == sum(image.nbytes for image in images)
    for index, image in enumerate(images):
        np.testing.assert_array_equal(memory.image(index), image)


def test_one_odd_image_that_the_sample_of_sizes_missed_is_kept():
    images = [np.full((4, 4, 3), k % 256, np.uint8) for k in range(600)]
    images[1] = np.full((5, 4, 3), 77, np.uint8)  # the sample takes 256 of 600
    memory, bad = held(images)
    assert memory.pixels.ndim == 1
    assert bad.messages == {}
    assert memory.image(1).shape == (5, 4, 3)
    np.testing.assert_array_equal(memory.image(599), images[599])


def test_a_set_beyond_the_limit_is_not_held():
    images = [np.zeros((8, 8, 3), np.uint8)] * 100
    needed = 100 * 8 * 8 * 3 / 2**30
    assert held(images, limit_gib=needed)[0] is not None
    assert held(images, limit_gib=needed * 0.99)[0] is None
    assert held(images, limit_gib=0)[0] is None


def test_a_set_whose_sample_was_too_small_is_given_up_at_the_limit():
    images = [np.zeros((2 + k % 2, 2, 3), np.uint8) for k in range(600)]
    sampled = set(np.linspace(0, 599, 256).astype(int))
    images = [image if k in sampled else np.zeros((50, 50, 3), np.uint8) for k, image in enumerate(images)]
    assert held(images, limit_gib=100_000 / 2**30)[0] is None


def test_a_bad_image_is_listed_with_its_path():
    images = [png(np.zeros((4, 4, 3), np.uint8))] * 9 + [b"not an image"]
    memory, bad = held(images)
    assert memory is not None
    assert list(bad.messages) == [9]
    assert "image_9" in bad.messages[9]


def test_common_size_is_none_where_sizes_differ():
    assert common_size(ImageList([np.zeros((4, 6, 3), np.uint8)] * 3)) == (4, 6)
    assert common_size(ImageList([np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)])) is None


def test_crops_do_not_depend_on_those_made_before_in_the_same_memory():
    generator = np.random.default_rng(4)
    pixels = torch.from_numpy(generator.integers(0, 256, (9, 3, 16, 12), dtype=np.uint8))
    box = torch.from_numpy(random_boxes(generator, 9, 16, 12))
    for interpolation in ("bicubic", "bilinear"):
        first = crop_resize_batch(pixels, box, (10, 8), interpolation=interpolation)
        before = first.clone()
        crop_resize_batch(255 - pixels, box.flip(0), (10, 8), interpolation=interpolation)
        one_by_one = [
            crop_resize_batch(image[None], place[None], (10, 8), interpolation=interpolation)[0]
            for image, place in zip(pixels, box)
        ]
        assert torch.equal(first, before)  # what was returned is not written to again
        assert torch.equal(first, torch.stack(one_by_one))
