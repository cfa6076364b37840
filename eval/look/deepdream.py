"""`what=deepdream`: images with more of what a layer sees in them (Mordvintsev, Olah and Tyka 2015, "Inceptionism").

The norm of a layer's values climbs, from the image itself and over several sizes of it, the octaves; what was added at
one size is enlarged and added to the image at the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.look.drawing import captioned
from eval.look.gradient_ascent import draw_shift
from eval.look.layer_places import choose_layer, find_places
from eval.look.layer_values import main_maps, read_layer
from eval.look.regularisers import clip_to_range, jitter
from eval.look.result import DoesNotApply, Look
from eval.look.settings import DeepdreamConfig
from eval.look.target import features_of
from ssl.models.backbones import MISFITS
from ssl.pictures import to_uint8

if TYPE_CHECKING:
    from eval.look.scene import Scene

Values = Callable[[Tensor], Tensor]
"""From normalised images (B, C, H, W) to the values of a layer, (B, ...)."""


@dataclass(frozen=True)
class Dream:
    """Images (B, C, H, W) that were changed, and the norms (B,) of the layer's values before and after."""

    image: Tensor
    start: Tensor
    end: Tensor


def look(scene: Scene) -> Look:
    """Each image that is shown, and what becomes of it."""
    settings = scene.config.deepdream
    if settings.octaves == 1 and settings.octave_scale != DeepdreamConfig.octave_scale:
        raise ValueError("deepdream.octave_scale has no effect with deepdream.octaves=1; leave one of them out")
    shown = scene.shown()
    places = find_places(scene.backbone, image_size=scene.image_size, in_chans=scene.channels)
    if settings.layer is None:
        maps = main_maps(places)
        if not maps:
            raise DoesNotApply(f"{type(scene.backbone).__name__} has no layer whose values have places on the image")
        layer = maps[round(2 / 3 * (len(maps) - 1))]
    else:
        layer = choose_layer(places, settings.layer, model=scene.backbone, key="deepdream.layer")
    run = features_of(scene)
    compute = partial(
        dream,
        lambda image: layer.values(read_layer(scene.backbone, run, layer.layer, image)),
        mean=scene.mean,
        std=scene.std,
        sizes=octave_sizes(
            scene.image_size, settings.octaves, settings.octave_scale, multiple=multiple_of_sides(scene.backbone)
        ),
        steps=settings.steps,
        step_size=settings.step_size,
        reach=max(min(scene.image_size) // 8, 1) if settings.jitter is None else settings.jitter,
        seed=scene.seed,
        say=True,
    )
    dreams = [compute(part) for part in shown.image.split(scene.config.batch_size)]
    image, start, end = (torch.cat([getattr(each, key) for each in dreams]).cpu() for key in ("image", "start", "end"))
    start, end = start.numpy(), end.numpy()
    pictures = to_uint8(image, scene.mean, scene.std)
    return Look(
        pictures={
            "": captioned(
                [list(shown.pixels), list(pictures)],
                captions=[[""] * len(shown), [f"norm {a:.3g} to {b:.3g}" for a, b in zip(start, end)]],
                row_titles=["image", f"more of what {layer.layer} sees"],
                title=f"DeepDream: the norm of {layer.layer} raised, in {settings.octaves} octaves",
                min_side=160,
            )
        },
        data={
            "layer": layer.layer,
            "images": [
                {"path": name, "index": int(index), "start": float(a), "end": float(b)}
                for name, index, a, b in zip(shown.names, shown.index, start, end)
            ],
        },
        arrays={"image": image.numpy()},
        metrics={"norm_ratio": float(np.mean(end / start))},
        lines=[f"the norm of {layer.layer} grew {np.mean(end / start):.2f} times"],
    )


def multiple_of_sides(network: nn.Module) -> tuple[int, int]:
    """Rows and columns of pixels of which the sides of images must be multiples."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, tuple | list) else (1, 1)


def octave_sizes(
    image_size: tuple[int, int], octaves: int, scale: float, *, multiple: tuple[int, int] = (1, 1)
) -> list[tuple[int, int]]:
    """(height, width) of each octave, the image's own last, each once. ValueError for numbers that make none."""
    if octaves < 1 or scale <= 1:
        raise ValueError(f"deepdream needs octaves of 1 or more and octave_scale above 1, got {octaves} and {scale}")
    sizes = []
    for octave in reversed(range(1, octaves)):
        height, width = (
            max(round(side / scale**octave / step), 1) * step for side, step in zip(image_size, multiple, strict=True)
        )
        sizes.append((height, width))
    return list(dict.fromkeys([*sizes, image_size]))


def norms(values: Tensor) -> Tensor:
    """The norm of each image's values (B, ...), divided by the root of their number: (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


def dream(
    values: Values,
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sizes: Sequence[tuple[int, int]],
    steps: int,
    step_size: float,
    reach: int,
    seed: int = 0,
    say: bool = False,
) -> Dream:
    """Let the norm of a layer's values climb from images (B, C, H, W), in steps whose mean change is `step_size`.

    `sizes` end with the images' own; `reach` is by how many pixels an image is moved in a step, at most. Pixels stay
    ones that an image can have. Raises ValueError for a network that cannot read the smaller sizes.
    """
    if steps < 1 or step_size <= 0 or reach < 0:
        raise ValueError(
            "deepdream needs 1 step or more of a size above 0 and jitter of 0 or more, "
            f"got {steps}, {step_size} and {reach}"
        )
    with torch.no_grad():
        start = norms(values(image))
        _check_sizes(values, image, sizes)
    generator = torch.Generator().manual_seed(seed)
    detail = torch.zeros_like(image)
    began, done = time.perf_counter(), 0
    for size in sizes:
        base = _resized(image, size)
        current = clip_to_range(base + _resized(detail, size), mean, std)
        for _ in range(steps):
            current = _climb(values, current, step_size, draw_shift(reach, generator))
            current = clip_to_range(current, mean, std)
            done += 1
            if say and done == 1:
                pixels = sum(each[0] * each[1] for each in sizes) / (size[0] * size[1])
                seconds = (time.perf_counter() - began) * steps * pixels
                print(f"deepdream: {steps * len(sizes)} steps, about {seconds:.0f} s", flush=True)
        detail = current - base
    with torch.no_grad():
        return Dream(current, start, norms(values(current)))


def _climb(values: Values, image: Tensor, step_size: float, shift: tuple[int, int]) -> Tensor:
    """One step up the norm of the values of the image as it is seen moved by `shift`."""
    given = jitter(image, shift).requires_grad_()
    with torch.enable_grad():
        # The mean square: its gradient points where the norm's does, and is defined where the norm is 0.
        (gradient,) = torch.autograd.grad(values(given).flatten(1).square().mean(1).sum(), given)
    gradient = jitter(gradient, (-shift[0], -shift[1]))
    size = gradient.abs().mean((1, 2, 3), keepdim=True)  # (B, 1, 1, 1)
    return image + step_size * gradient / size.clamp(min=1e-30)


def _check_sizes(values: Values, image: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    for size in sizes[:-1]:
        try:
            values(_resized(image[:1], size))
        except MISFITS as error:
            raise ValueError(
                f"this network cannot read images of {size[0]} x {size[1]} pixels ({error}); give deepdream.octaves=1, "
                "or a smaller deepdream.octave_scale"
            ) from error


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[2:]) == size:
        return image
    return functional.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
