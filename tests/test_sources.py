"""Folders, parquet tables, torchvision's sets and subsets, on files written here; bad input by its message."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from ssl.data.decode import decode
from ssl.data.embedded import Embedded
from ssl.data.folder import Folder
from ssl.data.parquet import Parquet
from ssl.data.subset import Subset, limit, split_held_out
from ssl.data.torchvision_sets import cifar10, cifar100, imagenet, stl10

CONF = Path(__file__).resolve().parents[1] / "conf" / "data"
CIFAR10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(value: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(root: Path, *names: str) -> Path:
    """Files below `root`; the n-th picture is of the gray level n."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def values(source) -> list[int]:
    return [int(decode(source.read(i), 3)[0, 0, 0]) for i in range(len(source))]


def write_parquet(
    path: Path, levels, labels=None, *, names=None, column="image", struct=True, label="label", **options
):
    images = [png(level) for level in levels]
    if struct:
        images = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)], HUGGING_FACE)
    table = {column: images} | ({label: labels} if labels is not None else {})
    table = pa.table(table)
    if names is not None:
        info = {"info": {"features": {column: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


# Folders


def test_a_heap_of_images_is_unlabelled_and_other_files_are_counted(tmp_path):
    write_images(tmp_path, "b.png", "deep/er/a.PNG", "a.png", ".hidden.png", ".cache/c.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deep" / "labels.csv").write_text("no image")
    source = Folder(root=tmp_path)
    assert [Path(source.describe(i)).relative_to(tmp_path).as_posix() for i in range(3)] == [
        "a.png",
        "b.png",
        "deep/er/a.PNG",
    ]
    assert values(source) == [2, 0, 1]
    assert source.num_ignored == 2
    assert source.classes is None
    assert source.labels.tolist() == [-1, -1, -1]
    assert source.labels.dtype == np.int64


def test_files_are_never_classes(tmp_path):
    source = Folder(root=write_images(tmp_path, *(f"{i}.png" for i in range(20)), "one_folder/x.png"))
    assert source.classes is None


def test_images_in_two_or_more_folders_and_none_beside_them_are_labelled(tmp_path):
    write_images(tmp_path, "cat/1.png", "dog/1.png", "dog/sub/2.png", "ant/x.png")
    (tmp_path / "empty").mkdir()
    source = Folder(root=tmp_path)
    assert source.classes == ["ant", "cat", "dog"]
    assert source.labels.tolist() == [0, 1, 2, 2]
    with pytest.raises(ValueError, match=r"no labelled test split.*holds the folders ant, cat, dog, empty; wanted is"):
        Folder("test", root=tmp_path)


def test_one_class_folder_is_unlabelled(tmp_path):
    assert Folder(root=write_images(tmp_path, "photos/1.png", "photos/2.png")).classes is None


@pytest.mark.parametrize("test_folder", ["test", "val", "validation"])
def test_split_folders_are_numbered_alike(tmp_path, test_folder):
    write_images(
        tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", f"{test_folder}/b/1.png", f"{test_folder}/c/1.png"
    )
    train, test = Folder(root=tmp_path), Folder("test", root=tmp_path)
    assert train.classes == test.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [1, 2]
    assert values(test) == [3, 4]


def test_an_unlabelled_test_folder_beside_a_labelled_val_is_passed_over(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png", "val/a/1.png", "val/b/1.png")
    assert values(Folder("test", root=tmp_path)) == [3, 4]


def test_a_test_folder_is_never_trained_on(tmp_path):
    write_images(tmp_path, "a/1.png", "b/1.png", "test/a/1.png", "test/b/1.png")
    train = Folder(root=tmp_path)
    assert values(train) == [0, 1]
    assert train.classes == ["a", "b"]
    assert values(Folder("test", root=tmp_path)) == [2, 3]


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "data", "a/1.png", "b/2.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    outside = write_images(tmp_path / "outside", "3.png")
    (tmp_path / "data" / "d").symlink_to(outside)
    source = Folder(root=tmp_path / "data")
    assert sorted(Path(source.describe(i)).name for i in range(len(source))) == ["1.png", "2.png", "3.png"]
    assert source.num_ignored == 1


def test_order_does_not_depend_on_the_file_system(tmp_path):
    names = [f"{folder}/{number}.png" for folder in "cab" for number in (3, 1, 2)]
    first = Folder(root=write_images(tmp_path / "x", *names))
    second = Folder(root=write_images(tmp_path / "y", *sorted(names)))
    relative = [[os.path.relpath(s.describe(i), s.folder) for i in range(len(s))] for s in (first, second)]
    assert relative[0] == relative[1] == sorted(names)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", "is empty"),
        (["a.txt", "b/c.mp4"], "train", "holds no images: 2 files, none of which ends in .bmp"),
        (["1.png"], "test", "no labelled test split in .*: it holds no folders; wanted is .*/test/<class>/<image>"),
        (["train/a/1.png", "train/b/1.png", "test/1.png"], "test", "test holds no class folders; wanted is"),
        (["train/1.png", "test/a/1.png", "test/b/1.png"], "test", "has class folders .a, b. and .*train has not"),
        (["train/a/1.png", "train/b/1.png", "val/z/1.png"], "test", "classes that .*train lacks: z; .* has a, b"),
        (["test/a/1.png"], "train", "has a test split .* and nothing to train on"),
        (["a.png"], "val", "split must be one of train, test, got 'val'"),
    ],
)
def test_folder_that_does_not_fit_says_what_is_wanted(tmp_path, files, split, message):
    write_images(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        Folder(split, root=tmp_path)


@pytest.mark.parametrize("source", [Folder, Parquet, cifar10, stl10, imagenet])
def test_wrong_path_names_the_nearest_folder(tmp_path, source):
    with pytest.raises(ValueError, match=f"data.root=.*does not exist; the nearest folder that does is {tmp_path}$"):
        source(root=tmp_path / "nowhere" / "at_all")


def test_file_instead_of_a_folder_is_named(tmp_path):
    write_images(tmp_path, "1.png")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        Folder(root=tmp_path / "1.png")


# Parquet


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("layout", ["{}.parquet", "data/{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_hugging_face_layouts_are_read(tmp_path, layout, struct):
    options = {"names": ["cat", "dog"], "struct": struct}
    write_parquet(tmp_path / layout.format("train"), [3, 1, 2], [1, 0, 1], **options)
    write_parquet(tmp_path / layout.format("test"), [7, 8], [0, 1], **options)
    train, test = Parquet(root=tmp_path), Parquet("test", root=tmp_path)
    assert values(train) == [3, 1, 2]
    assert values(test) == [7, 8]
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [1, 0, 1]
    assert train.labels.dtype == np.int64


def test_many_files_and_row_groups_are_one_table(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(7), list(range(7)), row_group_size=3)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(7, 12), list(range(7, 12)), row_group_size=2)
    for held_gib in (1.0, 0.0):  # with no room every group is read again
        source = Parquet(root=tmp_path, held_gib=held_gib)
        assert values(source) == list(range(12))
        assert [int(decode(source.read(i), 1)[0, 0, 0]) for i in (11, 0, 6, 7, 3)] == [11, 0, 6, 7, 3]
        assert source.labels.tolist() == list(range(12))
    assert source.describe(9) == f"{tmp_path / 'train-00001-of-00002.parquet'} row 2"


def test_a_set_that_may_not_be_held_warns(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", range(4))
    Parquet(root=tmp_path, held_gib=0.0)
    assert "slow in random order" in caplog.text


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0], [0])
    write_parquet(tmp_path / "validation.parquet", [5], [0])
    assert values(Parquet("test", root=tmp_path)) == [5]


def test_an_unlabelled_test_split_beside_a_labelled_validation_is_passed_over(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1], [0, 1])
    write_parquet(tmp_path / "test.parquet", [4], [-1])
    write_parquet(tmp_path / "validation.parquet", [5], [1])
    assert values(Parquet("test", root=tmp_path)) == [5]


def test_globs_and_single_files_are_train_where_no_name_tells(tmp_path):
    write_parquet(tmp_path / "part-0.parquet", [4])
    write_parquet(tmp_path / "part-1.parquet", [5])
    write_parquet(tmp_path / "other.parquet", [6])
    write_parquet(tmp_path / "trainees.parquet", [7])
    assert values(Parquet(root=tmp_path / "part-*.parquet")) == [4, 5]
    assert values(Parquet(root=tmp_path / "other.parquet")) == [6]
    assert values(Parquet(root=tmp_path)) == [6, 4, 5, 7]
    assert Parquet(root=tmp_path).classes is None
    with pytest.raises(ValueError, match=r"no test split in .*found other.parquet.*test\*.parquet"):
        Parquet("test", root=tmp_path)


def test_text_labels_are_numbered_as_in_train(tmp_path):
    write_parquet(tmp_path / "train.parquet", [0, 1, 2], ["dog", "ant", None])
    write_parquet(tmp_path / "test.parquet", [3], ["dog"])
    train, test = Parquet(root=tmp_path), Parquet("test", root=tmp_path)
    assert train.classes == test.classes == ["ant", "dog"]
    assert train.labels.tolist() == [1, 0, -1]
    assert test.labels.tolist() == [1]
    write_parquet(tmp_path / "test.parquet", [3], ["bee"])
    with pytest.raises(ValueError, match="train lacks: bee"):
        Parquet("test", root=tmp_path)


def test_columns_can_be_chosen(tmp_path):
    table = pa.table({"id": [8, 9], "thumb": [png(1), png(2)], "full": [png(3), png(4)], "kind": [1, 0]})
    pq.write_table(table, tmp_path / "train.parquet")
    assert values(Parquet(root=tmp_path)) == [1, 2]
    assert Parquet(root=tmp_path).classes is None  # an id is no label
    source = Parquet(root=tmp_path, image_column="full", label_column="kind")
    assert values(source) == [3, 4]
    assert source.labels.tolist() == [1, 0]
    assert source.classes == ["0", "1"]
    with pytest.raises(ValueError, match=r"no column 'id' of image bytes; its columns: id \(int64\), thumb \(binary\)"):
        Parquet(root=tmp_path, image_column="id")
    with pytest.raises(ValueError, match="no column 'thumb' of integer or text labels"):
        Parquet(root=tmp_path, label_column="thumb")


def test_row_without_an_image_is_undecodable_not_fatal(tmp_path):
    images = pa.array([{"bytes": png(1), "path": "a"}, {"bytes": None, "path": "b"}, None], HUGGING_FACE)
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    source = Parquet(root=tmp_path)
    assert [len(source.read(i)) > 0 for i in range(3)] == [True, False, False]
    with pytest.raises(ValueError, match="empty"):
        decode(source.read(1), 3)


def test_table_without_images_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no image column.*text \(string\), label \(int64\)"):
        Parquet(root=tmp_path)


def test_truncated_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", range(5))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train.parquet cannot be read as parquet, it is truncated"):
        Parquet(root=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        Parquet(root=tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": [png(0)], "label": [None]}, "has no labels; its columns"),
        ({"image": [png(0)]}, "has no labels; its columns: image"),
        ({"image": [png(0)], "label": [-5]}, "run from -5 to -5, allowed are -1"),
        ({"image": pa.array([], pa.binary())}, "has no rows"),
    ],
)
def test_test_table_that_does_not_fit_says_why(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=message):
        Parquet("test", root=tmp_path)


def test_folder_without_tables_points_to_folders(tmp_path):
    with pytest.raises(ValueError, match="data=folder"):
        Parquet(root=write_images(tmp_path, "1.png"))
    with pytest.raises(ValueError, match="no file matches"):
        Parquet(root=tmp_path / "*.parquet")


# torchvision's sets


def write_cifar10(root: Path) -> None:
    """CIFAR-10's files as the authors ship them, one image per batch; the checksums cannot agree."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.arange(3072, dtype=np.uint8)[None] + np.uint8(number)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar10_is_read_as_pixels(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold cifar10 whole.*data.source.download=true"):
        cifar10(root=tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, test = cifar10(root=tmp_path), cifar10("test", root=tmp_path)
    assert (len(train), len(test)) == (5, 1)
    assert train.labels.tolist() == [0, 1, 2, 3, 4]
    assert train.classes == list("abcdefghij")
    planes = (np.arange(3072, dtype=np.uint8) + np.uint8(2)).reshape(3, 32, 32)
    np.testing.assert_array_equal(train.read(2), planes.transpose(1, 2, 0))
    assert test.describe(0) == "cifar10 (test) image 0"


def test_stl10_trains_on_all_or_on_the_labelled_images(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 2), ("unlabeled", 3), ("test", 1)):
        np.arange(count * 3 * 96 * 96, dtype=np.int64).astype(np.uint8).tofile(folder / f"{name}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    source = stl10(root=tmp_path)
    assert source.labels.tolist() == [0, 1, -1, -1, -1]
    assert source.read(4).shape == (96, 96, 3)
    assert source.read(4).flags.c_contiguous
    assert stl10(root=tmp_path, labeled=True).labels.tolist() == [0, 1]
    assert stl10("test", root=tmp_path).labels.tolist() == [0]


@pytest.mark.parametrize("source", [cifar10, cifar100, stl10])
def test_missing_set_says_how_to_download_it(tmp_path, source):
    with pytest.raises(ValueError, match=rf"download it once with data={source.__name__} .*data.source.download=true"):
        source(root=tmp_path)


def test_imagenet_takes_names_from_torchvisions_meta_file(tmp_path):
    write_images(
        tmp_path, "train/n01440764/1.png", "train/n02007558/1.png", "val/n01440764/2.png", "val/n02007558/2.png"
    )
    assert imagenet(root=tmp_path).classes == ["n01440764", "n02007558"]
    torch.save(({"n01440764": ("tench", "Tinca tinca"), "n02007558": ("flamingo",)}, []), tmp_path / "meta.bin")
    test = imagenet("test", root=tmp_path)
    assert test.classes == ["tench, Tinca tinca", "flamingo"]
    assert test.labels.tolist() == [0, 1]
    assert values(test) == [2, 3]


@pytest.mark.parametrize("source", [cifar10, cifar100, stl10, imagenet])
def test_root_with_parquet_files_is_read_as_parquet(tmp_path, source):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [3, 1], [1, 0])
    assert values(source(root=tmp_path)) == [3, 1]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="needs ../shared/data/cifar10")
def test_real_cifar10_from_parquet():
    train, test = cifar10(root=CIFAR10), cifar10("test", root=CIFAR10)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.classes == test.classes
    assert train.classes[0] == "airplane"
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    table = pq.read_table(CIFAR10 / "test.parquet")
    for row in (0, 4999, 5000, 9999):
        assert test.read(row) == table["image"][row]["bytes"].as_py()
        assert test.labels[row] == table["label"][row].as_py()
        assert decode(test.read(row), 3).shape == (32, 32, 3)


# Subsets


def test_limit_is_seeded_balanced_and_nested():
    source = Embedded(num_train=240)
    some = limit(source, 60, seed=3)
    assert np.bincount(some.labels).tolist() == [5] * 12
    assert some.classes == source.classes
    np.testing.assert_array_equal(some.read(7), source.read(some.indices[7]))
    assert some.describe(7) == source.describe(some.indices[7])
    np.testing.assert_array_equal(some.indices, limit(source, 60, seed=3).indices)
    assert (some.indices != limit(source, 60, seed=4).indices).any()
    assert set(limit(source, 30, seed=3).indices) <= set(some.indices)
    assert limit(source, None) is source
    assert limit(source, 240) is source


def test_limit_of_an_unlabelled_source_is_a_random_part(tmp_path):
    source = Folder(root=write_images(tmp_path, *(f"{i:02}.png" for i in range(40))))
    indices = limit(source, 10, seed=0).indices
    assert len(set(indices)) == 10
    assert indices.max() > 10


def test_held_out_slice_is_stratified_disjoint_and_seeded():
    labels = np.repeat([0, 1, 2, 7], [100, 50, 3, 1])
    kept, held_out = split_held_out(labels, 0.1, seed=0)
    assert sorted([*kept, *held_out]) == list(range(154))
    assert [int((labels[held_out] == label).sum()) for label in (0, 1, 2, 7)] == [10, 5, 1, 0]
    np.testing.assert_array_equal(held_out, split_held_out(labels, 0.1, seed=0)[1])
    assert (held_out != split_held_out(labels, 0.1, seed=1)[1]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limit(Embedded(num_train=12), 0), "data.limit must be at least 1 image, got 0"),
        (lambda: Subset(Embedded(num_train=12), np.array([3, 12])), r"must lie in 0..11, got 3..12"),
        (lambda: Subset(Embedded(num_train=12), np.array([], np.int64)), "at least one index"),
        (lambda: split_held_out(np.zeros(9), 1.5, 0), "between 0 and 1, got 1.5"),
        (lambda: split_held_out(np.arange(9), 0.5, 0), "at least one class needs two images"),
    ],
)
def test_bad_subsets_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Configuration


@pytest.mark.parametrize("name", ["folder", "parquet", "cifar10", "cifar100", "stl10", "imagenet"])
def test_every_data_file_builds_its_source(tmp_path, name):
    if name == "folder":
        write_images(tmp_path, "1.png", "2.png")
    else:
        write_parquet(tmp_path / "train.parquet", [0, 1])
    node = OmegaConf.load(CONF / f"{name}.yaml")
    node.root = str(tmp_path)
    source = instantiate(OmegaConf.create({"data": node}).data.source, split="train")
    assert values(source) == [0, 1]
    assert node.name == name
