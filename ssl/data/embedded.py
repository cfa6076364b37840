"""Procedural images that need no download: twelve shapes under nuisances, made on the fly from (seed, split, index).

A class is a shape and nothing else. Place, size, tilt, stretch, colours, which of object and ground is lighter,
background, clutter, an occluding bar and noise are drawn per image, so that neighbours in pixels are rarely of one
class, while an object spans most of the image and looks alike in every colour. Works at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ssl.data.sources import check_split
from ssl.randomness import uniforms

_CHUNK = 128  # images made at once, so that the arrays stay in the cache
_HELD_BYTES = 2**28  # larger sets are made image by image when they are read
_NOISE_SIDE = 256
_NUM_BLOBS = 2
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Embedded:
    """`num_train` or `num_test` images of `size` x `size` pixels, uint8 RGB; the same for the same seed everywhere.

    Labels go round the classes, so every prefix is balanced.
    """

    num_ignored = 0

    def __init__(
        self, split: str = "train", *, size: int = 32, num_train: int = 6000, num_test: int = 1200, seed: int = 0
    ) -> None:
        self.split = check_split(split)
        if size < 8:
            raise ValueError(f"embedded images need a size of at least 8 pixels, got {size}; try data.image_size=32")
        count = num_train if split == "train" else num_test
        if count < 1:
            raise ValueError(f"embedded data needs at least 1 image in its {split} split, got {count}")
        self.name = f"embedded {size}x{size} ({split})"
        self.size, self.seed = size, seed
        self.classes: list[str] | None = list(SHAPES)
        self.labels = np.arange(count, dtype=np.int64) % len(SHAPES)
        self._held = None
        if count * size * size * 3 <= _HELD_BYTES:
            self._held = render(np.arange(count), split=split, size=size, seed=seed)  # (N, S, S, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Pixels, uint8 (S, S, 3)."""
        if self._held is not None:
            return self._held[index]
        return render(np.array([index]), split=self.split, size=self.size, seed=self.seed)[0]

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


def render(index: np.ndarray, *, split: str, size: int, seed: int) -> np.ndarray:
    """The images at `index` (B,), uint8 (B, S, S, 3); each is a function of (seed, split, its index)."""
    index = np.asarray(index, np.int64)
    noise = _noise_tile(seed)
    images = np.empty((len(index), size, size, 3), np.uint8)
    for start in range(0, len(index), _CHUNK):
        part = index[start : start + _CHUNK]
        images[start : start + _CHUNK] = _render_chunk(part, _Draws(seed, split, part), noise, size)
    return images


class _Draws:
    """Numbers per image in named ranges; each name is its own use, so adding one moves no other."""

    def __init__(self, seed: int, split: str, index: np.ndarray) -> None:
        self._key = seed, index, split

    def __call__(self, use: str, low: float = 0.0, high: float = 1.0, count: int = 1) -> np.ndarray:
        """float32 (B, 1, 1) or (B, count), uniform in low..high."""
        seed, index, split = self._key
        numbers = low + (high - low) * uniforms(seed, 0, index, f"embedded {split} {use}", count)
        return numbers.astype(np.float32).reshape(len(index), *((1, 1) if count == 1 else (count,)))


def _render_chunk(index: np.ndarray, draw: _Draws, noise: np.ndarray, size: int) -> np.ndarray:
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1  # the image spans -1..1
    x, y = axis[None, None, :], axis[None, :, None]  # (1, 1, S), (1, S, 1)
    pixel = np.float32(2 / size)

    ground, other, front = _colours(draw)  # (B, 3) each, in 0..1
    image = _background(draw, x, y, ground, other)  # (B, S, S, 3)
    for blob in range(_NUM_BLOBS):
        away = np.hypot(x - draw(f"blob x {blob}", -1, 1), y - draw(f"blob y {blob}", -1, 1))  # (B, S, S)
        _paint(image, away - draw(f"blob radius {blob}", 0.06, 0.22), pixel, draw(f"blob colour {blob}", count=3))

    radius = draw("radius", 0.55, 0.9)
    angle, stretch = draw("angle", -0.5, 0.5), np.exp(draw("stretch", -0.2, 0.2))
    reach = np.maximum(0.0, 1.05 - radius)  # the larger, the closer to the middle
    across, down = x - draw("x", -1, 1) * reach, y - draw("y", -1, 1) * reach
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    u = (cos * across + sin * down) * stretch  # (B, S, S), the object spans -1..1
    v = (cos * down - sin * across) / stretch
    distance = np.empty_like(u)
    labels = index % len(SHAPES)
    for label, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        if len(rows):
            distance[rows] = shape(u[rows], v[rows])
    shade = np.cos(draw("light", 0, 6.2832)) * u + np.sin(draw("light", 0, 6.2832)) * v
    lit = front[:, None, None] + (draw("shade", 0.0, 0.2) * shade)[..., None]  # (B, S, S, 3)
    _paint(image, distance * radius, pixel, lit)

    turn = draw("bar angle", 0, 3.1416)
    bar = np.abs(np.cos(turn) * x + np.sin(turn) * y - draw("bar place", -0.8, 0.8)) - draw("bar width", 0.05, 0.12)
    present = draw("bar present") < 0.25
    _paint(image, np.where(present, bar, 1.0), pixel, draw("bar colour", count=3))

    place = (draw("noise place", 0, _NOISE_SIDE, count=2)).astype(np.int64)  # (B, 2)
    rows = (place[:, :1] + np.arange(size)) % _NOISE_SIDE  # (B, S)
    columns = (place[:, 1:] + np.arange(size)) % _NOISE_SIDE
    image += noise[rows[:, :, None], columns[:, None, :]] * draw("noise", 0.0, 0.03)[..., None]
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _colours(draw: _Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two background colours and the object's, (B, 3); the object is lighter or darker than both, as often."""
    luma = draw("ground luma", 0.2, 0.8)[:, 0]  # (B, 1)
    contrast = draw("contrast", 0.22, 0.5)[:, 0]
    sign = np.where(draw("polarity")[:, 0] < 0.5, -1, 1)
    sign = np.where(luma + sign * contrast > 1, -1, np.where(luma + sign * contrast < 0, 1, sign))

    def coloured(use: str, luma: np.ndarray) -> np.ndarray:
        tint = draw(use, -0.35, 0.35, count=3)
        return luma + tint - (tint @ _LUMA)[:, None]

    second = luma - sign * draw("second luma", 0, 0.12)[:, 0]
    return coloured("ground", luma), coloured("second", second), coloured("front", luma + sign * contrast)


def _background(draw: _Draws, x: np.ndarray, y: np.ndarray, ground: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A gradient between two colours, rippled by two plane waves, (B, S, S, 3)."""
    turn = draw("gradient", 0, 6.2832)
    mix = 0.5 + 0.5 * (np.cos(turn) * x + np.sin(turn) * y)  # (B, S, S)
    for wave in range(2):
        turn, speed = draw(f"wave angle {wave}", 0, 3.1416), draw(f"wave speed {wave}", 2, 14)
        phase = speed * (np.cos(turn) * x + np.sin(turn) * y) + draw(f"wave phase {wave}", 0, 6.2832)
        mix += draw(f"wave height {wave}", 0, 0.25) * np.sin(phase)
    return ground[:, None, None] + mix[..., None] * (other - ground)[:, None, None]


def _paint(image: np.ndarray, distance: np.ndarray, pixel: np.float32, colour: np.ndarray) -> None:
    """Lay `colour` over `image` (B, S, S, 3) where `distance` (B, S, S) < 0, its edge one pixel soft."""
    cover = (0.5 - distance / pixel).clip(0, 1)[..., None]
    image += cover * ((colour if colour.ndim == 4 else colour[:, None, None]) - image)


def _noise_tile(seed: int) -> np.ndarray:
    """Gaussian noise (side, side, 3), of which each image takes a window; drawing it per image would cost too much."""
    count = _NOISE_SIDE * _NOISE_SIDE * 3
    numbers = uniforms(seed, 0, np.arange(2), "embedded noise", count)  # (2, count)
    normal = np.sqrt(-2 * np.log(1 - numbers[0])) * np.cos(2 * np.pi * numbers[1])  # Box and Muller
    return normal.astype(np.float32).reshape(_NOISE_SIDE, _NOISE_SIDE, 3)


# The shapes: signed distances of (u, v) in -1..1 to the outline, negative inside, exact enough for a one-pixel edge.


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.85


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.68) - 0.22


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _box(u, v, 0.78, 0.78)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(0.866 * np.abs(u) - 0.5 * (v + 0.9), v - 0.65)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    fifth = 2 * np.pi / 5
    turn = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)  # folded into half of one point
    away = np.hypot(u, v)
    return 0.367 * (away * np.cos(turn) - 0.92) + 0.930 * away * np.sin(turn)  # the edge from a tip to a notch


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, 0.9, 0.28), _box(u, v, 0.28, 0.9))


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(u, v) - 0.88, 0.72 - np.hypot(u - 0.42, v))


def _dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(np.hypot(u - 0.52, v), np.hypot(u + 0.52, v)) - 0.4


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    head = np.maximum(0.75 * np.abs(u) - 0.66 * (v + 0.95), v + 0.1)
    return np.minimum(head, _box(u, v - 0.35, 0.24, 0.55))


def _horseshoe(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_box(u, v, 0.78, 0.8), -_box(u, v + 0.5, 0.34, 0.9))


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_box(u, v, 0.82, 0.85), 0.15 - np.abs((v + 0.85) % 0.567 - 0.283))


def _checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    line = 0.283  # three cells a side, parted at +-line
    along, down = np.abs(u) - line, np.abs(v) - line
    edge = np.minimum(np.abs(along), np.abs(down))
    return np.maximum(_box(u, v, 0.85, 0.85), np.where((along < 0) == (down < 0), -edge, edge))


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "dots": _dots,
    "arrow": _arrow,
    "horseshoe": _horseshoe,
    "stripes": _stripes,
    "checker": _checker,
}
