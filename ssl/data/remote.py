"""Parquet files behind a url, read through fsspec: footers and labels at the start, then a row group at a time."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ssl.data.stream import StreamError, StreamSettings

FIRST_DELAY = 0.5
"""Seconds before a read is tried again; doubled with every attempt."""
NUM_SMALL_READS = 32
"""Footers and labels read at the same time: they wait for the network, not for its bandwidth."""
_TAIL = 2**16  # bytes read from the end of a file, which hold the footer of most
_MAGIC = b"PAR1"

T = TypeVar("T")
R = TypeVar("R")


def is_url(root: str | Path) -> bool:
    """Whether a root is one of fsspec's urls and not a path."""
    return "://" in str(root)


class RemoteFiles:
    """The parquet files at a url (or a path): a folder, a file, or a glob.

    Raises ValueError where there are none, and where fsspec or the package for this kind of url is not installed.
    """

    def __init__(self, root: str | Path, settings: StreamSettings) -> None:
        self.root, self.settings = root, settings
        self._fs, path = _filesystem(root, settings.storage_options)
        found = self._list(path)
        self._interrupted = threading.Event()
        self._sizes = {
            PurePosixPath(name): int(info["size"])
            for name, info in sorted(found.items())
            if name.endswith(".parquet") and not PurePosixPath(name).name.startswith(".")
        }
        if not self._sizes:
            raise ValueError(f"data.root={root} holds no *.parquet file, or does not exist; only those are streamed")
        parent = PurePosixPath(path)
        while _is_glob(parent) or parent in self._sizes:
            parent = parent.parent
        self.base: PurePath = parent
        self.paths: list[PurePath] = list(self._sizes)

    def open(self, paths: list[PurePath]) -> list[RemoteTable]:
        """The files' tables; only their footers are read."""
        return self._in_parallel(lambda path: RemoteTable(self, path, self._sizes[PurePosixPath(path)]), paths)

    def read_column(self, tables: list[RemoteTable], column: str) -> pa.ChunkedArray:
        """A column of all tables, one behind another."""
        groups = [(table, group) for table in tables for group in range(table.num_row_groups)]
        parts = self._in_parallel(lambda part: part[0].read_row_group(part[1], [column]).column(0), groups)
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks])

    def name(self, path: PurePath) -> str:
        """The url of a file."""
        return self._fs.unstrip_protocol(str(path))

    def read(self, path: PurePath, start: int, stop: int, *, what: str, stopped: threading.Event | None) -> bytes:
        """The bytes [start, stop) of a file. Raises StreamError when more than `settings.retries` attempts failed."""
        stopped = stopped or self._interrupted
        attempts = self.settings.retries + 1
        for attempt in range(attempts):
            try:
                data = self._fs.cat_file(str(path), start=start, end=stop)
                if len(data) == stop - start:
                    return data
                problem = f"{len(data)} bytes came of {stop - start}"
            except (FileNotFoundError, PermissionError) as error:
                raise StreamError(f"{self.name(path)}, {what}, cannot be read: {error!r}") from error
            except Exception as error:  # each file system has its own errors of the network
                problem = repr(error)
            if attempt + 1 == attempts or stopped.wait(FIRST_DELAY * 2**attempt):
                break
        raise StreamError(
            f"{self.name(path)}, {what}, could not be read in {attempts} attempts (data.source.retries="
            f"{self.settings.retries}): {problem}; the same command goes on from the last checkpoint"
        )

    def _in_parallel(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of each item, by threads, in order. Raises the first error and leaves the rest."""
        pool = ThreadPoolExecutor(NUM_SMALL_READS)
        try:
            return list(pool.map(function, items))
        except BaseException:
            self._interrupted.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _list(self, path: str) -> dict[str, Any]:
        """The files there, with what the file system says of them."""
        try:
            if _is_glob(PurePosixPath(path)):
                found: Any = self._fs.glob(path, detail=True)
                return {name: info for name, info in found.items() if info["type"] == "file"}
            return {str(name): info for name, info in self._fs.find(path, detail=True).items()}
        except FileNotFoundError:
            return {}
        except Exception as error:  # each file system has its own errors of access and of the network
            raise ValueError(
                f"data.root={self.root} cannot be listed: {error!r}; see the url, the network and your credentials, or "
                "give data.source.storage_options={...} for fsspec"
            ) from error


class RemoteTable:
    """One parquet file; has what is used of pyarrow's ParquetFile. Thread safe."""

    def __init__(self, files: RemoteFiles, path: PurePath, size: int) -> None:
        self._files, self._path, self._size = files, path, size
        name = files.name(path)
        tail = self._read(max(size - _TAIL, 0), size, "its footer") if size else b""
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != _MAGIC or length > size:
            raise ValueError(f"{name} cannot be read as parquet, it is truncated or something else")
        if length > len(tail):
            tail = self._read(size - length, size, "its footer")
        try:
            self.metadata = pq.read_metadata(pa.BufferReader(tail))
            self.schema_arrow: pa.Schema = self._open([]).schema_arrow
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{name} cannot be read as parquet, it is truncated or something else: {error}") from error

    @property
    def num_row_groups(self) -> int:
        return self.metadata.num_row_groups

    def read_row_group(self, group: int, columns: list[str], *, stopped: threading.Event | None = None) -> pa.Table:
        """Columns, or parts of them such as `image.bytes`, of a row group.

        Gives up between two attempts where `stopped` is set. Raises StreamError, and ValueError for what is damaged.
        """
        row_group = self.metadata.row_group(group)
        chunks = [row_group.column(place) for place in range(row_group.num_columns)]
        pieces = []
        for chunk in chunks:
            if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns):
                start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
                stop = start + chunk.total_compressed_size
                pieces.append((start, self._read(start, stop, f"row group {group}", stopped)))
        try:
            return self._open(pieces).read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{self._files.name(self._path)} is damaged in row group {group}: {error}") from error

    def _open(self, pieces: list[tuple[int, bytes]]) -> pq.ParquetFile:
        return pq.ParquetFile(pa.PythonFile(_Pieces(self._size, pieces), mode="r"), metadata=self.metadata)

    def _read(self, start: int, stop: int, what: str, stopped: threading.Event | None = None) -> bytes:
        return self._files.read(self._path, start, stop, what=what, stopped=stopped)


class _Pieces(io.RawIOBase):
    """A file of which only some pieces, (start, bytes) each, are here."""

    def __init__(self, size: int, pieces: list[tuple[int, bytes]]) -> None:
        self._size, self._pieces, self._place = size, pieces, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        for start, data in self._pieces:
            if start <= self._place < start + len(data):
                part = data[self._place - start : self._place - start + size] if size >= 0 else data
                self._place += len(part)
                return part
        raise OSError(f"its footer names the bytes from {self._place} on, where the column does not lie")


def _filesystem(root: str | Path, options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's file system for a root, and the path in it."""
    url = str(root) if is_url(root) else f"file://{Path(root).expanduser().absolute()}"
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ValueError(f"data.root={root} is streamed through fsspec: pip install fsspec s3fs") from error
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(
            f"data.root={root} needs a package that is not installed: {error}; pip install fsspec s3fs for s3://, "
            "gcsfs for gs://, adlfs for abfs://, aiohttp for http://"
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"data.root={root} with data.source.storage_options={options} is nothing that fsspec can open: {error}"
        ) from error


def _is_glob(path: PurePosixPath) -> bool:
    return any(character in str(path) for character in "*?[")
