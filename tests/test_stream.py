"""Parquet streamed through fsspec: what a batch has, what is read and held when, and what happens when reads fail."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from eval import knn
from eval.config import register
from eval.subject import read_features
from ssl import pretrain
from ssl.config import CONF, register_schemas
from ssl.data import remote
from ssl.data import stream as stream_module
from ssl.data.loader import Loader
from ssl.data.memory import common_size, sample_sizes
from ssl.data.parquet import Parquet
from ssl.data.sources import checksum
from ssl.data.stream import StreamError, in_order
from ssl.data.subset import Subset, limit
from ssl.data.views import View
from ssl.data.window import WindowOrder
from ssl.randomness import shuffle
from tests.image_list import png

WHOLE = [View(crop="resize")]


class Watched(LocalFileSystem):
    """A local file system that tells which bytes were asked of it, and that can fail, hang and be slow."""

    protocol = "watched"
    reads: ClassVar[list[tuple[str, int, int]]] = []
    failures: ClassVar[dict[int, int]] = {}
    """By the number of bytes asked for: how many such reads fail."""
    pace = staticmethod(lambda start: None)

    def cat_file(self, path, start=None, end=None, **_):
        assert None not in (start, end)
        Watched.reads.append((str(path), start, end))
        Watched.pace(start)
        if Watched.failures.get(end - start, 0) > 0:
            Watched.failures[end - start] -= 1
            raise ConnectionResetError("the line broke")
        return super().cat_file(path, start=start, end=end)

    def unstrip_protocol(self, name):
        return f"watched://{name}"


fsspec.register_implementation("watched", Watched)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    Watched.reads, Watched.failures, Watched.pace = [], {}, staticmethod(lambda start: None)
    monkeypatch.setattr(remote, "FIRST_DELAY", 1e-4)
    return Watched


def picture(value: int) -> bytes:
    return png(np.full((6, 6, 3), value, np.uint8))


def write(root: Path, *, sizes: list[list[int]], split: str = "train", labels: str = "number") -> Path:
    """A file per list in `sizes`, with row groups of these sizes; image n is of the colour n, and its label n % 7."""
    root.mkdir(exist_ok=True)
    number = 0
    for file, groups in enumerate(sizes):
        schema = pa.schema(
            {
                "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
                "label": pa.string() if labels == "text" else pa.int64(),
            }
        )
        with pq.ParquetWriter(root / f"{split}-{file:02d}.parquet", schema) as writer:
            for size in groups:
                rows = range(number, number + size)
                images = [{"bytes": picture(row % 256), "path": f"{row}.png"} for row in rows]
                names = [f"class {row % 7}" if labels == "text" else row % 7 for row in rows]
                columns = [pa.array(images, schema.field(0).type), pa.array(names)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=max(size, 1))
                number += size
    return root


SIZES = [[7, 5, 9], [8], [3, 11, 6, 7], [4, 10]]  # 70 images in 10 groups
FLAT = [size for groups in SIZES for size in groups]


def make(root: Path, source=None, **settings) -> Loader:
    given = {name: settings.pop(name) for name in list(settings) if name in ("window", "lanes", "readers", "retries")}
    source = source or Parquet(root=f"watched://{root}", **given)
    settings = {"size": (6, 6), "channels": 3, "seed": 5, "threads": 2} | settings
    return Loader(source, WHOLE, **settings)


def indices(batches) -> list[list[int]]:
    found = []
    for batch in batches:
        colours = batch["crops"][0][:, 0, 0, 0].tolist()
        assert colours == batch["index"].tolist(), "a slot shows another image than its own"
        assert batch["label"].tolist() == [index % 7 for index in batch["index"].tolist()]
        found.append(batch["index"].tolist())
    return found


def joined(lists: list[list[int]]) -> list[int]:
    return [item for each in lists for item in each]


# ---- batches from a stream -----------------------------------------------------------------------------------------


def test_streamed_batches_have_the_images_and_labels_of_the_window_order(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=2)
    order = WindowOrder(np.cumsum([0, *FLAT]), seed=5, window=24, lanes=2, global_batch_size=8)
    assert indices(loader.batches(start_step=0, stop_step=16, global_batch_size=8)) == [
        order.step(step).index.tolist() for step in range(16)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_over_ranks_every_image_comes_once_per_epoch(tmp_path, world_size):
    root = write(tmp_path / "set", sizes=[[7, 5, 9], [8, 3, 11, 6, 7], [4, 12]])  # 72 images
    shares = []
    for rank in range(world_size):
        batches = make(root, window=24, lanes=4).batches(
            start_step=9, stop_step=18, global_batch_size=8, rank=rank, world_size=world_size
        )
        shares += joined(indices(batches))
    assert sorted(shares) == list(range(72))


def test_a_resume_at_any_step_continues_with_the_same_batches(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    whole = indices(make(root, window=24, lanes=2).batches(start_step=0, stop_step=20, global_batch_size=8))
    for start in (1, 7, 8, 13):
        again = make(root, window=24, lanes=2).batches(start_step=start, stop_step=20, global_batch_size=8)
        assert indices(again) == whole[start:]


def test_threads_readers_and_slow_reads_do_not_change_batches(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    whole = indices(make(root, window=24, lanes=2).batches(start_step=0, stop_step=16, global_batch_size=8))
    Watched.pace = staticmethod(lambda start: time.sleep(start % 7 / 2000))
    for settings in ({"threads": 1, "readers": 0}, {"threads": 3, "readers": 1, "prefetch": 0}, {"readers": 16}):
        loader = make(root, window=24, lanes=2, **settings)
        assert indices(loader.batches(start_step=0, stop_step=16, global_batch_size=8)) == whole


@pytest.mark.parametrize("readers", [0, 1, 8])
def test_each_group_is_read_once_per_epoch(tmp_path, readers):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=1, readers=readers)
    Watched.reads.clear()
    indices(loader.batches(start_step=0, stop_step=10, global_batch_size=7))
    assert len(Watched.reads) == len(set(Watched.reads)) == 10
    indices(loader.sequential(batch_size=9))
    assert set(Counter(Watched.reads).values()) == {2}


def test_groups_that_the_borders_of_lanes_cut_are_read_twice_at_most(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=4)
    Watched.reads.clear()
    indices(loader.batches(start_step=0, stop_step=17, global_batch_size=4))
    assert len(set(Watched.reads)) == 10
    assert len(Watched.reads) <= 10 + 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_sequential_reads_a_streamed_set_in_order(tmp_path, world_size):
    root = write(tmp_path / "set", sizes=SIZES)
    shares = [
        indices(make(root).sequential(batch_size=4, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert joined([joined(share) for share in shares]) == list(range(70))


def test_parts_of_a_streamed_set_are_streamed(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    whole = Parquet(root=f"watched://{root}", window=12, lanes=2)
    part = Subset(limit(whole, 41, seed=1), np.arange(1, 41, 2))
    kept = part.source.indices[part.indices]
    Watched.reads.clear()
    loader = Loader(part, WHOLE, size=(6, 6), channels=3, seed=5, threads=2)
    shown = [batch["crops"][0][:, 0, 0, 0].tolist() for batch in loader.sequential(batch_size=6)]
    assert joined(shown) == kept.tolist()
    groups = np.unique(np.searchsorted(np.cumsum(FLAT), kept, "right"))
    assert len(Watched.reads) == len(groups)
    batches = loader.batches(start_step=0, stop_step=5, global_batch_size=4)
    epoch = [batch["crops"][0][:, 0, 0, 0].tolist() for batch in batches]
    assert sorted(joined(epoch)) == kept.tolist()
    with pytest.raises(ValueError, match="sort the indices"):
        Subset(whole, np.array([3, 1]))


# ---- what is read and held -----------------------------------------------------------------------------------------


def test_only_footers_and_labels_are_read_at_the_start_and_labels_once(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    source = Parquet(root=f"watched://{root}")
    assert source.labels.tolist() == [index % 7 for index in range(70)]
    footers = {(f"{path}", path.stat().st_size) for path in root.iterdir()}
    ends = [(path, end) for path, _, end in Watched.reads if (path, end) in footers]
    assert len(ends) == 4
    assert len(Watched.reads) == 4 + 10  # the label column of ten row groups
    images = {
        (str(path), pq.ParquetFile(path).metadata.row_group(group).column(0).data_page_offset)
        for path in root.iterdir()
        for group in range(pq.ParquetFile(path).num_row_groups)
    }
    inside = [(p, start) for p, start, end in Watched.reads if (p, end) not in footers]
    assert not {(p, start) for p, start in inside} & images


def test_sizes_and_checksum_of_a_stream_take_two_groups_and_none(tmp_path):
    source = Parquet(root=f"watched://{write(tmp_path / 'set', sizes=SIZES)}")
    Watched.reads.clear()
    assert common_size(source) == (6, 6)
    assert len(sample_sizes(source)) == 7 + 10
    assert len(Watched.reads) == 2
    other = Parquet(root=f"watched://{write(tmp_path / 'other', sizes=[[7, 5, 9], [8], [3, 11, 6, 7], [4, 9]])}")
    Watched.reads.clear()
    assert checksum(source) == checksum(Parquet(root=f"file://{tmp_path / 'set'}"))
    assert checksum(source) != checksum(other)
    assert Watched.reads == []


def test_a_first_look_at_few_images_reads_little_ahead(tmp_path):
    loader = make(write(tmp_path / "set", sizes=[[10] * 7]))
    Watched.reads.clear()
    batches = loader.sequential(batch_size=2)
    next(batches)
    batches.close()
    assert len(Watched.reads) <= 2


def test_images_copied_one_by_one_are_read_ahead_by_several_readers(tmp_path):
    source = Parquet(root=f"watched://{write(tmp_path / 'set', sizes=[[2] * 35])}", readers=4)
    together, most, lock = 0, 0, threading.Lock()

    def pace(start: int) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.002)
        with lock:
            together -= 1

    Watched.reads.clear()
    Watched.pace = staticmethod(pace)
    assert [source.read(index) for index in in_order(source)] == [picture(index) for index in range(70)]
    assert len(Watched.reads) == 35
    assert 2 <= most <= 4


def held_at_most(loader: Loader, **arguments) -> int:
    most = 0
    for _ in loader.batches(**arguments):
        (reading,) = loader.groups.stream.readings
        most = max(most, reading.num_held)
    return most


def test_held_groups_are_bounded_by_the_window_and_twice_the_readers(tmp_path):
    root = write(tmp_path / "set", sizes=[[2] * 60, [2] * 60])
    for window, readers in ((8, 1), (8, 4), (48, 2)):
        loader = make(root, window=window, lanes=2, readers=readers, prefetch=1)
        most = held_at_most(loader, start_step=0, stop_step=110, global_batch_size=4)
        live = window // 2 + 2 * 2  # groups of the window, and those that each lane has begun and not ended
        of_a_batch = 4  # new groups of each batch that is in the making or was planned last
        assert most <= live + 2 * readers + 3 * of_a_batch
        assert most >= window // 4


def test_read_ahead_stops_at_held_gib(tmp_path):
    root = write(tmp_path / "set", sizes=[[2] * 60, [2] * 60])
    loader = make(root, window=8, lanes=2, readers=30, prefetch=0)
    stream = loader.groups.stream
    free = held_at_most(loader, start_step=0, stop_step=50, global_batch_size=4)
    stream.held_bytes = int(14 * stream.sizes.mean())
    assert held_at_most(loader, start_step=0, stop_step=50, global_batch_size=4) <= 14 < free


def test_a_window_that_does_not_fit_is_refused_with_its_size(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=64, lanes=2)
    loader.groups.stream.held_bytes = 1000
    with pytest.raises(ValueError, match=r"a window of 64 images takes .* on each of 1 ranks.*data.source.held_gib"):
        loader.batches(start_step=0, stop_step=1, global_batch_size=8)


def test_nothing_is_held_and_no_thread_left_after_the_last_batch_or_an_early_stop(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=2)

    def left() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith(("stream-", "loader-"))]

    batches = loader.batches(start_step=0, stop_step=10**6, global_batch_size=8)
    next(batches)
    assert any(name.startswith("stream-") for name in left())
    (reading,) = loader.groups.stream.readings
    batches.close()
    assert (left(), reading.num_held, loader.groups.stream.readings) == ([], 0, ())
    indices(loader.batches(start_step=0, stop_step=9, global_batch_size=8))
    assert left() == []
    with loader:
        next(loader.batches(start_step=0, stop_step=10**6, global_batch_size=8))
    assert left() == []


def test_two_iterators_of_one_stream_do_not_disturb_each_other(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=2)
    whole = indices(loader.batches(start_step=0, stop_step=16, global_batch_size=8))
    batches = loader.batches(start_step=0, stop_step=16, global_batch_size=8)
    first = [next(batches) for _ in range(4)]
    assert joined(indices(loader.sequential(batch_size=10))) == list(range(70))
    assert indices([*first, *batches]) == whole


# ---- when reads fail -----------------------------------------------------------------------------------------------


def fail(root: Path, times: int) -> None:
    """The reads of the fifth row group's images fail so often."""
    chunk = pq.ParquetFile(root / "train-02.parquet").metadata.row_group(1).column(0)
    Watched.failures[chunk.total_compressed_size] = times


def test_a_read_that_fails_is_tried_again(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    whole = indices(make(root, window=24).batches(start_step=0, stop_step=8, global_batch_size=8))
    loader = make(root, window=24, retries=3)
    fail(root, 3)
    assert indices(loader.batches(start_step=0, stop_step=8, global_batch_size=8)) == whole


def test_a_read_that_goes_on_failing_names_the_url_and_the_row_group(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    loader = make(root, window=24, retries=2)
    fail(root, 10**6)
    with pytest.raises(StreamError, match=r"watched://.*train-02.parquet, row group 1, .*3 attempts.*the line broke"):
        indices(loader.batches(start_step=0, stop_step=8, global_batch_size=8))
    assert loader.bad == {}
    assert len([t for t in threading.enumerate() if t.name.startswith(("stream-", "loader-"))]) == 0


def test_a_damaged_group_is_named(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    loader = make(root, window=24)
    path = root / "train-02.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-02.parquet is damaged in row group 1"):
        indices(loader.batches(start_step=0, stop_step=8, global_batch_size=8))


def test_an_undecodable_image_is_replaced_in_a_stream(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    images = [b"no image" if row == 11 else picture(row) for row in range(40)]
    pq.write_table(pa.table({"image": images}), root / "train.parquet", row_group_size=4)
    source = Parquet(root=f"watched://{root}", window=16, lanes=2)
    loader = Loader(source, WHOLE, size=(6, 6), channels=3, seed=5, threads=2, max_bad_fraction=0.1)
    shown = {}
    for batch in loader.batches(start_step=0, stop_step=10, global_batch_size=4):
        shown |= dict(zip(batch["index"].tolist(), batch["crops"][0][:, 0, 0, 0].tolist()))
    assert sorted(shown) == list(range(40))
    assert [index for index, colour in shown.items() if index != colour] == list(loader.bad) == [11]


def test_control_c_while_a_read_hangs_stops_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "_GOODBYE", 0.05)
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24)
    entered, release = threading.Event(), threading.Event()

    def hang(start: int) -> None:
        entered.set()
        release.wait()

    def interrupt() -> None:
        entered.wait()
        os.kill(os.getpid(), signal.SIGINT)

    Watched.pace = staticmethod(hang)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(loader.batches(start_step=0, stop_step=8, global_batch_size=8))
        assert [t for t in threading.enumerate() if t.name.startswith("loader-")] == []
    finally:
        release.set()


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """A labelled train and test split of 20 x 20 images, in row groups of 8."""
    root, generator = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, num in (("train", 64), ("test", 20)):
        images = [png(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(num)]
        table = pa.table({"image": images, "label": [row % 4 for row in range(num)]})
        pq.write_table(table, root / f"{split}.parquet", row_group_size=8)
    return root


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(command, overrides=list(overrides))


def test_a_run_on_a_stream_continues_exactly_also_where_its_files_were_moved(noise, tmp_path):
    register_schemas()
    words = [
        *("method=simclr", "model=resnet10", "model.args={layers:[1,1,1,1],channels:[8,8,16,16]}", "data=parquet"),
        *("data.source.window=32", "data.source.stream=true", "trainer.global_batch_size=16", "trainer.epochs=2"),
        *("trainer.device=cpu", "trainer.log_every_steps=1", "wandb.mode=disabled", "loader.threads=1"),
    ]
    losses = {}
    for name, stops in (("whole", [8]), ("parts", [3, 8])):
        for stop in stops:
            root = noise if stop == 8 else f"file://{noise}"
            out = tmp_path / name
            pretrain.run(composed("pretrain", *words, f"data.root={root}", f"trainer.steps={stop}"), out=out)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]
    assert [step for step, _ in losses["whole"]] == list(range(1, 9))
    assert losses["parts"] == losses["whole"]


def test_a_streamed_set_is_judged_as_the_same_files_on_disk(noise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    register(knn.KnnConfig)
    words = ["ckpt=pixels", "data=parquet", "device=cpu", "threads=1"]
    disk, stream = (
        read_features(composed("knn", *words, f"data.root={root}"), command="eval.knn")
        for root in (noise, f"file://{noise}")
    )
    for one, other in ((disk.train, stream.train), (disk.test, stream.test)):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.index, other.index)


# ---- roots and settings --------------------------------------------------------------------------------------------


def test_memory_urls_globs_files_and_local_folders_are_streamed_alike(tmp_path):
    root = write(tmp_path / "set", sizes=SIZES)
    write(root, sizes=[[5, 4]], split="test")
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe_file(f"/test_stream/{path.name}", path.read_bytes())
    roots = [(f"file://{root}", None), (root, True), ("memory://test_stream", None), ("memory://test_stream/t*", None)]
    for place, stream in roots:
        source, test = (Parquet(split, root=place, stream=stream, window=24) for split in ("train", "test"))
        assert (len(source), len(test)) == (70, 9)
        assert [source.read(index) for index in (0, 33, 69)] == [picture(index) for index in (0, 33, 69)]
        assert indices(make(root, source).batches(start_step=0, stop_step=2, global_batch_size=8))
    single = Parquet(root="memory://test_stream/train-01.parquet")
    assert [single.read(index) for index in range(8)] == [picture(21 + index) for index in range(8)]
    assert single.describe(3) == "memory:///test_stream/train-01.parquet row 3"
    memory.rm("/test_stream", recursive=True)


def test_text_labels_of_a_streamed_test_split_are_numbered_as_in_train(tmp_path):
    root = write(tmp_path / "set", sizes=[[9, 6]], labels="text")
    write(root, sizes=[[5]], split="test", labels="text")
    source = Parquet("test", root=f"watched://{root}")
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert source.classes == [f"class {k}" for k in range(7)]


def test_local_files_keep_the_order_of_the_whole_set(tmp_path):
    source = Parquet(root=write(tmp_path / "set", sizes=SIZES))
    assert source.groups is None
    batches = indices(make(tmp_path, source, in_memory_gib=0).batches(start_step=0, stop_step=8, global_batch_size=8))
    assert joined(batches) == shuffle(5, 0, 70, np.arange(64)).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 100}, r"data.source.window has no effect .* data.source.stream=true"),
        ({"storage_options": {"anon": True}}, r"data.source.storage_options has no effect"),
        ({"stream": True, "window": 0}, "data.source.window must be at least 1, got 0"),
        ({"stream": True, "readers": -1}, "data.source.readers must be at least 0, got -1"),
        ({"root": "watched://{}", "stream": False}, "is a url, which is always streamed"),
        ({"root": "nosuch://{}"}, "nothing that fsspec can open.*nosuch"),
        ({"root": "watched://{}/elsewhere"}, r"holds no \*.parquet file, or does not exist"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_words(tmp_path, settings, message):
    root = write(tmp_path / "set", sizes=[[3]])
    settings = {"root": str(root)} | {k: v.format(root) if k == "root" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message):
        Parquet(**settings)


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match="pip install fsspec s3fs for s3://"):
        Parquet(root="s3://bucket/set")


def test_a_truncated_file_is_named_by_its_url(tmp_path):
    root = write(tmp_path / "set", sizes=[[3]])
    path = root / "train-00.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"watched://.*train-00.parquet cannot be read as parquet, it is truncated"):
        Parquet(root=f"watched://{root}")


def test_lanes_that_ranks_share_warn_with_the_number_that_mends_it(tmp_path, caplog):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24, lanes=2)
    loader.batches(start_step=0, stop_step=1, global_batch_size=8, rank=0, world_size=2)
    assert "share" not in caplog.text
    loader.batches(start_step=0, stop_step=1, global_batch_size=8, rank=0, world_size=4)
    assert "4 ranks share the 2 lanes" in caplog.text
    assert "data.source.lanes=4" in caplog.text


def test_a_loader_of_a_stream_says_so_and_holds_nothing_in_memory(tmp_path):
    loader = make(write(tmp_path / "set", sizes=SIZES), window=24)
    assert not loader.in_memory
    assert loader.describe() == (
        "70 images decoded by 2 threads, streamed in 10 row groups, mixed in a window of 24 images"
    )
    assert torch.equal(next(loader.sequential(batch_size=3))["index"], torch.arange(3))
