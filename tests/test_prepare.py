"""`python -m ssl.prepare`: what is stored of each image, and shards that are whole, repeatable and resumed."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from ssl.config import CONF
from ssl.data.decode import decode
from ssl.data.embedded import Embedded
from ssl.data.folder import Folder
from ssl.data.jpeg_rows import read_layout
from ssl.data.loader import Loader
from ssl.data.parquet import Parquet
from ssl.data.prepared import Size, store_image, target_size
from ssl.data.views import View
from ssl.prepare import main, register, run
from ssl.prepare_report import next_command
from tests.image_list import jpeg, png
from tests.test_decode import PHOTOS, encode, smooth, with_orientation

FEW = ["short_side=48", "rows_per_group=4", "rows_per_shard=8", "threads=2"]


def prepare(out: Path, *words: str) -> dict:
    register()
    with initialize_config_dir(CONF, version_base="1.3"):
        return run(compose("prepare", overrides=[f"out={out}", *FEW, *words]))


def prepare_folder(root: Path, out: Path, *words: str) -> dict:
    return prepare(out, "data=folder", f"data.root={root}", *words)


def write_photos(root: Path, *folders: str, each: int = 6) -> Path:
    """PNG, JPEG large and JPEG small enough, in turn."""
    large = Embedded("train", size=64, num_train=each * len(folders))
    for place in range(len(large)):
        folder = root / folders[place // each]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(large.read(place))
        data = [png(pixels), jpeg(pixels), jpeg(pixels[:40, :44])][place % 3]
        (folder / f"photo {place}.{['png', 'jpg', 'JPEG'][place % 3]}").write_bytes(data)
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", "train/cat", "train/dog", "val/cat", "val/dog")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Decibels, of uint8 images."""
    error = np.square(ours.astype(float) - theirs.astype(float)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def stored(data: bytes, short_side: int | None = 48, quality: int = 95, channels: int = 3) -> tuple[bytes, str]:
    return store_image(data, decode(data, channels), Size(short_side, quality))


# ---- what is stored of an image --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 128), (48, 64)),
        ((333, 100), (160, 48)),
        ((48, 500), (48, 500)),
        ((20, 30), (20, 30)),
        ((49, 49), (48, 48)),
    ],
)
def test_the_short_side_is_what_was_asked_for_and_never_more_than_it_was(size, expected):
    assert target_size(size, 48) == expected
    assert target_size(size, None) == size


def test_what_is_shrunk_is_pillows_resize_within_what_jpeg_does():
    pixels = smooth(97, 150)
    data, kind = stored(png(pixels))
    theirs = Image.fromarray(pixels).resize((74, 48), Image.Resampling.BICUBIC)
    assert kind == "shrunk"
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    assert psnr(decode(data), np.asarray(theirs)) > 38


def test_a_jpeg_that_is_small_enough_stays_byte_for_byte():
    for data in (jpeg(smooth(40, 60)), encode(Image.fromarray(smooth(40, 60)).convert("L"), "JPEG")):
        assert stored(data) == (data, "copied")
    assert stored(jpeg(smooth(140, 60)), short_side=None)[1] == "copied"


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_jpeg_is_stored_upright(orientation):
    original = with_orientation(Image.fromarray(smooth(40, 30)), "JPEG", orientation)
    data, kind = stored(original)
    assert kind == "converted"
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) is None
    assert psnr(np.asarray(Image.open(io.BytesIO(data))), decode(original)) > 30  # of a wrongly turned one 12 at most


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "I;16"])
def test_other_pixels_become_what_decode_makes_of_them(mode):
    if mode == "I;16":
        original = encode(Image.fromarray(smooth(40, 30)[..., 0].astype(np.uint16) << 8), "PNG")
    else:
        image = Image.fromarray(smooth(40, 30))
        image = image.quantize(200) if mode == "P" else image.convert(mode)
        original = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    data, kind = stored(original)
    assert kind == "converted"
    assert psnr(decode(data), decode(original)) > 28


def test_gray_stays_gray_and_the_same_pixels():
    gray = smooth(40, 60)[..., 0]
    for original in (png(gray), png(np.repeat(gray[..., None], 3, axis=2)), png(smooth(90, 90)[..., 0])):
        data, _ = stored(original)
        assert Image.open(io.BytesIO(data)).mode == "L"
        assert decode(data).shape[2] == 3
    assert psnr(decode(stored(png(gray))[0], 1)[..., 0], gray) > 38


def test_one_channel_makes_every_image_gray():
    data, kind = stored(jpeg(smooth(40, 60)), channels=1)
    assert kind == "converted"
    assert Image.open(io.BytesIO(data)).mode == "L"


@pytest.mark.parametrize("quality", [20, 90, 100])
def test_what_is_encoded_is_baseline_with_a_marker_after_every_row_and_chroma_halved(quality: int):
    noise = np.random.default_rng(0).integers(0, 256, (97, 150, 3), dtype=np.uint8)
    for original, row in ((noise, 16), (noise[..., 0], 8)):
        data, _ = stored(png(original), quality=quality)
        layout = read_layout(data)
        assert layout is not None
        assert (layout.height, layout.width) == (48, 74)
        assert (layout.row, layout.rows_per_restart) == (row, 1)
        image = Image.open(io.BytesIO(data))
        assert "progressive" not in image.info
        assert get_sampling(image) == (2 if row == 16 else -1)  # 4:2:0; gray has none


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_shards_hold_every_image_with_its_label_its_class_and_its_path(photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    report = prepare_folder(photos, out)
    assert sorted(contents(out)) == [f"{split}-0000{k}-of-00002.parquet" for split in ("test", "train") for k in (0, 1)]
    for split in ("train", "test"):
        original, ours = Folder(split, root=photos), Parquet(split, root=out)
        np.testing.assert_array_equal(ours.labels, original.labels)
        assert ours.classes == original.classes == ["cat", "dog"]
        tables = [pq.read_table(path) for path in sorted(out.glob(f"{split}-*"))]
        paths = [
            path
            for table in tables
            for path in pa.chunked_array(table["image"]).combine_chunks().field("path").to_pylist()
        ]
        assert [photos / path for path in paths] == [Path(original.describe(index)) for index in range(len(original))]
        for index in range(len(original)):
            pixels = decode(ours.read(index))
            assert pixels.shape[:2] == target_size(decode(original.read(index)).shape[:2], 48)
    counts = report["splits"]["train"]
    assert (counts["stored"], counts["shrunk"], counts["copied"], counts["converted"]) == (12, 8, 4, 0)
    assert counts["bytes_after"] == sum(len(Parquet("train", root=out).read(index)) for index in range(12))
    assert counts["bytes_before"] == sum(path.stat().st_size for path in (photos / "train").rglob("*.*"))
    assert json.loads((out / "report.json").read_text()) == report


def test_row_groups_have_the_stated_number_of_images(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "out", "rows_per_group=5", "rows_per_shard=12")
    metadata = pq.read_metadata(tmp_path / "out" / "train-00000-of-00001.parquet")
    assert [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)] == [5, 5, 2]


def test_shards_are_the_same_bytes_for_any_threads_and_wherever_the_originals_lie(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "one", "threads=1")
    prepare_folder(photos.rename(tmp_path / "moved"), tmp_path / "three", "threads=3")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_originals_are_left_as_they_are(photos: Path, tmp_path: Path):
    def state() -> dict:
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in photos.rglob("*")}

    before = state()
    prepare_folder(photos, tmp_path / "out")
    assert state() == before


def test_images_without_labels_have_no_label_column(tmp_path: Path):
    write_photos(tmp_path / "photos", "any")
    report = prepare_folder(tmp_path / "photos", tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "train-00000-of-00001.parquet").names == ["image"]
    assert list(report["splits"]) == ["train"]
    assert "no labelled test split" in report["notes"][0]


class Labelled(Embedded):
    """Pixels with labels of a kind."""

    def __init__(self, split: str = "train", *, kind: str) -> None:
        super().__init__(split, size=16, num_train=6, num_test=3)
        self.classes = ["a", "b", "c"]
        few = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [-1, -1, -1], [0, 0, 1], [1, 1, 0]])
        self.labels = (few if kind == "several" else np.array([2, -1, 0, 1, 2, 1]))[: len(self)]


def labelled(kind: str) -> list[str]:
    """The words that name it as the data."""
    without = [f"~data.source.{key}" for key in ("size", "num_train", "num_test", "seed")]
    target = "data.source._target_=tests.test_prepare.Labelled"
    return ["data=embedded", target, *without, f"+data.source.kind={kind}"]


@pytest.mark.parametrize("kind", ["one", "several"])
def test_labels_that_are_missing_or_several_come_back(tmp_path: Path, kind: str):
    prepare(tmp_path, *labelled(kind))
    for split in ("train", "test"):
        ours = Parquet(split, root=tmp_path)
        np.testing.assert_array_equal(ours.labels, Labelled(split, kind=kind).labels)
        assert ours.classes == ["a", "b", "c"]


def test_a_prepared_set_can_be_prepared_again(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "one")
    report = prepare(tmp_path / "two", "data=parquet", f"data.root={tmp_path / 'one'}", "short_side=null")
    assert report["splits"]["train"]["copied"] == 12
    first, second = Parquet("train", root=tmp_path / "one"), Parquet("train", root=tmp_path / "two")
    assert [first.read(k) for k in range(12)] == [second.read(k) for k in range(12)]


@pytest.mark.parametrize("kind", ["one", "several"])
def test_hugging_face_reads_images_names_and_paths(photos: Path, tmp_path: Path, kind: str, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    if kind == "one":
        prepare_folder(photos, out)
    else:
        prepare(out, *labelled(kind))
    theirs = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "test"):
        ours = Parquet(split, root=out)
        assert len(theirs[split]) == len(ours)
        for index in range(len(ours)):
            row = theirs[split][index]
            np.testing.assert_array_equal(np.asarray(row["image"].convert("RGB")), decode(ours.read(index)))
            if kind == "one":
                assert row["label"] == ours.labels[index]
            elif row["labels"] is not None:
                np.testing.assert_array_equal(np.flatnonzero(ours.labels[index] == 1), row["labels"])
    if kind == "one":
        assert theirs["train"].features["label"].names == ["cat", "dog"]
        raw = theirs["train"].cast_column("image", datasets.Image(decode=False))
        assert raw[0]["image"]["path"] == "train/cat/photo 0.png"
    else:
        assert theirs["train"].features["labels"].feature.names == ["a", "b", "c"]


# ---- views -----------------------------------------------------------------------------------------------------------


def views_of(source, size: int) -> np.ndarray:
    view = View(crop="random_resized", scale=(0.2, 1.0), flip=0.5)
    loader = Loader(source, [view], size=(size, size), channels=3, seed=0, threads=1, in_memory_gib=0)
    return next(loader.sequential(batch_size=8))["crops"][0].numpy()  # (B, 3, h, w)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not there")
def test_views_of_prepared_photos_are_those_of_the_originals_within_what_recompression_does(tmp_path: Path):
    """A crop's box is rounded to pixels of either image, and a crop below 224 pixels is enlarged: some detail goes."""
    for path in sorted(PHOTOS.iterdir())[:8]:
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    prepare_folder(tmp_path / "photos", tmp_path / "out", "short_side=256")
    original = views_of(Folder("train", root=tmp_path / "photos"), 224)
    ours = views_of(Parquet("train", root=tmp_path / "out"), 224)
    near = [psnr(one, other) for one, other in zip(ours, original)]
    others = [psnr(one, other) for one, other in zip(ours, np.roll(original, 1, axis=0))]
    assert min(near) > 19
    assert np.median(near) > 26
    assert max(others) < 16


# ---- stopped and started again ---------------------------------------------------------------------------------------


class Stopping(Embedded):
    """Ctrl-C at an image, until a file says otherwise."""

    def __init__(self, split: str = "train", *, num_train: int, at: int, unless: str) -> None:
        super().__init__(split, size=16, num_train=num_train, num_test=1)
        self.at, self.unless = at, Path(unless)

    def read(self, index: int) -> np.ndarray:
        if index == self.at and not self.unless.exists():
            raise KeyboardInterrupt
        return super().read(index)


def test_ctrl_c_leaves_whole_shards_and_the_same_command_goes_on(tmp_path: Path):
    source = "data.source._target_=tests.test_prepare.Stopping"
    words = ["data=embedded", source, "~data.source.size", "~data.source.num_test", "~data.source.seed", "split=train"]
    words += ["data.source.num_train=20", "+data.source.at=12", f"+data.source.unless={tmp_path / 'go on'}"]
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-00000-of-00003.parquet"]
    first = (tmp_path / "out" / "train-00000-of-00003.parquet").stat().st_mtime_ns
    (tmp_path / "go on").touch()
    report = prepare(tmp_path / "out", *words)
    assert report["images_now"] == 12
    assert report["splits"]["train"]["stored"] == 20
    assert (tmp_path / "out" / "train-00000-of-00003.parquet").stat().st_mtime_ns == first
    prepare(tmp_path / "at once", *words)
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_what_a_killed_run_left_is_removed_and_a_complete_one_changes_nothing(photos: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    before = prepare_folder(photos, out)
    (out / ".partial-1-train-00001-of-00002.parquet").write_bytes(b"half")
    report = json.loads((out / "report.json").read_text())
    capsys.readouterr()
    prepare_folder(photos, out)
    assert "everything was there already" in capsys.readouterr().out
    assert not list(out.glob(".partial*"))
    assert json.loads((out / "report.json").read_text()) == report == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["short_side=40"], r"short_side: 48 -> 40\nGive another out="),
        (["quality=80", "rows_per_group=3"], r"quality: 90 -> 80\n  rows_per_group: 4 -> 3"),
        (["data.channels=1"], "data.channels: 3 -> 1"),
        (["data.limit=10"], "num_images: 12 -> 10"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_with_the_difference(photos, tmp_path, words, message):
    prepare_folder(photos, tmp_path / "out", "split=train")
    with pytest.raises(ValueError, match=message):
        prepare_folder(photos, tmp_path / "out", "split=train", *words)


def test_other_images_or_labels_in_the_same_folder_are_refused(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "out", "split=train")
    (photos / "train" / "dog").rename(photos / "train" / "wolf")
    with pytest.raises(ValueError, match="labels: "):
        prepare_folder(photos, tmp_path / "out", "split=train")


def test_a_split_can_be_prepared_after_the_other(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "apart", "split=train")
    report = prepare_folder(photos, tmp_path / "apart", "split=test")
    prepare_folder(photos, tmp_path / "at once")
    assert contents(tmp_path / "apart") == contents(tmp_path / "at once")
    assert {split: found["stored"] for split, found in report["splits"].items()} == {"train": 12, "test": 12}


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_skipped_files_are_told_with_the_reason(photos: Path, tmp_path: Path, capsys):
    (photos / "train" / "cat" / "photo 0.png").write_bytes(b"not an image")
    (photos / "train" / "dog" / "photo 7.jpg").write_bytes(jpeg(smooth(90, 90))[:-600])
    report = prepare_folder(photos, tmp_path / "out", "data.max_bad_fraction=0.5")
    (first, why), (second, other) = report["splits"]["train"]["skipped"]
    assert (first, second) == ("train/cat/photo 0.png", "train/dog/photo 7.jpg")
    assert "not an image" in why
    assert "0x" not in why  # an address would make each run's shards differ
    assert "truncated" in other
    assert "skipped, because they cannot be decoded: 2\n  train/cat/photo 0.png: no image" in capsys.readouterr().out
    ours, original = Parquet("train", root=tmp_path / "out"), Folder("train", root=photos)
    np.testing.assert_array_equal(ours.labels, np.delete(original.labels, [0, 7]))


def test_too_many_bad_images_stop_the_command_and_leave_no_shard(photos: Path, tmp_path: Path):
    for path in (photos / "train" / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"of 12 images .* data.max_bad_fraction=0.25 allows") as error:
        prepare_folder(photos, tmp_path / "out", "data.max_bad_fraction=0.25")
    assert "train/cat/photo 0.png: the file is empty" in str(error.value)
    assert not list((tmp_path / "out").iterdir())
    for path in photos.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 12 images"):
        prepare_folder(photos, tmp_path / "out", "data.max_bad_fraction=1")


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses files that grow beyond 6,000 bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_ends_in_words_and_leaves_nothing_half_written(tmp_path, small_files):
    with pytest.raises(OSError, match=r"train-00000-of-00003.parquet cannot be written .* make room"):
        prepare(tmp_path / "out", "data=embedded", "data.source.num_train=20", "data.source.size=48", "quality=100")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["", "prepared", ".."])
def test_out_among_the_originals_is_refused(photos: Path, place: str):
    with pytest.raises(ValueError, match="lie in each other"):
        prepare_folder(photos, photos / place)


def test_an_out_that_cannot_be_written_is_refused(photos: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="give another out="):
        prepare_folder(photos, tmp_path / "file" / "out")


def test_a_folder_with_other_parquet_files_is_refused(photos: Path, tmp_path: Path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "other").mkdir()
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "other" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="was not written by this command"):
        prepare_folder(photos, tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quality=0"], "1 to 100; got 0"),
        (["short_side=0"], "null to keep every size; got 0"),
        (["rows_per_group=9"], "rows_per_group=9 is more than rows_per_shard=8"),
        (["threads=0"], "threads must be at least 1"),
        (["data.channels=4"], "1 or 3 channels, got data.channels=4"),
        (["split=test", "data.limit=3"], "no effect with split=test"),
    ],
)
def test_impossible_settings_are_refused_in_words(photos: Path, tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        prepare_folder(photos, tmp_path / "out", *words)


def run_main(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ssl.prepare", *words])
    main()


def test_the_command_prints_what_it_did_and_what_comes_next(photos: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_main(monkeypatch, "data=folder", f"data.root={photos}", f"out={out}", "short_side=48", "threads=1")
    printed = capsys.readouterr().out
    assert "train: 12 images in 1 shard: 8 shrunk to a short side of 48, 4 copied byte for byte" in printed
    assert printed.endswith(f"next: python -m ssl.pretrain data=parquet data.root={out}\n")


@pytest.mark.parametrize(("gib", "setting"), [(7, ""), (9, " data.source.stream=true")])
def test_a_set_that_is_not_held_in_memory_is_streamed(gib: int, setting: str):
    report = {"splits": {"train": {"bytes_after": gib * 2**30}, "test": {"bytes_after": 100}}}
    assert next_command(report, Path("out")) == f"python -m ssl.pretrain data=parquet data.root=out{setting}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=folder", "data.root=/x", "out=/tmp/y", "data.image_size=64"], "data.image_size: without effect here"),
        (["data=checkpoint", "out=/tmp/y"], "data/checkpoint"),
        (["data=embedded"], "this must be given: out=..."),
    ],
)
def test_a_mistake_ends_the_command_with_a_message(words: list[str], message: str, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *words)
    assert end.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "message"), [("nowhere", "nowhere does not exist"), ("*.parquet", "no file matches data.root=")]
)
def test_originals_that_are_not_there_are_told_by_their_source(root: str, message: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", "data=parquet" if "*" in root else "data=folder", f"data.root='{root}'")


def test_files_named_by_a_glob_are_told_apart_by_their_paths(photos: Path, tmp_path: Path):
    prepare_folder(photos, tmp_path / "one", "split=train")
    prepare(tmp_path / "two", "data=parquet", f"data.root='{tmp_path / 'one' / '*-of-*.parquet'}'")
    paths = pq.read_table(tmp_path / "two" / "train-00001-of-00002.parquet")["image"].combine_chunks().field("path")
    assert paths.to_pylist() == [f"train-00001-of-00002.parquet row {row}" for row in range(4)]
