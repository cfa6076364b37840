"""Images that a person names (a file, a folder, a glob) or hands over, and their central views without stand-ins."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eval.extract import centre_view
from ssl.data.augment import Augment
from ssl.data.decode import crop_resize
from ssl.data.folder import EXTENSIONS, scan
from ssl.data.reader import UNREADABLE, Reader
from ssl.data.sources import UNLABELLED, Source
from ssl.data.threads import ShouldStop, available_cores, chunk_bounds, run_ahead

GLOB = frozenset("*?[")
CHUNK = (8, 32)
AHEAD = 2


class Images:
    """Image files by path, and pictures that are in memory: Pillow's, or uint8 arrays (H, W) or (H, W, C)."""

    classes: list[str] | None = None
    num_ignored = 0

    def __init__(self, images: Sequence[Any], *, channels: int = 3, name: str = "images") -> None:
        self.name, self.channels = name, channels
        self._images = list(images)
        self.labels = np.full(len(self), UNLABELLED, np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes | np.ndarray:
        image = self._images[index]
        if isinstance(image, str | os.PathLike):
            with open(image, "rb") as file:
                return file.read()
        return pixels(image, self.channels)

    def describe(self, index: int) -> str:
        """The file's path, or `image <number>` for a picture that came without one."""
        image = self._images[index]
        return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"


def find_images(given: str | Path | Sequence[str | Path]) -> Images:
    """The image files of a file, a folder (with all folders below it), a glob (`**` for any depth), or a list of those.

    Folders are read in the order of their names and give what has the extension of an image; a file or a glob gives
    what it names. A file that is named twice is read once. Raises ValueError where something names no image.
    """
    parts = [given] if isinstance(given, str | Path) else list(given)
    if not parts:
        raise ValueError("images= names nothing; give a file, a folder, a glob such as 'photos/*.jpg', or a list")
    paths = dict.fromkeys(path for part in parts for path in _find(str(part)))
    return Images(list(paths), name=str(given))


def _find(given: str) -> list[str]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return [str(path)]
    if not GLOB & set(given):
        nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise ValueError(f"images={given} does not exist; the nearest folder that does is {nearest}")
    matched = sorted(glob.glob(str(path), recursive=True))
    files = [each for each in matched if os.path.isfile(each)]
    if not files:
        found = f"only folders ({len(matched)}); to read what is in them add /*" if matched else "nothing"
        raise ValueError(f"images={given} matches {found}; ** stands for folders of any depth, as in 'photos/**/*.jpg'")
    return files


def _in_folder(folder: Path) -> list[str]:
    files = scan(folder)
    if not len(files):
        others = f"{files.num_ignored} files, none of which" if files.num_ignored else "no file, so none"
        raise ValueError(f"images={folder} holds no images: {others} ends in {', '.join(sorted(EXTENSIONS))}")
    return [os.path.join(folder, below, name) for below in sorted(files.names) for name in files.names[below]]


def pixels(image: Any, channels: int) -> np.ndarray:
    """A picture in memory as uint8 (H, W, C), upright: gray is repeated, alpha dropped, colour made luma.

    Raises ValueError for what is no picture, or has values beyond 8 bits.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
            raise ValueError(
                f"an array must hold uint8 values 0..255 as (H, W) or (H, W, C), got {image.dtype} {image.shape}"
            )
        if image.ndim == 3 and image.shape[2] == channels:
            return image
        if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
            raise ValueError(f"an array (H, W, C) must have {channels} channels, got {image.shape}")
        image = Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image is a path, a Pillow image or a uint8 array, got {type(image).__name__}")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"a Pillow image of mode {image.mode} has values beyond 8 bits; convert it to L or RGB first")
    if channels not in (1, 3):
        raise ValueError(f"a picture of mode {image.mode} cannot be given {channels} channels; give a uint8 array")
    upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    return np.array(upright).reshape(upright.height, upright.width, channels)


@dataclass(frozen=True)
class Views:
    """Central views of a stretch of images: those that could be decoded, and why the others could not."""

    index: np.ndarray
    """(B,) of the images that could be decoded."""
    crops: Tensor
    """uint8 (B, C, h, w)."""
    failed: dict[int, str]
    """Index to path and reason."""

    def normalised(self, augment: Augment, device: torch.device) -> Tensor:
        """float32 (B, C, h, w) on `device`, as an evaluation sees it."""
        nothing_drawn = {"flip": np.zeros(len(self.index), bool)}
        return augment.make_view(augment.views[0], self.crops.to(device), nothing_drawn)


def read_views(
    source: Source,
    *,
    size: tuple[int, int],
    channels: int,
    batch_size: int,
    threads: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Views]:
    """The central view of each image in [start, stop), in order, `batch_size` at once and a few batches ahead.

    As the loader of an evaluation makes it; but an image that cannot be decoded is left out, and named, and no other
    takes its place.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}; leave it out to use all cores")
    threads = available_cores() if threads is None else threads
    reader = Reader(source, channels=channels)
    stop = len(source) if stop is None else stop
    jobs = (
        _Job(reader, np.arange(first, min(first + batch_size, stop)), size=size, threads=threads)
        for first in range(start, stop, batch_size)
    )
    yield from run_ahead(jobs, num_threads=threads, ahead=AHEAD)


class _Job:
    """One batch in the making: threads fill chunks of a preallocated tensor."""

    def __init__(self, reader: Reader, index: np.ndarray, *, size: tuple[int, int], threads: int) -> None:
        self.reader, self.index, self.size = reader, index, size
        self.view = centre_view(size)
        self.chunks: Sequence[tuple[int, int]] = chunk_bounds(
            len(index), num_threads=threads, smallest=CHUNK[0], largest=CHUNK[1]
        )
        self.crops = torch.empty((len(index), reader.channels, *size), dtype=torch.uint8)
        self.reasons: dict[int, str] = {}  # by slot; each is written by one thread

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        for slot in range(start, stop):
            if should_stop():
                return
            index = int(self.index[slot])
            try:
                data, size = self.reader.open(index)
                image = self.reader.decode(index, data, size)
            except UNREADABLE as error:
                self.reasons[slot] = f"{self.reader.source.describe(index)}: {error}"
                continue
            self.crops[slot] = torch.from_numpy(
                crop_resize(image, self._box(index, size), self.size, self.view.interpolation)
            )

    def finish(self) -> Views:
        readable = np.array([slot not in self.reasons for slot in range(len(self.index))])
        failed = {int(self.index[slot]): self.reasons[slot] for slot in sorted(self.reasons)}
        crops = self.crops if not failed else self.crops[torch.from_numpy(readable)]
        return Views(self.index[readable], crops, failed)

    def _box(self, index: int, size: tuple[int, int]) -> Any:
        height, width = (np.array([side], np.int64) for side in size)
        drawn = self.view.sample(
            seed=0, epoch=0, index=np.array([index]), view=0, height=height, width=width, size=self.size
        )
        return tuple(drawn["box"][0].tolist())
