"""A run that goes on with another number of ranks: the same images in the same global batches, the same losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.layers import DropPath
from torch import nn

import ssl.distributed as distributed
import ssl.pretrain
from ssl.checkpoint import read_state, steps_saved
from ssl.config import TrainerConfig
from ssl.data.loader import Loader
from ssl.methods.base import Method
from ssl.rank_dependence import rank_dependence
from tests.pool import Pool
from tests.test_pretrain import METHODS, composed, weights_of

SAVED, BROKEN, END = 5, 7, 12  # all in the middle of one of four epochs of three steps, and of what a line averages
SETTINGS = [
    *["data=embedded", "data.source.num_train=28", "data.source.num_test=6", "data.in_memory_gib=0", "online=none"],
    *["trainer.device=cpu", "trainer.precision=fp32", "trainer.global_batch_size=8", "trainer.epochs=4"],
    *[
        "trainer.log_every_steps=3",
        f"trainer.checkpoint_every_steps={SAVED}",
        "trainer.ema_decay=0.9",
        "trainer.keep_last=9",
    ],
    *["trainer.pictures=false", "optim.base_lr=1e-4", "wandb.mode=disabled", "loader.threads=1", "launch=none"],
]
WITHOUT_DROPOUT = {"relative_location": ["method.dropout=0.0"]}  # its numbers are each rank's own, see rank_dependence
Seen = dict[int, list[int]]
"""The images of each step, in the order of the global batch."""


class Broken(Exception):
    """What ends a run at a step of the test's choice."""


def train(words: list[str], out: Path, broken_at: int | None = None) -> Seen:
    """Run as `words` say, on this rank or alone; this rank's images of each step. `broken_at` is the step, counted from
    0, whose batch does not come.
    """
    seen: Seen = {}
    batches, stop = Loader.batches, distributed.stop

    def recorded(self: Loader, *, start_step: int, **rest: Any) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(batches(self, start_step=start_step, **rest), start=start_step):
            if step == broken_at:
                raise Broken
            seen[step] = batch["index"].tolist()
            yield batch

    Loader.batches = recorded  # pyright: ignore[reportAttributeAccessIssue]
    distributed.stop = lambda: None  # the pool's ranks stay together for the next test
    try:
        ssl.pretrain.run(composed(*words), out=out)
    except Broken:
        pass
    finally:
        Loader.batches, distributed.stop = batches, stop
    return seen


def joined(shares: list[Seen]) -> Seen:
    """The ranks' shares, one behind another."""
    return {step: [index for share in shares for index in share[step]] for step in shares[0]}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory) -> tuple[list[str], Path, Seen]:
    """A run of one process that nothing cut."""
    words = [*METHODS[request.param], *SETTINGS, *WITHOUT_DROPOUT.get(request.param, [])]
    out = tmp_path_factory.mktemp(request.param) / "run"
    return words, out, train(words, out)


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_the_same_images_and_losses_on_another_number_of_ranks(
    whole: tuple[list[str], Path, Seen], two_ranks: Pool, tmp_path: Path, first: int
):
    words, uncut, expected = whole
    if first == 1:
        before, after = train(words, tmp_path, BROKEN), joined(two_ranks.run(train, words, tmp_path))
    else:
        before, after = joined(two_ranks.run(train, words, tmp_path, BROKEN)), train(words, tmp_path)
    assert read_state(steps_saved(tmp_path)[0][1])["world_size"] == first

    assert (min(after), max(before)) == (SAVED, BROKEN - 1)
    seen = before | after
    assert seen == expected
    for epoch in range(END // 3):
        shown = [index for step in range(3 * epoch, 3 * epoch + 3) for index in seen[step]]
        assert len(set(shown)) == len(shown) == 24  # none twice, and none missing but the epoch's 4 left over

    ours, theirs = lines_of(tmp_path), lines_of(uncut)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 3, 6, 9, 12]
    for line, other in zip(ours, theirs):
        # BatchNorm over few images amplifies rounding: by the end 2e-4 in SimCLR, 1e-6 in the other two.
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    for name, tensors in weights_of(uncut).items():
        others = weights_of(tmp_path)[name]
        away = sum(float((tensor.float() - others[key].float()).square().sum()) for key, tensor in tensors.items())
        assert away**0.5 <= 0.02 * sum(float(tensor.float().square().sum()) for tensor in tensors.values()) ** 0.5, name


def test_a_run_that_depends_on_its_ranks_says_so_when_they_are_others(two_ranks: Pool, tmp_path: Path, caplog):
    words = [*METHODS["simclr"], *SETTINGS, "trainer.sync_batchnorm=false"]
    two_ranks.run(train, [*words, f"trainer.steps={SAVED}"], tmp_path)
    train([*words, f"trainer.steps={SAVED + 1}"], tmp_path)
    told = [record.getMessage() for record in caplog.records if "the run had 2 ranks and has 1 now" in record.message]
    assert len(told) == 1
    assert "trainer.sync_batchnorm=false" in told[0]
    caplog.clear()
    train([*words, f"trainer.steps={SAVED + 2}"], tmp_path)
    assert "the run had" not in caplog.text


def found(method: Method, **settings: Any) -> str:
    return "; ".join(rank_dependence(method, TrainerConfig(global_batch_size=8, **settings), then=1, now=2))


def test_what_depends_on_ranks_is_told_apart():
    convolutional, plain = Method(), Method()
    convolutional.backbone = timm.create_model("resnet10t", num_classes=0)
    plain.backbone = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    assert found(convolutional) == found(plain, sync_batchnorm=False) == ""
    assert "each rank's images" in found(convolutional, sync_batchnorm=False)
    assert "those of 2 images and are those of 4 now" in found(convolutional, device_batch_size=2)
    assert found(convolutional, device_batch_size=8) == found(plain, device_batch_size=2) == ""
    for dropping in (nn.Dropout(0.1), DropPath(0.1)):
        plain.backbone = nn.Sequential(nn.Linear(2, 2), dropping)
        assert "drop path" in found(plain)
    plain.backbone = timm.create_model("ghostnet_100", num_classes=0)  # drops without a module
    assert "drop path" in found(plain)
    plain.backbone, plain.depends_on_ranks = nn.Linear(2, 2), True
    assert "mixed" in found(plain)
