"""Runs that are killed, by tests/kill.py: whatever moment a SIGKILL comes at, the same command continues."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kill import METHODS, Report, differences, kill_and_compare

KILLS = 25


@pytest.fixture(scope="module", params=METHODS)
def killed(request, tmp_path_factory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    seed = list(METHODS).index(request.param)
    return kill_and_compare(request.param, kills=KILLS, seed=seed, folder=folder), folder


def test_a_run_killed_25_times_ends_as_the_uninterrupted_one_bit_for_bit(killed: tuple[Report, Path]):
    report, folder = killed
    assert report.differences == [], report.text()
    assert (len(report.deaths), report.starts) == (KILLS, KILLS + 1)
    assert (folder / "killed" / "wandb").is_dir()  # in two of the starts


def test_the_kills_come_during_saves_and_between_them_and_before_the_first(killed: tuple[Report, Path]):
    report, _ = killed
    assert sum(death.saving for death in report.deaths) >= KILLS // 4
    assert sum(not death.saving for death in report.deaths) >= KILLS // 8
    assert report.deaths[0].saved == 0
    assert len({death.where for death in report.deaths}) >= KILLS // 4
    assert report.deaths[-1].step > 0


def spoil_weights(run: Path) -> None:
    """The lowest bit of one number."""
    path = max((run / "checkpoints").iterdir()) / "optimizer.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.float32 and tensor.numel())
    tensors[name].view(torch.int32).flatten()[0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_state(run: Path) -> None:
    path = max((run / "checkpoints").iterdir()) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epoch": 99.0}))


def repeat_a_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[1:]]))


def leave_a_partial_save(run: Path) -> None:
    (run / "checkpoints" / ".partial_step_00000001").mkdir()


def leave_a_temporary_file(run: Path) -> None:
    (run / "metrics.jsonl.tmp").write_text("")


@pytest.mark.parametrize("killed", ["mae"], indirect=True)  # the comparison is the same for every method
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_weights, "optimizer.safetensors differs"),
        (spoil_state, "epoch is .* and 99.0"),
        (repeat_a_line, "metrics.jsonl: "),
        (leave_a_partial_save, "checkpoints: .*partial"),
        (leave_a_temporary_file, "files of the run: .*tmp"),
    ],
)
def test_the_comparison_sees(killed: tuple[Report, Path], tmp_path: Path, spoil, told: str):
    _, folder = killed
    shutil.copytree(folder / "killed", tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    before = differences(folder / "peace", tmp_path / "run")
    spoil(tmp_path / "run")
    (found,) = [line for line in differences(folder / "peace", tmp_path / "run") if line not in before]
    assert re.search(told, found)
