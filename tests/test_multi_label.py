"""Images of several classes: from parquet lists to splits, limits and the commands that refuse them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eval.splits import make_splits
from ssl.data.parquet import Parquet
from ssl.data.sources import UNLABELLED
from ssl.data.subset import limit, split_held_out

LISTS = [[0, 2], [1], None, [], [2], [1, 0]]
HOT = [[1, 0, 1], [0, 1, 0], [-1, -1, -1], [0, 0, 0], [0, 0, 1], [1, 1, 0]]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels, *, feature=None, kind=None) -> Path:
    table = pa.table({"image": [png(i % 256) for i in range(len(labels))], "labels": pa.array(labels, kind)})
    if feature is not None:
        info = {"info": {"features": {"image": {"_type": "Image"}, "labels": feature}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def data(root: Path) -> dict:
    source = {"_target_": "ssl.data.parquet.Parquet", "root": str(root)}
    return {"name": "parquet", "root": str(root), "source": source}


@pytest.mark.parametrize("kind", [None, pa.large_list(pa.int32())])
def test_lists_of_classes_are_read_as_multi_hot_rows(tmp_path, kind):
    source = Parquet(root=write(tmp_path / "train.parquet", LISTS, kind=kind))
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == HOT
    assert source.classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    "feature",
    [
        {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["ant", "bee", "cat", "dog"]}},
        {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["ant", "bee", "cat", "dog"]}},
        [{"_type": "ClassLabel", "names": ["ant", "bee", "cat", "dog"]}],
    ],
)
def test_class_names_of_lists_come_from_the_metadata(tmp_path, feature):
    source = Parquet(root=write(tmp_path / "train.parquet", LISTS, feature=feature))
    assert source.classes == ["ant", "bee", "cat", "dog"]
    assert source.labels.shape == (6, 4)
    assert source.labels[0].tolist() == [1, 0, 1, 0]


def test_lists_of_text_are_numbered_as_train_numbers_them(tmp_path):
    write(tmp_path / "train.parquet", [["sea", "sky"], ["sky"], ["tree"]])
    write(tmp_path / "test.parquet", [["tree", "sky"], []])
    train, test = Parquet(root=tmp_path), Parquet("test", root=tmp_path)
    assert train.classes == test.classes == ["sea", "sky", "tree"]
    assert test.labels.tolist() == [[0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 1], [1, 0, 0]], "row 0 of 'labels' names the class 1 more than once; .* not a 0 or 1 for every"),
        ([[], []], "are all empty"),
        ([[0, None]], "hold nulls"),
        ([[0, -1]], "hold nulls or -1"),
        ([[-3]], "run from -3"),
    ],
)
def test_lists_that_name_no_classes_are_refused(tmp_path, labels, message):
    kind = pa.list_(pa.int64())
    with pytest.raises(ValueError, match=message):
        Parquet(root=write(tmp_path / "train.parquet", labels, kind=kind))


def test_each_class_of_a_multi_label_set_is_held_out_in_proportion():
    generator = np.random.default_rng(0)
    labels = (generator.random((2000, 3)) < [0.6, 0.2, 0.02]).astype(np.int64)
    kept, held_out = split_held_out(labels, 0.25, seed=1)
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(2000))
    assert labels[held_out, 2].sum() == round(labels[:, 2].sum() * 0.25)  # by its rarest class an image counts
    assert np.allclose(labels[held_out].mean(0), labels.mean(0), atol=0.03)


def test_a_limit_keeps_images_of_rare_classes(tmp_path):
    labels = [[0]] * 90 + [[0, 1]] * 6 + [[]] * 4
    source = limit(Parquet(root=write(tmp_path / "train.parquet", labels)), 15, seed=0)
    assert source.labels.shape == (15, 2)
    assert source.labels[:, 1].sum() >= 5


def test_images_without_labels_are_left_out_and_columns_joined_by_name(tmp_path):
    write(tmp_path / "train.parquet", [["sea"], None, ["sky", "sea"], []])
    write(tmp_path / "test.parquet", [["sky"], ["sea"], None])
    splits = make_splits(data(tmp_path), own=False, seed=0, command="eval.x", multi_label=True)
    assert splits.multi_label
    assert (len(splits.train), len(splits.test)) == (3, 2)
    assert not (splits.train.labels == UNLABELLED).any()

    joined = splits.in_classes_of_train(torch.from_numpy(splits.test.labels))
    assert joined.tolist() == [[0, 1], [1, 0]]


def test_columns_of_test_follow_the_class_numbers_of_train(tmp_path):
    def named(*names: str) -> list:
        return [{"_type": "ClassLabel", "names": list(names)}]

    write(tmp_path / "train.parquet", [[0], [1, 2]], feature=named("a", "b", "c"))
    write(tmp_path / "test.parquet", [[0], [0, 1]], feature=named("c", "a", "unused"))
    splits = make_splits(data(tmp_path), own=False, seed=0, command="eval.x", multi_label=True)

    joined = splits.in_classes_of_train(torch.from_numpy(splits.test.labels))
    assert joined.tolist() == [[0, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize(
    ("train", "test", "multi_label", "message"),
    [
        ([[0], [1]], [[0]], False, "eval.x needs one class per image.*eval.linear_probe, which reports mAP"),
        ([[0], [0]], [[0]], True, "each class is that of all images or of none"),
        ([[0], [1]], [[2]], True, r"1 classes of test are not in train \(2\)"),
        ([[0], [1]], [0], True, "one of train and test names several classes per image"),
    ],
)
def test_multi_label_splits_that_cannot_be_judged_are_refused(tmp_path, train, test, multi_label, message):
    write(tmp_path / "train.parquet", train)
    write(tmp_path / "test.parquet", test)
    with pytest.raises(ValueError, match=message):
        make_splits(data(tmp_path), own=False, seed=0, command="eval.x", multi_label=multi_label)
