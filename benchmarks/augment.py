"""The peers' way of changing colours, blurring and normalising beside ours: torchvision per sample on Pillow images.

    python -m benchmarks.augment

Each row takes the same uint8 crops through the recipe of a file of `conf/augment/`, the two ways in turns, `--rounds`
times, on one thread. Times are CPU seconds of this process, which a busy machine disturbs less than the clock; a ratio
is one of a round's two times, and the median and range over the rounds are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision import transforms

from ssl.data.augment import Augment
from ssl.data.views import View, make_views

CONF = Path(__file__).resolve().parents[1] / "conf" / "augment"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def peers_transform(view: View, size: int) -> transforms.Compose:
    """torchvision's transforms for everything of a view's recipe but the crop."""
    steps: list[Callable] = [transforms.RandomHorizontalFlip(view.flip)]
    if view.jitter:
        jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(transforms.RandomApply([jitter], view.jitter))
    if view.grayscale:
        steps.append(transforms.RandomGrayscale(view.grayscale))
    if view.blur:
        blur = transforms.GaussianBlur(view.blur_kernel_size((size, size)), view.blur_sigma)
        steps.append(transforms.RandomApply([blur], view.blur))
    return transforms.Compose(steps)


def peers_way(view: View, crops: Tensor, *, pillow: bool) -> Callable[[], None]:
    """Each crop by itself: on Pillow images as the peers ship it, or on float tensors, as exact as ours."""
    size, change = crops.shape[-1], peers_transform(view, crops.shape[-1])
    finish = transforms.Normalize(MEAN, STD)
    if pillow:
        images: list = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in crops]
        steps = [change, transforms.ToTensor(), finish]
    else:
        images = list(crops)
        steps = [lambda crop: crop / 255, change, finish]
    per_sample = transforms.Compose(steps)

    def run() -> None:
        result = torch.empty(len(images), 3, size, size)
        for row, image in enumerate(images):
            result[row] = per_sample(image)

    return run


def our_way(view: View, crops: Tensor) -> Callable[[], None]:
    """Parameters for the whole batch, then the batched operations."""
    module = Augment([view], mean=MEAN, std=STD)
    batch, _, height, width = crops.shape
    sides = {"height": np.full(batch, height), "width": np.full(batch, width), "size": (height, width)}
    epoch = iter(range(10**9))

    def run() -> None:
        parameters = view.sample(seed=0, epoch=next(epoch), index=np.arange(batch), view=0, **sides)
        given = {name: torch.from_numpy(values) for name, values in parameters.items()}
        module({"crops": [crops], "parameters": [given]})

    return run


def cpu_seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def pictures(batch: int, size: int) -> Tensor:
    """Soft shapes with some noise, as photographs have: uint8 (B, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    shapes = functional.interpolate(torch.rand(batch, 3, 7, 7, generator=generator), (size, size), mode="bicubic")
    noise = 0.05 * torch.randn(shapes.shape, generator=generator)
    return (shapes + noise).clamp(0, 1).mul(255).to(torch.uint8)


def recipe(name: str) -> View:
    return make_views(OmegaConf.load(CONF / f"{name}.yaml").views)[0]


def main() -> None:
    """Print a table of the rows below."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    large, small = recipe("simclr"), recipe("simclr_small")
    rows = [
        ("SimCLR colour, blur, normalise, 224 px", large, 48, 224),
        ("the same without blur", replace(large, blur=0.0), 48, 224),
        ("blur alone", View(blur=1.0), 24, 224),
        ("hue alone", View(jitter=1.0, hue=0.2), 48, 224),
        ("MAE flip, normalise, 224 px", recipe("mae"), 48, 224),
        ("SimCLR colour, normalise, 32 px", small, 512, 32),
    ]
    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, {arguments.rounds} rounds; images per CPU second"
    )
    print(f"{'':40}{'Pillow':>10}{'float':>10}{'ours':>10}   ours : Pillow        ours : float")
    for title, view, batch, size in rows:
        crops = pictures(batch, size)
        ways = [peers_way(view, crops, pillow=True), peers_way(view, crops, pillow=False), our_way(view, crops)]
        for way in ways:
            way()
        rounds = [[batch / cpu_seconds(way) for way in ways] for _ in range(arguments.rounds)]
        rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
        text = f"{title:40}" + "".join(f"{rate:10,.0f}" for rate in rates)
        for other in (0, 1):
            ratios = [one[2] / one[other] for one in rounds]
            text += f"   {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(text, flush=True)


if __name__ == "__main__":
    main()
