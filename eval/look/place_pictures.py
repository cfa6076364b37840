"""Pictures of relative location's answers, and of which places it takes for which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eval.look.drawing import BAD, GOOD, boxed, captioned, colour, enlarged, figure_pixels, framed, plot
from eval.look.places import Answers
from eval.look.views import side_by_side
from ssl.methods.relative_location import CENTRE, NEIGHBOURS, PLACES
from ssl.pictures import to_uint8

SIDE = 144
"""Pixels of a tile's side, about."""

Size = tuple[int, int]


def answer_picture(
    view: Tensor,
    answers: Answers,
    labels: Sequence[str],
    *,
    patch_size: Size,
    mean: Sequence[float],
    std: Sequence[float],
) -> np.ndarray:
    """Of views (B, C, H, W): their patches, what the backbone was given, and a map of the answer for each neighbour."""
    rows: list[list[np.ndarray | None]] = []
    captions: list[list[str | None]] = []
    probabilities = answers.probabilities[: len(view)].cpu().numpy()  # (B, 8, 8)
    brightest = max(round(float(probabilities.max()), 2), 2 / len(PLACES))
    for place, pixels in enumerate(to_uint8(view, mean, std)):
        right = answers.predicted[place].cpu() == torch.arange(len(PLACES))
        rows.append(
            [
                _with_patches(pixels, patch_size, answers.corners[place], right),
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
    return captioned(rows, captions=captions, title=title, min_side=SIDE)


def _found(right: Tensor) -> str:
    return f"{int(right.sum())} of {len(PLACES)} places found"


def _with_patches(pixels: np.ndarray, patch_size: Size, corners: Tensor, right: Tensor) -> np.ndarray:
    factor = _factor(pixels)
    height, width = (side * factor for side in patch_size)
    boxes = [(top * factor, left * factor, height, width) for top, left in corners.tolist()]
    inks = [(255, 255, 255)] * 9
    for cell, found in zip(NEIGHBOURS, right.tolist()):
        inks[cell] = GOOD if found else BAD
    return boxed(_large(pixels), boxes, inks)


def _factor(pixels: np.ndarray) -> int:
    return max(round(SIDE / max(pixels.shape[:2])), 1)


def _large(pixels: np.ndarray) -> np.ndarray:
    return enlarged(pixels, _factor(pixels))


def _patches_as_given(patches: Tensor) -> np.ndarray:
    """The nine patches (9, C, h, w) in their grid, each stretched to its own range."""
    channels = patches.shape[1]
    flat = patches.flatten(1)
    low, high = flat.min(1).values.view(-1, 1, 1, 1), flat.max(1).values.view(-1, 1, 1, 1)
    pixels = to_uint8((patches - low) / (high - low).clamp_min(1e-6), [0.0] * channels, [1.0] * channels)
    factor = max(round((SIDE / 3 - 4) / max(pixels.shape[1:3])), 1)
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


def confusion_plot(counts: np.ndarray, share: float, error: float, num: int) -> np.ndarray:
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
