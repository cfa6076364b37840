"""A folder of image files, labelled where its sub-folders say so."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ssl.data.sources import UNLABELLED, NoTestSplit, check_split

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)
TEST_FOLDERS = ("test", "val", "validation")


class Folder:
    """The images below `root`, whatever their depth, in the order of their folders and names.

    - `root/train/<class>/...` with `root/test/`, `root/val/` or `root/validation/` beside it: labelled, a split each.
    - `root/<class>/...`, at least two sub-folders with images and none directly in `root`: labelled train.
    - anything else: unlabelled train. A test folder is never trained on.

    Files with other extensions are counted in `num_ignored`; hidden files and folders are skipped; a folder that is
    reached twice through links is read once. Raises ValueError for a wrong path, a folder without images, and for a
    test split where there is no labelled one.
    """

    def __init__(self, split: str = "train", *, root: str | Path) -> None:
        base = existing_folder(root)
        if check_split(split) == "train":
            self.folder, files = _train_files(base)
            self.classes = files.class_names()
        else:
            self.folder, files, self.classes = _test_files(base)
        self.name = f"folder {self.folder} ({split})"
        self.num_ignored = files.num_ignored
        if not len(files):
            raise ValueError(_no_images(self.folder, files))
        self._folders, self._folder_of, self._names, self._ends = files.compact()
        self.labels = self._find_labels()

    def __len__(self) -> int:
        return len(self._folder_of)

    def read(self, index: int) -> bytes:
        with open(self.describe(index), "rb") as file:
            return file.read()

    def describe(self, index: int) -> str:
        """The file's path."""
        begin = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._names[begin : self._ends[index]])
        return os.path.join(self.folder, self._folders[self._folder_of[index]], name)

    def _find_labels(self) -> np.ndarray:
        """int64 (N,) from each file's uppermost folder below `self.folder`."""
        if self.classes is None:
            return np.full(len(self), UNLABELLED, np.int64)
        number = {name: label for label, name in enumerate(self.classes)}
        of_folder = np.array([number[_top(folder)] for folder in self._folders], np.int64)
        return of_folder[self._folder_of]


@dataclass
class Files:
    """Image files below a folder: sub-folders relative to it, and the sorted names in each."""

    names: dict[str, list[str]] = field(default_factory=dict)
    num_ignored: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def class_names(self) -> list[str] | None:
        """The uppermost folders, where there are two or more and no image lies beside them."""
        tops = self.tops()
        return tops if len(tops) >= 2 and "" not in tops else None

    def tops(self) -> list[str]:
        """The uppermost folders that hold images, "" where some lie in no sub-folder."""
        return sorted({_top(folder) for folder in self.names})

    def compact(self) -> tuple[list[str], np.ndarray, bytes, np.ndarray]:
        """Folders, each file's folder (N,), all file names joined, and where each ends (N,): about 30 bytes a file."""
        folders = sorted(self.names)
        sizes = [len(self.names[folder]) for folder in folders]
        encoded = [os.fsencode(name) for folder in folders for name in self.names[folder]]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return folders, np.repeat(np.arange(len(folders), dtype=np.int32), sizes), b"".join(encoded), ends


def scan(folder: Path, without: tuple[str, ...] = ()) -> Files:
    """Every image file below `folder`, but for those in its sub-folders `without`. Each real folder is read once."""
    found = Files()
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        place = os.path.join(folder, relative)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or a second link to the same folder
            continue
        seen.add((status.st_dev, status.st_ino))
        names, below = [], []
        with _entries(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or (not relative and entry.name in without):
                    continue
                if entry.is_dir():
                    below.append(os.path.join(relative, entry.name))
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                    names.append(entry.name)
                else:
                    found.num_ignored += 1
        waiting += sorted(below, reverse=True)  # in order of paths, so that it is always the first link that counts
        if names:
            found.names[relative] = sorted(names)
    return found


def existing_folder(root: str | Path) -> Path:
    """`root` as a path; ValueError unless it is a folder."""
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"data.root={root} is a file; give the folder that holds the images")
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    raise ValueError(f"data.root={root} does not exist; the nearest folder that does is {nearest}")


def few(names: list[str], most: int = 8) -> str:
    """The first names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _train_files(base: Path) -> tuple[Path, Files]:
    if (base / "train").is_dir():
        return base / "train", scan(base / "train")
    files = scan(base, without=TEST_FOLDERS)
    beside = [name for name in TEST_FOLDERS if (base / name).is_dir()]
    if not len(files) and beside:
        raise ValueError(
            f"{base} has a test split ({few(beside)}) and nothing to train on; wanted is {base}/train/, "
            f"or data.root={base / beside[0]} to train on that folder"
        )
    return base, files


def _test_files(base: Path) -> tuple[Path, Files, list[str]]:
    """The first labelled test split, with the classes of train, so that both splits number them alike."""
    train, train_files = _train_files(base)
    present = [name for name in TEST_FOLDERS if (base / name).is_dir()]
    wanted = f"wanted is {base}/test/<class>/<image> (or val/, validation/) beside {base}/train/<class>/<image>"
    if not present:
        with _entries(base) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        found = f"the folders {few(folders)}" if folders else "no folders"
        raise NoTestSplit(f"no labelled test split in {base}: it holds {found}; {wanted}")
    splits = [(base / name, scan(base / name)) for name in present]
    # ImageNet's own test/ is a heap of unlabelled files beside a labelled val/.
    labelled = next(((folder, files) for folder, files in splits if len(files) and "" not in files.tops()), None)
    if labelled is None:
        raise ValueError(f"no labelled test split in {base}: {few(present)} holds no class folders; {wanted}")
    folder, files = labelled
    known = train_files.class_names()
    if known is None:
        raise ValueError(
            f"{folder} has class folders ({few(files.tops())}) and {train} has not, so there are no labelled images "
            f"to compare with; {wanted}"
        )
    unknown = sorted(set(files.tops()) - set(known))
    if unknown:
        raise ValueError(f"{folder} has classes that {train} lacks: {few(unknown)}; {train} has {few(known)}")
    return folder, files, known


def _entries(folder: str | Path):
    try:
        return os.scandir(folder)
    except PermissionError as error:
        raise ValueError(f"{folder} may not be read by this user; change its permissions or move it away") from error


def _top(folder: str) -> str:
    return folder.split(os.sep, 1)[0]


def _no_images(folder: Path, files: Files) -> str:
    if not files.num_ignored:
        return f"{folder} is empty: no file in it nor in the folders below it"
    return (
        f"{folder} holds no images: {files.num_ignored} files, none of which ends in {', '.join(sorted(EXTENSIONS))}; "
        "tables are read with data=parquet"
    )
