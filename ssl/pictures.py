"""Pictures for a person to look at: the views that a method sees, and what MAE makes of masked images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Statistics = Sequence[float]
"""Mean or standard deviation per channel, in 0..1 scale."""


def to_uint8(images: Tensor, mean: Statistics, std: Statistics) -> np.ndarray:
    """Normalised images (B, C, h, w) as uint8 pixels (B, h, w, 3): one channel as gray, of many the first three."""
    pixels = images.detach().float().cpu()
    scale = torch.as_tensor(std, dtype=torch.float32).view(-1, 1, 1)
    shift = torch.as_tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    pixels = (pixels * scale + shift).nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()  # (B, C, h, w)
    if pixels.shape[1] == 2:
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels[:, :3]
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def grid(rows: Sequence[Sequence[np.ndarray]], *, gap: int = 2, min_side: int = 96) -> np.ndarray:
    """Rows of uint8 (h, w, 3) tiles as one (H, W, 3) picture on white; a tile may be smaller than the others.

    Tiles whose longer side is under `min_side` pixels are enlarged by a whole factor, so that single pixels stay
    squares.
    """
    if not rows or not any(len(row) for row in rows):
        raise ValueError("a grid needs at least one tile")
    longest = max(side for row in rows for tile in row for side in tile.shape[:2])
    factor = max(math.ceil(min_side / longest), 1)
    tiles = [[tile.repeat(factor, axis=0).repeat(factor, axis=1) for tile in row] for row in rows]
    height = max(tile.shape[0] for row in tiles for tile in row)
    width = max(tile.shape[1] for row in tiles for tile in row)
    columns = max(len(row) for row in tiles)
    canvas = np.full((len(tiles) * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def views_panel(views: Sequence[Tensor], *, mean: Statistics, std: Statistics, num_images: int = 8) -> np.ndarray:
    """One column per image, one row per view (B, C, h, w)."""
    return grid([list(to_uint8(view[:num_images], mean, std)) for view in views])


def reconstruction_panel(
    pictures: Mapping[str, Tensor], *, mean: Statistics, std: Statistics, num_images: int = 8
) -> np.ndarray:
    """One column per image: the input, what the encoder saw of it (gray where masked), and the reconstruction.

    `pictures` are `input`, `masked` and `reconstruction`, each (B, C, h, w), as `MAE.reconstruct` returns them.
    """
    return grid(
        [list(to_uint8(pictures[name][:num_images], mean, std)) for name in ("input", "masked", "reconstruction")]
    )


def save_png(image: np.ndarray, path: Path) -> None:
    """Write an uint8 (H, W, 3) picture; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
