"""What pretraining and fine-tuning share: evaluations during a run, recipes compared, rows gathered over ranks."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from ssl import distributed
from ssl.checkpoint import read_state, steps_saved
from ssl.failed_step import read_failed_step
from ssl.methods.base import Batch
from ssl.methods.simclr import SimCLR
from ssl.online import OnlineSubject, StopRun
from ssl.pretrain import run
from ssl.trainer import NotFinite
from tests.test_pretrain import SHORT, TINY_RESNET, composed, weights_of

WORDS = ["method=simclr", *TINY_RESNET, *SHORT, "trainer.eval_every_epochs=1"]


class Watch:
    """An evaluation that draws random numbers, looks at the method, and counts."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.count = stop_at, 0

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        self.count += 1
        assert not subject.method.training
        torch.rand(3)
        subject.backbone(torch.randn(2, 3, *subject.image_size))
        if subject.step == self.stop_at:
            raise StopRun(f"enough at step {subject.step}", {"count": self.count})
        return {"count": self.count}

    def state(self) -> dict[str, int]:
        return {"count": self.count}

    def load(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def watched(*words: str, stop_at: int | None = None):
    config = composed(*WORDS, *words)
    config.online = {"watch": {"_target_": "tests.test_training.Watch", "stop_at": stop_at}}
    return config


def test_an_evaluation_is_logged_with_its_step_and_leaves_the_training_as_it_is(tmp_path: Path):
    run(composed(*WORDS), out=tmp_path / "without")
    run(watched(), out=tmp_path / "with")
    assert [line["step"] for line in lines_of(tmp_path / "with") if "count" in line] == [3, 6, 9, 12]
    assert [line["loss"] for line in lines_of(tmp_path / "with")] == [
        line["loss"] for line in lines_of(tmp_path / "without")
    ]
    ours, theirs = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(tensor.equal(theirs[file][name]) for file, each in ours.items() for name, tensor in each.items())


def test_what_an_evaluation_keeps_survives_a_stop(tmp_path: Path):
    run(watched("trainer.steps=6"), out=tmp_path)
    run(watched(), out=tmp_path)
    assert [line["count"] for line in lines_of(tmp_path) if "count" in line] == [1, 2, 3, 4]


def test_an_evaluation_ends_the_run_once_its_step_is_saved_and_logged(tmp_path: Path):
    config = watched(stop_at=6)
    with pytest.raises(StopRun, match="enough at step 6"):
        run(config, out=tmp_path)
    assert steps_saved(tmp_path)[-1][0] == 6
    assert lines_of(tmp_path)[-1] | {"count": 2, "step": 6} == lines_of(tmp_path)[-1]
    with pytest.raises(StopRun, match="enough at step 6"):  # the same command does not go on
        run(config, out=tmp_path)
    assert read_state(steps_saved(tmp_path)[-1][1])["ended"] == "enough at step 6"
    config.online, config.accept_changes = {}, True
    run(config, out=tmp_path)
    assert steps_saved(tmp_path)[-1][0] == 12


def test_a_setting_that_a_run_did_not_know_yet_counts_as_its_default(tmp_path: Path):
    words = [*WORDS, "trainer.steps=3"]
    run(composed(*words), out=tmp_path)
    recipe = steps_saved(tmp_path)[-1][1] / "run.yaml"
    values = yaml.safe_load(recipe.read_text())
    del values["trainer"]["clip_grad_norm"], values["trainer"]["swa_every_epochs"], values["model"]["library"]
    recipe.write_text(yaml.safe_dump(values))
    card = recipe.with_name("state.json")
    state = json.loads(card.read_text())
    state["sha256"]["run.yaml"] = hashlib.sha256(recipe.read_bytes()).hexdigest()
    card.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"clip_grad_norm: None -> 2\.0"):
        run(composed(*words, "trainer.clip_grad_norm=2.0"), out=tmp_path)
    run(composed(*WORDS, "trainer.steps=4"), out=tmp_path)
    assert steps_saved(tmp_path)[-1][0] == 4


class Spoiled(SimCLR):
    """SimCLR whose loss is not a number where a batch holds image 7."""

    def contrast(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().contrast(embeddings)
        return {**outputs, "loss": outputs["loss"] * (math.nan if self.spoiled else 1.0)}

    def forward(self, batch: Batch, **options):
        self.spoiled = bool((batch["index"] == 7).any())
        return super().forward(batch, **options)


def test_a_run_that_keeps_failing_leaves_the_first_bad_step_and_its_images(tmp_path: Path):
    words = [word for word in WORDS if not word.startswith("trainer.device_batch_size")]
    config = composed(*words, "trainer.max_bad_steps=0", "trainer.steps=12")
    config.method._target_ = "tests.test_training.Spoiled"
    with pytest.raises(NotFinite, match=r"the loss was nan.*failed"):
        run(config, out=tmp_path)
    folder = steps_saved(tmp_path / "failed")[-1][1]
    failed, batch = read_failed_step(folder)
    assert 7 in batch["index"].tolist()
    assert failed.step == steps_saved(tmp_path / "failed")[-1][0] + 1
    assert len(failed.images) == len(batch["index"])
    assert not steps_saved(tmp_path) or steps_saved(tmp_path)[-1][0] < failed.step


def _gathered(sizes: tuple[int, int]) -> list[list[float]]:
    rank = distributed.rank()
    rows = torch.arange(2.0 * sizes[rank]).view(-1, 2) + 100 * rank
    return distributed.gather_rows(rows).tolist()


@pytest.mark.parametrize("sizes", [(2, 3), (3, 0), (0, 0)])
def test_rows_of_ranks_of_unequal_size_are_joined_in_order(two_ranks, sizes: tuple[int, int]):
    expected = [
        [float(100 * rank + 2 * row), float(100 * rank + 2 * row + 1)] for rank in (0, 1) for row in range(sizes[rank])
    ]
    assert two_ranks.run(_gathered, sizes) == [expected, expected]
