"""The server's own images, which a page may name by their place: those of the bank, and the examples that it offers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eval.app.uploads import Refused
from eval.images import find_images
from eval.look.labels import class_name
from eval.look.scene import Scene
from eval.pages.pictures import as_png
from ssl.config import plain
from ssl.data.decode import decode
from ssl.data.reader import UNREADABLE
from ssl.data.sources import Source
from ssl.pictures import to_uint8

THUMBNAIL = 96  # pixels
GONE = "this image can no longer be read"


@dataclass(frozen=True)
class Group:
    """Images of the server's own that a page may name by their place: 0..len-1."""

    source: Source
    index: np.ndarray
    """(N,) in the source."""

    def __len__(self) -> int:
        return len(self.index)

    def truth(self, place: int) -> str | None:
        """The names of the classes of an image; None where nobody said."""
        return class_name(np.asarray(self.source.labels)[self.index[place]], self.source.classes)

    def name(self, place: int) -> str:
        """The file with its folder, or the row of its table; not the path to it, which is nobody else's business."""
        told = self.source.describe(int(self.index[place]))
        return "/".join(told.replace("\\", "/").split("/")[-2:])

    def pixels(self, place: int, channels: int) -> np.ndarray:
        """The pixels (H, W, C) of an image. Raises Refused where it is gone."""
        try:
            data = self.source.read(int(self.index[place]))
            return decode(data, channels) if isinstance(data, bytes) else data
        except UNREADABLE as error:
            raise Refused(404, GONE) from error

    def thumbnail(self, place: int, scene: Scene) -> bytes:
        """A small picture of an image, as PNG. Raises Refused where it is gone."""
        views = scene.views_of(self.source, self.index[place : place + 1], (THUMBNAIL, THUMBNAIL))
        if not len(views.index):
            raise Refused(404, GONE)
        zeros, ones = [0.0] * scene.channels, [1.0] * scene.channels
        return as_png(to_uint8(views.crops.float() / 255, zeros, ones)[0])


def examples(scene: Scene) -> Group:
    """The images that the page offers: those that a person named, else some of the split that is looked at."""
    named = scene.config.images is not None
    source = find_images(plain(scene.config.images)) if named else scene.source(scene.split)
    return Group(source, scene.shown().index)
