"""CIFAR, STL-10 and ImageNet as torchvision lays them out; a root that holds parquet files is read as parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from ssl.data.folder import Folder, existing_folder
from ssl.data.parquet import Parquet
from ssl.data.sources import Source, check_split


class Pixels:
    """Images held as one array, uint8 (N, H, W, C)."""

    num_ignored = 0

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, classes: list[str] | None) -> None:
        self.name, self.images, self.classes = name, images, classes
        self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Pixels, uint8 (H, W, C)."""
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"


def cifar10(split: str = "train", *, root: str | Path, download: bool = False) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32x32 in 10 classes."""
    return _cifar(datasets.CIFAR10, "cifar10", split, root, download)


def cifar100(split: str = "train", *, root: str | Path, download: bool = False) -> Source:
    """CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images of 32x32 in 100 fine classes."""
    return _cifar(datasets.CIFAR100, "cifar100", split, root, download)


def stl10(split: str = "train", *, root: str | Path, download: bool = False, labeled: bool = False) -> Source:
    """STL-10 (Coates et al. 2011), 96x96 in 10 classes.

    Train is the 5,000 labelled images followed by the 100,000 unlabelled ones, or with `labeled` the former alone; test
    is 8,000 images.
    """
    check_split(split)
    if _holds_parquet(root):
        return Parquet(split, root=root)
    part = split if split == "test" or labeled else "train+unlabeled"
    data = _load(datasets.STL10, "stl10", root, download, split=part)
    images = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))  # (N, 96, 96, 3)
    return Pixels(f"stl10 ({split})", images, data.labels, list(data.classes))


def imagenet(split: str = "train", *, root: str | Path) -> Source:
    """ImageNet (Russakovsky et al. 2015) unpacked as `root/train/<wnid>/` and `root/val/<wnid>/`.

    Class names stand in for the WordNet ids where torchvision's `meta.bin` or devkit archive lies in `root`.
    """
    if _holds_parquet(root):
        return Parquet(split, root=root)
    source = Folder(split, root=root)
    base = Path(root).expanduser()
    archives = (datasets.imagenet.META_FILE, datasets.imagenet.ARCHIVE_META["devkit"][0])
    if source.classes is not None and any((base / name).is_file() for name in archives):
        if not (base / archives[0]).is_file():
            datasets.imagenet.parse_devkit_archive(str(base))
        names = datasets.imagenet.load_meta_file(str(base))[0]
        source.classes = [", ".join(names[wnid]) if wnid in names else wnid for wnid in source.classes]
    return source


def _cifar(dataset: Any, name: str, split: str, root: str | Path, download: bool) -> Source:
    train = check_split(split) == "train"
    if _holds_parquet(root):
        return Parquet(split, root=root)
    data = _load(dataset, name, root, download, train=train)
    return Pixels(f"{name} ({split})", data.data, data.targets, list(data.classes))


def _holds_parquet(root: str | Path) -> bool:
    path = Path(root).expanduser()
    if not path.is_dir():
        return path.suffix == ".parquet"
    return any(next(path.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet"))  # not ImageNet's depths


def _load(dataset: Any, name: str, root: str | Path, download: bool, **choice: Any) -> Any:
    """torchvision's data set; ValueError that says how to get it where it is not there."""
    path = Path(root).expanduser() if download else existing_folder(root)
    try:
        return dataset(path, download=download, **choice)
    except RuntimeError as error:  # torchvision's word for files that are missing or damaged
        raise ValueError(
            f"data.root={root} does not hold {name} whole, neither as torchvision stores it nor as *.parquet; "
            f"download it once with data={name} data.root={root} data.source.download=true ({error})"
        ) from error
