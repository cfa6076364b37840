"""`what=inversion`: images made again from what a layer says of them (Mahendran and Vedaldi 2014, arXiv:1412.0035).

Noise is changed until its values are those of the image, with the paper's two priors: total variation, with beta 2,
and the alpha-norm, with alpha 6. The less a made image resembles the image, the more the layer has left out of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eval.look.attribution import start
from eval.look.drawing import captioned
from eval.look.layer_places import Places, choose_layer, find_places
from eval.look.layer_values import main_maps, read_layer
from eval.look.regularisers import alpha_norm, clip_to_range, total_variation
from eval.look.result import DoesNotApply, Look
from eval.look.target import features_of
from ssl.config import plain
from ssl.pictures import to_uint8

if TYPE_CHECKING:
    from eval.look.scene import Scene

Values = Callable[[Tensor], Tensor]
"""From normalised images (B, C, H, W) to the values of a layer, (B, ...)."""
FEATURES = "features"
START = 0.1
"""Standard deviation of the noise that is started from, in those of the data."""


@dataclass(frozen=True)
class Inversion:
    """Images (B, C, H, W) made again, and the relative errors (B,) of the values of what was started from and of them.

    An error is the squared distance from the values of the image, divided by their squared norm (equation 2).
    """

    image: Tensor
    start: Tensor
    end: Tensor


def look(scene: Scene) -> Look:
    """Each of the first images that are shown, made again from several depths."""
    settings = scene.config.inversion
    if settings.num_images < 1:
        raise ValueError(f"inversion.num_images must be at least 1, got {settings.num_images}")
    shown = scene.shown(settings.num_images)
    image, pixels = shown.image[: settings.num_images], shown.pixels[: settings.num_images]
    places = find_places(scene.backbone, image_size=scene.image_size, in_chans=scene.channels)
    layers = plain(settings.layers)
    names = default_layers(places) if layers is None else _checked(layers, places, scene)
    found = _made_again(scene, image, names)
    kept = {name: correlation(each.image, image).tolist() for name, each in found.items()}
    metrics = {}
    for name, each in found.items():
        metrics[f"{name}_start_error"] = float(each.start.mean())
        metrics[f"{name}_error"] = float(each.end.mean())
        metrics[f"{name}_pixel_correlation"] = float(np.mean(kept[name]))
    return Look(
        pictures={"": _picture(scene, pixels, found)},
        data={
            "images": [
                {"path": shown.names[i], "index": int(shown.index[i]), "truth": shown.truth(i)}
                for i in range(len(image))
            ],
            "depths": [
                {
                    "layer": name,
                    "start_error": each.start.tolist(),
                    "error": each.end.tolist(),
                    "pixel_correlation": kept[name],
                }
                for name, each in found.items()
            ],
        },
        arrays={name.replace(".", "_"): each.image.cpu().numpy() for name, each in found.items()},
        metrics=metrics,
        lines=[
            f"{name}: relative error {metrics[f'{name}_start_error']:.3g} of noise, {metrics[f'{name}_error']:.3g} of "
            f"the made image, whose pixels correlate {metrics[f'{name}_pixel_correlation']:.2f} with the image's"
            for name in found
        ],
    )


def _made_again(scene: Scene, image: Tensor, names: Sequence[str]) -> dict[str, Inversion]:
    """Images (B, C, H, W) made again from each of the layers, as the settings say."""
    settings, run = scene.config.inversion, features_of(scene)
    start("inversion", lambda given, rows: run(given).sum(1), image, num=settings.steps * len(image) * len(names))
    began = time.perf_counter()
    found: dict[str, Inversion] = {}
    for name in names:
        found[name] = invert(
            run if name == FEATURES else _reader(scene, name),
            image,
            mean=scene.mean,
            std=scene.std,
            steps=settings.steps,
            step_size=settings.step_size,
            tv_weight=settings.total_variation,
            alpha_weight=settings.alpha_norm,
            seed=scene.seed,
        )
        spent = time.perf_counter() - began
        print(f"inversion: {name} in {spent:.0f} s, {len(found)} of {len(names)} depths", flush=True)
    return found


def _picture(scene: Scene, pixels: np.ndarray, found: dict[str, Inversion]) -> np.ndarray:
    """A row for each image, uint8 (B, H, W, 3): itself, and made again from each layer."""
    made = {name: to_uint8(each.image, scene.mean, scene.std) for name, each in found.items()}
    return captioned(
        [[pixels[i], *(each[i] for each in made.values())] for i in range(len(pixels))],
        captions=[
            ["image", *(f"{name}: error {each.start[i]:.2g} to {each.end[i]:.2g}" for name, each in found.items())]
            for i in range(len(pixels))
        ],
        title="Images made again from the values of layers, from the first to the last, with the relative error of "
        "these values at the start and at the end",
        min_side=160,
    )


def default_layers(places: dict[str, Places]) -> list[str]:
    """Four depths, evenly over a network's stages and blocks, and the features."""
    maps = [each.layer for each in main_maps(places)]
    chosen = [maps[math.ceil(len(maps) * part / 4) - 1] for part in range(1, 5)] if maps else []
    return [*dict.fromkeys(chosen), FEATURES]


def invert(
    values: Values,
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    steps: int,
    step_size: float,
    tv_weight: float,
    alpha_weight: float,
    seed: int = 0,
) -> Inversion:
    """Make images (B, C, H, W) again from their values, starting from seeded noise.

    Adam, whose step falls to 0 as a half cosine, minimises the relative error, `tv_weight` times the total variation
    and `alpha_weight` times the alpha-norm; no image has a part in another's. Pixels stay ones that an image can have.
    Raises DoesNotApply where the values of an image are all zero.
    """
    if steps < 1 or step_size <= 0 or tv_weight < 0 or alpha_weight < 0:
        raise ValueError(
            "inversion needs 1 step or more of a size above 0, and weights of 0 or more; "
            f"got {steps}, {step_size}, {tv_weight} and {alpha_weight}"
        )
    with torch.no_grad():
        wanted = values(image).flatten(1)  # (B, D)
    length = wanted.square().sum(1)  # (B,)
    if not length.all():
        raise DoesNotApply("the layer gives nothing but zeros for an image, which cannot be made again from that")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator).to(image)
    made = clip_to_range(START * noise, mean, std).requires_grad_()

    def errors() -> Tensor:
        return (values(made).flatten(1) - wanted).square().sum(1) / length  # (B,)

    with torch.no_grad():
        start = errors()
    optimizer = torch.optim.Adam([made], lr=step_size)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = step_size * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            priors = tv_weight * total_variation(made) + alpha_weight * alpha_norm(made)
            (errors() + priors).sum().backward(inputs=[made])
        optimizer.step()
        with torch.no_grad():
            made.copy_(clip_to_range(made, mean, std))
    with torch.no_grad():
        return Inversion(made.detach(), start, errors())


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """The correlation of the values of images (B, C, H, W) with those of others, (B,)."""
    first, second = (each.flatten(1) - each.flatten(1).mean(1, keepdim=True) for each in (first, second))
    return torch.nn.functional.cosine_similarity(first, second)


def _reader(scene: Scene, name: str) -> Values:
    run = features_of(scene)
    return lambda image: read_layer(scene.backbone, run, name, image)


def _checked(layers: Sequence[str], places: dict[str, Places], scene: Scene) -> list[str]:
    """The layers that were given, each once."""
    for name in layers:
        if name != FEATURES:
            choose_layer(places, name, model=scene.backbone, key="inversion.layers")
    if not layers:
        raise ValueError("inversion.layers names none; give modules' names, features, or leave it out")
    return list(dict.fromkeys(layers))
