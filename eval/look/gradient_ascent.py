"""`what=gradient_ascent`: images made from noise to activate a unit (Erhan et al. 2009; Simonyan et al. 2013,
arXiv:1312.6034, section 2; regularised as in Yosinski et al. 2015, arXiv:1506.06579, section 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.look.drawing import captioned
from eval.look.layer_places import choose_layer, find_places
from eval.look.layer_values import read_layer
from eval.look.regularisers import (
    blur,
    clip_small_contributions,
    clip_small_norms,
    clip_to_range,
    jitter,
    l2_decay,
)
from eval.look.result import Look
from eval.look.settings import GradientAscentConfig
from eval.look.target import features_of, head_of
from ssl.config import plain
from ssl.pictures import to_uint8

if TYPE_CHECKING:
    from eval.look.samples import Shown
    from eval.look.scene import Scene

Activations = Callable[[Tensor], Tensor]
"""From normalised images (B, C, H, W) to the activation of every unit, (B, units)."""
PLACES = ("mean", "centre")
COMPARED = 64
"""Images of the data, at least, that the made ones are compared with."""
STARTS = (0.1, 0.3, 1.0, 3.0)
"""Standard deviations of the noise that is started from, in those of the data: a louder one where a unit is silent."""


@dataclass(frozen=True)
class Regularisers:
    """How an image is kept from becoming noise while it climbs; 0 turns each off."""

    jitter: int = 0
    l2_decay: float = 0.0
    blur_every: int = 0
    blur_sigma: float = 0.5
    clip_norm: float = 0.0
    clip_contribution: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.l2_decay < 1 and 0 <= self.clip_norm < 1 and 0 <= self.clip_contribution < 1):
            raise ValueError(
                "l2_decay, clip_norm and clip_contribution of gradient_ascent are shares, 0 or more and below 1; got "
                f"{self.l2_decay}, {self.clip_norm} and {self.clip_contribution}"
            )
        if self.jitter < 0 or self.blur_every < 0 or self.blur_sigma <= 0:
            raise ValueError(
                "gradient_ascent needs jitter and blur_every of 0 or more and blur_sigma above 0; "
                f"got {self.jitter}, {self.blur_every} and {self.blur_sigma}"
            )


@dataclass(frozen=True)
class Ascent:
    """Images (U, C, H, W) that climbed, one for each unit, and the activations (U, steps + 1) on their way."""

    image: Tensor
    trace: Tensor


def look(scene: Scene) -> Look:
    """An image for each unit, and beside it the one that activates it most of those that are shown."""
    settings = scene.config.gradient_ascent
    _check_settings(settings)
    activations, layer, names = unit_activations(scene, settings.layer, settings.place)
    shown = scene.shown(max(scene.config.num_images, COMPARED))
    with torch.no_grad():
        real = torch.cat([activations(part) for part in shown.image.split(scene.config.batch_size)])  # (B, units)
    units = numbers_of_units(
        plain(settings.units), settings.num_units, real.shape[1], names=names, seed=scene.seed, layer=layer
    )
    ascent = _climbed(scene, activations, units)
    trace = ascent.trace.cpu().numpy()  # (U, steps + 1)
    best = _Best(*(each.tolist() for each in real[:, units].max(0)))
    titles = [names[unit] if names else f"unit {unit}" for unit in units]
    beaten = sum(end > value for end, value in zip(trace[:, -1].tolist(), best.value))
    silent = [title for i, title in enumerate(titles) if np.ptp(trace[i]) == 0]
    lines = [
        f"{beaten} of {len(units)} made images activate their unit of {layer} more than any of {len(shown)} images does"
    ]
    if silent:
        lines.append(f"no gradient reaches {', '.join(silent)}: these units are silent, and their images noise")
    told = [
        {
            "unit": unit,
            "name": names[unit] if names else None,
            "start": float(trace[i, 0]),
            "end": float(trace[i, -1]),
            "best_image": shown.names[best.place[i]],
            "best_image_activation": best.value[i],
        }
        for i, unit in enumerate(units)
    ]
    return Look(
        pictures={"": _picture(scene, shown, ascent, best, titles, layer)},
        data={"layer": layer, "units": told},
        arrays={"image": ascent.image.cpu().numpy(), "trace": trace},
        metrics={"above_best_image": beaten / len(units)},
        lines=lines,
    )


@dataclass(frozen=True)
class _Best:
    """Of each unit (U,) the greatest activation by an image of the data, and that image's place among those shown."""

    value: list[float]
    place: list[int]


def _climbed(scene: Scene, activations: Activations, units: Sequence[int]) -> Ascent:
    """An image for each unit, as the settings say."""
    settings = scene.config.gradient_ascent
    regularisers = Regularisers(
        jitter=max(min(scene.image_size) // 16, 1) if settings.jitter is None else settings.jitter,
        **{key: settings[key] for key in ("l2_decay", "blur_every", "blur_sigma", "clip_norm", "clip_contribution")},
    )
    return ascend(
        activations,
        units,
        image_size=scene.image_size,
        mean=scene.mean,
        std=scene.std,
        steps=settings.steps,
        step_size=settings.step_size,
        regularisers=regularisers,
        seed=scene.seed,
        device=scene.device,
        say=True,
    )


def _picture(scene: Scene, shown: Shown, ascent: Ascent, best: _Best, titles: Sequence[str], layer: str) -> np.ndarray:
    """The made images, and below each the one of the data that activates its unit most."""
    trace = ascent.trace.tolist()  # (U, steps + 1)
    return captioned(
        [list(to_uint8(ascent.image, scene.mean, scene.std)), [shown.pixels[place] for place in best.place]],
        captions=[
            [f"{title}: {way[0]:.2g} to {way[-1]:.3g}" for title, way in zip(titles, trace)],
            [f"{value:.3g}" for value in best.value],
        ],
        row_titles=["made from noise", f"the best of {len(shown)} images"],
        title=f"Images that activate units of {layer}, with the activation",
        min_side=160,
    )


def unit_activations(scene: Scene, layer: str | None, place: str) -> tuple[Activations, str, list[str] | None]:
    """What gives every unit's activation, where it is read, and the units' names where they are classes.

    Of a map the mean of all places or the one in its centre. Raises ValueError for a layer that is not there.
    """
    if place not in PLACES:
        raise ValueError(f"gradient_ascent.place must be one of {', '.join(PLACES)}, got {place!r}")
    head = head_of(scene) if layer in (None, "logits") else None
    if head is not None or layer in ("logits", "features", None):
        if place != "mean":
            raise ValueError(f"gradient_ascent.place={place} has no effect on {layer or 'vectors'}; leave it out")
        if head is not None:
            return head.model, "logits", head.classes
        if layer == "logits":
            raise ValueError(
                "gradient_ascent.layer=logits needs a classifier, and this checkpoint has none; probe it first "
                "(python -m eval.linear_probe ckpt=...), or give features or a layer"
            )
        return features_of(scene), "features", None
    places = find_places(scene.backbone, image_size=scene.image_size, in_chans=scene.channels)
    chosen = choose_layer(places, layer, model=scene.backbone, key="gradient_ascent.layer")
    run = features_of(scene)

    def read(image: Tensor) -> Tensor:
        values = chosen.values(read_layer(scene.backbone, run, chosen.layer, image))  # (B, units, h*w)
        rows, columns = chosen.grid_size
        return values.mean(2) if place == "mean" else values[:, :, rows // 2 * columns + columns // 2]

    return read, chosen.layer, None


def numbers_of_units(
    given: Sequence[Any] | None, num: int, total: int, *, names: list[str] | None, seed: int, layer: str
) -> list[int]:
    """The numbers of the units that are meant, or of `num` drawn by the seed. Raises ValueError for those not there."""
    if given is None:
        if num < 1:
            raise ValueError(f"gradient_ascent.num_units must be at least 1, got {num}")
        drawn = np.random.default_rng(seed).permutation(total)[:num]
        return sorted(int(unit) for unit in drawn)
    units = [names.index(str(each)) if names and str(each) in names else each for each in given]
    wrong = [each for each in units if not (isinstance(each, int) and 0 <= each < total)]
    if wrong or not units:
        classes = f", or names of classes: {', '.join(names[:10])}" if names else ""
        raise ValueError(f"gradient_ascent.units of {layer} are numbers 0 to {total - 1}{classes}; got {list(given)}")
    return units


def ascend(
    activations: Activations,
    units: Sequence[int],
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    steps: int,
    step_size: float,
    regularisers: Regularisers,
    seed: int = 0,
    device: torch.device | str = "cpu",
    say: bool = False,
) -> Ascent:
    """An image for each unit that climbs its activation from seeded noise.

    The mean change of a value in a step falls from `step_size` to 0. The noise is faint, and louder for units that have
    no gradient there, as those behind a ReLU may. Pixels stay ones that an image can have. The last quarter of the
    steps is without jitter, so that the image fits where it lies, and the last is not regularised but for the range.
    """
    if steps < 1 or step_size <= 0:
        raise ValueError(f"gradient_ascent needs 1 step or more of a size above 0, got {steps} and {step_size}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(units), len(mean), *image_size, generator=generator).to(device)
    rows, chosen = torch.arange(len(units), device=device), torch.as_tensor(units, device=device)

    def climb(given: Tensor) -> tuple[Tensor, Tensor]:
        """The activations (U,) of images, and their gradient (U, C, H, W)."""
        given = given.detach().requires_grad_()
        with torch.enable_grad():
            value = activations(given)[rows, chosen]  # (U,)
            (gradient,) = torch.autograd.grad(value.sum(), given)
        return value.detach(), gradient

    image = clip_to_range(STARTS[0] * noise, mean, std)  # (U, C, H, W)
    for louder in STARTS[1:]:
        silent = climb(image)[1].flatten(1).abs().amax(1) == 0  # (U,)
        if not silent.any():
            break
        image = torch.where(silent.view(-1, 1, 1, 1), clip_to_range(louder * noise, mean, std), image)
    with torch.no_grad():
        trace = [activations(image)[rows, chosen]]  # (U,)
    began = time.perf_counter()
    for step in range(steps):
        shift = draw_shift(regularisers.jitter if step < 3 * steps // 4 else 0, generator)
        value, gradient = climb(jitter(image, shift))
        gradient = jitter(gradient, (-shift[0], -shift[1]))
        if step:
            trace.append(value)
        size = gradient.abs().mean((1, 2, 3), keepdim=True)  # (U, 1, 1, 1)
        stride = step_size * (1 + math.cos(math.pi * step / steps)) / 2
        image = image + stride * gradient / size.clamp(min=1e-30)
        if step < steps - 1:
            image = _regularised(image, gradient, step, regularisers)
        image = clip_to_range(image, mean, std)
        if say and step == 0:
            seconds = (time.perf_counter() - began) * steps
            print(f"gradient_ascent: {steps} steps of {len(units)} images, about {seconds:.0f} s", flush=True)
    with torch.no_grad():
        trace.append(activations(image)[rows, chosen])
    return Ascent(image, torch.stack(trace, dim=1))


def _regularised(image: Tensor, gradient: Tensor, step: int, by: Regularisers) -> Tensor:
    """An image after a step; `gradient` is that of the activation before it."""
    if by.l2_decay:
        image = l2_decay(image, by.l2_decay)
    if by.blur_every and (step + 1) % by.blur_every == 0:
        image = blur(image, by.blur_sigma)
    if by.clip_norm:
        image = clip_small_norms(image, by.clip_norm)
    if by.clip_contribution:
        image = clip_small_contributions(image, gradient, by.clip_contribution)
    return image


def _check_settings(settings: Any) -> None:
    """Raise ValueError for settings that have no effect beside others."""
    for key, without in (
        ("num_units", settings.units is not None and "gradient_ascent.units, which names them"),
        ("blur_sigma", settings.blur_every == 0 and "gradient_ascent.blur_every=0, which never blurs"),
    ):
        if without and settings[key] != getattr(GradientAscentConfig, key):
            raise ValueError(f"gradient_ascent.{key} has no effect with {without}; leave one of them out")


def draw_shift(reach: int, generator: torch.Generator) -> tuple[int, int]:
    """Rows and columns by which an image is moved, each within `reach` pixels either way."""
    rows, columns = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return rows, columns
