"""`python -m eval.linear_probe`: layers, folds, low-shot draws, multi-label sets; what it writes and refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image
from sklearn.metrics import average_precision_score, confusion_matrix

from eval import knn, linear_probe, scores
from eval.classifier import load_classifier
from eval.command import report
from eval.config import register
from eval.subject import Judged, read_features
from ssl.config import CONF
from ssl.data.embedded import Embedded
from tests.run_folder import write_run

RESNET = ["ckpt=random", "model=resnet10", "model.args.channels=[8,8,16,16]"]
VIT = ["ckpt=random", "model=vit_t", "+model.args.depth=2", "+model.args.embed_dim=24", "+model.args.num_heads=2"]
SMALL = ["data=embedded", "data.source.num_train=120", "data.source.num_test=36"]
QUICK = ["device=cpu", "threads=1", "lr=[0.01,0.1]", "weight_decay=[0.01]", "steps=30"]
SOLVED = ["device=cpu", "threads=1", "solver=lbfgs", "weight_decay=[0.01,0.1]"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Baselines write below the working directory."""
    monkeypatch.chdir(tmp_path)


def composed(*words: str, command: str = "linear_probe") -> DictConfig:
    register(linear_probe.LinearProbeConfig if command == "linear_probe" else knn.KnnConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(command, overrides=list(words))


def probe(*words: str) -> dict:
    """What the command wrote, read back."""
    return json.loads(Path(linear_probe.run(composed(*words))["path"]).read_text())


def write_multi_label(root: Path, *, num_train: int = 60, num_test: int = 24) -> Path:
    """Pictures of embedded shapes: six are of class `low`, every other one of `odd`, a single one of `one`."""
    root.mkdir()
    for split, num in (("train", num_train), ("test", num_test)):
        source, images, labels = Embedded(split, num_train=num_train, num_test=num_test), [], []
        for index in range(num):
            buffer = io.BytesIO()
            Image.fromarray(source.read(index)).save(buffer, "PNG")
            images.append(buffer.getvalue())
            shape = int(source.labels[index])
            labels.append([name for name, has in (("low", shape < 6), ("odd", shape % 2), ("one", shape == 3)) if has])
        pq.write_table(pa.table({"image": images, "labels": labels}), root / f"{split}.parquet")
    return root


# ---- honesty ---------------------------------------------------------------------------------------------------------


def test_test_is_read_once_after_the_choice_and_for_the_chosen_features_alone(monkeypatch):
    config = composed(*RESNET, *SMALL, *QUICK, "layers=[1,4]", "pooling=[model,grid]", "grid_dim=64")
    judged = read_features(config, command="eval.linear_probe", multi_label=True)
    happened = []

    def read_source(source, title, sets):
        happened.append((title, [(each.layer, each.pooling) for each in sets]))
        return judged.read_source(source, title, sets)

    chosen = linear_probe.select

    def select(*given, **named):
        found = chosen(*given, **named)
        happened.append(("chosen", [(found.choice["layer"], found.choice["pooling"])]))
        return found

    monkeypatch.setattr(linear_probe, "select", select)
    report(config, replace(judged, read_source=read_source), linear_probe.score)
    every = [("1", "model"), ("1", "grid"), ("4", "model"), ("4", "grid")]
    (_, first), (chose, choice), (last, of_test) = happened
    assert (first, chose, last) == (every, "chosen", "test")
    assert of_test == choice


def test_the_labels_of_test_never_move_the_choice():
    config = composed(*RESNET, *SMALL, *QUICK)
    judged = read_features(config, command="eval.linear_probe")
    honest = report(config, judged, linear_probe.score)

    def turned(source, title, sets):
        found = judged.read_source(source, title, sets)
        return [replace(each, labels=each.labels.flip(0)) for each in found] if title == "test" else found

    other = report(config, replace(judged, read_source=turned, kept={}, counts={}), linear_probe.score)
    assert other["protocol"]["grid"] == honest["protocol"]["grid"]
    assert other["protocol"]["choice"] == honest["protocol"]["choice"]
    assert other["metrics"] != honest["metrics"]


# ---- what is written -------------------------------------------------------------------------------------------------


def test_details_hold_the_confusion_and_the_accuracy_of_each_class():
    config = composed(*RESNET, *SMALL, *QUICK)
    judged = read_features(config, command="eval.linear_probe")
    path = Path(report(config, judged, linear_probe.score)["path"])
    written = json.loads(path.read_text())
    counts = np.array(written["details"]["confusion"]["rows"])
    assert written["details"]["confusion"]["classes"] == judged.splits.classes
    assert counts.sum(1).tolist() == list(written["details"]["num_test_of_class"].values()) == [3] * 12
    assert list(written["details"]["num_train_of_class"].values()) == [10] * 12
    assert counts.trace() / 36 == pytest.approx(written["metrics"]["top1"])
    assert list(written["details"]["per_class"].values()) == pytest.approx((counts.diagonal() / 3).tolist())
    lines = [line.strip(" ,") for line in path.read_text().splitlines()]
    assert sum(line.startswith("[") and len(json.loads(line)) == 12 for line in lines if line.endswith("]")) >= 12


def test_the_json_tells_when_how_long_and_with_what():
    protocol = probe(*RESNET, *SMALL, *QUICK, "seed=3")["protocol"]
    assert protocol["seed"] == 3
    assert protocol["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "device"} <= set(protocol)
    assert protocol["wall_seconds"] >= protocol["score_seconds"] > 0
    assert protocol["feature_seconds"] > 0
    assert protocol["tried"] == {"lr": [0.01, 0.1], "weight_decay": [0.01], "batchnorm": [True]}
    assert (protocol["data"]["num_train"], protocol["data"]["num_test"]) == (120, 36)


@pytest.mark.parametrize(
    ("subject", "layers", "names"),
    [(RESNET, "layers=all", "01234"), (VIT, "layers=[0,1]", "01"), (VIT, "layers=last_2", ["last_2"])],
)
def test_every_layer_has_its_rows_in_the_grid(subject, layers, names):
    written = probe(*subject, *SMALL, *SOLVED, layers, "batchnorm=[true,false]")
    grid, choice = written["protocol"]["grid"], written["protocol"]["choice"]
    assert len(grid) == len(names) * 4
    assert {row["layer"] for row in grid} == set(names)
    assert choice in grid


def test_dimensions_of_each_set_are_told():
    written = probe(*VIT, *SMALL, *SOLVED, "layers=last_2", "pooling=[token,token_patches]")
    assert [each["dimensions"] for each in written["protocol"]["features"]["sets"]] == [48, 72]


def test_the_saved_head_names_the_classes_that_the_probe_scored(tmp_path):
    run_dir = write_run(tmp_path / "run")
    config = composed(f"ckpt={run_dir}", *SMALL, *SOLVED, "layers=[2,3]", "pooling=grid", "grid_dim=64")
    config.precision = "fp32"
    judged = read_features(config, command="eval.linear_probe")
    result = report(config, judged, linear_probe.score)
    classifier = load_classifier(result["protocol"]["weights"])
    pixels = torch.from_numpy(np.stack([judged.splits.test.read(i) for i in range(36)])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (classifier.mean, classifier.std))
    with torch.no_grad():
        predicted = classifier.model((pixels - mean) / std).argmax(1)
    assert classifier.classes == judged.splits.classes
    truth = torch.from_numpy(judged.splits.test.labels)
    expected = confusion_matrix(truth, predicted, labels=range(12))
    written = json.loads(Path(result["path"]).read_text())
    assert written["details"]["confusion"]["rows"] == expected.tolist()


# ---- folds and draws -------------------------------------------------------------------------------------------------


def test_a_held_out_slice_can_be_asked_for():
    protocol = probe(*RESNET, *SMALL, *QUICK, "held_out=0.3")["protocol"]
    assert (protocol["held_out"], protocol["num_held_out"]) == ("one slice", 36)


def test_low_shot_draws_give_mean_deviation_and_each_draw(capsys):
    written = probe(*RESNET, *SMALL, *SOLVED, "train_amount=4", "draws=3", "seed=7")
    metrics, protocol, draws = written["metrics"], written["protocol"], written["details"]["draws"]
    assert [each["seed"] for each in draws] == protocol["low_shot"]["seeds"] == [7, 8, 9]
    assert [each["num_train"] for each in draws] == [48] * 3
    each = [one["metrics"]["top1"] for one in draws]
    assert protocol["draws_top1"] == each
    assert metrics["top1"] == pytest.approx(np.mean(each))
    assert metrics["top1_std"] == pytest.approx(np.std(each, ddof=1))
    assert len(set(each)) > 1
    assert all(one["choice"] in one["grid"] for one in draws)
    (path,) = Path("runs").glob("random_resnet18_args.channels-8-8-16-16_*_embedded/seed7/eval/*.json")
    assert path.name == "linear_probe_4_per_class.json"
    assert f"top-1 {metrics['top1']:.1%} +- {100 * metrics['top1_std']:.1f}" in capsys.readouterr().out


def test_one_image_of_each_class_is_learnt_by_one_head():
    written = probe(*RESNET, *SMALL, "device=cpu", "solver=lbfgs", "weight_decay=[0.1]", "train_amount=1", "draws=2")
    assert [each["num_train"] for each in written["details"]["draws"]] == [12, 12]
    assert written["protocol"]["held_out"] is None
    with pytest.raises(ValueError, match="one class needs two images"):
        probe(*RESNET, *SMALL, *SOLVED, "train_amount=1")


# ---- several classes per image ---------------------------------------------------------------------------------------


def test_a_multi_label_set_is_judged_by_map(tmp_path, monkeypatch, capsys):
    root = write_multi_label(tmp_path / "set")
    config = composed(*RESNET, "data=parquet", f"data.root={root}", *SOLVED)
    judged = read_features(config, command="eval.linear_probe", multi_label=True)
    seen = {}

    def headline(logits, labels, *, multi_label):
        seen.update(logits=logits, labels=labels)
        return scores.headline(logits, labels, multi_label=multi_label)

    monkeypatch.setattr(linear_probe, "headline", headline)
    result = report(config, judged, linear_probe.score)
    expected = [average_precision_score(seen["labels"][:, c], seen["logits"][:, c]) for c in range(3)]
    assert judged.splits.classes == ["low", "odd", "one"]
    assert result["metrics"] == {"map": pytest.approx(np.mean(expected))}
    written = json.loads(Path(result["path"]).read_text())
    assert list(written["details"]["average_precision"].values()) == pytest.approx(expected)
    assert written["protocol"]["data"]["multi_label"] is True
    assert f"mAP {np.mean(expected):.1%}" in capsys.readouterr().out


def test_knn_refuses_a_multi_label_set_and_names_what_does_not(tmp_path):
    root = write_multi_label(tmp_path / "set", num_train=12, num_test=12)
    with pytest.raises(ValueError, match=r"eval.knn needs one class per image.*python -m eval.linear_probe"):
        knn.run(composed("ckpt=pixels", "data=parquet", f"data.root={root}", command="knn"))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["solver=lbfgs", "lr=[0.1]"], "lr=.* has no effect with solver=lbfgs"),
        (["solver=lbfgs", "steps=10"], "steps=10 has no effect with solver=lbfgs"),
        (["solver=adam"], "solver=adam is not known"),
        (["draws=3"], "draws=3 has no effect without train_amount"),
        (["train_amount=1%", "draws=0"], "draws must be 1 or more"),
        (["train_amount=10"], "all of the 120 images"),
        (["train_amount=half"], "no amount of images per class"),
        (["folds=3", "held_out=0.2"], "has no effect with folds=3"),
        (["retrain=false"], "retrain=false has no meaning with 5 folds"),
        (["layers=9"], "layers=9: ResNet has 5 stages"),
        (["pooling=token"], "needs a vision transformer"),
        (["grid_dim=64"], "grid_dim=64 has no effect"),
        (["layers=all", "features_gib=1e-6"], "more than features_gib=1e-06"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_and_nothing_is_written(words, message):
    with pytest.raises(ValueError, match=message):
        probe(*RESNET, *SMALL, "device=cpu", "threads=1", *words)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_features_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    config = composed(*RESNET, *SMALL, *QUICK)
    judged = read_features(config, command="eval.linear_probe")
    with torch.no_grad():
        next(judged.subject.model.parameters())[0] = torch.nan  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(
        ValueError, match="embedded 32x32 \\(train\\) image 0 are not finite; the backbone has diverged"
    ):
        report(config, judged, linear_probe.score)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def write_folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["all"], "needs labels.*has none"),
        (["train/ant", "test/ant"], "needs labels|one in train|needs two classes"),
        (["train/ant", "train/bee", "test/wasp", "test/ant"], "lacks: wasp"),
        ([], "is empty"),
    ],
)
def test_images_that_cannot_be_judged_are_refused_and_nothing_is_written(tmp_path, folders, message):
    root = tmp_path / "photos"
    root.mkdir()
    write_folders(root, *folders)
    with pytest.raises(ValueError, match=message):
        probe("ckpt=pixels", "data=folder", f"data.root={root}", *SOLVED)
    assert not Path("runs").exists()


def test_judged_reads_a_split_once_and_keeps_it():
    config = composed(*RESNET, *SMALL, *QUICK)
    judged: Judged = read_features(config, command="eval.linear_probe")
    assert judged.train is judged.train
    assert judged.counts["train"]["num"] == 120
    assert "test" not in judged.counts
