"""One picture of what a short pretraining learned: the loss, the accuracies, neighbours before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INK, GREY, BLUE, PALE = "#1f2430", "#8a91a0", "#2b6cb0", "#a9c5e4"
RIGHT, WRONG, PAPER = (0.16, 0.60, 0.36), (0.84, 0.33, 0.31), (1.0, 1.0, 1.0)
CELL, FRAME, GAP = 64, 4, 40  # pixels of the picture's mosaic


@dataclass(frozen=True)
class Neighbours:
    """Query images with their class names, and per query its nearest images with whether each is of its class."""

    queries: list[np.ndarray]
    names: list[str]
    images: list[list[np.ndarray]]
    right: list[list[bool]]


def draw(
    path: Path,
    *,
    loss: Sequence[tuple[float, float]],
    rows: Sequence[tuple[str, float, float]],
    before: Neighbours,
    after: Neighbours,
    num_images: int,
) -> None:
    """Write the PNG. `loss` holds (epoch, loss), `rows` (subject, kNN top-1, linear top-1) as fractions."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 11, "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12.4, 10.2), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, height_ratios=[1, 1.75], left=0.07, right=0.97, top=0.9, bottom=0.03, hspace=0.3, wspace=0.18
        )
        figure.suptitle(
            f"What a backbone learned from {num_images:,} images without a label", fontsize=17, x=0.07, ha="left"
        )
        _draw_loss(figure.add_subplot(grid[0, 0]), loss)
        _draw_accuracies(figure.add_subplot(grid[0, 1]), rows)
        _draw_neighbours(figure.add_subplot(grid[1, :]), before, after)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_loss(axes, loss: Sequence[tuple[float, float]]) -> None:
    epochs, values = zip(*loss) if loss else ((), ())
    axes.plot(epochs, values, color=BLUE, linewidth=2)
    axes.set_title("Pretraining loss", loc="left", fontsize=13)
    axes.set_xlabel("epoch")
    axes.grid(axis="y", color="#e6e8ec")


def _draw_accuracies(axes, rows: Sequence[tuple[str, float, float]]) -> None:
    place = np.arange(len(rows))
    for offset, number, colour, name in ((-0.2, 1, PALE, "kNN"), (0.2, 2, BLUE, "linear probe")):
        values = [100 * row[number] for row in rows]
        bars = axes.bar(place + offset, values, width=0.38, color=colour, label=name)
        axes.bar_label(bars, [f"{value:.0f}" for value in values], padding=2, fontsize=11)
    axes.set_title("Accuracy on test images, %", loc="left", fontsize=13)
    axes.set_xticks(place, [row[0] for row in rows])
    axes.set_ylim(0, 108)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.legend(frameon=False, loc="upper left")


def _draw_neighbours(axes, before: Neighbours, after: Neighbours) -> None:
    num = len(before.images[0])
    tile = CELL + 2 * FRAME + 6
    starts = (0, tile + GAP, tile + 2 * GAP + num * tile)  # left edge of the query, of both groups
    canvas = np.ones((len(before.queries) * tile, starts[2] + num * tile, 3))
    for row, query in enumerate(before.queries):
        _paste(canvas, row * tile, starts[0], query, PAPER)
        for left, group in zip(starts[1:], (before, after)):
            for column, (image, right) in enumerate(zip(group.images[row], group.right[row])):
                _paste(canvas, row * tile, left + column * tile, image, RIGHT if right else WRONG)
        axes.text(-12, row * tile + tile / 2, before.names[row], ha="right", va="center", fontsize=11)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    for left, title in zip(starts, ("test image", "nearest train images, untrained", "nearest train images, trained")):
        axes.text(left, -14, title, fontsize=12)
    axes.text(starts[1], canvas.shape[0] + 22, "frames: same class", color=RIGHT, fontsize=11, ha="left")
    axes.text(starts[1] + 190, canvas.shape[0] + 22, "another class", color=WRONG, fontsize=11, ha="left")


def _paste(canvas: np.ndarray, top: int, left: int, image: np.ndarray, frame: tuple[float, float, float]) -> None:
    """Put an image (H, W, C) uint8 into the canvas, enlarged without smoothing, with a frame around it."""
    side = CELL + 2 * FRAME
    canvas[top : top + side, left : left + side] = frame
    rows = np.arange(CELL) * image.shape[0] // CELL
    columns = np.arange(CELL) * image.shape[1] // CELL
    pixels = image[rows][:, columns] / 255.0  # (CELL, CELL, C)
    canvas[top + FRAME : top + FRAME + CELL, left + FRAME : left + FRAME + CELL] = pixels
