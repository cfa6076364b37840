"""`python -m eval.predict` and `load_predictor`: what is said of which image, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from torch import nn

from eval import linear_probe, predict
from eval.config import register
from eval.head_file import save_head
from eval.images import find_images, pixels, read_views
from eval.predict import load_predictor
from ssl import checkpoint
from ssl.config import CONF
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone
from ssl.models.classifier import make_classifier
from tests.image_list import ImageList, png
from tests.run_folder import write_images, write_run

CLASSES = ["ant", "bee", "cat"]
CPU = {"device": "cpu", "precision": "fp32", "threads": 1}


def write_head(
    folder: Path, run_dir: Path, *, multi_label: bool = False, image_size: tuple[int, int] | None = None
) -> Path:
    """A head of made weights on the last checkpoint of a run."""
    loaded = checkpoint.load_backbone(run_dir, image_size=image_size)
    generator = torch.Generator().manual_seed(3)
    return save_head(
        folder,
        weight=torch.randn(3, 16, generator=generator),
        bias=torch.randn(3, generator=generator),
        classes=CLASSES,
        checkpoint=loaded.path,
        sha256=loaded.hash,
        features={"pooling": "model"},
        image_size=loaded.spec.image_size,
        multi_label=multi_label,
    )


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A run with a probed head, and photos beside it."""
    home = tmp_path_factory.mktemp("home")
    run_dir = write_run(home / "runs" / "tiny")
    write_head(run_dir / "eval" / "linear_probe.head", run_dir)
    write_images(home / "photos", "a", "b/deep")
    return run_dir


@pytest.fixture
def photos(a_run, tmp_path) -> Path:
    """A copy of the photos: a/{0,1,2}.png and b/deep/{0,1,2}.png."""
    shutil.copytree(a_run.parents[1] / "photos", tmp_path / "photos")
    return tmp_path / "photos"


def command(monkeypatch, capsys, *words: str, code: int = 0) -> tuple[str, str]:
    """What the command prints on both streams, ending with `code`."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.predict.py", *words, "device=cpu", "precision=fp32", "threads=1"])
    if code:
        with pytest.raises(SystemExit) as end:
            predict.main()
        assert end.value.code == code
    else:
        predict.main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out, said.err


def expected_scores(run_dir: Path, paths: list[Path], *, multi_label: bool = False) -> torch.Tensor:
    """Probabilities (N, C) by Pillow, timm's forward and the head's definition alone; for images of 32 pixels."""
    loaded = checkpoint.load_backbone(run_dir)
    image = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (loaded.mean, loaded.std))
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(3, 16, generator=generator), torch.randn(3, generator=generator)
    with torch.no_grad():
        logits = loaded.model((image - mean) / std) @ weight.T + bias
    return logits.sigmoid() if multi_label else logits.softmax(dim=1)


# ---- what is predicted ---------------------------------------------------------------------------------------------


def test_scores_are_the_softmax_of_the_head_on_the_backbones_features(a_run, photos):
    paths = [photos / "a" / f"{number}.png" for number in range(3)]
    found = load_predictor(a_run, **CPU)(paths)
    for row, prediction in zip(expected_scores(a_run, paths), found):
        order = row.argsort(descending=True).tolist()
        assert prediction.labels == order
        assert prediction.classes == [CLASSES[label] for label in order]
        torch.testing.assert_close(torch.tensor(prediction.scores), row[order], atol=1e-5, rtol=1e-4)


def test_scores_of_a_multi_label_head_are_sigmoids(a_run, photos, tmp_path):
    head = write_head(tmp_path / "many.head", a_run, multi_label=True)
    paths = [photos / "a" / "0.png"]
    (prediction,) = load_predictor(head, **CPU)(paths)
    row = expected_scores(a_run, paths, multi_label=True)[0]
    torch.testing.assert_close(torch.tensor(prediction.scores), row.sort(descending=True).values, atol=1e-5, rtol=1e-4)
    assert abs(sum(prediction.scores) - 1) > 1e-3


def test_paths_pillow_images_and_arrays_are_one_image(a_run, photos):
    path = photos / "a" / "1.png"
    predictor = load_predictor(a_run, **CPU)
    with Image.open(path) as image:
        found = predictor([path, str(path), image, np.array(image)])
        (alone,) = predictor(image)
    assert len({tuple(each.scores) for each in found}) == 1
    assert found[2].path == "image 2"
    assert alone.scores == pytest.approx(found[0].scores, rel=1e-5)


def test_predictions_keep_the_order_and_do_not_depend_on_the_batch(a_run, photos):
    paths = sorted(photos.rglob("*.png"))
    whole = load_predictor(a_run, **CPU)(paths)
    single = load_predictor(a_run, batch_size=1, **CPU)(paths)
    assert [each.path for each in whole] == [str(path) for path in paths]
    for one, other in zip(whole, single):
        assert one.labels == other.labels
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_an_image_that_cannot_be_decoded_keeps_its_place_and_says_why(a_run, photos):
    (photos / "a" / "1.png").write_bytes(b"no picture")
    paths = [photos / "a" / f"{number}.png" for number in range(3)]
    found = load_predictor(a_run, **CPU)([*paths, photos / "gone.png"])
    assert [each.error is None for each in found] == [True, False, True, False]
    assert str(paths[1]) in found[1].error
    assert (found[1].classes, found[3].scores) == ([], [])


def test_large_images_are_cropped_as_in_an_evaluation():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    (views,) = read_views(ImageList([png(image)]), size=(112, 112), channels=3, batch_size=4, threads=1)
    box = Image.fromarray(image).crop((69, 19, 331, 281))  # 7/8 of 300 is 262 pixels, in the middle
    by_pillow = np.asarray(box.resize((112, 112), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(views.crops[0].numpy().astype(int) - by_pillow).max() <= 2


def test_images_are_read_while_they_are_asked_for():
    """A folder of any size is never held: after the first batch only a few more have been read."""
    read = []

    class Counted(ImageList):
        def read(self, index):
            read.append(index)
            return super().read(index)

    source = Counted([np.zeros((8, 8, 3), np.uint8)] * 500)
    batches = read_views(source, size=(8, 8), channels=3, batch_size=10, threads=1)
    next(batches)
    assert len(set(read)) <= 50
    batches.close()


# ---- the command ---------------------------------------------------------------------------------------------------


def test_csv_names_class_label_and_score_of_every_image(a_run, photos, monkeypatch, capsys):
    out, err = command(monkeypatch, capsys, f"ckpt={a_run}", f"images={photos}", "format=csv", "top=2")
    rows = list(csv.DictReader(io.StringIO(out)))
    paths = sorted(photos.rglob("*.png"))
    assert [row["path"] for row in rows] == [str(path) for path in paths for _ in range(2)]
    best = expected_scores(a_run, paths).max(dim=1)
    for place, row in enumerate(rows[::2]):
        assert (int(row["label"]), row["class"]) == (best.indices[place], CLASSES[best.indices[place]])
        assert float(row["score"]) == pytest.approx(best.values[place].item(), abs=1e-4)
    assert "6 images; " in err


def test_json_is_one_array_and_a_file_is_written_whole(a_run, photos, tmp_path, monkeypatch, capsys):
    target = tmp_path / "new" / "found.json"
    command(monkeypatch, capsys, f"ckpt={a_run}", f"images={photos}/a", "format=json", f"out={target}", "batch_size=2")
    found = json.loads(target.read_text())
    assert [Path(each["path"]).name for each in found] == ["0.png", "1.png", "2.png"]
    assert [set(each["predictions"][0]) for each in found] == [{"class", "label", "score"}] * 3
    assert [path.name for path in target.parent.iterdir()] == ["found.json"]


def test_the_table_shows_each_image_with_its_classes_below_it(a_run, photos, monkeypatch, capsys):
    out, err = command(monkeypatch, capsys, f"ckpt={a_run}", f"images={photos}/a/0.png", "top=9")
    lines = out.splitlines()
    assert lines[0] == f"{photos}/a/0.png"
    assert len(lines) == 4  # there are three classes
    assert "next: python -m eval.predict" in err


def test_undecodable_files_are_named_and_skipped(a_run, photos, monkeypatch, capsys):
    (photos / "a" / "1.png").write_bytes(b"no picture")
    out, err = command(monkeypatch, capsys, f"ckpt={a_run}", f"images={photos}/a", "format=csv", "top=1")
    assert len(out.splitlines()) == 3
    assert f"skipped: {photos}/a/1.png: " in err
    assert "2 images, 1 skipped" in err


def test_when_no_file_can_be_decoded_the_command_fails_and_writes_nothing(a_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.png").write_bytes(b"no picture")
    out = tmp_path / "out.csv"
    words = [f"ckpt={a_run}", f"images={tmp_path}/x.png", "format=csv", f"out={out}"]
    _, err = command(monkeypatch, capsys, *words, code=1)
    assert "none of the 1 images" in err
    assert not out.exists()


# ---- which images --------------------------------------------------------------------------------------------------


def test_files_folders_globs_and_lists_name_images(photos):
    (photos / "notes.txt").write_text("no image")
    source = find_images(photos)
    assert [source.describe(index) for index in range(len(source))] == sorted(map(str, photos.rglob("*.png")))
    assert len(find_images(f"{photos}/a/*.png")) == 3
    assert len(find_images(f"{photos}/**/[01].png")) == 4
    assert len(find_images([f"{photos}/a", f"{photos}/a/0.png", f"{photos}/b"])) == 6  # none twice
    assert len(find_images(photos / "a" / "0.png")) == 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("gone.png", r"gone\.png does not exist; the nearest folder"),
        ("*.webp", r"matches nothing; \*\* stands for"),
        ("*", r"matches only folders \(2\)"),
        ("empty", "holds no images: no file"),
        ("texts", "holds no images: 1 files, none of which ends in"),
    ],
)
def test_names_of_no_image_are_refused(images, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path / images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8 values"),
        (np.zeros((4, 4, 5), np.uint8), "must have 3 channels"),
        (Image.new("F", (4, 4)), "beyond 8 bits"),
        (7, "got int"),
    ],
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        pixels(image, 3)


def test_gray_alpha_and_rotated_pictures_become_upright_colour():
    generator = np.random.default_rng(0)
    gray = generator.integers(0, 255, (4, 6), dtype=np.uint8)
    assert (pixels(gray, 3) == gray[:, :, None]).all()
    assert (pixels(gray[:, :, None], 3) == gray[:, :, None]).all()
    rgba = generator.integers(0, 255, (4, 6, 4), dtype=np.uint8)
    assert (pixels(rgba, 3) == rgba[:, :, :3]).all()
    turned = Image.fromarray(gray)
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    assert pixels(turned, 1).shape == (6, 4, 1)


def write_finetuned(run_dir: Path) -> tuple[Path, nn.Module]:
    """A run folder as fine-tuning writes it, and the model in it."""
    torch.manual_seed(5)
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    _, spec = build_backbone("resnet18", image_size=(32, 32), model_args=args)
    method = Method()
    method.backbone, spec = make_classifier(spec, num_classes=3, head_std=1.0)
    checkpoint.save(
        run_dir,
        step=7,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml="seed: 0\n",
        state={"epoch": 1.0, "classifier": {"classes": CLASSES, "pooling": "avg", "multi_label": False}},
        mean=[0.5, 0.4, 0.3],
        std=[0.2, 0.3, 0.4],
    )
    return run_dir, method.backbone.eval()


# ---- which checkpoint ----------------------------------------------------------------------------------------------


def test_a_head_on_another_backbone_is_refused(a_run, tmp_path):
    other = write_run(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"(?s)belongs to a backbone with SHA-256.*has other weights.*backbone="):
        load_predictor(a_run / "eval" / "linear_probe.head", backbone=other, **CPU)


def test_a_fine_tuned_run_and_its_export_give_the_softmax_of_the_model(photos, tmp_path):
    run_dir, model = write_finetuned(tmp_path / "tuned")
    paths = [photos / "a" / f"{number}.png" for number in range(3)]
    image = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        expected = model((image - mean) / std).softmax(dim=1)  # (3, C)
    exported = checkpoint.export(checkpoint.load_backbone(run_dir), tmp_path / "export")
    for place in (run_dir, run_dir / "checkpoints" / "step_00000007", exported):
        for prediction, row in zip(load_predictor(place, **CPU)(paths), expected):
            assert prediction.classes[0] == CLASSES[row.argmax()]
            by_label = torch.tensor([prediction.scores[prediction.labels.index(label)] for label in range(3)])
            torch.testing.assert_close(by_label, row, atol=1e-5, rtol=1e-4)


def test_a_probe_and_the_predictions_with_its_head_name_the_same_share_right(tmp_path):
    run_dir = write_run(tmp_path / "run")
    root = write_images(tmp_path / "data", "train/ant", "train/bee", "train/cat", each=12)
    for name in ("ant", "bee", "cat"):  # every third image of train, so that some are named wrong and some right
        (root / "test" / name).mkdir(parents=True)
        for path in sorted((root / "train" / name).glob("*.png"))[::3]:
            path.rename(root / "test" / name / path.name)
    words = [f"ckpt={run_dir}", "data=folder", f"data.root={root}", "steps=50", "lr=[0.1]", "weight_decay=[0.01]"]
    register(linear_probe.LinearProbeConfig)
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("linear_probe", overrides=[*words, "device=cpu", "precision=fp32", "threads=1"])
    result = linear_probe.run(config)
    predictor = load_predictor(run_dir / "eval" / "linear_probe_folder.head", **CPU)
    found = list(predictor.stream(find_images(root / "test")))
    right = [prediction.classes[0] == Path(prediction.path).parent.name for prediction in found]
    assert sum(right) / len(right) == pytest.approx(result["metrics"]["top1"])
    assert result["protocol"]["data"]["num_test"] == len(right) == 12


def test_a_backbone_for_a_fine_tuned_run_has_no_effect(a_run, tmp_path):
    run_dir, _ = write_finetuned(tmp_path / "tuned")
    with pytest.raises(ValueError, match="backbone= has no effect"):
        load_predictor(run_dir, backbone=a_run, **CPU)


def test_a_head_sees_images_of_the_size_that_it_was_trained_on(a_run, tmp_path):
    head = write_head(tmp_path / "large.head", a_run, image_size=(48, 48))
    assert load_predictor(head, **CPU).classifier.image_size == (48, 48)


def test_a_run_that_was_moved_is_found_beside_its_head(a_run, photos, tmp_path):
    before = write_run(tmp_path / "before")
    write_head(before / "eval" / "linear_probe.head", before)
    before.rename(tmp_path / "after")
    paths = [photos / "a" / "0.png"]
    found = load_predictor(tmp_path / "after" / "eval" / "linear_probe.head", **CPU)(paths)
    assert found[0].scores == load_predictor(a_run, **CPU)(paths)[0].scores


def test_a_head_keeps_to_its_step_when_the_run_has_gone_on(a_run, photos, tmp_path):
    run_dir = write_run(tmp_path / "run")
    write_head(run_dir / "eval" / "linear_probe.head", run_dir)
    write_run(run_dir, seed=1, step=20)
    predictor = load_predictor(run_dir, **CPU)
    assert "step_00000012" in predictor.classifier.title
    shutil.rmtree(run_dir / "checkpoints" / "step_00000012")
    with pytest.raises(ValueError, match=r"(?s)step_00000012 does not exist.*step_00000020 has other weights"):
        load_predictor(run_dir, **CPU)


def test_of_several_heads_that_of_the_runs_own_data_is_taken_else_one_must_be_named(tmp_path):
    run_dir = write_run(tmp_path / "run")
    for name in ("linear_probe_cifar10", "linear_probe_folder"):
        write_head(run_dir / "eval" / f"{name}.head", run_dir)
    with pytest.raises(ValueError, match=r"2 probed heads.*linear_probe_cifar10\.head"):
        load_predictor(run_dir, **CPU)
    write_head(run_dir / "eval" / "linear_probe.head", run_dir)
    assert "linear_probe.head on" in load_predictor(run_dir, **CPU).classifier.title


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=nowhere", "images=."], "ckpt=nowhere does not exist"),
        (["ckpt={bare}", "images=."], "names no classes; predicting needs"),
        (["ckpt={run}", "images=nothing/*.jpg"], "images=nothing/*.jpg matches nothing"),
        (["ckpt={run}", "images={run}", "top=0"], "top must be at least 1"),
        (["ckpt={run}", "images={photos}", "out={photos}"], "is a folder; give the file"),
        (["ckpt={run}", "images={photos}", "formt=csv"], "did you mean format?"),
        (["ckpt={run}", "images={photos}", "batch_size=0"], "batch_size must be at least 1"),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(words, message, a_run, photos, tmp_path, monkeypatch, capsys):
    bare = write_run(tmp_path / "bare")
    words = [word.format(bare=bare, run=a_run, photos=photos) for word in words]
    assert message in command(monkeypatch, capsys, *words, code=1)[1]


def test_without_ckpt_or_images_the_ways_to_give_them_are_shown(monkeypatch, capsys):
    assert "eval.predict needs ckpt= and images=" in command(monkeypatch, capsys, "ckpt=runs/a", code=2)[1]
