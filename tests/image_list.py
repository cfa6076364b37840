"""A source that is a list, for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


class ImageList:
    """Images given as encoded bytes, as uint8 (H, W, C), as a path to read, or as an exception to raise."""

    def __init__(self, images: list[bytes | np.ndarray | Path | Exception]):
        self.name = "a list"
        self.images = images
        self.labels = np.arange(len(images), dtype=np.int64) * 10
        self.classes = None
        self.num_ignored = 0

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes | np.ndarray:
        image = self.images[index]
        if isinstance(image, Exception):
            raise image
        return image.read_bytes() if isinstance(image, Path) else image

    def describe(self, index: int) -> str:
        return f"image_{index}"
