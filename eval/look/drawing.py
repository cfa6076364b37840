"""Pictures from tiles, captions, heat maps and plots. All take and give uint8 (H, W, 3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

INK, PAPER = (32, 32, 32), (255, 255, 255)
GOOD, BAD = (0, 114, 178), (213, 94, 0)
"""Blue and vermilion of Okabe and Ito's palette, which colour-blind people tell apart."""
GAP, TITLE_SIZE, TEXT_SIZE = 6, 15, 12
LARGEST_TILE = 96  # pixels
GRAY = 128
"""What stands for a hidden pixel: the same gray in all channels, whatever the data's mean is."""

Tile = np.ndarray
"""uint8 (h, w, 3)."""


def captioned(
    rows: Sequence[Sequence[Tile | None]],
    *,
    captions: Sequence[Sequence[str | None]] | None = None,
    row_titles: Sequence[str] | None = None,
    title: str | None = None,
    min_side: int = 96,
) -> np.ndarray:
    """Rows of tiles as one picture: a title above, each row's own at its left, a caption under each tile.

    A tile that is None leaves its place empty. Tiles whose longer side is under `min_side` are enlarged by one whole
    factor, so that single pixels stay squares. Captions are wrapped to the width of a tile.
    """
    tiles = [tile for row in rows for tile in row if tile is not None]
    if not tiles:
        raise ValueError("a picture needs at least one tile")
    factor = max(math.ceil(min_side / max(side for tile in tiles for side in tile.shape[:2])), 1)
    cell_h = max(tile.shape[0] for tile in tiles) * factor
    cell_w = max(tile.shape[1] for tile in tiles) * factor
    font, title_font = _font(TEXT_SIZE), _font(TITLE_SIZE)
    texts = [_wrapped(row, cell_w, font) for row in captions] if captions else [[] for _ in rows]
    line = TEXT_SIZE + 4
    text_heights = [max((text.count("\n") + 1 for text in row if text), default=0) * line for row in texts]
    titles = [_wrap(each, 150, font) for each in row_titles] if row_titles else []
    left = GAP + (max(_width(each, font) for each in titles) + 2 * GAP if titles else 0)
    columns = max(len(row) for row in rows)
    width = left + columns * (cell_w + GAP)
    heading = _wrap(title, max(width - 2 * GAP, 200), title_font) if title else ""
    width = max(width, _width(heading, title_font) + 2 * GAP if heading else 0)
    top = GAP + ((heading.count("\n") + 1) * (TITLE_SIZE + 5) + GAP if heading else 0)
    height = top + sum(cell_h + each + GAP for each in text_heights)
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    if heading:
        draw.multiline_text((GAP, GAP), heading, fill=INK, font=title_font, spacing=5)
    y = top
    for number, row in enumerate(rows):
        if titles:
            draw.multiline_text((GAP, y), titles[number], fill=INK, font=font, spacing=4)
        for place, tile in enumerate(row):
            x = left + place * (cell_w + GAP)
            if tile is not None:
                canvas.paste(Image.fromarray(enlarged(tile, factor)), (x, y))
            if place < len(texts[number]) and texts[number][place]:
                draw.multiline_text((x, y + cell_h + 2), texts[number][place], fill=INK, font=font, spacing=4)
        y += cell_h + text_heights[number] + GAP
    return np.array(canvas)


def enlarged(tile: Tile, factor: int) -> np.ndarray:
    """Each pixel as a square of `factor` by `factor`."""
    return tile.repeat(factor, axis=0).repeat(factor, axis=1)


def framed(tile: Tile, colour: tuple[int, int, int], *, width: int = 3) -> np.ndarray:
    """The tile with a frame of `width` pixels around it; it grows by twice that."""
    frame = np.empty((tile.shape[0] + 2 * width, tile.shape[1] + 2 * width, 3), np.uint8)
    frame[:] = colour
    frame[width:-width, width:-width] = tile
    return frame


def colours_end(values: np.ndarray, *, percentile: float = 99.0) -> float:
    """Where colours of a map end, so that a few values do not hide the others: this percentile of the sizes of its
    values, 1 where they are all 0.
    """
    return float(np.percentile(np.abs(values), percentile)) or 1.0


def tile_side(image_size: tuple[int, int]) -> int:
    """Pixels of an image among many: its longer side, at most 96."""
    return min(max(image_size), LARGEST_TILE)


def with_gray(pixels: Tile, hidden: np.ndarray) -> np.ndarray:
    """Pixels uint8 (H, W, 3) with gray where `hidden` (H, W)."""
    return np.where(hidden[:, :, None], np.uint8(GRAY), pixels)


def colour(heat: np.ndarray, *, symmetric: bool = False, bounds: tuple[float, float] | None = None) -> np.ndarray:
    """A map (h, w) in colours: viridis from its least to its greatest value, or blue, white and red around 0.

    `bounds` set the values of the ends; what lies beyond them has their colour. A constant map has one colour.
    """
    values = np.nan_to_num(np.asarray(heat, np.float64))
    if bounds is None:
        bound = float(np.abs(values).max())
        bounds = (-bound, bound) if symmetric else (float(values.min()), float(values.max()))
    low, high = bounds
    scaled = np.clip((values - low) / (high - low), 0, 1) if high > low else np.full(values.shape, 0.5 * symmetric)
    table = matplotlib.colormaps["RdBu_r" if symmetric else "viridis"]
    return (table(scaled)[..., :3] * 255).round().astype(np.uint8)


def resized(heat: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """A map (h, w) at `size`, bilinear or in squares."""
    given = torch.from_numpy(np.asarray(heat, np.float32))[None, None]  # (1, 1, h, w)
    scaled = interpolate(given, size=size, mode="bilinear", align_corners=False) if smooth else None
    return (interpolate(given, size=size, mode="nearest") if scaled is None else scaled)[0, 0].numpy()


def overlay(
    pixels: Tile,
    heat: np.ndarray,
    *,
    alpha: float = 0.5,
    symmetric: bool = False,
    bounds: tuple[float, float] | None = None,
    smooth: bool = True,
) -> np.ndarray:
    """A map (h, w) in colours over the gray image, brought to the image's size."""
    gray = pixels.astype(np.float64).mean(axis=2, keepdims=True).repeat(3, axis=2)
    coloured = colour(resized(heat, pixels.shape[:2], smooth=smooth), symmetric=symmetric, bounds=bounds)
    return (gray * (1 - alpha) + coloured * alpha).round().astype(np.uint8)


def boxed(pixels: Tile, boxes: Sequence[tuple[int, int, int, int]], colours: Sequence[tuple[int, int, int]]) -> Tile:
    """The picture with boxes (top, left, height, width), in pixels, drawn on it."""
    canvas = Image.fromarray(pixels)
    draw = ImageDraw.Draw(canvas)
    thick = max(1, round(max(pixels.shape[:2]) / 100))
    for (top, left, height, width), ink in zip(boxes, colours):
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=ink, width=thick)
    return np.array(canvas)


def plot(width: float, height: float) -> Figure:
    """An empty figure of so many inches, at 100 pixels each, without the state that pyplot keeps."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure of `plot` as uint8 (H, W, 3)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@functools.cache
def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings: Pillow's own font lacks most signs and scripts."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _width(text: str, font: Any) -> int:
    return max(math.ceil(font.getlength(line)) for line in text.split("\n"))


def _wrapped(row: Sequence[str | None], width: int, font: Any) -> list[str]:
    return [_wrap(text, width, font) if text else "" for text in row]


def _wrap(text: str, width: int, font: Any) -> str:
    """Text in lines of at most `width` pixels, broken between words, and within those that are longer."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            joined = f"{current} {word}".strip()
            if current and font.getlength(joined) > width:
                lines.append(current)
                joined = word
            while font.getlength(joined) > width and len(joined) > 1:
                fits = next(n for n in range(len(joined) - 1, 0, -1) if n == 1 or font.getlength(joined[:n]) <= width)
                lines.append(joined[:fits])
                joined = joined[fits:]
            current = joined
        lines.append(current)
    return "\n".join(lines)
