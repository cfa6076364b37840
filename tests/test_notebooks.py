"""The notebooks run from top to bottom, as someone who opens them would run them, and are stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from ssl.pretrain import run
from tests.test_pretrain import composed

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["look_at_a_run", "use_the_backbone_with_timm"]


@pytest.fixture(scope="module")
def run_of_ones_own(tmp_path_factory) -> Path:
    """A run that a reader has already: one epoch of MAE on few images."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    words = "method=mae model=vit_micro data.source.num_train=60 data.source.num_test=20 trainer.epochs=1"
    small = "trainer.global_batch_size=30 trainer.device=cpu wandb.mode=disabled report=none online=none"
    run(composed(*words.split(), *small.split()), out=out)
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, run_of_ones_own: Path, tmp_path: Path, monkeypatch):
    """The first one trains its own run, the other one is told of a run that is there."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if path == NOTEBOOKS[0]:
        monkeypatch.delenv("RUN", raising=False)
    else:
        monkeypatch.setenv("RUN", str(run_of_ones_own))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    told = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "%" in told
    complaints = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert complaints == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
