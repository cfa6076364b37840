"""The code in docs/ runs as it stands: Python blocks, and the parts and recipes that docs/extend.md has one write."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl.pretrain import run
from ssl.randomness import uniforms
from tests.forks import start
from tests.test_pretrain import composed

DOCS = Path(__file__).resolve().parents[1] / "docs"
SHORT = [
    *("model=vit_micro", "data=embedded", "data.source.num_train=40", "data.source.num_test=20"),
    *("trainer.global_batch_size=20", "trainer.device=cpu", "loader.threads=1", "wandb.mode=disabled", "report=none"),
]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def command_with(page: str, words: str) -> list[str]:
    """The words of the command of a page that holds `words`, without `python -m`."""
    lines = [line for block in blocks(page, "text") for line in block.splitlines()]
    (line,) = [line for line in lines if words in line]
    return shlex.split(line)[2:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "run"
    run(composed("method=mae", *SHORT, "trainer.steps=2"), out=out)
    return out


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A folder with the files that docs/extend.md, and the part of the README that it shows, tell how to write."""
    for language in ("python", "yaml"):
        for block in [*blocks("../README.md", language), *blocks("extend.md", language)]:
            name = re.match(r"# (my_\S+)\n", block)
            if name is None:  # the README has other blocks, too
                continue
            path = tmp_path / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.split("\n", 1)[1])
    return tmp_path


def test_the_views_of_the_concepts_are_boxes_within_the_images(capsys):
    found: dict = {}
    exec(blocks("concepts.md", "python")[0], found)
    box = found["drawn"]["box"]
    assert box.shape == (2, 4)
    assert str(box) in capsys.readouterr().out
    assert (box[:, :2] >= 0).all()
    assert (box[:, :2] + box[:, 2:] <= [[480, 640], [333, 500]]).all()


def test_the_numbers_of_the_concepts_are_those_of_each_image_alone(capsys):
    exec(blocks("concepts.md", "python")[1], {})
    alone = [uniforms(seed=0, epoch=3, index=np.array([index]), use="noise", count=2)[0] for index in (17, 4)]
    assert capsys.readouterr().out.strip() == str(np.stack(alone))


def test_every_python_block_of_the_concepts_and_of_looking_inside_is_run_here():
    assert [len(blocks(page, "python")) for page in ("concepts.md", "look.md")] == [2, 1]


def test_a_look_from_python_gives_what_the_page_says(trained: Path, capsys):
    (code,) = blocks("look.md", "python")
    found: dict = {}
    exec(code.replace('"runs/<run>", ', f'"{trained}", "sample=40", "device=cpu", '), found)
    assert (found["picture"].dtype, found["picture"].ndim) == (np.uint8, 3)
    assert found["found"].lines[0] in capsys.readouterr().out


def test_the_evaluation_of_ones_own_is_logged_at_every_epoch_and_is_the_features_length(reader: Path):
    words = command_with("extend.md", "online=norm")
    said = reader / "said.txt"
    child = start([*words, *SHORT, "trainer.epochs=2", "trainer.log_every_steps=1", "out=run"], home=reader, said=said)
    child.join(300)
    assert child.exitcode == 0, said.read_text()[-4000:]
    rows = [json.loads(line) for line in (reader / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {row["epoch"]: row["feature_norm"] for row in rows if "feature_norm" in row}
    assert list(told) == [1.0, 2.0]
    assert all("rankme" in row for row in rows if "feature_norm" in row)
    assert told[2.0] == pytest.approx(_feature_norm(reader / "run"), rel=1e-2)  # training computes in bf16 where it can


def _feature_norm(out: Path) -> float:
    """The mean length of the features of all images of train, by timm's own forward pass."""
    from ssl.checkpoint import load_backbone
    from ssl.config import build

    loaded = load_backbone(out)
    source = build(composed(*SHORT, "method=mae").data.source, split="train")
    pixels = np.stack([source.read(index) for index in range(len(source))])  # (N, H, W, C)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    image = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        features = loaded.model.forward_head(loaded.model.forward_features(image), pre_logits=True)
    return features.norm(dim=1).mean().item()


def test_a_run_of_ones_own_parts_is_judged_on_images_of_ones_own(reader: Path):
    said = reader / "said.txt"
    ours = (
        "--config-dir my_conf method=rotation data=noise model=my_resnet trainer.global_batch_size=10 trainer.steps=1"
    )
    quick = "trainer.device=cpu wandb.mode=disabled report=none online=none out=run"
    judged = [word.replace("runs/<run>", "run") for word in command_with("extend.md", "python -m eval.health")]
    for words in (["ssl.pretrain", *ours.split(), *quick.split()], [*judged, "device=cpu", "sample=20", "views=0"]):
        child = start(words, home=reader, said=said)
        child.join(300)
        assert child.exitcode == 0, said.read_text()[-4000:]
    assert (
        "noise" in json.loads((reader / "run" / "eval" / "health_noise.json").read_text())["protocol"]["data"]["name"]
    )


def test_the_recipe_of_ones_own_composes_and_yields_to_the_command_line(reader: Path):
    words = command_with("extend.md", "experiment=mine")
    said = reader / "said.txt"
    child = start([*words, "trainer.epochs=3", "--cfg", "job"], home=reader, said=said)
    child.join(300)
    told = said.read_text()
    assert child.exitcode == 0, told[-4000:]
    for line in ("_target_: ssl.methods.simclr.SimCLR", "base_lr: 0.1", "epochs: 3", "global_batch_size: 64"):
        assert line in told, f"{line} in\n{told}"
