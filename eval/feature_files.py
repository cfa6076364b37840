"""A folder of features in pieces, each written whole, so that what was interrupted goes on where it was.

meta.json                    the protocol, the pieces that are whole, the images that could not be decoded
data/train-00000.parquet     rows of index, split, path, label, class and features
data/train-00000.npy .csv    the same with format=npy: features (n, D) float32, and the other columns
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl.data.folder import few
from ssl.data.sources import UNLABELLED, Source
from ssl.data.subset import Subset

FORMAT = 1
META, DATA = "meta.json", "data"
COLUMNS = ("index", "split", "path", "label", "class")


@dataclass(frozen=True)
class Piece:
    """A stretch [start, stop) of a split's images."""

    split: str
    start: int
    stop: int
    files: list[str]
    """Relative to the folder."""


@dataclass
class Rows:
    """What is known of the images of a piece, beside their features: a list per column."""

    index: list[int] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    label: list[Any] = field(default_factory=list)
    classes: list[Any] = field(default_factory=list)

    def add(self, source: Source, split: str, index: np.ndarray) -> None:
        """The images `index` (B,) of `source`. Without a label, label and class are null."""
        for place in index.tolist():
            label, name = label_of(source, place)
            self.index.append(int(source.indices[place]) if isinstance(source, Subset) else place)
            self.split.append(split)
            self.path.append(source.describe(place))
            self.label.append(label)
            self.classes.append(name)

    def columns(self) -> dict[str, list[Any]]:
        """The columns by their names in the files."""
        return dict(zip(COLUMNS, (self.index, self.split, self.path, self.label, self.classes)))


class FeatureFolder:
    """Writes pieces into a folder and keeps account of them in its `meta.json`."""

    def __init__(self, folder: Path, *, recipe: dict[str, Any], protocol: dict[str, Any], overwrite: bool) -> None:
        """Begin in an empty folder, or go on with what the same `recipe` has written there.

        Raises ValueError where the folder holds another recipe's pieces and `overwrite` is false, and where it holds
        data files that no meta.json speaks of.
        """
        self.folder = folder
        self.recipe = json.loads(json.dumps(recipe))  # as it is read again: lists, no tuples
        self.meta: dict[str, Any] = {"format": FORMAT, "complete": False, "recipe": self.recipe}
        self.meta |= {"protocol": protocol, "pieces": [], "undecodable": []}
        before = self._read_meta()
        if before is not None and (differing := _differing(before.get("recipe"), self.recipe)):
            if not overwrite:
                raise ValueError(
                    f"{folder} holds features made with another {', '.join(differing)}; give another out=, or "
                    "overwrite=true to remove them"
                )
            self._remove(before)
            before = None
        if before is None:
            self._refuse_strangers()
        elif overwrite:
            self._remove(before)
        else:
            self.meta |= {key: before[key] for key in ("pieces", "undecodable")}
        (folder / DATA).mkdir(parents=True, exist_ok=True)
        for leftover in (folder / DATA).glob(".partial_*"):  # of a run that was killed
            leftover.unlink()
        self._write_meta()

    def has(self, piece: Piece) -> bool:
        """Whether a piece was written, and its files still have the sizes they had then."""
        known = next((each for each in self.meta["pieces"] if each["files"] == piece.files), None)
        sizes = [_size(self.folder / name) for name in piece.files]
        return known is not None and known["bytes"] == sizes and known["stop"] == piece.stop

    def write(self, piece: Piece, rows: Rows, features: np.ndarray, failed: list[str]) -> None:
        """Write a piece's features (n, D) and rows under their final names, then the account of it."""
        try:
            for name in piece.files:
                partial = self.folder / DATA / f".partial_{Path(name).name}"
                _WRITE[Path(name).suffix](partial, rows, features)
                os.replace(partial, self.folder / name)
        except OSError as error:
            raise OSError(
                f"{piece.files[0]} cannot be written to {self.folder}: {error.strerror or error}; make room and run "
                "the same command again, which goes on from here, or give another out="
            ) from error
        sizes = [_size(self.folder / name) for name in piece.files]
        written = {**asdict(piece), "rows": len(features), "bytes": sizes}
        others = [each for each in self.meta["pieces"] if each["files"] != piece.files]
        self.meta["pieces"] = [*others, written]
        self.meta["undecodable"] = sorted(set(self.meta["undecodable"]) | set(failed))
        self._write_meta()

    def finish(self) -> None:
        """Say in meta.json that all pieces are there."""
        self.meta["complete"] = True
        self._write_meta()

    @property
    def num_rows(self) -> int:
        return sum(piece["rows"] for piece in self.meta["pieces"])

    def _read_meta(self) -> dict[str, Any] | None:
        path = self.folder / META
        if not path.exists():
            return None
        try:
            meta = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); give another out=, or remove the folder") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ValueError(f"{path} is none that this command has written; give another out=")
        return meta

    def _write_meta(self) -> None:
        partial = self.folder / f".{META}.{os.getpid()}"
        try:
            partial.write_text(json.dumps(self.meta, indent=2, allow_nan=False) + "\n")
            os.replace(partial, self.folder / META)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{self.folder} cannot be written to: {error.strerror}; give another out=") from error

    def _remove(self, meta: dict[str, Any]) -> None:
        """Remove the pieces that a meta.json speaks of, and nothing else."""
        (self.folder / META).unlink()
        for piece in meta["pieces"]:
            for name in piece["files"]:
                (self.folder / DATA / Path(name).name).unlink(missing_ok=True)

    def _refuse_strangers(self) -> None:
        found = [path.name for path in sorted((self.folder / DATA).glob("*")) if path.suffix in _WRITE]
        if found:
            raise ValueError(
                f"{self.folder / DATA} holds files that no {META} speaks of ({few(found)}); give another out="
            )


def plan_pieces(sources: dict[str, Source], *, rows_per_piece: int, file_format: str) -> Iterator[Piece]:
    """The pieces of each split, in order, with the names of their files."""
    suffixes = [".parquet"] if file_format == "parquet" else [".csv", ".npy"]  # features last: they make it whole
    for split, source in sources.items():
        for number, start in enumerate(range(0, len(source), rows_per_piece)):
            names = [f"{DATA}/{split}-{number:05d}{suffix}" for suffix in suffixes]
            yield Piece(split, start, min(start + rows_per_piece, len(source)), names)


def label_of(source: Source, place: int) -> tuple[Any, Any]:
    """Label and class name of an image: a number and a text, lists where it may have several, or None."""
    label = source.labels[place]
    if np.ndim(label):  # multi-hot (C,)
        if (label == UNLABELLED).any():
            return None, None
        chosen = np.flatnonzero(label).tolist()
        return chosen, None if source.classes is None else [source.classes[each] for each in chosen]
    if label == UNLABELLED:
        return None, None
    return int(label), None if source.classes is None else source.classes[int(label)]


def _write_parquet(path: Path, rows: Rows, features: np.ndarray) -> None:
    several = any(isinstance(label, list) for label in rows.label)
    number, text = (pa.list_(pa.int64()), pa.list_(pa.string())) if several else (pa.int64(), pa.string())
    types = (pa.int64(), pa.string(), pa.string(), number, text)
    columns = [pa.array(values, each) for values, each in zip(rows.columns().values(), types)]
    flat = pa.array(np.ascontiguousarray(features, np.float32).reshape(-1))
    columns.append(pa.FixedSizeListArray.from_arrays(flat, features.shape[1]))  # (n, D)
    table = pa.Table.from_arrays(columns, names=[*COLUMNS, "features"])
    pq.write_table(table, path, use_dictionary=["split"])  # pyright: ignore[reportArgumentType]  # its stubs lag


def _write_npy(path: Path, rows: Rows, features: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to the name
        np.save(file, np.ascontiguousarray(features, np.float32))


def _write_csv(path: Path, rows: Rows, features: np.ndarray) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in zip(*rows.columns().values()):
            writer.writerow(["|".join(map(str, each)) if isinstance(each, list) else each for each in row])


_WRITE = {".parquet": _write_parquet, ".npy": _write_npy, ".csv": _write_csv}


def _differing(before: Any, now: dict[str, Any]) -> list[str]:
    """The keys of a recipe that are not as they were."""
    before = before if isinstance(before, dict) else {}
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
