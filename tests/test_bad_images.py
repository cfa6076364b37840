"""Images that cannot be read, wherever they lie: replaced alike, counted by the run, known after a resume."""

from __future__ import annotations

import io
import logging
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ssl.distributed as distributed
from ssl.checkpoint import read_state, steps_saved
from ssl.data.bad_images import BadImages, BadList
from ssl.data.folder import Folder
from ssl.data.loader import Loader
from ssl.data.parquet import Parquet
from ssl.data.sources import Source
from ssl.data.views import make_views
from ssl.pretrain import run
from tests.image_list import ImageList
from tests.test_pretrain import METHODS, composed, metrics_of, weights_of

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


# ---- in a run --------------------------------------------------------------------------------------------------------

RUN = [
    *METHODS["mae"],
    *["data=parquet", "data.image_size=32", "data.in_memory_gib=0", "data.max_bad_fraction=0.3", "online=none"],
    *["trainer.global_batch_size=10", "trainer.epochs=2", "trainer.device=cpu", "trainer.precision=fp32"],
    *["trainer.checkpoint_every_steps=2", "trainer.log_every_steps=1", "trainer.keep_last=9", "trainer.pictures=false"],
    *["wandb.mode=disabled", "launch=none"],
]


def known(out: Path, step: int) -> set[int]:
    """The bad images that the checkpoint of `step` knows."""
    folder = dict(steps_saved(out))[step]
    return {int(index) for index in read_state(folder)["bad_images"]}


def test_a_run_counts_what_its_steps_met_and_a_resume_goes_on_counting_and_reads_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = [*RUN, f"data.root={table(tmp_path / 'set')}"]
    run(composed(*words, "loader.threads=3", "loader.prefetch=3"), out=tmp_path / "uncut")
    counts = [line["bad_images"] for line in metrics_of(tmp_path / "uncut")]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == len(BAD)
    assert [len(known(tmp_path / "uncut", step)) for step in (2, 4, 6)] == [counts[step - 1] for step in (2, 4, 6)]

    run(composed(*words, "loader.threads=1", "trainer.steps=2"), out=tmp_path / "cut")
    before = known(tmp_path / "cut", 2)
    reads: list[int] = []
    read = Parquet.read

    def recorded(self: Parquet, index: int) -> bytes:
        if threading.current_thread().name.startswith("loader-"):  # not the look at sizes and checksum at the start
            reads.append(index)
        return read(self, index)

    monkeypatch.setattr(Parquet, "read", recorded)
    run(composed(*words, "loader.threads=2"), out=tmp_path / "cut")
    assert before
    assert reads
    assert not before & set(reads)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "uncut")
    assert known(tmp_path / "cut", 6) == set(BAD)
    for name, tensors in weights_of(tmp_path / "uncut").items():
        assert all(tensor.equal(weights_of(tmp_path / "cut")[name][key]) for key, tensor in tensors.items())


def run_together(words: list[str], out: Path) -> str:
    """Run on this rank of a pool, whose ranks stay together; what ended it."""
    stop, distributed.stop = distributed.stop, lambda: None
    try:
        run(composed(*words), out=out)
    except BadImages as error:
        return str(error)
    finally:
        distributed.stop = stop
    return "complete"


def test_two_ranks_count_together_what_one_counts(two_ranks, tmp_path: Path):
    words = [*RUN, f"data.root={table(tmp_path / 'set')}", "loader.threads=1"]
    run(composed(*words), out=tmp_path / "one")
    assert two_ranks.run(run_together, words, tmp_path / "two") == ["complete"] * 2
    ours, theirs = ([line["bad_images"] for line in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert ours == theirs
    for step in (2, 4, 6):
        assert known(tmp_path / "one", step) == known(tmp_path / "two", step)


def test_the_fraction_limits_what_all_ranks_found_together_and_ends_them_all(two_ranks, tmp_path: Path):
    root = tmp_path / "set"
    root.mkdir()
    images = [b"no picture" if number in (3, 8, 13, 21) else encoded(number) for number in range(40)]
    pq.write_table(pa.table({"image": images}), root / "train.parquet")
    words = [*RUN, f"data.root={root}", "loader.threads=1", "loader.prefetch=0", "trainer.epochs=1"]
    words += ["trainer.global_batch_size=20", f"data.max_bad_fraction={3 / 40}"]
    said = two_ranks.run(run_together, words, tmp_path / "run")
    assert all(f"4 of 40 images of parquet {root}" in each for each in said)
    assert all(f"row {number}: no image that can be read" in said[1] for number in (3, 8, 13, 21))


def test_a_folder_that_lost_a_file_is_another_set_to_a_resume(tmp_path: Path):
    source = folder(tmp_path / "set")
    words = [*RUN, f"data.root={tmp_path / 'set'}", "loader.threads=1"]
    words[words.index("data=parquet")] = "data=folder"
    run(composed(*words, "trainer.steps=2"), out=tmp_path / "run")
    Path(source.describe(0)).unlink()
    with pytest.raises(ValueError, match=r"other images \(30; .* has 29\).*accept_changes=true"):
        run(composed(*words), out=tmp_path / "run")
