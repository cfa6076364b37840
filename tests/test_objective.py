"""The one number of a run that a sweep is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ssl.objective import find_objective


def test_a_last_loss_that_is_not_finite_is_told_in_words(tmp_path: Path):
    config = OmegaConf.create({"objective": "loss"})
    assert find_objective(config, {"loss": 0.25}, out=tmp_path) == 0.25
    with pytest.raises(ValueError, match=r"objective=loss .* the run's last loss is not finite"):
        find_objective(config, {"loss": None}, out=tmp_path)
