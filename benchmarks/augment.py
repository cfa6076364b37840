"""The peers' way of changing colours, blurring and normalising beside ours: torchvision per sample on Pillow images.

    python -m benchmarks.augment

Each row takes the same uint8 crops through the recipe of a file of `conf/augment/`, on one thread unless told. How it
is measured stands in benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision import transforms

from benchmarks.compare import Part, Way, parser_of, run, timed
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


def pictures(batch: int, size: int) -> Tensor:
    """Soft shapes with some noise, as photographs have: uint8 (B, 3, size, size)."""
    generator = torch.Generator().manual_seed(0)
    shapes = functional.interpolate(torch.rand(batch, 3, 7, 7, generator=generator), (size, size), mode="bicubic")
    noise = 0.05 * torch.randn(shapes.shape, generator=generator)
    return (shapes + noise).clamp(0, 1).mul(255).to(torch.uint8)


def recipe(name: str) -> View:
    return make_views(OmegaConf.load(CONF / f"{name}.yaml").views)[0]


PILLOW, FLOAT = "torchvision on Pillow", "torchvision on floats"
QUICK = ["--batch-size", "8"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=9)
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--batch-size", type=int, default=48, help="crops of 224 pixels; of 32 pixels ten times as many"
    )
    return parser


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """A part for each recipe, and for the operations that cost most."""
    large, small = recipe("simclr"), recipe("simclr_small")
    for name, view, size in (
        ("SimCLR colour, blur, normalise, 224 px", large, 224),
        ("the same without blur, 224 px", replace(large, blur=0.0), 224),
        ("blur alone, 224 px", View(blur=1.0), 224),
        ("hue alone, 224 px", View(jitter=1.0, hue=0.2), 224),
        ("MAE flip, normalise, 224 px", recipe("mae"), 224),
        ("SimCLR colour, normalise, 32 px", small, 32),
    ):
        batch = given.batch_size * (10 if size == 32 else 1)
        yield Part(name, "views", batch, partial(ways, view, batch, size))


def ways(view: View, batch: int, size: int) -> dict[str, Way]:
    """All start from the same crops."""
    torch.manual_seed(0)
    crops = pictures(batch, size)
    pillow, on_floats = (peers_way(view, crops, pillow=pillow) for pillow in (True, False))
    return {PILLOW: timed(pillow), FLOAT: timed(on_floats), "ours": timed(our_way(view, crops))}


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
