"""What the looks that explain a score share: how long it will take, what is drawn, and how a map is put to the test.

The test covers the pixels that a map marks with the mean colour, and then a region of the same shape elsewhere: a map
that says something about the network finds where that moves the score more (after Samek et al. 2015, arXiv:1509.06321).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.look.drawing import captioned, colours_end, overlay, resized
from eval.look.result import Look
from eval.look.target import Score, Target

if TYPE_CHECKING:
    from eval.look.samples import Shown
    from eval.look.scene import Scene

BATCH = 64
"""Images that go through the network at once, where nothing else is said."""
SHARE = 0.1
"""Of the pixels that are covered in the test."""
DRAWS = 8
"""Random places for the region of the same shape."""


def rows_of(image: Tensor) -> Tensor:
    """The number of each image in its batch, (B,)."""
    return torch.arange(len(image), device=image.device)


def in_batches(compute: Callable[[Score, Tensor], Tensor], score: Score, image: Tensor, batch_size: int) -> Tensor:
    """What `compute` gives for a score and images (B, C, H, W), (B, ...), at most `batch_size` images at a time."""
    parts = []
    for first in range(0, len(image), batch_size):

        def of_part(variant: Tensor, rows: Tensor, first: int = first) -> Tensor:
            return score(variant, rows + first)

        parts.append(compute(of_part, image[first : first + batch_size]))
    return torch.cat(parts)


@torch.no_grad()
def scores_of(score: Score, image: Tensor, *, batch_size: int = BATCH) -> Tensor:
    """The score of each image itself, (B,)."""
    return in_batches(lambda part, some: part(some, rows_of(some)), score, image, batch_size)


def start(name: str, score: Score, image: Tensor, *, num: int, gradient: bool = True) -> None:
    """Say how many passes of one image follow and about how long they take, measured on one batch.

    Where they end at an earlier layer than the score, they take less.
    """
    passes = "forward and backward passes" if gradient else "forward passes"
    seconds = seconds_per_image(score, image, gradient=gradient) * num
    print(f"{name}: {num:,} {passes} of one image, about {seconds:.0f} s", flush=True)


def seconds_per_image(score: Score, image: Tensor, *, gradient: bool) -> float:
    """How long a pass takes, measured on a batch after one that warms up."""
    took = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            given = image.detach().clone().requires_grad_(gradient)
            value = score(given, rows_of(image)).sum()
            if gradient:
                torch.autograd.grad(value, given)
        if image.device.type == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    return took / len(image)


@torch.no_grad()
def deletion(
    score: Score, image: Tensor, heat: np.ndarray, *, share: float = SHARE, seed: int = 0, batch_size: int = BATCH
) -> dict[str, float]:
    """How far the score moves, either way, where the `share` of pixels of which maps (B, h, w) are greatest is
    covered: `marked`; and where that region, rolled over the borders, is covered elsewhere, in the mean: `elsewhere`.
    """
    size = (image.shape[2], image.shape[3])
    whole = scores_of(score, image, batch_size=batch_size)  # (B,)
    seen = 1 - region(heat, size, share=share).to(image)  # (B, 1, H, W)
    marked = (whole - scores_of(score, image * seen, batch_size=batch_size)).abs()  # 0 is the mean colour
    generator = np.random.default_rng(seed)
    elsewhere = []
    for _ in range(DRAWS):
        moved = seen.roll([int(generator.integers(side)) for side in size], dims=(2, 3))
        elsewhere.append((whole - scores_of(score, image * moved, batch_size=batch_size)).abs())
    return {"marked": float(marked.mean()), "elsewhere": float(torch.stack(elsewhere).mean())}


def region(heat: np.ndarray, size: tuple[int, int], *, share: float) -> Tensor:
    """1 where maps (B, h, w), brought to a size, are greatest, for that share of the pixels, else 0: (B, 1, H, W)."""
    count = max(round(share * math.prod(size)), 1)
    scaled = torch.stack([torch.as_tensor(resized(each, size)) for each in heat]).flatten(1)  # (B, H*W)
    best = scaled.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scaled).scatter_(1, best, 1.0).view(len(heat), 1, *size)


def heat_look(
    scene: Scene,
    shown: Shown,
    target: Target,
    heats: Mapping[str, np.ndarray],
    *,
    title: str,
    signed: Sequence[str] = (),
    smooth: bool = True,
    data: Mapping[str, Any] | None = None,
    lines: Sequence[str] = (),
) -> Look:
    """The picture, the numbers and the test of maps (B, h, w) by their names, of the images that are shown.

    Maps named in `signed` are blue where they lower the score and red where they raise it.
    """
    values, tests = tested(scene, shown, target, heats)
    rows, captions = [], []
    for place in range(len(shown)):
        tiles, texts = [shown.pixels[place]], [image_caption(shown, target, place, values[place])]
        for name, heat in heats.items():
            bound = colours_end(heat[place])
            bounds = (-bound, bound) if name in signed else (0.0, bound)
            picture = overlay(
                shown.pixels[place], heat[place], alpha=0.75, symmetric=name in signed, bounds=bounds, smooth=smooth
            )
            tiles.append(picture)
            texts.append(f"{name}, up to {bound:.2g}")
        rows.append(tiles)
        captions.append(texts)
    return Look(
        pictures={"": captioned(rows, captions=captions, title=title, min_side=160)},
        data={
            "target": target.kind,
            "meaning": target.meaning,
            "covered_share": SHARE,
            **(data or {}),
            "images": [
                {
                    "path": shown.names[place],
                    "index": int(shown.index[place]),
                    "truth": shown.truth(place),
                    "explained": target.names[place] or None,
                    "score": values[place],
                }
                for place in range(len(shown))
            ],
        },
        arrays={key(name): heat.astype(np.float32) for name, heat in heats.items()},
        metrics={f"{key(name)}_{part}": value for name, test in tests.items() for part, value in test.items()},
        lines=[f"explained: the {target.meaning}", *lines, *(_tested(name, test) for name, test in tests.items())],
    )


def tested(
    scene: Scene, shown: Shown, target: Target, heats: Mapping[str, np.ndarray]
) -> tuple[list[float], dict[str, dict[str, float]]]:
    """The score of each image that is shown, and of each map (B, h, w) how far what it marks moves them."""
    batch_size = int(scene.config.batch_size)
    tests = {
        name: deletion(target.score, shown.image, heat, seed=scene.seed, batch_size=batch_size)
        for name, heat in heats.items()
    }
    return scores_of(target.score, shown.image, batch_size=batch_size).tolist(), tests


def image_caption(shown: Shown, target: Target, place: int, value: float) -> str:
    """What an image is, what is explained of it, and the score."""
    truth = shown.truth(place)
    parts = [f"true: {truth}" if truth is not None else "", f"explained: {target.names[place]}", f"score {value:.3g}"]
    return "\n".join(part for part in parts if part and part != "explained: ")


def key(name: str) -> str:
    """A map's name as that of an array or a metric."""
    return name.lower().replace(" ", "_")


def _tested(name: str, test: Mapping[str, float]) -> str:
    return (
        f"{name}: covering the {SHARE:.0%} of pixels that it marks most moves the score by {test['marked']:.3g}, "
        f"covering the same shape elsewhere by {test['elsewhere']:.3g}"
    )
