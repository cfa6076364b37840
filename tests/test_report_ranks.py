"""The report of a run whose weights are cut over ranks: one rank makes it, and all find their weights as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.report.budget import Budget
from ssl.starts import read_starts
from tests.pool import Pool
from tests.test_pretrain import METHODS, SHORT
from tests.test_sharded_runs import CUT, assert_same_files, pretrain

WORDS = [
    *SHORT,
    *["trainer.precision=fp32", "trainer.steps=4", "trainer.checkpoint_every_steps=2", "trainer.ema_decay=0.5"],
    *["online=none", "launch=none", CUT],
]


def with_all_pictures(words: list[str], out: str) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "allows", lambda self, seconds, **limits: True)
        return pretrain(words, out)


@pytest.mark.parametrize("method", ["mae", "relative_location"])
def test_two_ranks_train_alike_with_and_without_the_pictures_of_features(method: str, two_ranks: Pool, tmp_path: Path):
    words = [*METHODS[method], *WORDS]
    two_ranks.run(with_all_pictures, [*words, "report.sample=16"], str(tmp_path / "with"))
    two_ranks.run(pretrain, [*words, "report=none"], str(tmp_path / "without"))
    assert (tmp_path / "with" / "pictures" / "map_00000002.png").exists()
    assert (tmp_path / "with" / "report.html").exists()
    (start,) = read_starts(tmp_path / "with")
    assert start.about["world_size"] == 2
    assert_same_files(tmp_path / "with", tmp_path / "without", tolerance=0.0)
