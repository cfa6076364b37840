"""How well a run answers its pretext question, and what a single patch gives away without being understood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from eval.look.drawing import BAD, GOOD, boxed, captioned, colour, enlarged, figure_pixels, framed, plot
from eval.look.places import Answers, accuracy, ask, confusion
from eval.look.result import DoesNotApply, Look
from eval.look.scene import Scene, sample_index
from eval.look.shortcuts import (
    GRID,
    ClassProbe,
    PlaceProbe,
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
from ssl.data.sources import UNLABELLED, Source
from ssl.methods.relative_location import CENTRE, NEIGHBOURS, PLACES, RelativeLocation, cut
from ssl.models.backbones import pooled_features
from ssl.pictures import to_uint8

NUM_PATCHES = 4
TILE = 144
"""Pixels of a tile's side, about."""


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


@dataclass(frozen=True)
class Shortcuts:
    """What linear probes tell from the features of single patches."""

    cell: ClassProbe
    place: PlaceProbe
    channel: ClassProbe | None
    """None for images of one channel."""


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
    pictures["shortcuts"] = _shortcut_plot(found, title=_shortcut_title(scene, patches))
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
        metrics |= _shortcut_metrics(each, "" if name == "trained" or len(found) == 1 else "_untrained")
    lines += _shortcut_lines(found, relative=relative)
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
    if not relative and (settings["patch_size"] or 1) > min(scene.image_size):
        raise ValueError(f"pretext.patch_size={settings['patch_size']} is larger than images of {scene.image_size}")


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
    labels = [label(_class_name(source, each), source.describe(each), each) for each in index[:few].tolist()]
    picture = _answer_picture(scene, method, view[:few], answers, labels)
    pictures = {"": picture, "confusion": _confusion_plot(counts, share, error, len(index))}
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


def commonest_mistake(counts: np.ndarray) -> str:
    """In words, which place is taken for which most often, or which answer is given whatever is asked."""
    answer = int(counts.sum(0).argmax())
    share = counts[:, answer].sum() / counts.sum()
    if share > 0.5:
        return (
            f"{PLACES[answer]} is the answer to {share:.0%} of the questions: the head does not tell places apart yet"
        )
    wrong = np.where(np.eye(len(PLACES), dtype=bool), 0, counts)
    if not wrong.any():
        return "no place is taken for another"
    true, taken = (int(place) for place in np.unravel_index(wrong.argmax(), wrong.shape))
    share = counts[true, taken] / counts[true].sum()
    return (
        f"taken for another most often: {PLACES[true]} for {PLACES[taken]}, {share:.0%} of those at the {PLACES[true]}"
    )


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


def _class_name(source: Source, index: int) -> str | None:
    number = source.labels[index]
    if np.ndim(number) or number == UNLABELLED or source.classes is None:
        return None
    return source.classes[int(number)]


def _answer_picture(
    scene: Scene, method: RelativeLocation, view: Tensor, answers: Answers, labels: Sequence[str]
) -> np.ndarray:
    rows: list[list[np.ndarray | None]] = []
    captions: list[list[str | None]] = []
    probabilities = answers.probabilities[: len(view)].cpu().numpy()  # (B, 8, 8)
    brightest = max(round(float(probabilities.max()), 2), 2 / len(PLACES))
    for place, pixels in enumerate(to_uint8(view, scene.mean, scene.std)):
        right = answers.predicted[place].cpu() == torch.arange(len(PLACES))
        rows.append(
            [
                _with_patches(pixels, method, answers.corners[place], right),
                _patches_as_given(answers.patches[place]),
                _little_maps(probabilities[place], brightest, side=max((max(_large(pixels).shape[:2]) - 20) // 9, 8)),
            ]
        )
        captions.append([labels[place], "as the backbone is given them", _found(right)])
    title = (
        "Relative location: where does a patch lie beside the centre? Left, the patches in the view: blue where the "
        "place was found, vermilion where it was not. Right, a map for each neighbour: the probability of each of the "
        f"eight places, from dark, 0, to bright, {brightest:.2f}; the true one is framed. Chance is {1 / len(PLACES)}."
    )
    rows, captions = side_by_side(rows, captions)
    return captioned(rows, captions=captions, title=title, min_side=TILE)


def _found(right: Tensor) -> str:
    return f"{int(right.sum())} of {len(PLACES)} places found"


def _with_patches(pixels: np.ndarray, method: RelativeLocation, corners: Tensor, right: Tensor) -> np.ndarray:
    factor = _factor(pixels)
    height, width = (side * factor for side in method.patch_size)
    boxes = [(top * factor, left * factor, height, width) for top, left in corners.tolist()]
    inks = [(255, 255, 255)] * 9
    for cell, found in zip(NEIGHBOURS, right.tolist()):
        inks[cell] = GOOD if found else BAD
    return boxed(_large(pixels), boxes, inks)


def _factor(pixels: np.ndarray) -> int:
    return max(round(TILE / max(pixels.shape[:2])), 1)


def _large(pixels: np.ndarray) -> np.ndarray:
    return enlarged(pixels, _factor(pixels))


def _patches_as_given(patches: Tensor) -> np.ndarray:
    """The nine patches (9, C, h, w) in their grid, each stretched to its own range."""
    channels = patches.shape[1]
    flat = patches.flatten(1)
    low, high = flat.min(1).values.view(-1, 1, 1, 1), flat.max(1).values.view(-1, 1, 1, 1)
    pixels = to_uint8((patches - low) / (high - low).clamp_min(1e-6), [0.0] * channels, [1.0] * channels)
    factor = max(round((TILE / 3 - 4) / max(pixels.shape[1:3])), 1)
    return _in_grid([enlarged(each, factor) for each in pixels])


def _little_maps(probabilities: np.ndarray, brightest: float, *, side: int) -> np.ndarray:
    """A 3x3 map of the eight probabilities (8, 8) in the place of each neighbour, its true place framed.

    A cell of a map has `side` pixels.
    """
    maps: list[np.ndarray] = []
    for neighbour in range(len(PLACES)):
        heat = np.zeros((3, 3))
        heat.flat[list(NEIGHBOURS)] = probabilities[neighbour]
        tile = enlarged(colour(heat, bounds=(0.0, brightest)), side)
        tile[side : 2 * side, side : 2 * side] = 160  # the centre patch is no answer
        row, column = divmod(NEIGHBOURS[neighbour], 3)
        top, left = row * side, column * side
        tile = boxed(
            tile, [(top, left, side, side), (top + 1, left + 1, side - 2, side - 2)], [(255, 255, 255), (0, 0, 0)]
        )
        found = probabilities[neighbour].argmax() == neighbour
        maps.append(framed(tile, GOOD if found else BAD, width=2))
    blank = np.full_like(maps[0], 255)
    return _in_grid([*maps[:CENTRE], blank, *maps[CENTRE:]])


def _in_grid(tiles: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Nine tiles of one size in three rows, on white."""
    height, width = tiles[0].shape[:2]
    canvas = np.full((3 * height + 2 * gap, 3 * width + 2 * gap, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // 3 * (height + gap), number % 3 * (width + gap)
        canvas[top : top + height, left : left + width] = tile
    return canvas


def _confusion_plot(counts: np.ndarray, share: float, error: float, num: int) -> np.ndarray:
    """The confusion matrix (8, 8), each row divided by its sum, with its numbers."""
    figure = plot(7.4, 6.6)
    axes = figure.add_subplot()
    rows = counts / counts.sum(1, keepdims=True).clip(1)  # (8, 8)
    shown = axes.imshow(rows, cmap="cividis", vmin=0, vmax=max(rows.max(), 1 / len(PLACES)))
    for true, row in enumerate(rows):
        for answered, value in enumerate(row):
            ink = "black" if value > 0.55 * shown.get_clim()[1] else "white"
            axes.text(answered, true, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=10)
    axes.set_xticks(range(len(PLACES)), PLACES, rotation=35, ha="right")
    axes.set_yticks(range(len(PLACES)), PLACES)
    axes.set_xlabel("place that was answered")
    axes.set_ylabel("true place")
    axes.set_title(
        f"{share:.1%} ± {error:.1%} of places found in {num} images; by chance {1 / len(PLACES):.1%}", fontsize=11
    )
    figure.colorbar(shown, ax=axes, label="share of the row", shrink=0.85)
    return figure_pixels(figure)


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
    return captioned(rows, captions=captions, title=title, min_side=TILE)


def _shortcut_title(scene: Scene, patches: Patches) -> str:
    height, width = patches.size
    return (
        f"What a single patch of {height}×{width} pixels gives away: linear probes on {len(patches.image)} images "
        f"of {scene.data_name}"
    )


def _shortcut_plot(found: Mapping[str, Shortcuts], *, title: str) -> np.ndarray:
    """Bars of the probes: each backbone, the same with shuffled labels, and a line at chance."""
    figure = plot(9.5, 3.9)
    figure.suptitle(title, fontsize=11)
    first = next(iter(found.values()))
    panels = figure.subplots(
        1, 2 if first.channel is None else 3, width_ratios=[1, 1.3] + [1] * (first.channel is not None)
    )
    _class_bars(panels[0], {name: each.cell for name, each in found.items()}, f"cell of a {GRID}×{GRID} grid")
    _place_bars(panels[1], {name: each.place for name, each in found.items()})
    if first.channel is not None:
        each = {name: one.channel for name, one in found.items() if one.channel is not None}
        _class_bars(panels[2], each, "displaced colour channel")
    return figure_pixels(figure)


INKS = {"trained": "#0072B2", "untrained": "#E69F00", "shuffled": "#999999"}
"""Okabe and Ito's blue and orange, and gray."""


def _class_bars(axes: Any, found: Mapping[str, ClassProbe], title: str) -> None:
    first = next(iter(found.values()))
    names = [*found, "shuffled"]
    heights = [100 * each.top1 for each in found.values()] + [100 * first.shuffled]
    spread = [100 * each.error for each in found.values()] + [100 * first.shuffled_error]
    axes.bar(names, heights, yerr=spread, capsize=3, color=[INKS[name] for name in names], width=0.65)
    axes.axhline(100 * first.chance, color="black", linestyle="--", linewidth=1, label=f"chance {first.chance:.0%}")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("% of patches told right")
    axes.set_ylim(0, max(*heights, 100 * first.chance) * 1.25)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _place_bars(axes: Any, found: Mapping[str, PlaceProbe]) -> None:
    first = next(iter(found.values()))
    groups = {name: ((each.r2_x, each.r2_y), (each.error_x, each.error_y)) for name, each in found.items()}
    groups["shuffled"] = ((first.shuffled_x, first.shuffled_y), (float("nan"), float("nan")))
    width = 0.8 / len(groups)
    for number, (name, (values, spread)) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        axes.bar([offset, 1 + offset], values, width=0.9 * width, yerr=spread, capsize=3, color=INKS[name], label=name)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks([0, 1], ["x, left to right", "y, top to bottom"])
    axes.set_title("place in the image", fontsize=10)
    axes.set_ylabel("explained variance R²")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.02), max(high, 0.1) * 1.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=len(groups))
    axes.spines[["top", "right"]].set_visible(False)


def _shortcut_metrics(found: Shortcuts, suffix: str) -> dict[str, float]:
    metrics = {
        f"cell_top1{suffix}": found.cell.top1,
        f"place_r2_x{suffix}": found.place.r2_x,
        f"place_r2_y{suffix}": found.place.r2_y,
    }
    if found.channel is not None:
        metrics[f"channel_top1{suffix}"] = found.channel.top1
    return metrics


def _shortcut_lines(found: Mapping[str, Shortcuts], *, relative: bool) -> list[str]:
    first = next(iter(found.values()))
    lines = [
        f"place, from one patch: the cell of {GRID}×{GRID} {_told(found, 'cell')}; "
        f"R2 of x {_r2_told(found, 'x')}, of y {_r2_told(found, 'y')}"
    ]
    if first.channel is not None:
        lines.append(f"which channel is displaced, from one patch: {_told(found, 'channel')}")
    trained, untrained = found.get("trained"), found.get("untrained")
    if trained is None or untrained is None:
        return [*lines, "there are no trained weights to compare with"]
    return [*lines, *findings(trained, untrained, relative=relative)]


def findings(trained: Shortcuts, untrained: Shortcuts, *, relative: bool) -> list[str]:
    """What training has made easier to tell from a single patch, and what a person may do."""
    x, y = (
        _more(
            getattr(trained.place, f"r2_{axis}") - getattr(untrained.place, f"r2_{axis}"),
            getattr(trained.place, f"error_{axis}"),
            getattr(untrained.place, f"error_{axis}"),
        )
        for axis in ("x", "y")
    )
    cell = _more(trained.cell.top1 - untrained.cell.top1, trained.cell.error, untrained.cell.error)
    found = []
    if x or (cell and not y):
        found.append(
            "training has made it easier to tell where in the image a patch lies, from left to right too: look for "
            "colour fringes of a lens, dark corners, frames or stamps that all images share"
        )
    elif y:
        found.append(
            "training has made it easier to tell how high in the image a patch lies, and not how far to the right: "
            "photos have a top and a bottom, which is knowledge and no shortcut"
        )
    coloured, before = trained.channel, untrained.channel
    if coloured is not None and before is not None and _more(coloured.top1 - before.top1, coloured.error, before.error):
        advice = "method.colour=drop, or gray with a larger method.gray_probability" if relative else "more grayscale"
        found.append(f"training has made a displaced colour channel easier to tell; against that: {advice}")
    return found or ["no sign that training has learned a shortcut: an untrained backbone tells as much"]


def _more(difference: float, *errors: float) -> bool:
    """Whether a difference is more than two standard errors of it, given those of what it is between."""
    return difference > 2 * sum(error**2 for error in errors) ** 0.5


def _told(found: Mapping[str, Shortcuts], probe: str) -> str:
    each: list[tuple[str, ClassProbe]] = [(name, getattr(one, probe)) for name, one in found.items()]
    words = ", ".join(f"{name} {one.top1:.1%} +- {one.error:.1%}" for name, one in each)
    return f"{words}, shuffled labels {each[0][1].shuffled:.1%}, chance {each[0][1].chance:.1%}"


def _r2_told(found: Mapping[str, Shortcuts], axis: str) -> str:
    return ", ".join(
        f"{which} {getattr(one.place, f'r2_{axis}'):.2f} +- {getattr(one.place, f'error_{axis}'):.2f}"
        for which, one in found.items()
    )


def _no_question(scene: Scene) -> list[str]:
    """Why there is no confusion matrix, and where this method's own question is looked at."""
    name = scene.method_name
    if name in ("MAE", "SimMIM"):
        return [f"{name}'s own question is to fill in what is hidden: what=reconstructions shows its answers"]
    if name is None:
        return ["a backbone alone: places of neighbours are what relative location is asked, and what its head answers"]
    return [f"{name} is not asked for places; a confusion of the eight is of method=relative_location alone"]
