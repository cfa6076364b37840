"""What excites a unit: of many images the patches on which it is greatest, cut to what it sees of the image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.look.drawing import boxed, captioned
from eval.look.labels import class_name
from eval.look.layer_places import Places, choose_layer, find_places
from eval.look.result import Look
from eval.look.samples import sample_index
from eval.look.scene import Scene
from eval.look.settings import ActivationsConfig
from ssl.data.sources import Source
from ssl.data.subset import Subset
from ssl.models.backbones import pooled_features
from ssl.pictures import to_uint8

CHOICES = ("variance", "random")
DEAD = 1e-6
OUTSIDE, MARK = (225, 225, 225), (213, 94, 0)
"""Of a field the part beyond the image; the place of the greatest value."""


@dataclass(frozen=True)
class Excited:
    """What excites each of a layer's C units: its k greatest images, the greatest first, at their best place."""

    value: Tensor
    """(C, k)"""
    image: Tensor
    """(C, k) the image's number, as the batches give it."""
    place: Tensor
    """(C, k) of the layer's grid, row by row."""
    mean: Tensor
    """(C,) over all images and places, and so the three below."""
    variance: Tensor
    low: Tensor
    high: Tensor

    @property
    def dead(self) -> Tensor:
        """(C,) whether a unit has one value everywhere: it varies less than a millionth of what the liveliest does."""
        spread = self.high - self.low
        return spread <= DEAD * spread.max()

    @property
    def never_positive(self) -> Tensor:
        """(C,) whether a unit is nowhere above 0."""
        return self.high <= 0


def look(scene: Scene) -> Look:
    """The patches of a sample of images on which chosen units of a layer are greatest."""
    settings = scene.config.activations
    every = find_places(scene.backbone, image_size=scene.image_size, in_chans=scene.channels)
    key = "activations.layer"
    places = choose_layer(every, settings.layer, model=scene.backbone, key=key, large=True)
    last = choose_layer(every, None, model=scene.backbone, key=key)
    _check_settings(settings, places)
    source = scene.source(scene.split)
    index = sample_index(source, scene.config.sample, scene.seed)
    failed: dict[int, str] = {}
    images = scene.batches(Subset(source, index), "activations", failed)
    batches = ((torch.from_numpy(place), image) for place, image in images)
    excited = most_exciting(scene.backbone, places, batches, num_images=settings.num_patches)
    num_seen = len(index) - len(failed)
    units = choose_units(excited, units=settings.units, choose=settings.choose, num=settings.num_units, seed=scene.seed)
    chosen = np.unique(excited.image[units].numpy())  # into the sample
    pixels = dict(zip(chosen.tolist(), _pixels(scene, source, index[chosen])))
    rows = [_patches(excited, unit, pixels, places, scene.image_size) for unit in units]
    labels = np.asarray(source.labels)[index]
    per_unit = [_about_unit(scene, excited, unit, places, source, index, labels) for unit in units]
    num_dead, num_low = int(excited.dead.sum()), int(excited.never_positive.sum())
    return Look(
        pictures={
            "": captioned(
                [[patch for patch, _ in row] for row in rows],
                captions=_captions(per_unit, source),
                row_titles=[_row_title(each) for each in per_unit],
                title=_title(places, scene, num_seen, _cut_how(places)),
            ),
            "images": captioned(
                [[whole for _, whole in row] for row in rows],
                captions=_captions(per_unit, source),
                row_titles=[_row_title(each) for each in per_unit],
                title=_title(places, scene, num_seen, "the place marked"),
            ),
        },
        data={
            "layer": places.layer,
            "kind": places.kind,
            "grid_size": places.grid_size,
            "num_units": places.num_units,
            "field": None
            if places.field is None
            else {"size": places.field.size, "jump": places.field.jump, "start": places.field.start},
            "num_sampled": num_seen,
            "split": scene.split,
            "dead_units": excited.dead.nonzero()[:, 0].tolist(),
            "never_positive_units": excited.never_positive.nonzero()[:, 0].tolist(),
            "units": per_unit,
        },
        arrays={
            "mean": excited.mean.numpy(),
            "variance": excited.variance.numpy(),
            "low": excited.low.numpy(),
            "high": excited.high.numpy(),
            "image": index[excited.image.numpy()],
            "place": excited.place.numpy(),
            "value": excited.value.numpy(),
        },
        metrics={"dead_units": num_dead, "never_positive_units": num_low, "num_units": places.num_units},
        lines=[
            f"{places.layer} ({places.kind}): {num_dead} of {places.num_units} units are dead, one value everywhere; "
            f"{num_low} are nowhere above 0, over {num_seen:,} images",
            f"shown: units {', '.join(map(str, units))}, {_why(settings)}",
            _field_in_words(places, scene.image_size),
            *([_why_not(last, places)] if settings.layer is None and last != places else []),
        ],
    )


@torch.no_grad()
def most_exciting(
    model: nn.Module, places: Places, batches: Iterable[tuple[Tensor, Tensor]], *, num_images: int
) -> Excited:
    """Go over `batches` of (numbers (B,), normalised images (B, C, H, W)) and keep what excites each unit most.

    Of each image only the best place counts, so that the `num_images` are different images; the earlier of equals
    comes first. Raises ValueError where a value is not finite.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept[:] = [places.values(output).float().cpu().clone()]  # (B, C, P), before what follows writes over it

    handle = model.get_submodule(places.layer).register_forward_hook(keep)
    value = torch.empty(places.num_units, 0)
    image, place = value.long(), value.long()
    total = 0
    means, squares, low, high = [], [], [], []
    try:
        for number, batch in batches:
            pooled_features(model, batch)
            seen = kept[0]
            if not torch.isfinite(seen).all():
                raise ValueError(f"{places.layer} gives values that are not finite; the backbone has diverged")
            best, where = seen.max(dim=2)  # (B, C), (B, C)
            value = torch.cat([value, best.T], dim=1)  # (C, k+B)
            image = torch.cat([image, number.long().expand(places.num_units, -1)], dim=1)
            place = torch.cat([place, where.T], dim=1)
            order = value.argsort(dim=1, descending=True, stable=True)[:, :num_images]  # (C, k)
            value, image, place = (each.gather(1, order) for each in (value, image, place))
            total += seen.shape[0] * seen.shape[2]
            means.append(seen.sum((0, 2), dtype=torch.float64))
            squares.append(seen.square().sum((0, 2), dtype=torch.float64))
            low.append(seen.amin((0, 2)))
            high.append(seen.amax((0, 2)))
    finally:
        handle.remove()
    mean = torch.stack(means).sum(0) / total  # (C,)
    variance = (torch.stack(squares).sum(0) / total - mean.square()).clamp(min=0)
    return Excited(
        value, image, place, mean.float(), variance.float(), torch.stack(low).amin(0), torch.stack(high).amax(0)
    )


def choose_units(excited: Excited, *, units: Sequence[int] | None, choose: str, num: int, seed: int) -> list[int]:
    """The units given; else `num` that are alive: those of the highest variance, or a seeded draw, in their order."""
    if units is not None:
        return [int(unit) for unit in units]
    alive = (~excited.dead).nonzero()[:, 0]  # (A,)
    if choose == "variance":
        ranked = excited.variance[alive].argsort(descending=True, stable=True)
        return alive[ranked[:num]].tolist()
    drawn = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:num]
    return alive[drawn.sort().values].tolist()


def cut(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A box (top, left, height, width) of uint8 pixels (H, W, 3), no larger than the image.

    Light gray is what the box has beyond the image, and along a side of which it is no shorter, what it leaves out.
    """
    rows, seen_rows = _along(box[0], box[2], pixels.shape[0])
    columns, seen_columns = _along(box[1], box[3], pixels.shape[1])
    tile = np.empty((len(rows), len(columns), 3), np.uint8)
    tile[:] = OUTSIDE
    tile[np.ix_(seen_rows, seen_columns)] = pixels[np.ix_(rows[seen_rows], columns[seen_columns])]
    return tile


def _along(start: int, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a tile, and which of them are in the box and in the image."""
    rows = np.arange(start, start + size) if size < side else np.arange(side)
    return rows, (rows >= max(start, 0)) & (rows < min(start + size, side))


def _pixels(scene: Scene, source: Source, index: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) of the images at `index`, as the network saw them."""
    return to_uint8(scene.normalised(scene.views_of(source, index)), scene.mean, scene.std)


def _patches(
    excited: Excited, unit: int, pixels: dict[int, np.ndarray], places: Places, image_size: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each of a unit's images the patch, and the whole image with the patch marked."""
    pairs = []
    for image, place in zip(excited.image[unit].tolist(), excited.place[unit].tolist()):
        whole, box = pixels[image], places.box(place, image_size)
        is_part = box[2] < image_size[0] and box[3] < image_size[1]
        marked = _clipped(box, image_size) if is_part else places.cell(place, image_size)
        pairs.append((cut(whole, box), boxed(whole, [marked], [MARK])))
    return pairs


def _clipped(box: tuple[int, int, int, int], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    top, left = max(box[0], 0), max(box[1], 0)
    bottom, right = min(box[0] + box[2], image_size[0]), min(box[1] + box[3], image_size[1])
    return top, left, max(bottom - top, 1), max(right - left, 1)


def _about_unit(
    scene: Scene,
    excited: Excited,
    unit: int,
    places: Places,
    source: Source,
    index: np.ndarray,
    labels: np.ndarray,
) -> dict[str, Any]:
    patches = [
        {
            "image": int(index[image]),
            "name": source.describe(int(index[image])),
            "label": labels[image],
            "value": value,
            "cell": divmod(place, places.grid_size[1]),
            "box": places.box(place, scene.image_size),
        }
        for image, place, value in zip(
            excited.image[unit].tolist(), excited.place[unit].tolist(), excited.value[unit].tolist()
        )
    ]
    return {
        "unit": unit,
        "mean": float(excited.mean[unit]),
        "std": float(excited.variance[unit].sqrt()),
        "is_dead": bool(excited.dead[unit]),
        "patches": patches,
    }


def _captions(per_unit: Sequence[dict[str, Any]], source: Source) -> list[list[str]]:
    return [
        [f"{each['value']:.3g} {class_name(each['label'], source.classes) or ''}" for each in unit["patches"]]
        for unit in per_unit
    ]


def _cut_how(places: Places) -> str:
    return "the patch of that place" if places.field is None else "cut to what the unit sees"


def _row_title(unit: dict[str, Any]) -> str:
    dead = "\ndead" if unit["is_dead"] else ""
    return f"unit {unit['unit']}\n{unit['mean']:.2g} ± {unit['std']:.2g}{dead}"


def _title(places: Places, scene: Scene, num: int, how: str) -> str:
    return (
        f"{places.layer}: what of {num:,} {scene.split} images excites a unit most, {how}. "
        "Left: mean and spread of all its values; below: the value here"
    )


def _why(settings: Any) -> str:
    if settings.units is not None:
        return "as activations.units asks"
    return "those that vary most" if settings.choose == "variance" else "drawn at random of those alive"


def _field_in_words(places: Places, image_size: tuple[int, int]) -> str:
    rows, columns = places.grid_size
    if places.field is None:
        return (
            f"its {rows} x {columns} places look at the whole image through attention or gates, so that the patch "
            "shown is where the value stands, not all that made it"
        )
    height, width = places.field.size
    beyond = ", more than the image" if height > image_size[0] and width > image_size[1] else ""
    return f"each of its {rows} x {columns} places sees {height} x {width} pixels{beyond}, padding among them"


def _why_not(last: Places, places: Places) -> str:
    """Why a layer is shown that is not the last one."""
    (rows, columns), (last_rows, last_columns) = places.grid_size, last.grid_size
    return (
        f"{places.layer} with {rows} x {columns} places is shown, as the last layer, {last.layer}, has only "
        f"{last_rows} x {last_columns} on images of this size; activations.layer={last.layer} shows that one"
    )


def _check_settings(settings: Any, places: Places) -> None:
    for key in ("num_units", "num_patches"):
        if settings[key] < 1:
            raise ValueError(f"activations.{key} must be at least 1, got {settings[key]}")
    if settings.choose not in CHOICES:
        raise ValueError(f"activations.choose must be one of {', '.join(CHOICES)}, got {settings.choose!r}")
    if settings.units is None:
        return
    for key in ("choose", "num_units"):
        if settings[key] != getattr(ActivationsConfig, key):
            raise ValueError(f"activations.{key} has no effect with activations.units, which names them; leave it out")
    wrong = [unit for unit in settings.units if not 0 <= unit < places.num_units]
    if wrong or not len(settings.units):
        raise ValueError(
            f"activations.units must name some of the {places.num_units} units of {places.layer}, "
            f"0..{places.num_units - 1}, got {list(settings.units)}"
        )
