"""`python -m ssl.replay`: the step for which a run ended, done again, and what it is found to come from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from PIL import Image
from torch import Tensor, nn

from ssl.checkpoint import steps_saved
from ssl.checkpoint_card import read_config, read_state
from ssl.config import CONF, build, plain
from ssl.data.embedded import Embedded
from ssl.data.loader import Loader
from ssl.data.views import make_views
from ssl.failed_step import FailedStep, read_failed_step, write_failed_step
from ssl.methods.base import Batch, Method
from ssl.methods.mae import MAE
from ssl.models.backbones import BackboneSpec, backbone_from_spec
from ssl.not_finite import MOST_FOUND, FiniteWatch, find_at_fault
from ssl.pretrain import run as pretrain
from ssl.replay import ReplayConfig, find_failed, run
from ssl.replayed_step import cut_like_the_run, load
from ssl.tensor_files import load_tensors, save_tensors, sha256
from ssl.trainer import NotFinite
from tests.test_pretrain import METHODS, SHORT, composed, metrics_of

FEW = [
    "data.source.num_train=48",
    "data.source.num_test=36",
    "trainer.eval_every_epochs=null",
    "trainer.pictures=false",
]


def replay(failed: Path, *overrides: str) -> dict:
    ConfigStore.instance().store(name="replay_schema", node=ReplayConfig)
    with initialize_config_dir(CONF, version_base="1.3"):
        return run(compose("replay", overrides=[f"failed={failed}", "trainer.device=cpu", *overrides]))


class LogContrast(nn.Module):
    """The logarithm of each image's range in its first channel, minus infinity for an image of one colour."""

    def forward(self, image: Tensor) -> Tensor:
        values = image[:, 0].flatten(1)
        return (values.amax(1) - values.amin(1)).log()


class NeedsContrast(MAE):
    """A method that one image of one colour breaks."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.contrast_of = LogContrast()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": super().forward(batch)["loss"] + self.contrast_of(batch["views"][0]).mean()}


class Rounded(nn.Module):
    """log(1.001 - 1), where bf16 knows no number between 1 and 1.0078."""

    def forward(self, image: Tensor) -> Tensor:
        one = torch.ones(len(image), 1, device=image.device)
        return (nn.functional.linear(one, one[:1] * 1.001) - 1).log()


class NeedsPrecision(MAE):
    """A method that is finite in fp32 alone."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rounded = Rounded()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": super().forward(batch)["loss"] + self.rounded(batch["views"][0]).mean()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eight photos, of which 5.png is of one colour."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(8):
        pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        pixels = np.full_like(pixels, 128) if number == 5 else pixels
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


def ended(out: Path, method: str, *words: str) -> Path:
    """A run of one of this file's methods that ends for its bad steps; the folder that it names."""
    words = (*METHODS["mae"], f"method._target_=tests.test_replay.{method}", *SHORT, "trainer.max_bad_steps=1", *words)
    with pytest.raises(NotFinite) as error:
        pretrain(composed(*words), out=out)
    return Path(re.search(rf"{re.escape(str(out))}/failed\S*step_\d+", str(error.value))[0])


@pytest.fixture(scope="module")
def broken(photos: Path, tmp_path_factory) -> Path:
    words = ["data=folder", f"data.root={photos}", "data.image_size=32", "data.limit=null"]
    words += ["trainer.global_batch_size=8", "trainer.device_batch_size=4", "trainer.precision=fp32"]
    return ended(tmp_path_factory.mktemp("broken") / "run", "NeedsContrast", *words)


def test_the_image_the_module_and_the_parameter_that_broke_a_run_are_named(broken: Path, photos: Path, capsys):
    result = replay(broken, "trust=[tests]")
    assert [Path(each["image"]) for each in result["at_fault"]] == [photos / "5.png"]
    (outcome,) = result["outcomes"]
    assert outcome["module"]["name"] == "contrast_of"
    assert outcome["loss"] == "-inf"
    assert result["parts"] == 2
    assert (result["step"], result["images"]) == (1, 8)
    said = capsys.readouterr().out
    assert "contrast_of (LogContrast)" in said
    assert f"at fault: image 5, {photos / '5.png'}" in said
    assert "look at the images at fault" in said
    assert json.loads((broken / "replay.json").read_text()) == result
    assert (broken / "views.png").is_file()


def test_a_run_folder_means_its_last_failed_step(broken: Path, tmp_path: Path):
    run_folder = broken.parents[2]
    assert find_failed(run_folder) == find_failed(broken) == broken
    with pytest.raises(ValueError, match=r"holds no failed step"):
        find_failed(tmp_path)


def test_a_method_outside_of_the_package_runs_only_where_it_is_trusted(broken: Path):
    with pytest.raises(ValueError, match=r"tests\.test_replay\.NeedsContrast.*ssl\.methods\..*trust=\[tests\]"):
        replay(broken)
    with pytest.raises(ValueError, match="trust"):
        replay(broken, "trust=[test]")  # a package, not a prefix of its name


def test_a_damaged_batch_is_refused(broken: Path, tmp_path: Path):
    folder = tmp_path / "step_00000000"
    folder.mkdir()
    for path in broken.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = (broken / "batch.safetensors").read_bytes()
    (folder / "batch.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"batch\.safetensors is missing or not what was written"):
        replay(folder, "trust=[tests]")


def test_precision_is_named_where_the_step_is_finite_without_it(tmp_path: Path):
    folder = ended(tmp_path / "run", "NeedsPrecision", *FEW, "trainer.precision=bf16")
    result = replay(folder, "trust=[tests]")
    half, full = result["outcomes"]
    assert (half["precision"], full["precision"]) == ("bf16", "fp32")
    assert half["module"]["name"] == "rounded"
    assert full["module"] is None
    assert math.isfinite(full["loss"])
    assert result["advice"][0].startswith("the step is finite in fp32: trainer.precision=fp32")
    assert len(result["at_fault"]) >= MOST_FOUND
    (alone,) = replay(folder, "trust=[tests]", "trainer.precision=fp32")["outcomes"]
    assert alone == full


def test_weights_that_were_not_finite_are_told_apart(broken: Path, tmp_path: Path):
    folder = tmp_path / "step_00000000"
    folder.mkdir()
    for path in broken.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor.clone() for name, tensor in load_tensors(folder / "method.safetensors").items()}
    tensors["mask_token"] = torch.full_like(tensors["mask_token"], math.nan)
    save_tensors(tensors, folder / "method.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["method.safetensors"] = sha256(folder / "method.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    result = replay(folder, "trust=[tests]")
    assert result["weights_not_finite"] == ["mask_token"]
    assert "take an earlier checkpoint" in result["advice"][0]


@pytest.mark.parametrize("kind", METHODS)
def test_a_good_step_done_again_gives_the_loss_and_gradient_that_the_run_logged(tmp_path: Path, kind: str):
    words = [*METHODS[kind], *SHORT, *FEW, "trainer.device_batch_size=8", "trainer.precision=fp32"]
    words += ["trainer.checkpoint_every_steps=2", "trainer.steps=3", "trainer.clip_grad_norm=1e9"]
    words += ["model.drop_path=0.2"] if kind == "mae" else []
    words += ["method.dropout=0.5"] if kind == "relative_location" else []
    config = composed(*words)
    pretrain(config, out=tmp_path / "run")
    folder = dict(steps_saved(tmp_path / "run"))[2]
    source = Embedded("train", num_train=48, num_test=36)
    method = method_of(folder)
    loader = Loader(
        source,
        make_views(plain(config.augment.views)),
        size=method.view_size,
        channels=3,
        seed=0,
        num_noise=method.num_noise,
    )
    (batch,) = loader.batches(start_step=2, stop_step=3, global_batch_size=16)
    names = [source.describe(index) for index in batch["index"].tolist()]
    write_failed_step(folder, FailedStep(3, "asked for", "fp32", "cpu", names), batch)
    result = replay(folder)
    (outcome,) = result["outcomes"]
    logged = metrics_of(tmp_path / "run")[2]
    assert outcome["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert outcome["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert not result["at_fault"]
    assert len(result["largest_losses"]) == (5 if kind == "mae" else 0)


def method_of(folder: Path) -> Method:
    """The method of a checkpoint, with fresh weights."""
    spec = BackboneSpec.from_dict(read_state(folder)["backbone"])
    return build(
        read_config(folder)["method"],
        backbone=backbone_from_spec(spec),
        image_size=spec.image_size,
        in_chans=spec.in_chans,
    )


@pytest.mark.parametrize("joint", [True, False])
def test_ranks_and_parts_are_cut_as_the_run_cut_them(broken: Path, joint: bool):
    step = load(broken, trust=["tests"])
    step.state["world_size"] = 2
    step.config["trainer"] |= {"device_batch_size": 2, "sync_batchnorm": True}
    if joint:
        step.method.norm_of_all = nn.BatchNorm1d(2)
    cut = cut_like_the_run(step)
    ranks = [[0, 1, 2, 3], [4, 5, 6, 7]]  # the loader's shares of a global batch
    if joint:
        expected, keys = [share[number : number + 2] for number in (0, 2) for share in ranks], [(0, 0), (0, 1)]
    else:
        expected = [share[number : number + 2] for share in ranks for number in (0, 2)]
        keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert cut.order.tolist() == [row for part in expected for row in part]
    assert cut.keys == keys


def test_what_is_written_of_a_batch_is_read_again(tmp_path: Path):
    batch = {
        "index": torch.arange(3),
        "noise": torch.rand(3, 0),
        "crops": [torch.randint(0, 255, (3, 3, 4, 4), dtype=torch.uint8) for _ in range(11)],
        "parameters": [{"flip": torch.tensor([True, False, True]), "box": torch.rand(3, 4)}, {"flip": torch.ones(3)}],
    }
    failed = FailedStep(7, "the loss was nan", "bf16", "cuda", ["a", "b", "c"])
    write_failed_step(tmp_path, failed, batch)
    again, read = read_failed_step(tmp_path)
    assert again == failed
    assert read.keys() == batch.keys()
    assert len(read["crops"]) == 11
    assert all(ours.equal(theirs) for ours, theirs in zip(batch["crops"], read["crops"], strict=True))
    assert [set(each) for each in read["parameters"]] == [{"flip", "box"}, {"flip"}]
    assert read["parameters"][0]["box"].equal(batch["parameters"][0]["box"])
    assert read["noise"].shape == (3, 0)


@pytest.mark.parametrize("alone", [True, False])
def test_halving_finds_exactly_the_rows_at_fault(alone: bool):
    generator = np.random.default_rng(0)
    for _ in range(200):
        size, num_parts = int(generator.integers(4, 40)), int(generator.integers(1, 4))
        guilty = set(generator.choice(size, int(generator.integers(0, min(size - 1, 4))), replace=False).tolist())
        judged: list[int] = []

        def is_bad(rows: Tensor, guilty: set[int] = guilty, judged: list[int] = judged) -> bool:
            judged.append(len(rows))
            return bool(guilty & set(rows.tolist()))

        parts = torch.arange(size).tensor_split(num_parts)
        found = find_at_fault(is_bad, parts, alone=alone)
        assert set(found) >= guilty
        if alone:
            assert set(found) == guilty
            assert len(found) == len(guilty)
        else:
            assert 1 not in judged
        assert len(judged) <= num_parts + 2 * max(len(guilty), 1) * (math.ceil(math.log2(size)) + 1)


def test_rows_that_cannot_be_judged_alone_are_judged_beside_a_good_one():
    def is_bad(rows: Tensor) -> bool:
        assert len(rows) >= 2, "BatchNorm has no statistics of one row"
        return 3 in rows.tolist()

    assert find_at_fault(is_bad, [torch.arange(8)], alone=False) == [3]


def test_a_batch_that_fails_only_together_names_no_row():
    assert find_at_fault(lambda rows: len(rows) == 8, [torch.arange(8)], alone=True) == []


def test_the_first_module_and_the_first_gradient_that_are_not_finite_are_noted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), LogContrast(), nn.Linear(3, 1), nn.Tanh())
    with FiniteWatch(model) as watch:
        model(torch.zeros(3, 1, 4, 4)).sum()
    assert watch.module is not None
    assert (watch.module.name, watch.module.kind) == ("1", "LogContrast")

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.before(x).mul(0).sqrt())

    root = Root()
    with FiniteWatch(root) as watch:
        root(torch.ones(1, 1)).sum().backward()
    assert watch.module is None  # the square root of 0 is finite, and its derivative is not
    assert watch.parameter == "before.weight"
    root.zero_grad()
    root(torch.ones(1, 1)).sum().backward()
    assert root.before.weight.grad.isnan().all()
