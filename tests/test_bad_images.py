"""Images that cannot be read, wherever they lie: replaced alike, counted by the run, known after a resume."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ssl.data.bad_images import BadImages, BadList
from ssl.data.folder import Folder
from ssl.data.loader import Loader
from ssl.data.parquet import Parquet
from ssl.data.sources import Source
from ssl.data.views import make_views
from tests.image_list import ImageList

NUM = 30
VIEWS = make_views([{"count": 1, "scale": [0.3, 1.0], "flip": 0.5}])


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A picture that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((24 + number % 3, 20), Image.Resampling.BICUBIC).save(stream, kind)
    return stream.getvalue()


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of a few bytes whose header promises 900 million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    2: bomb(),
    5: b"",
    9: encoded(9, "JPEG")[:-200],
    11: b"<html><body>404: no such picture</body></html>",
    17: encoded(17)[:60],
    22: b"\x89PNG\r\n\x1a\n" + bytes(200),
}
"""A decompression bomb, an empty file, a truncated JPEG and PNG, a text, and noise behind a PNG's first bytes."""
WRONG_SUFFIX = 7
"""A PNG that is called a JPEG: its content tells."""


def contents() -> list[bytes]:
    return [BAD.get(number, encoded(number)) for number in range(NUM)]


def folder(root: Path) -> Folder:
    root.mkdir()
    for number, data in enumerate(contents()):
        name = f"{number:03d}.jpg" if number in (WRONG_SUFFIX, 9) else f"{number:03d}.png"
        (root / name).write_bytes(data)
    return Folder(root=root)


def table(root: Path) -> Path:
    root.mkdir()
    pq.write_table(pa.table({"image": contents()}), root / "train.parquet", row_group_size=4)
    return root


SOURCES: dict[str, Callable[[Path], Source]] = {
    "folder": folder,
    "parquet": lambda root: Parquet(root=table(root)),
    "streamed": lambda root: Parquet(root=table(root), stream=True, window=16, lanes=2),
}


def loader(source: Source, **settings: Any) -> Loader:
    settings = {"threads": 2, "in_memory_gib": 0, "max_bad_fraction": 0.5, **settings}
    return Loader(source, VIEWS, size=(8, 8), channels=3, seed=3, **settings)


STEPS = {"start_step": 0, "stop_step": 6, "global_batch_size": 10}


def crops(batches: Any) -> dict[tuple[int, int], bytes]:
    """The pixels of each image of each step."""
    return {
        (step, index): pixels.numpy().tobytes()
        for step, batch in enumerate(batches)
        for index, pixels in zip(batch["index"].tolist(), batch["crops"][0])
    }


# ---- what is replaced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_bad_image_is_replaced_alike_whatever_the_threads_ranks_and_resume(tmp_path: Path, kind: str):
    source = SOURCES[kind](tmp_path / "set")
    one = loader(source, threads=1, prefetch=0)
    whole = crops(one.batches(**STEPS))
    assert set(one.bad) == set(BAD)  # and not the PNG that is called a JPEG
    assert crops(loader(source, threads=5, prefetch=3).batches(**STEPS)) == whole
    shares = [crops(loader(source).batches(**STEPS, rank=rank, world_size=2)) for rank in (0, 1)]
    assert shares[0] | shares[1] == whole
    rest = crops(loader(source).batches(**(STEPS | {"start_step": 4})))
    assert {(step + 4, index): pixels for (step, index), pixels in rest.items()} == {
        key: pixels for key, pixels in whole.items() if key[0] >= 4
    }


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_set_held_in_memory_replaces_by_the_same_images(tmp_path: Path, kind: str):
    source = SOURCES[kind](tmp_path / "set")
    held, decoded = loader(source, in_memory_gib=1), loader(source)
    assert held.in_memory
    assert not decoded.in_memory
    assert crops(held.batches(**STEPS)) == crops(decoded.batches(**STEPS))
    assert held.bad == decoded.bad


def test_a_bad_image_shows_an_image_that_is_good_and_its_slot_keeps_its_index(tmp_path: Path):
    source = folder(tmp_path / "set")
    plain = make_views([{"crop": "resize"}])
    settings = {"size": (20, 24), "channels": 3, "seed": 3, "in_memory_gib": 0, "max_bad_fraction": 0.5}
    (batch,) = Loader(source, plain, **settings).sequential(batch_size=NUM)
    assert batch["index"].tolist() == list(range(NUM))
    shown = {pixels.numpy().tobytes(): number for number, pixels in enumerate(batch["crops"][0]) if number not in BAD}
    stand_ins = [shown[batch["crops"][0][number].numpy().tobytes()] for number in BAD]
    assert not set(stand_ins) & set(BAD)
    assert len(set(stand_ins)) > 1  # not all by the same one


def test_a_bomb_is_refused_without_its_memory(tmp_path: Path):
    import tracemalloc

    source = ImageList([bomb(), *(encoded(number) for number in range(9))])
    tracemalloc.start()
    bad = loader(source)
    next(bad.sequential(batch_size=10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(bad.bad) == [0]
    assert peak < 2**26  # its pixels would be 2.5 GiB


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_vanishes_in_mid_epoch_is_replaced_from_there_on_as_if_it_had_never_been(
    tmp_path: Path, threads: int
):
    source = folder(tmp_path / "set")
    whole = crops(loader(source).batches(**STEPS))
    victims = {index for step, index in whole if step in (1, 5)} - set(BAD)
    victim = next(index for index in sorted(victims) if {(1, index), (5, index)} <= whole.keys())
    seen: list[Any] = []
    running = loader(source, threads=threads, prefetch=0)
    for step, batch in enumerate(running.batches(**STEPS)):
        seen.append(batch)
        if step == 2:
            Path(source.describe(victim)).unlink()
    after = crops(loader(source).batches(**STEPS))
    assert after[5, victim] != whole[5, victim]
    found = crops(seen)
    assert found == {key: (whole if key[0] <= 2 else after)[key] for key in whole}
    assert "No such file" in running.bad[victim]
    resumed = loader(source, threads=threads)
    later = crops(resumed.batches(**(STEPS | {"start_step": 4})))
    assert later == {(step - 4, index): pixels for (step, index), pixels in found.items() if step >= 4}


def test_each_bad_image_is_logged_once_with_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = folder(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        for _ in loader(source, threads=4).batches(**STEPS):
            pass
    told = [record.getMessage() for record in caplog.records if "cannot decode" in record.getMessage()]
    assert len(told) == len(BAD)
    for number in BAD:
        assert sum(f"cannot decode {source.describe(number)}: " in line for line in told) == 1


# ---- what is counted -------------------------------------------------------------------------------------------------


def met(whole: dict[tuple[int, int], bytes], source: Source, step: int) -> set[int]:
    """The bad images that the batches up to `step` met, by following each slot's candidates."""
    bad = BadList(source, seed=3, max_fraction=1)
    found = set()
    for at, index in whole:
        attempt = 0
        while at <= step and (shown := bad.candidate(index, attempt)) in BAD:
            found.add(shown)
            attempt += 1
    return found


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("kind", SOURCES)
def test_the_count_is_that_of_the_batches_handed_out_and_not_of_those_ahead(tmp_path: Path, kind: str, prefetch: int):
    source = SOURCES[kind](tmp_path / "set")
    whole = crops(loader(source).batches(**STEPS))
    running = loader(source, threads=3, prefetch=prefetch)
    counts = []
    for step, _ in enumerate(running.batches(**STEPS)):
        assert set(running.bad_list.counted) == met(whole, source, step)
        counts.append(len(running.bad_list.counted))
    assert counts[0] < counts[-1] == len(BAD)


def test_what_other_ranks_found_is_counted_once_and_not_read_again(tmp_path: Path):
    class Counting(ImageList):
        def read(self, index: int):
            reads.append(index)
            return super().read(index)

    reads: list[int] = []
    source = Counting([BAD.get(number, encoded(number)) for number in range(NUM)])
    first, second = (loader(source) for _ in range(2))
    for _ in first.batches(**STEPS):
        pass
    news = first.bad_list.news()
    assert set(news) == set(BAD)
    assert first.bad_list.news() == {}
    second.bad_list.learn(news)
    reads.clear()
    for _ in second.batches(**STEPS):
        pass
    assert not set(reads) & set(BAD)
    assert set(second.bad_list.counted) == set(BAD)
    assert second.bad_list.news() == {}  # it is others' news


def test_the_fraction_limits_what_is_learnt_too():
    bad = BadList(ImageList([b""] * 100), seed=0, max_fraction=0.02)
    bad.learn({3: "image_3: broken", 4: "image_4: broken"})
    with pytest.raises(BadImages, match=r"3 of 100 images .*data\.max_bad_fraction=0\.02(.|\n)*image_3: broken"):
        bad.learn({3: "image_3: broken", 9: "image_9: broken"})
