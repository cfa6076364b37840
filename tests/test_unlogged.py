"""Scalars of steps that were not logged before a run stopped."""

from __future__ import annotations

import pytest
import torch

from ssl.unlogged import UnloggedSteps


def unlogged(*rows: dict[str, float]) -> UnloggedSteps:
    steps = UnloggedSteps(torch.device("cpu"))
    for row in rows:
        steps.add({name: torch.tensor(value) for name, value in row.items()})
    return steps


def test_stored_rows_are_averaged_with_those_of_the_same_names():
    resumed = unlogged()
    resumed.load(unlogged({"loss": 2.0, "skipped": 0.0}).state())
    resumed.add({"skipped": torch.tensor(1.0), "loss": torch.tensor(4.0)})
    names, rows = resumed.over_ranks()
    assert dict(zip(names, rows.T.tolist(), strict=True)) == {"loss": [2.0, 4.0], "skipped": [0.0, 1.0]}


def test_stored_rows_of_another_recipe_with_other_names_are_dropped():
    resumed = unlogged()
    resumed.load(unlogged({"loss": 2.0, "accuracy": 0.5}, {"loss": 3.0, "accuracy": 0.5}).state())
    resumed.add({"loss": torch.tensor(4.0), "grad_norm": torch.tensor(1.0)})
    names, rows = resumed.over_ranks()
    assert names == ["loss", "grad_norm"]
    assert rows.tolist() == [[4.0, 1.0]]


def test_a_step_without_a_scalar_that_the_one_before_had_is_a_mistake():
    with pytest.raises(KeyError, match="accuracy"):
        unlogged({"loss": 2.0, "accuracy": 0.5}, {"loss": 2.0})
