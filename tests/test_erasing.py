"""Random erasing against timm's loop, and its noise against the normal distribution."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing

from ssl.data.augment import Augment
from ssl.data.erasing import erase_
from ssl.data.views import View, erase_box
from ssl.device_noise import key_of, normal_numbers, uniform_numbers
from ssl.randomness import uniforms


def sample(view: View, *, num_images: int = 200, seed: int = 0, epoch: int = 0, first: int = 0, size=(24, 17)):
    index = np.arange(first, first + num_images)
    sides = {"height": np.full(num_images, 30), "width": np.full(num_images, 40)}
    return view.sample(seed=seed, epoch=epoch, index=index, view=0, size=size, **sides)


def timms_box(numbers: list[float], size: tuple[int, int], view: View, share: float) -> tuple[int, int, int, int]:
    """timm's loop, with the numbers that it would draw."""
    (img_h, img_w), areas, aspects, places = size, numbers[:10], numbers[10:20], numbers[20:]
    for attempt in range(10):
        low, high = view.erase_area
        target_area = (low + (high - low) * areas[attempt]) * img_h * img_w * share
        low, high = map(math.log, view.erase_ratio)
        aspect_ratio = math.exp(low + (high - low) * aspects[attempt])
        h = round(math.sqrt(target_area * aspect_ratio))
        w = round(math.sqrt(target_area / aspect_ratio))
        if w < img_w and h < img_h:
            return int(places[0] * (img_h - h + 1)), int(places[1] * (img_w - w + 1)), h, w
    return 0, 0, 0, 0


@pytest.mark.parametrize("area", [(0.02, 1 / 3), (0.3, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("size", [(24, 17), (8, 64)])
def test_boxes_are_those_of_timms_loop(size, area):
    view = View(erase=1.0, erase_area=area)
    draws = uniforms(0, 0, np.arange(500), "any", 22)
    share = np.where(np.arange(500) % 2, 1.0, 1 / 3)
    boxes = erase_box(draws, size, share=share, area=view.erase_area, ratio=view.erase_ratio)
    expected = [timms_box(row, size, view, part) for row, part in zip(draws.astype(np.float64).tolist(), share)]
    np.testing.assert_array_equal(boxes, expected)
    assert (boxes[:, 2] > 0).any()


def test_erased_areas_are_distributed_as_timms():
    number, view = 4000, View(erase=0.25, erase_count=3)
    boxes = sample(view, num_images=number, size=(32, 32))["erase_box"]
    ours = torch.ones(number, 1, 32, 32)
    erase_(ours, boxes, np.zeros(number, np.int64), mode="const")
    random.seed(0)
    theirs = RandomErasing(0.25, max_count=3, mode="const", device="cpu")(torch.ones(number, 1, 32, 32))
    shares = [np.sort((images == 0).float().mean((1, 2, 3)).numpy()) for images in (ours, theirs)]
    assert abs(np.mean(shares[0] > 0) - np.mean(shares[1] > 0)) < 0.03
    quantiles = [np.quantile(share[share > 0], np.linspace(0.05, 0.95, 10)) for share in shares]
    assert abs(quantiles[0] - quantiles[1]).max() < 0.03


def test_the_number_of_boxes_is_uniform_and_shares_the_area():
    view = View(erase=1.0, erase_count=3, erase_area=(0.3, 0.3), erase_ratio=(1.0, 1.0))
    boxes = sample(view, num_images=6000, size=(100, 100))["erase_box"]
    number = (boxes[:, :, 2] > 0).sum(1)
    assert abs(np.bincount(number)[1:] / 6000 - 1 / 3).max() < 0.025
    for count in (1, 2, 3):
        side = round(math.sqrt(0.3 * 10_000 / count))
        assert (boxes[number == count][:, :count, 2:] == side).all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_only_the_boxes_of_chosen_images_change(mode):
    view = View(erase=0.5, erase_mode=mode, erase_count=2)
    parameters = sample(view)
    crops = torch.full((200, 3, 24, 17), 51, dtype=torch.uint8)
    batch = {"crops": [crops], "parameters": [{name: torch.from_numpy(v) for name, v in parameters.items()}]}
    plain = {"crops": [crops], "parameters": batch["parameters"]}
    ours = Augment([view], mean=(0.1,) * 3, std=(0.5,) * 3)(batch)["views"][0]
    before = Augment([View()], mean=(0.1,) * 3, std=(0.5,) * 3)(plain)["views"][0]
    inside = torch.zeros(200, 24, 17, dtype=torch.bool)
    for image, boxes in zip(inside, parameters["erase_box"]):
        for top, left, height, width in boxes:
            image[top : top + height, left : left + width] = True
    assert 0.35 < inside.flatten(1).any(1).float().mean() < 0.65
    erased = ours.permute(0, 2, 3, 1)[inside]  # (T, 3)
    assert torch.equal(ours.permute(0, 2, 3, 1)[~inside], before.permute(0, 2, 3, 1)[~inside])
    if mode == "const":
        assert (erased == 0).all()
    elif mode == "rand":  # a colour for each box
        colours = [ours[k, :, b[0], b[1]] for k, row in enumerate(parameters["erase_box"]) for b in row[:1] if b[2]]
        assert len(torch.stack(colours).unique(dim=0)) == len(colours)
        last = [len(row) - 1 - int(np.argmax(row[::-1, 2] > 0)) for row in parameters["erase_box"]]
        for k, number in enumerate(last):
            top, left, height, width = parameters["erase_box"][k, number]
            part = ours[k, :, top : top + height, left : left + width].flatten(1)
            assert height == 0 or (part == part[:, :1]).all()
    else:
        assert abs(erased.mean()) < 0.02
        assert abs(erased.std() - 1) < 0.02


def test_noise_is_standard_normal_and_independent_between_keys_and_places():
    keys = torch.tensor([0, 1, 2**47, 2**48 - 1])
    numbers = normal_numbers(keys[:, None], torch.arange(50_000)).double()  # (4, 50000)
    assert numbers.isfinite().all()
    for row in numbers:
        ordered = row.sort().values
        theirs = 0.5 * (1 + torch.special.erf(ordered / math.sqrt(2)))
        assert (theirs - torch.arange(1, 50_001) / 50_000).abs().max() < 1.95 / math.sqrt(50_000)
    correlation = torch.corrcoef(torch.cat([numbers[:, :-1], numbers[:, 1:]])) - torch.eye(8)
    assert correlation.abs().max() < 0.02


def test_uniform_numbers_fill_the_range_and_follow_from_their_key():
    keys = key_of(torch.from_numpy(uniforms(0, 0, np.arange(3), "key", 2)))
    assert keys.unique().numel() == 3
    numbers = uniform_numbers(keys[:, None], torch.arange(40_000))  # (3, 40000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for row in numbers:
        counts, _ = np.histogram(row.numpy(), bins=20, range=(0, 1))
        assert abs(counts / 40_000 - 0.05).max() < 0.005
    assert torch.equal(uniform_numbers(keys[1], torch.tensor(7)), numbers[1, 7])


def test_noise_is_a_function_of_the_image_the_epoch_and_the_seed():
    view = View(erase=1.0)

    def erased(rows=slice(None), **changes):
        parameters = {name: values[rows] for name, values in sample(view, num_images=9, **changes).items()}
        images = torch.zeros(len(parameters["erase_key"]), 2, 24, 17)
        erase_(images, parameters["erase_box"], parameters["erase_key"], mode="pixel")
        return images

    together = erased()
    assert torch.equal(erased(slice(4, 5)), together[4:5])
    assert torch.equal(erased(np.array([7, 2])), together[[7, 2]])
    for change in ({"seed": 1}, {"epoch": 1}, {"first": 9}):
        assert not torch.equal(erased(**change), together)


def test_chunks_of_a_batch_do_not_change_what_is_erased(monkeypatch):
    view = View(erase=0.7, jitter=0.5, brightness=0.4)
    crops = torch.randint(0, 256, (40, 3, 24, 17), generator=torch.manual_seed(0)).to(torch.uint8)
    batch = {"crops": [crops], "parameters": [sample(view, num_images=40)]}
    module = Augment([view], mean=(0.5,) * 3, std=(0.2,) * 3)
    whole = module(batch)["views"][0]
    monkeypatch.setattr("ssl.data.augment._CACHED_PIXELS", 24 * 17 * 7)
    assert torch.equal(module(batch)["views"][0], whole)


def test_erasing_moves_no_other_number_of_the_view():
    plain, erasing = sample(View(flip=0.5, blur=0.5)), sample(View(flip=0.5, blur=0.5, erase=0.25))
    assert set(erasing) - set(plain) == {"erase_box", "erase_key"}
    for name, values in plain.items():
        np.testing.assert_array_equal(erasing[name], values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"erase": 1.5}, "erase is a probability"),
        ({"erase": 0.5, "erase_mode": "noise"}, "choose one of const, rand, pixel"),
        ({"erase": 0.5, "erase_count": 0}, "whole number from 1 on, got 0"),
        ({"erase": 0.5, "erase_count": 1.5}, "whole number from 1 on, got 1.5"),
        ({"erase": 0.5, "erase_area": (0.1, 1.5)}, "erase_area is a share of the view"),
        ({"erase": 0.5, "erase_ratio": (0.0, 1.0)}, "erase_ratio is height by width"),
        ({"erase_mode": "rand", "erase_count": 2}, "erase_mode, erase_count have no effect while erase=0"),
    ],
)
def test_impossible_erasing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        View(**values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_erases_what_a_cpu_erases():
    parameters = sample(View(erase=1.0, erase_count=2), num_images=20)
    for mode in ("const", "rand", "pixel"):
        ours, theirs = torch.zeros(20, 3, 24, 17, device="cuda"), torch.zeros(20, 3, 24, 17)
        for images in (ours, theirs):
            erase_(images, parameters["erase_box"], parameters["erase_key"], mode=mode)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
