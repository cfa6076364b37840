"""Parquet tables of encoded images, in Hugging Face's layout or with a plain column of bytes."""

from __future__ import annotations

import glob
import json
import logging
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl.data.folder import few
from ssl.data.remote import RemoteFiles, RemoteTable, is_url
from ssl.data.sources import UNLABELLED, NoTestSplit, check_split
from ssl.data.stream import Groups, Stream, StreamSettings

logger = logging.getLogger(__name__)

_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val)(?![a-z])", re.IGNORECASE)
_IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls")


class Parquet:
    """The rows of one or many parquet files below `root`: a folder, a file, or a glob.

    The split is read from the beginning of a file's name, or of its folders': `train*`; `test*`, else `validation*` or
    `val*`. Where no name tells, all files are train. Images stand in a column of structs {bytes, path} or of bytes.
    Labels are integers, named by Hugging Face's metadata where present, or text, numbered in sorted order of train's. A
    column of lists of either is multi-label: the classes that an image has, in any order, none where the list is empty.

    A row group is read when the first of its images is, and up to `held_gib` of them are kept, encoded.

    A `root` that is a url of fsspec's (s3://bucket/set, memory://set), or any one with `stream`, is streamed: only
    footers and labels are read here, and row groups ahead of the batches that need them (`groups`; see WindowOrder for
    the order, StreamSettings for `window` and what follows it). `held_gib` then bounds what is held, window and all.

    Raises ValueError for paths, splits, columns and files that do not fit, and for settings that have no effect.
    """

    num_ignored = 0

    def __init__(
        self,
        split: str = "train",
        *,
        root: str | Path,
        image_column: str | None = None,
        label_column: str | None = None,
        held_gib: float = 8.0,
        stream: bool | None = None,
        window: int | None = None,
        lanes: int | None = None,
        readers: int | None = None,
        retries: int | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        check_split(split)
        given = {"window": window, "lanes": lanes, "readers": readers, "retries": retries}
        settings = _stream_settings(root, stream, {**given, "storage_options": storage_options})
        files: _Files = _LocalFiles(root) if settings is None else RemoteFiles(root, settings)
        choices = files_of_split(files.paths, split, files.base)
        # Hugging Face's imagenet-1k has a test split without labels beside a labelled validation split.
        paths = next((paths for paths in choices[:-1] if _has_labels(files, paths[0], label_column)), choices[-1])
        self.name = f"parquet {root} ({split})"
        self._files = files.open(paths)
        self._paths = [files.name(path) for path in paths]
        schema = self._files[0].schema_arrow
        self.image_column = _image_column(schema, image_column, self._paths[0])
        label = _label_column(schema, label_column, self._paths[0])
        for path, file in zip(self._paths, self._files):
            for column in (self.image_column, label):
                if column is not None and column not in file.schema_arrow.names:
                    raise ValueError(
                        f"{path} lacks the column {column!r} of {self._paths[0]}: {_columns(file.schema_arrow)}"
                    )
        groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.num_row_groups)]
        sizes = [self._files[f].metadata.row_group(g).num_rows for f, g in groups]
        self._groups, self._starts = groups, [0, *accumulate(sizes)]  # G, G+1
        if not self._starts[-1]:
            raise ValueError(f"{root} has no rows in its {split} split ({few(self._paths)})")
        self.labels: np.ndarray = np.full(len(self), UNLABELLED, np.int64)
        self.classes: list[str] | None = None
        if label is not None:
            needs_train = split == "test" and _is_text(schema, label)
            train = files_of_split(files.paths, "train", files.base)[0] if needs_train else None
            self.labels, self.classes = _labels(files, self._files, label, _feature_names(schema, label), train)
        if split == "test" and (self.labels == UNLABELLED).all():
            raise ValueError(
                f"the test split in {few(self._paths)} has no labels; "
                f"its columns: {_columns(schema)}; name another one with data.source.label_column"
            )
        self._held: dict[int, _Group] = {}
        self._held_bytes = int(held_gib * 2**30)
        self._lock = threading.Lock()
        stored = np.array([self._group_bytes(number) for number in range(len(groups))])  # (G,)
        self.groups: Groups | None = None
        if settings is not None:
            held = Stream(self._fetch, stored, settings=settings, held_bytes=self._held_bytes)
            filled = np.flatnonzero(sizes)
            self.groups = Groups(held, filled, np.append(np.array(self._starts)[filled], len(self)))
        elif stored.sum() > self._held_bytes:
            logger.warning(
                "%s: its %.1f GiB are more than the %.1f of data.source.held_gib, so row groups are read again and "
                "again, which is slow in random order; image files in folders (data=folder) are not, and "
                "data.source.stream=true reads each once per epoch, mixed in a window",
                *(self.name, stored.sum() / 2**30, held_gib),
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> bytes:
        """The encoded image; empty where the row has none."""
        group = bisect_right(self._starts, index) - 1
        return self._group(group)[index - self._starts[group]]

    def describe(self, index: int) -> str:
        """The file and the row in it."""
        group = bisect_right(self._starts, index) - 1
        file, _ = self._groups[group]
        first = self._starts[bisect_left(self._groups, (file, 0))]
        return f"{self._paths[file]} row {index - first}"

    def _group(self, number: int) -> Sequence[bytes]:
        if self.groups is not None:
            return self.groups.stream.group(number)
        held = self._held.get(number)
        if held is None:
            with self._lock:  # a ParquetFile must not be read by two threads at once
                held = self._held.get(number) or self._read_group(number)
                self._held[number] = held
                while len(self._held) > 1 and sum(map(self._group_bytes, self._held)) > self._held_bytes:
                    del self._held[next(iter(self._held))]  # the one read first
        return held

    def _read_group(self, number: int) -> _Group:
        file, group = self._groups[number]
        try:
            column = self._files[file].read_row_group(group, columns=[self._leaf(file)]).column(0)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{self._paths[file]} is damaged in row group {group}: {error}") from error
        return _Group(column)

    def _fetch(self, number: int, stopped: threading.Event) -> _Group:
        """A row group from afar."""
        number, group = self._groups[number]
        file = self._files[number]
        assert isinstance(file, RemoteTable)
        return _Group(file.read_row_group(group, [self._leaf(number)], stopped=stopped).column(0))

    def _leaf(self, file: int) -> str:
        """The bytes alone, not the struct's path."""
        is_struct = pa.types.is_struct(self._files[file].schema_arrow.field(self.image_column).type)
        return f"{self.image_column}.bytes" if is_struct else self.image_column

    def _group_bytes(self, number: int) -> int:
        file, group = self._groups[number]
        row_group, leaf = self._files[file].metadata.row_group(group), self._leaf(file)
        columns = (row_group.column(place) for place in range(row_group.num_columns))
        return next(column.total_uncompressed_size for column in columns if column.path_in_schema == leaf)


class _Group(Sequence[bytes]):
    """The images of one row group, as Arrow's own buffers."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        column = column.flatten()[0] if pa.types.is_struct(column.type) else column
        self._parts = []
        self._starts = [0]
        for chunk in column.chunks:
            if not len(chunk):
                continue
            kind = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
            _, ends, data = chunk.buffers()
            ends = np.frombuffer(ends, kind, len(chunk) + 1, chunk.offset * np.dtype(kind).itemsize)
            self._parts.append((ends, memoryview(data) if data is not None else memoryview(b"")))
            self._starts.append(self._starts[-1] + len(chunk))

    def __getitem__(self, row: int) -> bytes:
        part = bisect_right(self._starts, row) - 1
        (ends, data), row = self._parts[part], row - self._starts[part]
        return bytes(data[ends[row] : ends[row + 1]])

    def __len__(self) -> int:
        return self._starts[-1]


class _Files(Protocol):
    """Where parquet files lie: on this machine or behind a url."""

    base: PurePath
    paths: list[PurePath]

    def open(self, paths: list[PurePath]) -> Sequence[Any]:
        """Of each file pyarrow's ParquetFile, or what has its methods."""
        ...

    def read_column(self, tables: list[Any], column: str) -> pa.ChunkedArray: ...

    def name(self, path: PurePath) -> str: ...


class _LocalFiles:
    """Files that are mapped into memory."""

    def __init__(self, root: str | Path) -> None:
        self.base, self.paths = find_files(root)

    def open(self, paths: list[PurePath]) -> list[pq.ParquetFile]:
        return [_open(path) for path in paths]

    def read_column(self, tables: list[pq.ParquetFile], column: str) -> pa.ChunkedArray:
        return pa.chunked_array([chunk for table in tables for chunk in table.read([column]).column(0).chunks])

    def name(self, path: PurePath) -> str:
        return str(path)


def _stream_settings(root: str | Path, stream: bool | None, given: dict[str, Any]) -> StreamSettings | None:
    """How a root is streamed; None where it is not. Raises ValueError for settings without effect."""
    given = {name: value for name, value in given.items() if value is not None}
    if stream is False and is_url(root):
        raise ValueError(f"data.root={root} is a url, which is always streamed; leave data.source.stream=false out")
    if stream or is_url(root):
        return StreamSettings(**given)
    if given:
        raise ValueError(
            f"data.source.{next(iter(given))} has no effect on files of this machine, which are not streamed; leave it "
            "out, or give data.source.stream=true"
        )
    return None


def find_files(root: str | Path) -> tuple[PurePath, list[PurePath]]:
    """Sorted parquet files at a path, and the folder they lie below: a folder (any depth), a file, or a glob.

    Raises ValueError where there is none.
    """
    path = Path(root).expanduser()
    files: list[PurePath]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
        if not files:
            raise ValueError(f"data.root={root} holds no *.parquet file; image files are read with data=folder")
        return path, files
    if path.is_file():
        return path.parent, [path]
    if glob.has_magic(str(path)):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not files:
            raise ValueError(f"no file matches data.root={root}")
        return next(parent for parent in path.parents if not glob.has_magic(str(parent))), files
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    raise ValueError(f"data.root={root} does not exist; the nearest folder that does is {nearest}")


def files_of_split(files: list[PurePath], split: str, base: PurePath) -> list[list[PurePath]]:
    """The files whose names say `split`, for test then those of validation; all are train where no name says anything.

    Raises ValueError where none is left.
    """
    named: dict[str, list[PurePath]] = {}
    for file in files:
        named.setdefault(_split_of(file.relative_to(base)), []).append(file)
    wanted = ("train",) if split == "train" else ("test", "validation", "valid", "val")
    found = [named[name] for name in wanted if name in named]
    if found:
        return found
    if split == "train" and list(named) == [""]:
        return [files]
    kind = NoTestSplit if split == "test" else ValueError
    raise kind(
        f"no {split} split in {base}: found {few([file.name for file in files])}; wanted is a file named "
        f"{' or '.join(f'{name}*.parquet' for name in wanted)}"
    )


def _split_of(file: PurePath) -> str:
    for name in reversed(file.parts):
        match = _SPLIT_NAME.match(name)
        if match:
            return match[1].lower()
    return ""


def _open(path: PurePath) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read as parquet, it is truncated or something else: {error}") from error


def _image_column(schema: pa.Schema, wanted: str | None, path: str) -> str:
    fitting = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        if wanted not in fitting:
            raise ValueError(f"{path} has no column {wanted!r} of image bytes; its columns: {_columns(schema)}")
        return wanted
    if not fitting:
        raise ValueError(
            f"{path} has no image column, that is a struct {{bytes, path}} or binary; its columns: {_columns(schema)}"
        )
    return next((name for name in _IMAGE_NAMES if name in fitting), fitting[0])


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(schema: pa.Schema, wanted: str | None, path: str) -> str | None:
    def fits(name: str) -> bool:
        kind = _class_type(schema.field(name).type)
        return pa.types.is_integer(kind) or pa.types.is_boolean(kind) or _is_text(schema, name)

    if wanted is not None:
        if wanted not in schema.names or not fits(wanted):
            raise ValueError(
                f"{path} has no column {wanted!r} of integer or text labels, or lists of them; "
                f"its columns: {_columns(schema)}"
            )
        return wanted
    named = [name for name in schema.names if fits(name) and _feature_names(schema, name)]
    usual = [name for name in _LABEL_NAMES if name in schema.names and fits(name)]
    return next(iter([name for name in usual if name in named] + named + usual), None)


def _has_labels(files: _Files, path: PurePath, wanted: str | None) -> bool:
    """Whether a file has a label that is neither null nor -1."""
    tables = list(files.open([path]))
    column = _label_column(tables[0].schema_arrow, wanted, files.name(path))
    if column is None:
        return False
    return any(value not in (None, UNLABELLED) for value in files.read_column(tables, column).to_pylist())


def _is_text(schema: pa.Schema, name: str) -> bool:
    kind = _class_type(schema.field(name).type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _class_type(kind: Any) -> Any:
    """The type of one label, in a list or by itself."""
    return kind.value_type if _is_list(kind) else kind


def _feature_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Class names of a column, or of its lists' values, from Hugging Face's schema metadata, `ClassLabel.names`."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        if isinstance(feature, list):  # how older versions write a list
            feature = feature[0]
        return list(feature.get("feature", feature)["names"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def _labels(
    files: _Files, tables: Sequence[Any], column: str, names: list[str] | None, train: list[PurePath] | None
) -> tuple[np.ndarray, list[str] | None]:
    """int64 (N,) or multi-hot (N, C), with `UNLABELLED` for nulls, and the class names.

    `train`: the files that number text labels.
    """
    values = files.read_column(list(tables), column)
    known = values if train is None else files.read_column(list(files.open(train)), column)
    if not _is_list(values.type):
        return _numbers(values, column, names, known)
    length = pc.fill_null(pc.call_function("list_value_length", [values]), 0).to_numpy()  # (N,)
    if not length.any():
        raise ValueError(
            f"the lists in {column!r} are all empty, so no image has a class; see data.source.label_column"
        )
    flat, classes = _numbers(_flatten(values), column, names, _flatten(known) if _is_list(known.type) else known)
    if flat.min() == UNLABELLED or classes is None:
        raise ValueError(
            f"lists in {column!r} hold nulls or {UNLABELLED} among the classes of an image; leave them out"
        )
    row = np.repeat(np.arange(len(values)), length)
    labels = np.zeros((len(values), len(classes)), np.int64)
    labels[row, flat] = 1
    if labels.sum() < len(flat):
        pairs, count = np.unique(np.stack([row, flat]), axis=1, return_counts=True)
        where, label = pairs[:, count.argmax()]
        raise ValueError(
            f"row {where} of {column!r} names the class {label} more than once; a list holds the numbers of the "
            "classes that an image has, not a 0 or 1 for every class"
        )
    labels[values.is_null().to_numpy()] = UNLABELLED
    return labels, classes


def _flatten(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of all lists, one behind another."""
    return pc.call_function("list_flatten", [lists])


def _numbers(
    values: pa.ChunkedArray, column: str, names: list[str] | None, known: pa.ChunkedArray
) -> tuple[np.ndarray, list[str] | None]:
    """Labels (n,) of a column without lists, with `UNLABELLED` for nulls, and the class names; `known` are train's."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        classes = sorted(set(known.unique().to_pylist()) - {None})
        unknown = sorted(set(values.unique().to_pylist()) - {None, *classes})
        if unknown:
            raise ValueError(f"the test split has classes in {column!r} that train lacks: {few(unknown)}")
        number = {name: label for label, name in enumerate(classes)}
        return np.array([number.get(name, UNLABELLED) for name in values.to_pylist()], np.int64), classes
    numbers = pc.fill_null(pc.cast(values, pa.int64()), UNLABELLED).to_numpy().astype(np.int64)
    lowest, highest = int(numbers.min()), int(numbers.max())
    if lowest < UNLABELLED or (names is not None and highest >= len(names)):
        raise ValueError(
            f"labels in {column!r} run from {lowest} to {highest}, "
            f"allowed are {UNLABELLED} (none) to {len(names) - 1 if names else 'any'}; see data.source.label_column"
        )
    if highest == UNLABELLED:
        return numbers, names
    return numbers, names or [str(number) for number in range(highest + 1)]


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
