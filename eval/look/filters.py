"""What the first layer looks for: its filters, a patch embedding's components, and a transformer's positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.look.components import principal_components
from eval.look.drawing import captioned, colour, enlarged
from eval.look.first_layer import FirstLayer, filter_tiles, first_layer, position_embedding, position_similarity
from eval.look.result import Look
from eval.look.scene import Scene
from eval.look.settings import FiltersConfig
from ssl.pictures import grid, to_uint8

ORDERS = ("norm", "index")
SHOWN_PLACES = 8
"""Rows and columns of the grid of patches whose positions are shown."""


def look(scene: Scene) -> Look:
    """The first layer's filters, beside what they were before training where there was any."""
    settings = scene.config.filters
    _check_settings(settings)
    image, why_none = _images(scene)
    layer = first_layer(scene.backbone, image)
    before = first_layer(scene.untrained(), image) if scene.loaded is not None else None
    order = filter_order(layer, settings.order)[: settings.num]
    stages = {"trained" if before is not None else "untrained": layer}
    if before is not None:
        stages[scene.untrained_title] = before
    num_filters, channels, height, width = layer.weight.shape
    dead = layer.is_dead if why_none is None else layer.is_next_to_0
    if not layer.is_embedding and settings.num_components != FiltersConfig.num_components:
        raise ValueError(f"filters.num_components has no effect: {layer.name} is no patch embedding; leave it out")
    pictures = {"": _filters_picture(stages, order, title=_title(layer, settings, len(order)))}
    data: dict[str, Any] = {
        "layer": layer.name,
        "num_filters": num_filters,
        "channels": channels,
        "kernel_size": (height, width),
        "is_embedding": layer.is_embedding,
        "activation": layer.activation,
        "shown": order.tolist(),
        "norm": layer.norm.tolist(),
        "dead_filters": dead.nonzero()[:, 0].tolist(),
        "num_images": len(image) if why_none is None else 0,
    }
    metrics: dict[str, float] = {"dead_filters": int(dead.sum()), "num_filters": num_filters}
    lines = [
        f"{layer.name}: {num_filters} filters of {height} x {width} pixels, {int(dead.sum())} of them dead "
        + (f"(next to 0, or one answer to all of {len(image)} images)" if why_none is None else "(next to 0)")
    ]
    if why_none is not None:
        lines.append(f"whether a filter answers was not looked at, without images: {why_none}")
    if before is not None and scene.is_start_known:
        change = filter_change(layer.weight, before.weight)
        metrics["mean_change"] = data["mean_change"] = float(change.mean())
        doing = scene.untrained_title.removeprefix("before ")
        lines.append(f"{doing} turned them by {change.mean():.2f} on average: 0 is not at all, 1 is to a right angle")
    if layer.is_embedding and settings.num_components and min(num_filters, channels * height * width) > 1:
        pictures["components"], data["explained_variance"] = _components_picture(stages, settings.num_components)
        leading = sum(data["explained_variance"])
        lines.append(
            f"{len(data['explained_variance'])} components of the embedding hold {leading:.0%} of its variance"
        )
    pictures |= _positions(scene, data, lines)
    if channels < scene.channels:
        lines.append(
            f"each filter reads {channels} of the image's {scene.channels} channels, and is shown without colour"
        )
    if channels > 3:
        lines.append(f"of {channels} channels the first three are shown, as red, green and blue")
    arrays = {"weight": layer.weight.numpy()}
    return Look(pictures=pictures, data=data, arrays=arrays, metrics=metrics, lines=lines)


def _images(scene: Scene) -> tuple[Tensor, str | None]:
    """Images (B, C, H, W) to ask the filters; where nobody named some and the data are not there, none but a blank one,
    and why.
    """
    try:
        return scene.shown().image, None
    except (ValueError, OSError) as error:
        if any(scene.config[key] is not None for key in ("images", "indices", "split")):
            raise
        return torch.zeros(1, scene.channels, *scene.image_size, device=scene.device), str(error).partition("\n")[0]


def filter_order(layer: FirstLayer, order: str) -> Tensor:
    """The filters' numbers (F,): by norm, the greatest first, or as they stand."""
    if order == "index":
        return torch.arange(len(layer.weight))
    return layer.norm.argsort(descending=True, stable=True)


def filter_change(after: Tensor, before: Tensor) -> Tensor:
    """How far each filter turned, (F, C, h, w) twice to (F,): 1 minus the cosine of the angle between the two."""
    return 1 - torch.cosine_similarity(after.flatten(1), before.flatten(1))


def _filters_picture(stages: dict[str, FirstLayer], order: Tensor, *, title: str) -> np.ndarray:
    panels = [_panel(filter_tiles(layer.weight[order])) for layer in stages.values()]
    return captioned([panels], captions=[list(stages)], title=title)


def _components_picture(stages: dict[str, FirstLayer], num: int) -> tuple[np.ndarray, list[float]]:
    """The components of the filters as filters, and the first network's shares of the variance."""
    found = {name: principal_components(layer.weight.flatten(1), num) for name, layer in stages.items()}
    shape = next(iter(stages.values())).weight.shape[1:]
    panels = [_panel(filter_tiles(each.direction.float().view(-1, *shape))) for each in found.values()]
    count = len(next(iter(found.values())).explained)
    picture = captioned(
        [panels],
        captions=[[f"{name}: {each.explained.sum():.0%} of the variance" for name, each in found.items()]],
        title=f"The first {count} principal components of the patch embedding, row by row; gray is 0",
    )
    return picture, next(iter(found.values())).explained.tolist()


def _positions(scene: Scene, data: dict[str, Any], lines: list[str]) -> dict[str, np.ndarray]:
    """A picture of learned positions; what there is instead is only said."""
    found = position_embedding(scene.backbone, scene.image_size)
    if found is None:
        return {}
    positions, grid_size, is_fixed = found
    data["positions"] = "fixed sines and cosines" if is_fixed else "learned"
    if is_fixed:
        lines.append("positions are fixed sines and cosines: nothing of them was learned, and they are not shown")
        return {}
    if not positions.norm(dim=1).min() > 0:
        lines.append("positions are 0: they were not learned yet")
        return {}
    similarity = position_similarity(positions).view(*grid_size, *grid_size).numpy()  # (h, w, h, w)
    rows, columns = (np.linspace(0, count - 1, min(count, SHOWN_PLACES)).round().astype(int) for count in grid_size)
    factor = max(1, math.ceil(48 / max(grid_size)))
    tiles = [[enlarged(colour(similarity[i, j], bounds=(-1, 1)), factor) for j in columns] for i in rows]
    title = "How alike the positions of a patch and of all others are, a map for each patch: dark is -1, bright is 1"
    return {"positions": captioned(tiles, title=title, min_side=1)}


def _panel(tiles: Tensor) -> np.ndarray:
    """Tiles (F, 3, h, w) in 0..1 as one picture, about as wide as high."""
    pixels = list(to_uint8(tiles, [0.0] * 3, [1.0] * 3))
    columns = math.ceil(math.sqrt(len(pixels)))
    return grid([pixels[start : start + columns] for start in range(0, len(pixels), columns)], min_side=40)


def _title(layer: FirstLayer, settings: Any, num_shown: int) -> str:
    which = f"{num_shown} of {len(layer.weight)} filters" if num_shown < len(layer.weight) else f"{num_shown} filters"
    order = ", the greatest norm first" if settings.order == "norm" else ""
    return f"{layer.name}: {which}{order}; each by its own greatest weight, gray is 0"


def _check_settings(settings: Any) -> None:
    if settings.order not in ORDERS:
        raise ValueError(f"filters.order must be one of {', '.join(ORDERS)}, got {settings.order!r}")
    if settings.num < 1:
        raise ValueError(f"filters.num must be at least 1, got {settings.num}")
    if settings.num_components < 0:
        raise ValueError(f"filters.num_components must be 0 (none) or more, got {settings.num_components}")
