"""`python -m eval.features`: what it writes of which image, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from eval import features
from eval.config import register
from eval.feature_files import FeatureFolder, Piece, Rows
from eval.subject import read_features
from ssl.config import CONF
from tests.image_list import ImageList
from tests.run_folder import write_images, write_run

QUICK = ["device=cpu", "precision=fp32", "threads=1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Baselines write below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", num_train=50, num_test=24)


def config_of(name: str, schema: type, *words: str):
    register(schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, overrides=[*words, *QUICK])


def call(*words: str) -> dict:
    """What the command does with these words, in this process."""
    return features.run(config_of("features", features.FeaturesConfig, *words))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def written(folder: Path) -> dict[str, int]:
    """When each piece was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").glob("t*.parquet")}


# ---- what is written -----------------------------------------------------------------------------------------------


def test_pieces_hold_the_features_that_evaluations_read(a_run, tmp_path):
    call(f"ckpt={a_run}", f"out={tmp_path}/f", "rows_per_piece=20", "batch_size=8")
    judged = read_features(config_of("features", features.FeaturesConfig, f"ckpt={a_run}"), command="x")
    names = ["test-00000", "test-00001", "train-00000", "train-00001", "train-00002"]
    assert list(contents(tmp_path / "f")) == [f"{name}.parquet" for name in names]
    for split in ("train", "test"):
        expected = getattr(judged, split)
        tables = [pq.read_table(tmp_path / "f" / "data" / f"{name}.parquet") for name in names if split in name]
        rows = [row for table in tables for row in table.to_pylist()]
        assert [row["index"] for row in rows] == expected.index.tolist()
        assert [row["label"] for row in rows] == expected.labels.tolist()
        assert [row["class"] for row in rows] == [judged.splits.classes[label] for label in expected.labels]
        found = np.array([row["features"] for row in rows], np.float32)
        np.testing.assert_allclose(found, expected.features.numpy(), rtol=1e-5, atol=1e-6)  # batches differ


def test_features_are_a_column_of_lists_of_fixed_size(a_run, tmp_path):
    call(f"ckpt={a_run}", f"out={tmp_path}/f", "split=test")
    schema = pq.read_schema(tmp_path / "f" / "data" / "test-00000.parquet")
    kind = schema.field("features").type
    assert (pa.types.is_fixed_size_list(kind), kind.list_size, kind.value_type) == (True, 16, pa.float32())
    whole = pq.read_table(tmp_path / "f" / "data")  # as pandas.read_parquet reads a folder
    assert whole.num_rows == 24


def test_npy_pieces_are_the_parquet_ones(a_run, tmp_path):
    call(f"ckpt={a_run}", f"out={tmp_path}/p", "rows_per_piece=30")
    call(f"ckpt={a_run}", f"out={tmp_path}/n", "rows_per_piece=30", "format=npy")
    for path in (tmp_path / "p" / "data").glob("*.parquet"):
        rows = pq.read_table(path).to_pylist()
        stem = tmp_path / "n" / "data" / path.stem
        loaded = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, np.array([row["features"] for row in rows], np.float32))
        with stem.with_suffix(".csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert [(int(row["index"]), row["class"], row["path"]) for row in table] == [
            (row["index"], row["class"], row["path"]) for row in rows
        ]


def test_meta_carries_the_protocol_and_the_pieces(a_run, tmp_path):
    call(f"ckpt={a_run}", f"out={tmp_path}/f", "rows_per_piece=20")
    meta = json.loads((tmp_path / "f" / "meta.json").read_text())
    protocol = meta["protocol"]
    assert meta["complete"]
    assert protocol["checkpoint"]["step"] == 12
    assert protocol["features"]["image_size"] == [32, 32]
    assert protocol["data"]["splits"]["train"]["num"] == 50
    assert protocol["versions"]
    assert protocol["commit"] is None or len(protocol["commit"]) >= 40
    assert [piece["rows"] for piece in meta["pieces"]] == [20, 20, 10, 20, 4]


def test_unlabelled_images_have_no_label_and_need_no_test_split(a_run, tmp_path):
    write_images(tmp_path / "photos", "all", each=5)
    meta = call(f"ckpt={a_run}", "data=folder", f"data.root={tmp_path}/photos", f"out={tmp_path}/f")
    rows = pq.read_table(tmp_path / "f" / "data").to_pylist()
    assert [row["path"] for row in rows] == [f"{tmp_path}/photos/all/{number}.png" for number in range(5)]
    assert {(row["label"], row["class"], row["split"]) for row in rows} == {(None, None, "train")}
    assert len(meta["pieces"]) == 1


def test_images_may_be_named_by_a_glob(a_run, tmp_path):
    write_images(tmp_path / "photos", "a", "b")
    call(f"ckpt={a_run}", f"images='{tmp_path}/photos/*/[01].png'", f"out={tmp_path}/f")
    paths = pq.read_table(tmp_path / "f" / "data").column("path").to_pylist()
    assert [path.removeprefix(f"{tmp_path}/photos/") for path in paths] == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_a_limit_keeps_the_images_own_numbers(a_run, tmp_path):
    call(f"ckpt={a_run}", "data.limit=10", "split=train", f"out={tmp_path}/few")
    call(f"ckpt={a_run}", "split=train", f"out={tmp_path}/all")
    few = pq.read_table(tmp_path / "few" / "data").to_pylist()
    every = {row["index"]: row for row in pq.read_table(tmp_path / "all" / "data").to_pylist()}
    assert len(few) == 10
    for row in few:
        assert row["path"] == every[row["index"]]["path"]
        np.testing.assert_allclose(row["features"], every[row["index"]]["features"], rtol=1e-5, atol=1e-6)


def test_images_that_cannot_be_decoded_are_left_out_and_named(a_run, tmp_path, capsys):
    root = write_images(tmp_path / "photos", "a", each=4)
    (root / "a" / "1.png").write_bytes(b"no picture")
    meta = call(f"ckpt={a_run}", f"images={root}", f"out={tmp_path}/f", "rows_per_piece=2")
    assert [piece["rows"] for piece in meta["pieces"]] == [1, 2]
    assert len(meta["undecodable"]) == 1
    assert f"{root}/a/1.png: " in meta["undecodable"][0]
    assert f"{root}/a/1.png: " in capsys.readouterr().out


def test_several_labels_are_lists():
    source = ImageList([np.zeros((4, 4, 3), np.uint8)] * 3)
    source.labels, source.classes = np.array([[1, 0, 1], [0, 0, 0], [-1, -1, -1]]), ["ant", "bee", "cat"]
    rows = Rows()
    rows.add(source, "train", np.array([0, 1, 2]))
    assert rows.label == [[0, 2], [], None]
    assert rows.classes == [["ant", "cat"], [], None]


def test_several_labels_are_written_as_lists(tmp_path):
    folder = FeatureFolder(tmp_path, recipe={}, protocol={}, overwrite=False)
    rows = Rows([0, 1], ["train"] * 2, ["a", "b"], [[0, 2], None], [["ant", "cat"], None])
    for name in ("data/train-00000.parquet", "data/train-00000.csv"):
        folder.write(Piece("train", 0, 2, [name]), rows, np.ones((2, 3), np.float32), [])
    found = pq.read_table(tmp_path / "data" / "train-00000.parquet").to_pylist()
    assert [(row["label"], row["class"]) for row in found] == [([0, 2], ["ant", "cat"]), (None, None)]
    assert "0|2,ant|cat" in (tmp_path / "data" / "train-00000.csv").read_text()


# ---- going on ------------------------------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on_to_the_same_bytes(a_run, tmp_path, monkeypatch, capsys):
    words = [f"ckpt={a_run}", "rows_per_piece=10"]
    call(*words, f"out={tmp_path}/whole")
    write, calls = FeatureFolder.write, []

    def interrupted(self, piece, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(piece)
        write(self, piece, *rest)

    monkeypatch.setattr(FeatureFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(*words, f"out={tmp_path}/parts")
    monkeypatch.setattr(FeatureFolder, "write", write)
    assert not json.loads((tmp_path / "parts" / "meta.json").read_text())["complete"]
    (tmp_path / "parts" / "data" / ".partial_train-00003.parquet").write_bytes(b"half")
    before = written(tmp_path / "parts")
    assert len(before) == 3
    call(*words, f"out={tmp_path}/parts")
    assert "3 of 8 pieces are there already" in capsys.readouterr().out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert before.items() <= written(tmp_path / "parts").items()  # these were not made again


def test_a_piece_that_was_removed_or_cut_is_made_again(a_run, tmp_path):
    words = [f"ckpt={a_run}", "rows_per_piece=20", f"out={tmp_path}/f"]
    call(*words)
    whole = contents(tmp_path / "f")
    (tmp_path / "f" / "data" / "train-00001.parquet").unlink()
    (tmp_path / "f" / "data" / "test-00000.parquet").write_bytes(b"cut")
    call(*words)
    assert contents(tmp_path / "f") == whole


def test_another_backbones_features_are_not_mixed_in_unless_told_to_overwrite(a_run, tmp_path):
    other = write_run(tmp_path / "other", seed=1, num_train=20, num_test=12)
    call(f"ckpt={a_run}", f"out={tmp_path}/f", "rows_per_piece=10")
    before = contents(tmp_path / "f")
    words = [f"ckpt={other}", f"out={tmp_path}/f", "rows_per_piece=10"]
    with pytest.raises(ValueError, match="made with another ckpt, data; give another out="):
        call(*words)
    assert contents(tmp_path / "f") == before
    call(*words, "overwrite=true")
    after = contents(tmp_path / "f")
    assert len(after) == 4  # of the others' eight none is left
    assert after["train-00000.parquet"] != before["train-00000.parquet"]


def test_files_of_others_are_never_removed(a_run, tmp_path):
    theirs = tmp_path / "f" / "data" / "theirs.parquet"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no meta\.json speaks of \(theirs\.parquet\)"):
        call(f"ckpt={a_run}", f"out={tmp_path}/f", "overwrite=true")
    assert theirs.exists()


def test_the_default_folder_lies_in_the_run_and_tells_data_and_split_apart(a_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(a_run, run_dir)
    call(f"ckpt={run_dir}")
    call(f"ckpt={run_dir}", "split=test")
    write_images(tmp_path / "photos", "all")
    call(f"ckpt={run_dir}", "data=folder", f"data.root={tmp_path}/photos")
    found = sorted(path.name for path in (run_dir / "eval").iterdir())
    assert found == ["features", "features_folder", "features_test"]


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_nothing_that_can_be_decoded_is_an_error(a_run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"(?s)none of the 1 images could be decoded.*a\.png"):
        call(f"ckpt={a_run}", f"images={tmp_path}/a.png", f"out={tmp_path}/f")


def test_too_many_undecodable_images_of_a_set_are_an_error(a_run, tmp_path):
    root = write_images(tmp_path / "photos", "a", each=4)
    (root / "a" / "1.png").write_bytes(b"no picture")
    words = [f"ckpt={a_run}", "data=folder", f"data.root={root}", f"out={tmp_path}/f"]
    with pytest.raises(ValueError, match=r"1 of 4 images could not be decoded.*max_bad_fraction=0\.01"):
        call(*words)
    assert call(*words, "data.max_bad_fraction=0.5")["complete"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt={run}", "rows_per_piece=0"], "rows_per_piece must be at least 1"),
        (["ckpt={run}", "images=gone/*.png"], "matches nothing"),
        (["ckpt=pixels", "images=."], "images= needs a checkpoint"),
        (["ckpt={run}", "images=.", "split=test"], "have no effect with images="),
        (["ckpt={run}", "name=a", "out=b"], "name=a has no effect with out=b"),
        (["ckpt={run}", "pooling=patches"], "pooling=patches needs a vision transformer"),
        (["ckpt={run}", "layers=all"], "vectors per image"),
        (["ckpt=gone"], "ckpt=gone does not exist"),
        (["ckpt={run}", "fromat=npy"], "did you mean format?"),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(words, message, a_run, monkeypatch, capsys):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.features.py", *(word.format(run=a_run) for word in words), *QUICK])
    with pytest.raises(SystemExit) as end:
        features.main()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert message in said
    assert "Traceback" not in said


def test_without_ckpt_the_ways_to_give_one_are_shown(monkeypatch, capsys):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.features.py"])
    with pytest.raises(SystemExit) as end:
        features.main()
    assert end.value.code == 2
    assert "eval.features needs ckpt=" in capsys.readouterr().err
