"""The views that a run trains on: each image with its crops marked, its views, and how each was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.images import find_images
from eval.look.drawing import boxed, captioned, framed, with_gray
from eval.look.masked import hidden_pixels
from eval.look.result import DoesNotApply, Look
from eval.look.run_views import RunViews
from eval.look.scene import Scene
from eval.look.view_parameters import drawn_values, in_words
from ssl.config import plain
from ssl.data.sources import Source
from ssl.data.views import View, make_views
from ssl.methods.base import Method
from ssl.methods.mae import MAE
from ssl.methods.relative_location import CENTRE, RelativeLocation
from ssl.methods.simmim import SimMIM
from ssl.pictures import to_uint8

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Okabe and Ito's: the views of an image in turn, and the boxes that they were cut from."""
SIDE = 160
"""Pixels of the longer side of a tile, at least."""


def look(scene: Scene) -> Look:
    """Views of the images to look at, of `views.epochs` epochs from `views.first_epoch` on."""
    settings = plain(scene.config.views)
    epochs = list(range(settings["first_epoch"], settings["first_epoch"] + settings["epochs"]))
    if not epochs or epochs[0] < 0:
        raise ValueError(
            f"views.epochs={settings['epochs']} views.first_epoch={settings['first_epoch']} name no epoch; give "
            "epochs from 1 and first_epoch from 0 on"
        )
    recipe = run_recipe(scene)
    method = scene.method()
    split = str(scene.config.split or "train")  # what a run trains on
    shown = scene.shown(split=split)
    source = find_images(plain(scene.config.images)) if scene.config.images is not None else scene.source(split)
    views = run_views(scene, source, recipe, method)
    drawn = [views.drawn(shown.index.tolist(), epoch=epoch) for epoch in epochs]
    seen = [views.seen(batch) for batch in drawn]

    rows, captions, described = [], [], []
    for place, index in enumerate(shown.index.tolist()):
        original = _original(views, views.shown_index(index))
        size = (original.shape[0], original.shape[1])
        values = [
            [
                drawn_values(view, _row(parameters, place), source_size=size)
                for view, parameters in zip(recipe, batch["parameters"], strict=True)
            ]
            for batch in drawn
        ]
        boxes = [tuple(each["box"].values()) for of_epoch in values for each in of_epoch]
        tiles: list[np.ndarray | None] = [_marked(original, boxes)]
        texts: list[str | None] = [
            f"{label(shown.truth(place), shown.names[place], index)}\n{size[0]}×{size[1]} pixels"
        ]
        for number, (epoch, batch) in enumerate(zip(epochs, seen, strict=True)):
            for view, each in enumerate(batch["views"]):
                pixels = _large(to_uint8(each[place : place + 1], scene.mean, scene.std)[0])
                tiles.append(framed(pixels, COLOURS[(number * len(recipe) + view) % len(COLOURS)]))
                which = f"view {view + 1}, " if len(recipe) > 1 else ""
                texts.append("\n".join([f"{which}epoch {epoch}", *in_words(values[number][view])]))
            tile, text = _as_given(method, batch, place, scene)
            if tile is not None:
                tiles.append(tile)
                texts.append(text)
        rows.append(tiles)
        captions.append(texts)
        described.append(
            {
                "index": index,
                "name": shown.names[place],
                "class": shown.truth(place),
                "replaced_by": None if views.shown_index(index) == index else source.describe(views.shown_index(index)),
                "height": size[0],
                "width": size[1],
                "epochs": [
                    {"epoch": epoch, "views": of_epoch, **_given(method, batch["noise"][place])}
                    for epoch, of_epoch, batch in zip(epochs, values, seen, strict=True)
                ],
            }
        )
    seed = int(scene.run_config.get("seed") or 0)
    when = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    rows, captions = side_by_side(rows, captions)
    is_own = _is_trained_on(scene, split)
    of_what = "is shown" if is_own else "would be shown of images that are not its own"
    title = f"{scene.method_name}: what a run of seed {seed} {of_what} in {when}; a view's frame has its box's colour"
    return Look(
        pictures={"": captioned(rows, captions=captions, title=title, min_side=SIDE)},
        data={
            "split": None if scene.config.images is not None else split,
            "source": source.name,
            "run_seed": seed,
            "view_size": list(method.view_size),
            "recipe": [_told(view) for view in recipe],
            "order": "crop, flip, policy, jitter (factors in the order of use), grayscale, blur, solarize, erase",
            "images": described,
        },
        arrays={
            "views": torch.stack([torch.stack(batch["views"], 1) for batch in seen], 1).cpu().numpy(),  # (B, E, V, ...)
            "noise": torch.stack([batch["noise"] for batch in seen], 1).cpu().numpy(),  # (B, E, num_noise)
            "index": shown.index,
        },
        lines=_lines(described, recipe, when, trained_on=is_own),
    )


def run_recipe(scene: Scene) -> list[View]:
    """The views of the checkpoint's own recipe. Raises DoesNotApply where it does not say them."""
    augment = scene.run_config.get("augment")
    if not isinstance(augment, Mapping) or not augment.get("views"):
        raise DoesNotApply(
            f"{scene.title} does not say which views it was trained on; give the folder of the pretraining run, or a "
            "checkpoint in it, instead of an export or another project's weights"
        )
    return make_views(augment["views"])


def run_views(scene: Scene, source: Source, recipe: Sequence[View], method: Method) -> RunViews:
    """What makes the views that the run trains on, of images of `source`."""
    data = scene.run_config.get("data") or {}
    return RunViews(
        source,
        recipe,
        size=method.view_size,
        seed=int(scene.run_config.get("seed") or 0),
        mean=scene.mean,
        std=scene.std,
        num_noise=method.num_noise,
        in_memory_gib=float(data.get("in_memory_gib", 4.0)),
        max_bad_fraction=1.0,
        threads=scene.config.threads,
        device=scene.device,
    )


def _row(parameters: Mapping[str, Tensor], place: int) -> dict[str, np.ndarray]:
    return {name: values[place].numpy() for name, values in parameters.items()}


def _original(views: RunViews, index: int) -> np.ndarray:
    """The whole image, uint8 (H, W, 3)."""
    data, size = views.loader.reader.open(index)
    pixels = torch.from_numpy(np.array(views.loader.reader.decode(index, data, size)))  # (H, W, C)
    channels = pixels.shape[2]
    return to_uint8(pixels.permute(2, 0, 1)[None] / 255, [0.0] * channels, [1.0] * channels)[0]


def _marked(original: np.ndarray, boxes: Sequence[Any]) -> np.ndarray:
    """The image at a size to be looked at, with the views' boxes in source pixels drawn on it."""
    pixels = _large(original)
    tall, wide = pixels.shape[0] / original.shape[0], pixels.shape[1] / original.shape[1]
    scaled = [
        (round(top * tall), round(left * wide), max(round(height * tall), 1), max(round(width * wide), 1))
        for top, left, height, width in boxes
    ]
    return outlined(pixels, scaled, [COLOURS[number % len(COLOURS)] for number in range(len(boxes))])


def outlined(pixels: np.ndarray, boxes: Sequence[Any], colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Boxes (top, left, height, width) with a white line inside their coloured one: seen on any ground."""
    inner = [(top + 1, left + 1, max(height - 2, 1), max(width - 2, 1)) for top, left, height, width in boxes]
    return boxed(boxed(pixels, inner, [(255, 255, 255)] * len(boxes)), boxes, colours)


def side_by_side(
    rows: Sequence[list[np.ndarray | None]], captions: Sequence[list[str | None]], *, columns: int = 6
) -> tuple[list[list[np.ndarray | None]], list[list[str | None]]]:
    """Rows and their captions, several images beside each other as long as there are at most `columns` tiles."""
    num = max(columns // max(len(row) for row in rows), 1)
    starts = range(0, len(rows), num)
    beside = [[tile for row in rows[at : at + num] for tile in row] for at in starts]
    return beside, [[text for row in captions[at : at + num] for text in row] for at in starts]


def _large(pixels: np.ndarray) -> np.ndarray:
    """Small pictures enlarged by a whole factor to SIDE pixels or a little more, large ones reduced to twice that."""
    longest = max(pixels.shape[:2])
    if longest <= SIDE:
        factor = math.ceil(SIDE / longest)
        return pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    if longest <= 1.5 * SIDE:
        return pixels
    scale = 1.5 * SIDE / longest
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _as_given(
    method: Method, batch: Mapping[str, Any], place: int, scene: Scene
) -> tuple[np.ndarray | None, str | None]:
    """What the backbone is given of an image's view, where that is not the view itself, and what that is."""
    view, noise = batch["views"][0][place : place + 1], batch["noise"][place : place + 1]
    pixels = to_uint8(view, scene.mean, scene.std)[0]
    if isinstance(method, MAE | SimMIM):
        hidden = hidden_pixels(method, noise, method.mask_ratio)[0, 0].cpu().numpy()  # (H, W)
        return _large(with_gray(pixels, hidden)), f"given: {1 - hidden.mean():.0%} of it"
    if isinstance(method, RelativeLocation):
        large = _large(pixels)
        scale = large.shape[0] / pixels.shape[0]
        height, width = (round(side * scale) for side in method.patch_size)
        boxes = [(round(top * scale), round(left * scale), height, width) for top, left in _corners(method, noise[0])]
        inks = [COLOURS[1] if cell == CENTRE else COLOURS[0] for cell in range(len(boxes))]
        return outlined(large, boxes, inks), "given: nine patches, one by one"
    return None, None


def _given(method: Method, noise: Tensor) -> dict[str, Any]:
    """What an image's `noise` (num_noise,) decides, as JSON values."""
    if isinstance(method, MAE | SimMIM):
        hidden = hidden_pixels(method, noise[None], method.mask_ratio)
        return {"hidden_share": hidden.float().mean().item()}
    if isinstance(method, RelativeLocation):
        height, width = method.patch_size
        return {
            "patches": [
                {"top": top, "left": left, "height": height, "width": width} for top, left in _corners(method, noise)
            ]
        }
    return {}


def _corners(method: RelativeLocation, noise: Tensor) -> list[list[int]]:
    return method.corners(noise[None])[0].tolist()


def _told(view: View) -> dict[str, Any]:
    """A view's recipe without what is left at its default."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(view).items()
        if value != getattr(View, name)
    }


def label(truth: str | None, name: str, index: int) -> str:
    """What an image is called under its picture: its class, else its file, else its number."""
    return truth or (Path(name).name if Path(name).suffix else f"image {index}")


def _is_trained_on(scene: Scene, split: str) -> bool:
    """Whether the images are those of the run, under the numbers that it knows them by."""
    own, data = scene.run_config.get("data") or {}, scene.config.data
    same = data.name == "checkpoint" and (data.limit is None or data.limit == own.get("limit"))
    return same and split == "train" and scene.config.images is None


def _lines(described: Sequence[Mapping[str, Any]], recipe: Sequence[View], when: str, *, trained_on: bool) -> list[str]:
    values = [view for image in described for epoch in image["epochs"] for view in epoch["views"]]
    area = [view["area"] for view in values]
    lines = [
        f"{len(values)} views of {len(described)} images, {len(recipe)} in each epoch, of {when}: "
        + ("those that the run is trained on" if trained_on else "as the run would see images that are not its own"),
        f"a crop shows {np.mean(area):.0%} of its image on average, {min(area):.0%} at least",
    ]
    replaced = [image["name"] for image in described if image["replaced_by"]]
    if replaced:
        lines.append(f"cannot be decoded, another image stands in: {', '.join(replaced)}")
    return lines
