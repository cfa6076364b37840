"""`python -m eval.compare`: which results may share a column, and what is said where they may not."""

from __future__ import annotations

import copy
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from eval import compare
from eval.protocols import brief, find_results, identity, protocol_difference, protocol_id
from ssl.tables import Table, metric_columns

KNN = {
    "command": "eval.knn",
    "subject": "runs/a/checkpoints/step_00000100",
    "checkpoint": {"path": "runs/a/checkpoints/step_00000100", "sha256": "aa", "step": 100, "weights": "model"},
    "backbone": {"architecture": "resnet18", "image_size": [32, 32]},
    "pooling": "avg",
    "features": {"dimensions": 512, "precision": "bf16", "crop": "center", "image_size": [32, 32], "mean": [0.5]},
    "data": {"name": "cifar10", "root": "/data", "train": "cifar10 (train)", "num_train": 50000, "num_test": 10000},
    "seed": 0,
    "device": "cpu",
    "feature_seconds": 10.5,
    "commit": "c0ffee",
    "versions": {"torch": "2.15.0", "timm": "1.0.31"},
    "gpu": None,
    "k": [20],
    "temperature": [0.07],
    "metric": "cosine",
    "notes": ["a note"],
    "score_seconds": 1.0,
}


def changed(**changes) -> dict:
    """The protocol with other values; `data__name="x"` changes a part of a part."""
    protocol = copy.deepcopy(KNN)
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = protocol
        for parent in parents:
            node = node[parent]
        node[last] = value
    return protocol


def write(path: Path, protocol: dict, **metrics: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metrics": metrics, "protocol": protocol}))
    return path


def command(monkeypatch, capsys, *words: str, code: int = 0) -> tuple[str, str]:
    """What the command prints on both streams, ending with `code`."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.compare.py", *words])
    if code:
        with pytest.raises(SystemExit) as end:
            compare.main()
        assert end.value.code == code
    else:
        compare.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


# ---- what is one protocol ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": "runs/b", "checkpoint": {"path": "runs/b", "sha256": "bb", "step": 7}},
        {"checkpoint": None, "backbone": None},
        {"backbone": {"architecture": "vit_base"}, "features__dimensions": 768},
        {"features__mean": [0.4]},
        {"seed": 3},
        {"commit": "beef"},
        {"versions": {"torch": "2.11.0"}},
        {"device": "cuda", "gpu": "one"},
        {"feature_seconds": 99.0, "score_seconds": 2.0},
        {"data__root": "/elsewhere", "data__train": "cifar10 at /elsewhere"},
        {"notes": []},
        {"center": None},
        {"choice": {"lr": 0.1}},
        {"date": "2026-01-01"},
        {"recipe": "mae"},
        {"draws_top1": [0.1, 0.2]},
        {"low_shot": {"seeds": [5, 6]}},
        {"weights": "linear_probe.head"},
        {"settings": {"trainer": {"device": "cuda", "pictures": False}}},
    ],
)
def test_another_model_on_another_machine_is_measured_alike(changes):
    assert protocol_difference(KNN, changed(**changes)) == {}
    assert protocol_id(KNN) == protocol_id(changed(**changes))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"k": [200]}, {"k": ([20], [200])}),
        ({"temperature": [0.1]}, {"temperature": ([0.07], [0.1])}),
        ({"metric": "euclidean"}, {"metric": ("cosine", "euclidean")}),
        ({"pooling": "patches"}, {"pooling": ("avg", "patches")}),
        ({"features__crop": "resize"}, {"features.crop": ("center", "resize")}),
        ({"features__image_size": [64, 64]}, {"features.image_size": ([32, 32], [64, 64])}),
        ({"data__name": "stl10"}, {"data.name": ("cifar10", "stl10")}),
        ({"data__num_train": 5000}, {"data.num_train": (50000, 5000)}),
        ({"low_shot": {"train_amount": "1%"}}, {"low_shot.train_amount": (None, "1%")}),
        ({"settings": {"trainer": {"epochs": 50}}}, {"settings.trainer.epochs": (None, 50)}),
        ({"command": "eval.linear_probe"}, {"command": ("eval.knn", "eval.linear_probe")}),
        ({"unheard_of": 1}, {"unheard_of": (None, 1)}),
    ],
)
def test_another_measurement_is_told_by_the_setting_that_differs(changes, difference):
    assert protocol_difference(KNN, changed(**changes)) == difference
    assert protocol_id(KNN) != protocol_id(changed(**changes))


def test_a_grid_is_its_settings_and_not_its_scores():
    def with_grid(lr: float, score: float) -> dict:
        return changed(grid=[{"lr": lr, "held_out_top1": score, "held_out_loss": 1 - score}])

    assert protocol_difference(with_grid(0.1, 0.5), with_grid(0.1, 0.6)) == {}
    assert list(protocol_difference(with_grid(0.1, 0.5), with_grid(0.2, 0.5))) == ["grid"]


def test_the_step_that_early_stopping_chose_is_an_outcome_of_fine_tuning_alone():
    for command, alike in (("eval.finetune", True), ("eval.linear_probe", False)):
        a, b = (changed(command=command, reported=f"the weights of step {step}") for step in (10, 20))
        assert (protocol_difference(a, b) == {}) is alike


def test_layers_are_compared_without_their_dimensions():
    def with_layers(dimensions: int, layer: str) -> dict:
        return changed(features={"sets": [{"layer": layer, "dimensions": dimensions}]})

    assert protocol_difference(with_layers(5, "last"), with_layers(6, "last")) == {}
    assert list(protocol_difference(with_layers(5, "last"), with_layers(5, "3"))) == ["features.sets"]


def test_the_order_of_keys_does_not_make_a_protocol():
    assert protocol_id(dict(reversed(KNN.items()))) == protocol_id(KNN)
    assert "data.num_test" in identity(KNN)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_results_that_were_measured_alike_share_a_table(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a" / "eval" / "knn.json", KNN, top1=0.801, top5=0.9)
    b = write(tmp_path / "b" / "eval" / "knn.json", changed(seed=1, checkpoint__step=200), top1=0.852, top5=0.95)
    out, _ = command(monkeypatch, capsys, str(a), str(b), "strict=true")
    lines = out.splitlines()
    assert lines[0] == f"eval.knn on cifar10 (50,000 train, 10,000 test)  [protocol {protocol_id(KNN)}]"
    assert [line.split() for line in lines[1:4]] == [
        ["result", "step", "top1", "top5"],
        [str(a), "100", "80.1%", "90.0%"],
        [str(b), "200", "85.2%", "95.0%"],
    ]
    assert lines[4:] == ["note: seed differs: 0 | 1"]


def test_other_protocols_get_tables_of_their_own_and_the_difference_is_listed(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", KNN, top1=0.8)
    b = write(tmp_path / "b.json", changed(k=[200], data__num_train=5000), top1=0.7)
    out, _ = command(monkeypatch, capsys, str(a), str(b))
    first, second, differences = out.strip().split("\n\n")
    assert "80.0%" in first
    assert "70.0%" not in first
    assert "70.0%" in second
    lines = differences.splitlines()[1:]
    assert (
        lines[0].strip()
        == f"protocol {protocol_id(changed(k=[200], data__num_train=5000))} and {protocol_id(KNN)}, both eval.knn:"
    )
    assert [line.strip() for line in lines[1:]] == ["data.num_train: 5000 | 50000", "k: [200] | [20]"]


def test_strict_refuses_other_protocols_with_what_differs(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", KNN, top1=0.8)
    b = write(tmp_path / "b.json", changed(temperature=[0.1]), top1=0.7)
    out, err = command(monkeypatch, capsys, str(a), str(b), "strict=true", code=1)
    assert out == ""
    assert "2 results were measured in 2 ways" in err
    assert "temperature: [0.1] | [0.07]" in err


def test_different_evaluations_are_named_and_not_spelled_out(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", KNN, top1=0.8)
    b = write(tmp_path / "b.json", changed(command="eval.linear_probe", steps=7), top1=0.7)
    out, _ = command(monkeypatch, capsys, str(a), str(b))
    assert "evaluations that have nothing in common: eval.knn" in out
    assert "steps" not in out


def test_run_folders_stand_for_their_results(tmp_path, monkeypatch, capsys):
    for name, top1 in (("a", 0.1), ("b", 0.2)):
        write(tmp_path / name / "eval" / "knn.json", KNN, top1=top1)
        write(tmp_path / name / "eval" / "probe.json", changed(command="eval.linear_probe"), top1=top1 + 0.5)
    out, _ = command(monkeypatch, capsys, str(tmp_path / "a"), str(tmp_path / "b" / "eval"))
    tables = out.split("\n\n")
    assert ("10.0%" in tables[0], "20.0%" in tables[0], "60.0%" in tables[0]) == (True, True, False)
    assert ("60.0%" in tables[1], "70.0%" in tables[1]) == (True, True)


def test_what_was_fine_tuned_from_a_run_belongs_to_its_results(tmp_path):
    write(tmp_path / "a" / "eval" / "knn.json", KNN, top1=0.1)
    write(tmp_path / "a" / "finetune" / "mae" / "seed0" / "eval" / "finetune.json", KNN, top1=0.2)
    found = [str(path.relative_to(tmp_path / "a")) for path in find_results(str(tmp_path / "a"))]
    assert found == ["eval/knn.json", "finetune/mae/seed0/eval/finetune.json"]


def test_csv_and_markdown_carry_the_protocol_in_each_row(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a.json", KNN, top1=0.8123456)
    b = write(tmp_path / "b.json", changed(k=[5]), top1=0.7, rank=12.34567)
    out, _ = command(monkeypatch, capsys, str(a), str(b), "format=csv", f"out={tmp_path}/new/table.md")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["protocol"] for row in rows] == [protocol_id(KNN), protocol_id(changed(k=[5]))]
    assert [(row["top1"], row["rank"]) for row in rows] == [("0.8123456", ""), ("0.7", "12.34567")]
    markdown = (tmp_path / "new" / "table.md").read_text().splitlines()
    assert markdown[0] == "| protocol | evaluation | result | step | top1 | rank |"
    assert markdown[3].endswith("| 70.0% | 12.35 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.json"], "gone.json does not exist"),
        (["text.json"], "text.json cannot be read (no JSON"),
        (["list.json"], "list.json is no result of an evaluation"),
        (["other.json"], "other.json is no result of an evaluation"),
        (["empty"], "empty holds no results (eval/*.json)"),
        (["a.json", "strct=true"], "did you mean strict?"),
        (["a.json", "out=a.json/table.md"], "give another out="),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", KNN, top1=0.1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"metrics": {}, "protocol": {}}')
    assert message in command(monkeypatch, capsys, *words, code=1)[1]


def test_without_results_the_ways_to_name_them_are_shown(monkeypatch, capsys):
    assert "eval.compare needs results" in command(monkeypatch, capsys, code=2)[1]


def test_names_with_signs_that_hydra_reads_are_taken_as_names(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "lr=0.1, it's [a] {b}"
    path = write(folder / "knn.json", KNN, top1=0.5)
    assert str(path) in command(monkeypatch, capsys, str(path), "format=markdown")[0]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_table_shows_shares_as_percentages_and_csv_keeps_the_digits():
    table = Table(["name", "top1", "rank", "n"], [["a|b", 0.12345, 3.14159, 1200], ["c", None, 10.0, 3]])
    assert table.text().splitlines() == [
        "name   top1   rank      n",
        "a|b   12.3%  3.142  1,200",
        "c               10      3",
    ]
    assert table.markdown().splitlines()[1:3] == ["| --- | ---: | ---: | ---: |", "| a\\|b | 12.3% | 3.142 | 1,200 |"]
    assert table.csv() == "name,top1,rank,n\na|b,0.12345,3.14159,1200\nc,,10.0,3"


def test_top1_stands_first_among_the_metrics():
    assert metric_columns([{"rank": 1.0}, {"top5": 0.5, "top1": 0.1}]) == ["top1", "top5", "rank"]
    assert metric_columns([{"rank": 1.0}, {"top5": 0.5}], most=1) == ["top5"]


def test_long_settings_are_shown_short():
    assert brief(list(range(100))) == "100 values"
    assert len(brief("x" * 100)) == 60
    assert brief(None) == "-"
