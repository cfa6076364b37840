"""How well a run answers its pretext question, and what a single patch gives away without being understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from eval.look.drawing import captioned
from eval.look.labels import class_name
from eval.look.place_pictures import SIDE, answer_picture, confusion_plot
from eval.look.places import Answers, accuracy, ask, commonest_mistake, confusion
from eval.look.result import DoesNotApply, Look
from eval.look.samples import sample_index
from eval.look.scene import Scene
from eval.look.shortcut_report import Shortcuts, shortcut_lines, shortcut_metrics, shortcut_plot
from eval.look.shortcuts import (
    GRID,
    features_of,
    grid_cell,
    middles,
    probe_class,
    probe_place,
    random_channels,
    random_corners,
    shifted_patches,
)
from eval.look.views import label, run_recipe, run_views, side_by_side
from ssl.config import plain
from ssl.methods.relative_location import PLACES, RelativeLocation, cut
from ssl.models.backbones import pooled_features
from ssl.pictures import to_uint8

NUM_PATCHES = 4


@dataclass(frozen=True)
class Patches:
    """Single patches of a sample of images as a backbone is shown them, untouched and with a channel displaced."""

    image: np.ndarray
    """(B,): which image."""
    place: Tensor
    """float32 (B, P, 2): x and y of each patch's middle, 0 left and top, 1 right and bottom."""
    cell: Tensor
    """int64 (B, P): the cell of a 3x3 grid over the image in which it lies."""
    channel: Tensor
    """int64 (B, P): the channel that is displaced in `shifted`, -1 for none."""
    plain: Tensor
    """(B, P, C, h, w)."""
    shifted: Tensor
    size: tuple[int, int]
    """Height and width in pixels of the image."""


def look(scene: Scene) -> Look:
    """Relative location's answers and confusions, and for any backbone what single patches give away."""
    relative = is_relative_location(scene)
    check_settings(scene, relative=relative)
    if relative:
        pictures, data, metrics, lines, patches = _answers(scene)
    else:
        pictures, data, metrics, lines = {}, {}, {}, _no_question(scene)
        patches = _random_patches(scene)
    found = {"trained": shortcuts(scene.backbone, patches, scene)}
    if scene.loaded is not None:
        found["untrained"] = shortcuts(scene.untrained(), patches, scene)
    else:
        found = {"untrained": found["trained"]}
    pictures["shortcuts"] = shortcut_plot(found, title=_shortcut_title(scene, patches))
    if not relative:
        pictures["patches"] = _patch_picture(scene, patches)
    data["shortcuts"] = {
        "patches": int(patches.plain.shape[0] * patches.plain.shape[1]),
        "images": len(patches.image),
        "patch_size": list(patches.size),
        "grid": GRID,
        "shift": int(scene.config.pretext.shift),
        "parts": "60 % of the images to fit, 20 % to choose the decay, 20 % judged",
        **{name: asdict(each) for name, each in found.items()},
    }
    for name, each in found.items():
        metrics |= shortcut_metrics(each, "" if name == "trained" or len(found) == 1 else "_untrained")
    lines += shortcut_lines(found, relative=relative)
    if scene.called("untrained") != "untrained":
        lines.append(f"called untrained here: {scene.untrained_title}")
    return Look(pictures=pictures, data=data, metrics=metrics, lines=lines)


def is_relative_location(scene: Scene) -> bool:
    """Whether the checkpoint holds relative location's head beside its backbone."""
    return scene.method_name == RelativeLocation.__name__ and isinstance(scene.method(), RelativeLocation)


def check_settings(scene: Scene, *, relative: bool) -> None:
    """Raise ValueError for settings that are out of range or have no effect on this checkpoint."""
    settings = plain(scene.config.pretext)
    if scene.config.images is not None:
        raise DoesNotApply("images= names too few to ask about; give data=folder data.root=PATH instead, or indices=")
    for key in ("sample", "shift"):
        if settings[key] < 1:
            raise ValueError(f"pretext.{key} must be at least 1, got {settings[key]}")
    if settings["epoch"] < 0:
        raise ValueError(f"pretext.epoch must be 0 or more, got {settings['epoch']}")
    given = [key for key in ("patches", "patch_size") if settings[key] is not None]
    if relative and given:
        raise ValueError(f"pretext.{given[0]} has no effect on relative location, which cuts its own nine patches")
    if not relative and settings["epoch"]:
        raise ValueError("pretext.epoch has no effect but on relative location, whose views and patches it chooses")
    for key in given:
        if settings[key] < 1:
            raise ValueError(f"pretext.{key} must be at least 1, got {settings[key]}")
    if not relative and (settings["patch_size"] or 1) >= min(scene.image_size):
        raise ValueError(
            f"pretext.patch_size={settings['patch_size']} leaves patches of images of {scene.image_size} one place; "
            f"give less than {min(scene.image_size)}"
        )


# ---- relative location --------------------------------------------------------------------------------------------


def _answers(
    scene: Scene,
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, float], list[str], Patches]:
    """(pictures, data, metrics, lines) of relative location's own question, and its patches for the probes."""
    method = scene.method()
    assert isinstance(method, RelativeLocation)
    view, noise, index = _views(scene, method)
    batches = [
        ask(method, *each) for each in zip(view.split(scene.config.batch_size), noise.split(scene.config.batch_size))
    ]
    answers = Answers(
        *(torch.cat([getattr(each, name) for each in batches]) for name in ("corners", "patches", "probabilities"))
    )
    counts = confusion(answers.predicted)
    share, error = accuracy(answers.predicted)
    source, few = scene.source(scene.split), _num_shown(scene, len(index))
    classes = [class_name(each, source.classes) for each in np.asarray(source.labels)[index[:few]]]
    labels = [label(name, source.describe(each), each) for name, each in zip(classes, index[:few].tolist())]
    size = method.patch_size
    picture = answer_picture(view[:few], answers, labels, patch_size=size, mean=scene.mean, std=scene.std)
    pictures = {"": picture, "confusion": confusion_plot(counts, share, error, len(index))}
    data = {
        "split": scene.split,
        "epoch": int(scene.config.pretext.epoch),
        "accuracy": share,
        "accuracy_error": error,
        "chance": 1 / len(PLACES),
        "images": len(index),
        "places": list(PLACES),
        "confusion": counts.tolist(),
        "confusion_rows": "true place",
        "confusion_columns": "place that was answered",
        "shown": [
            {
                "index": int(index[place]),
                "name": source.describe(int(index[place])),
                "corners": answers.corners[place].tolist(),
                "probabilities": answers.probabilities[place].tolist(),
            }
            for place in range(few)
        ],
    }
    lines = [
        f"places found: {share:.1%} +- {error:.1%} of the neighbours in {len(index)} images of {source.name}, "
        f"by chance {1 / len(PLACES):.1%}",
        commonest_mistake(counts),
    ]
    channel = random_channels(index, 9, channels=scene.channels, seed=scene.seed).to(view.device)
    shift = int(scene.config.pretext.shift)
    shifted = shifted_patches(view, answers.corners, method.patch_size, channel, shift=shift)
    patches = Patches(
        image=index,
        place=middles(answers.corners, image_size=method.view_size, patch_size=method.patch_size).cpu(),
        cell=torch.arange(9).expand(len(index), 9),
        channel=channel.cpu(),
        plain=answers.patches,
        shifted=method.prepare(shifted, noise),
        size=method.patch_size,
    )
    return pictures, data, {"accuracy": share}, lines, patches


def _views(scene: Scene, method: RelativeLocation) -> tuple[Tensor, Tensor, np.ndarray]:
    """(views, noise, indices) of a sample of the split, as training shows them in `pretext.epoch`."""
    views = run_views(scene, scene.source(scene.split), run_recipe(scene), method)
    index = _sample(scene)
    seen = views.seen(views.drawn(index.tolist(), epoch=int(scene.config.pretext.epoch)))
    readable = torch.from_numpy(~np.isin(index, list(views.loader.bad)))
    return seen["views"][0][readable], seen["noise"][readable], index[readable.numpy()]


def _sample(scene: Scene) -> np.ndarray:
    """Indices of the images that are asked about, those to show before the others."""
    source, settings = scene.source(scene.split), scene.config
    sample = sample_index(source, int(settings.pretext.sample), scene.seed)
    first = sample_index(source, settings.num_images, scene.seed)
    if settings.indices is not None:
        first = scene.shown().index
    return np.array(list(dict.fromkeys([*first, *sample])), np.int64)


def _num_shown(scene: Scene, num: int) -> int:
    """How many of `num` images of `_sample` are shown."""
    return min(scene.config.num_images if scene.config.indices is None else len(scene.config.indices), num)


# ---- any backbone -------------------------------------------------------------------------------------------------


def _random_patches(scene: Scene) -> Patches:
    """Patches at random places of a sample's central views, each resized to what the backbone takes."""
    settings = plain(scene.config.pretext)
    index = _sample(scene)
    views = scene.views_of(scene.source(scene.split), index)
    index, image = index[views.index], scene.normalised(views)  # (B, C, H, W)
    height, width = scene.image_size
    side = settings["patch_size"]
    size = (side, side) if side is not None else (max(height // 2, 1), max(width // 2, 1))
    num = settings["patches"] or NUM_PATCHES
    corners = random_corners(index, num, image_size=scene.image_size, patch_size=size, seed=scene.seed)
    place = middles(corners, image_size=scene.image_size, patch_size=size)
    channel = random_channels(index, num, channels=scene.channels, seed=scene.seed)
    corners = corners.to(scene.device)
    shifted = shifted_patches(image, corners, size, channel.to(scene.device), shift=settings["shift"])
    return Patches(
        image=index,
        place=place,
        cell=grid_cell(place.flatten(0, 1)).view(len(index), num),
        channel=channel,
        plain=cut(image, corners, size),
        shifted=shifted,
        size=size,
    )


def shortcuts(backbone: nn.Module, patches: Patches, scene: Scene) -> Shortcuts:
    """What linear probes on the features of `backbone` tell of single patches."""
    read = _reader(backbone, scene)
    num = patches.plain.shape[1]
    image = patches.image.repeat(num)
    features = features_of(patches.plain, read, batch_size=scene.config.batch_size)  # (B*P, D)
    cell = probe_class(features, patches.cell.flatten(), image, num_classes=GRID**2, seed=scene.seed)
    place = probe_place(features, patches.place.flatten(0, 1), image, seed=scene.seed)
    if scene.channels == 1:
        return Shortcuts(cell, place, None)
    features = features_of(patches.shifted, read, batch_size=scene.config.batch_size)
    shifted = patches.channel.flatten() + 1  # 0 for none
    return Shortcuts(
        cell, place, probe_class(features, shifted, image, num_classes=scene.channels + 1, seed=scene.seed)
    )


def _reader(backbone: nn.Module, scene: Scene) -> Callable[[Tensor], Tensor]:
    """From patches (B, C, h, w) to features (B, D): as they are for relative location, else at the backbone's size."""
    if is_relative_location(scene):
        return lambda patches: pooled_features(backbone, patches)
    return lambda patches: pooled_features(
        backbone, interpolate(patches, size=scene.image_size, mode="bilinear", align_corners=False, antialias=True)
    )


def _patch_picture(scene: Scene, patches: Patches) -> np.ndarray:
    """A few patches, untouched and with a channel displaced."""
    few = _num_shown(scene, len(patches.image))
    names = ("red", "green", "blue") if scene.channels == 3 else tuple(map(str, range(scene.channels)))
    whole = to_uint8(patches.plain[:few, 0], scene.mean, scene.std)
    moved = to_uint8(patches.shifted[:few, 0], scene.mean, scene.std)
    captions: list[list[str | None]] = []
    for place in range(few):
        x, y = patches.place[place, 0].tolist()
        channel = int(patches.channel[place, 0])
        captions.append([f"x {x:.2f}, y {y:.2f}", "not displaced" if channel < 0 else f"{names[channel]} displaced"])
    title = "Patches of which a probe tells the place (x from 0, left, to 1, y from 0, top) and the displaced channel"
    rows, captions = side_by_side([list(each) for each in zip(whole, moved)], captions)
    return captioned(rows, captions=captions, title=title, min_side=SIDE)


def _shortcut_title(scene: Scene, patches: Patches) -> str:
    height, width = patches.size
    return (
        f"What a single patch of {height}×{width} pixels gives away: linear probes on {len(patches.image)} images "
        f"of {scene.data_name}"
    )


def _no_question(scene: Scene) -> list[str]:
    """Why there is no confusion matrix, and where this method's own question is looked at."""
    name = scene.method_name
    if name in ("MAE", "SimMIM"):
        return [f"{name}'s own question is to fill in what is hidden: what=reconstructions shows its answers"]
    if name is None:
        return ["a backbone alone: places of neighbours are what relative location is asked, and what its head answers"]
    return [f"{name} is not asked for places; a confusion of the eight is of method=relative_location alone"]
