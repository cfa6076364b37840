"""Images made small once and stored in parquet shards, which `data=parquet` and Hugging Face's `datasets` read.

A shard is a function of its images and settings: threads, interruptions and the time of day do not enter. It is written
under a hidden name and renamed when it is whole, and tells in its own metadata what it was made from.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image

from ssl.data.decode import crop_resize_into, exif_orientation
from ssl.data.reader import UNREADABLE, Reader
from ssl.data.sources import UNLABELLED, Source
from ssl.data.threads import ShouldStop, chunk_bounds

FORMAT = 1
RECORD = b"ssl.prepare"
"""The key of a shard's record in its parquet metadata."""
KINDS = ("shrunk", "copied", "converted")

_JPEG = b"\xff\xd8\xff"
_SHARD_NAME = re.compile(r"(train|test)-(\d{5})-of-(\d{5})\.parquet")
_CHUNK = (2, 8)  # images that a thread takes at once: a stop waits for no more than one of them
_MAX_GROUP_BYTES = 2**31 - 1  # the offsets of arrow's binary columns are int32


@dataclass(frozen=True)
class Size:
    """What becomes of an image: at most `short_side` pixels on its short side (None keeps all), and JPEG's quality."""

    short_side: int | None
    quality: int


def target_size(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side at most `short_side` and the same aspect; never larger than `size`."""
    height, width = size
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return max(round(height * scale), short_side), max(round(width * scale), short_side)


def store_image(data: bytes | np.ndarray, pixels: np.ndarray, size: Size) -> tuple[bytes, str]:
    """The JPEG that is stored of an image, and which of KINDS that makes it.

    `pixels` uint8 (H, W, C) are the image upright. A JPEG that is upright, RGB or gray, and small enough stays byte for
    byte ("copied"); what is too large is resized (bicubic, antialiased: "shrunk"); anything else keeps its pixels
    ("converted"). What is encoded is baseline with 4:2:0 chroma, or gray where the channels agree, as those of
    a gray original do.
    """
    height, width = target_size(pixels.shape[:2], size.short_side)  # pyright: ignore[reportArgumentType]
    kind = "converted"
    if (height, width) != pixels.shape[:2]:
        kind = "shrunk"
        whole = (0, 0, pixels.shape[0], pixels.shape[1])
        resized = np.empty((height, width, pixels.shape[2]), np.uint8)
        crop_resize_into(torch.from_numpy(resized).permute(2, 0, 1), pixels, whole)
        pixels = resized
    elif isinstance(data, bytes) and _may_stay(data, channels=pixels.shape[2]):
        return data, "copied"
    if pixels.shape[2] == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        pixels = pixels[..., :1]
    return _encode(pixels, quality=size.quality), kind


def _encode(pixels: np.ndarray, *, quality: int) -> bytes:
    """A baseline JPEG of uint8 (H, W, 1 or 3), gray or with 4:2:0 chroma, with a restart marker after each row of MCUs.

    Huffman tables of its own would make a photo 3 % smaller and 2 % faster to decode, but take 2.7 times as long.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_rows=1)
    return stream.getvalue()


def _may_stay(data: bytes, *, channels: int) -> bool:
    """Whether every reader sees in these bytes what ours does: a JPEG upright, in a colour space without surprises."""
    if data[:3] != _JPEG or exif_orientation(data) != 1:
        return False
    try:
        colorspace = simplejpeg.decode_jpeg_header(data)[2]
    except ValueError:
        return False
    return colorspace == "Gray" or (channels == 3 and colorspace in ("RGB", "YCbCr"))


@dataclass
class Account:
    """What became of some images."""

    shrunk: int = 0
    copied: int = 0
    converted: int = 0
    bytes_before: int = 0
    """Of the images that are stored; pixels count as they are."""
    bytes_after: int = 0
    skipped: list[list[str]] = field(default_factory=list)
    """[path, reason] of each image that could not be read."""

    @property
    def stored(self) -> int:
        return self.shrunk + self.copied + self.converted

    def add(self, other: Account) -> None:
        """Count another's images here as well."""
        for name in (*KINDS, "bytes_before", "bytes_after"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped


@dataclass(frozen=True)
class Shard:
    """A stretch [start, stop) of a split's images, number `number` of `count`."""

    split: str
    number: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}.parquet"


def plan_shards(split: str, num_images: int, *, rows_per_shard: int) -> list[Shard]:
    """The shards of a split, in order."""
    count = -(-num_images // rows_per_shard)
    bounds = [(k * rows_per_shard, min((k + 1) * rows_per_shard, num_images)) for k in range(count)]
    return [Shard(split, number, count, start, stop) for number, (start, stop) in enumerate(bounds)]


def shard_schema(source: Source) -> pa.Schema:
    """The columns of a shard: `image` {bytes, path}, and where there are labels `label` int64, or `labels`, lists.

    Class names and the kind of each column stand in the metadata that Hugging Face's `datasets` reads.
    """
    columns: dict[str, Any] = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
    if source.classes is not None:
        label = {"names": list(source.classes), "_type": "ClassLabel"}
    if not (source.labels == UNLABELLED).all():
        several = source.labels.ndim == 2
        name = "labels" if several else "label"
        columns[name] = pa.list_(pa.int64()) if several else pa.int64()
        features[name] = {"feature": label, "_type": "Sequence"} if several else label
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})


@dataclass
class Group:
    """A row group, and what became of its images."""

    table: pa.Table
    account: Account


class GroupJob:
    """One row group in the making: threads read, shrink and encode chunks of the images at `start` to `stop`."""

    def __init__(
        self, reader: Reader, start: int, stop: int, *, root: str, schema: pa.Schema, size: Size, threads: int
    ):
        self.reader, self.start, self.schema, self.size, self.root = reader, start, schema, size, root
        smallest, largest = _CHUNK
        self.chunks: Sequence[tuple[int, int]] = chunk_bounds(
            stop - start, num_threads=threads, smallest=smallest, largest=largest
        )
        self._stored: list[tuple[bytes, str, int]] = [(b"", "", 0)] * (stop - start)  # bytes, kind, bytes before
        self._reasons: list[str | None] = [None] * (stop - start)

    def work(self, start: int, stop: int, should_stop: ShouldStop) -> None:
        for row in range(start, stop):
            if should_stop():
                return
            try:
                self._stored[row] = self._store(self.start + row)
            except UNREADABLE as error:
                # Pillow names the address of its buffer, which differs every time.
                self._reasons[row] = re.sub(r" at 0x[0-9a-f]+", "", str(error))

    def finish(self) -> Group:
        """The rows that could be read, and the account of all."""
        account, rows = Account(), []
        for row, ((data, kind, before), reason) in enumerate(zip(self._stored, self._reasons)):
            if reason is not None:
                account.skipped.append([self._path(row), reason])
                continue
            rows.append(row)
            account.bytes_before += before
            account.bytes_after += len(data)
            setattr(account, kind, getattr(account, kind) + 1)
        if account.bytes_after > _MAX_GROUP_BYTES:
            raise ValueError(
                f"the images from {self._path(0)} on are {account.bytes_after / 2**30:.1f} GiB in one row group, which "
                f"may hold 2; give a lower rows_per_group than {len(self._stored)}"
            )
        images = [{"bytes": self._stored[row][0], "path": self._path(row)} for row in rows]
        columns = [pa.array(images, self.schema.field("image").type)]
        if len(self.schema) == 2:
            columns.append(pa.array([self._label(row) for row in rows], self.schema.field(1).type))
        return Group(pa.Table.from_arrays(columns, schema=self.schema), account)

    def _store(self, index: int) -> tuple[bytes, str, int]:
        data, size = self.reader.open(index)
        pixels = self.reader.decode(index, data, size)
        stored, kind = store_image(data, pixels, self.size)
        return stored, kind, len(data) if isinstance(data, bytes) else data.nbytes

    def _path(self, row: int) -> str:
        return relative(self.reader.source.describe(self.start + row), self.root)

    def _label(self, row: int) -> int | list[int] | None:
        label = self.reader.source.labels[self.start + row]
        if np.ndim(label) == 0:
            return int(label)
        return None if (label == UNLABELLED).any() else np.flatnonzero(label).tolist()


def relative(path: str, root: str) -> str:
    """What follows `root` in a path, as text that can be stored whatever the bytes of the file's name."""
    below = path.removeprefix(root.rstrip(os.sep) + os.sep) if root else path
    return os.fsencode(below).decode("utf-8", "backslashreplace")


def fingerprint(source: Source) -> int:
    """CRC-32 over labels and class names: tells a set that was labelled anew."""
    names = json.dumps(source.classes).encode()
    return zlib.crc32(names, zlib.crc32(np.ascontiguousarray(source.labels).tobytes()))


def write_shard(folder: Path, shard: Shard, schema: pa.Schema, groups: Iterable[Group], recipe: dict[str, Any]) -> None:
    """Write the groups as a shard, whole or not at all. Raises OSError that says what to do."""
    partial = folder / f".partial-{os.getpid()}-{shard.name}"
    account = Account()
    compression: Any = {"image.bytes": "none"}  # JPEG is compressed already
    compression |= dict.fromkeys(_leaves(schema, ["image.path", *schema.names[1:]]), "zstd")
    try:
        with partial.open("wb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                use_dictionary=False,
                write_statistics=False,
                compression=compression,
            ) as writer:
                for group in groups:
                    if len(group.table):
                        writer.write_table(group.table, row_group_size=len(group.table))
                    account.add(group.account)
                record = {"format": FORMAT, "recipe": recipe, "shard": asdict(shard), "account": asdict(account)}
                writer.add_key_value_metadata({RECORD: json.dumps(record).encode()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / shard.name)
    except OSError as error:
        raise OSError(
            f"{shard.name} cannot be written to {folder}: {error.strerror or error}; make room and run the same "
            "command again, which goes on with this shard, or give another out="
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _leaves(schema: pa.Schema, names: list[str]) -> list[str]:
    """Columns as parquet calls their values."""
    return [
        f"{name}.list.element" if name in schema.names and pa.types.is_list(schema.field(name).type) else name
        for name in names
    ]


def read_record(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself; None for a file that this command has not written. Raises ValueError if damaged."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        record = json.loads(metadata[RECORD]) if RECORD in metadata else None
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{path} is damaged ({error}); remove it and run the same command again") from error
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None


def shards_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of the shards in a folder by file name. Raises ValueError where another parquet file lies there."""
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("[!.]*.parquet")):
        record = read_record(path)
        if record is None or not _SHARD_NAME.fullmatch(path.name):
            raise ValueError(f"{path} was not written by this command; give another out=")
        records[path.name] = record
    return records
