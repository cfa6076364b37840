"""`make demo` in small: it pretrains, scores three subjects and draws a picture; a second call goes on from there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from eval import demo

TINY = [
    "trainer.epochs=2", "trainer.global_batch_size=32", "trainer.device=cpu", "trainer.log_every_steps=1",
    "data.source.num_train=96", "data.source.num_test=36", "model.args.channels=[8,8,8,8]", "loader.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.run(folder, TINY)
    return folder


def test_it_writes_scores_of_pixels_untrained_and_trained_on_the_same_images(out):
    protocols = {}
    for name in ("raw_pixels", "untrained", None):
        for score in ("knn", "linear_probe"):
            written = json.loads((out / "eval" / f"{score}{f'_{name}' if name else ''}.json").read_text())
            assert 0.0 <= written["metrics"]["top1"] <= 1.0
            protocols[name] = written["protocol"]
    assert {protocol["data"]["num_test"] for protocol in protocols.values()} == {36}
    assert protocols["untrained"]["backbone"] == protocols[None]["backbone"]
    assert protocols["untrained"]["checkpoint"] is None
    assert protocols[None]["checkpoint"]["step"] == 6


def test_the_picture_is_no_blank_sheet(out):
    pixels = np.asarray(Image.open(out / "demo.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 900
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_a_second_call_finds_the_run_complete(out, capfd):
    rows = demo.run(out, TINY)
    said = capfd.readouterr().out
    assert "already complete" in said
    assert [row.subject for row in rows] == ["raw pixels", "untrained", "trained"]
    assert f"look at: {out}/demo.png" in said


def test_a_failed_pretraining_ends_the_demo_with_its_exit_code(tmp_path, capfd):
    with pytest.raises(SystemExit) as end:
        demo.run(tmp_path, ["trainer.epoch=1"])
    assert end.value.code == 1
    assert "trainer.epochs" in capfd.readouterr().err


def test_a_backbone_that_does_not_win_clearly_is_an_error():
    pixels, untrained = demo.Row("raw pixels", 0.3, 0.1), demo.Row("untrained", 0.1, 0.1)
    demo.check_won([pixels, untrained, demo.Row("trained", 0.6, 0.7)])
    for knn, linear in ((0.2, 0.7), (0.6, 0.2)):
        with pytest.raises(ValueError, match="does not win clearly"):
            demo.check_won([pixels, untrained, demo.Row("trained", knn, linear)])
