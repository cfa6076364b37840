"""`python -m eval.knn` and `python -m eval.linear_probe`: what they write, what they print, and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from eval import knn, linear_probe
from eval.command import start
from eval.config import register
from eval.untrained import untrained_folder, untrained_title
from ssl import checkpoint
from ssl.config import CONF
from ssl.data.embedded import Embedded
from ssl.methods.base import Method
from ssl.models.backbones import build_backbone

TINY = ["model=resnet10", "model.args.channels=[8,8,16,16]"]
SMALL = ["data=embedded", "data.source.num_train=120", "data.source.num_test=36"]
QUICK = ["device=cpu", "threads=1"]
SCHEMAS = {knn: knn.KnnConfig, linear_probe: linear_probe.LinearProbeConfig}
FEW_HEADS = ["lr=[0.01,0.1]", "weight_decay=[0.0,0.1]", "steps=50"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Baselines write below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A run folder with one checkpoint, as pretraining writes it, of the backbone that seed 0 starts from."""
    run_dir = tmp_path_factory.mktemp("runs") / "simclr_tiny"
    torch.manual_seed(0)
    args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    backbone, spec = build_backbone("resnet18", image_size=(32, 32), model_args=args)
    method = Method()
    method.backbone = backbone
    data = OmegaConf.load(f"{CONF}/data/embedded.yaml")
    data.source.num_train, data.source.num_test = 120, 36
    checkpoint.save(
        run_dir,
        step=12,
        method=method,
        spec=spec,
        optimizer_tensors={},
        ema=None,
        config_yaml=OmegaConf.to_yaml({"data": data, "seed": 0, "method": {"_target_": "ssl.methods.simclr.SimCLR"}}),
        state={"epoch": 1.0},
        mean=list(data.mean),
        std=list(data.std),
    )
    return run_dir


def composed(module, *overrides: str) -> DictConfig:
    """The config of a command as these words make it."""
    register(SCHEMAS[module])
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(module.__name__.removeprefix("eval."), overrides=[*overrides, *QUICK])


def call(module, *overrides: str):
    """What the command does with these words, in this process."""
    return module.run(composed(module, *overrides))


def test_knn_writes_metrics_and_the_protocol_beside_the_run(a_run, capsys):
    result = call(knn, f"ckpt={a_run}", "k=[5,20]")
    written = json.loads((a_run / "eval" / "knn.json").read_text())
    assert written == {"metrics": result["metrics"], "protocol": result["protocol"]}
    assert written["metrics"]["top1"] == written["metrics"]["top1_k5_T0.07"]
    protocol = written["protocol"]
    weights = a_run / "checkpoints" / "step_00000012" / "model.safetensors"
    assert protocol["checkpoint"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert protocol["checkpoint"]["step"] == 12
    assert (protocol["k"], protocol["temperature"], protocol["metric"]) == ([5, 20], [0.07], "cosine")
    assert (protocol["data"]["num_train"], protocol["data"]["num_test"], protocol["data"]["num_classes"]) == (
        120,
        36,
        12,
    )
    assert protocol["features"]["image_size"] == [32, 32]
    assert protocol["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert f"top-1 {written['metrics']['top1']:.1%}" in said
    assert f"written: {a_run}/eval/knn.json" in said
    assert f"next: python -m eval.linear_probe ckpt={a_run}" in said


def test_a_result_in_the_place_of_one_of_another_protocol_is_told(a_run, capsys):
    call(knn, f"ckpt={a_run}", "name=again", "k=[5]")
    call(knn, f"ckpt={a_run}", "name=again", "k=[5]")
    assert "in the place of" not in capsys.readouterr().out
    call(knn, f"ckpt={a_run}", "name=again", "k=[7]")
    assert "in the place of one of another protocol (k [5] -> [7]" in capsys.readouterr().out


def test_a_sweep_of_an_evaluation_leaves_a_result_for_each_run(a_run, tmp_path, monkeypatch):
    GlobalHydra.instance().clear()
    words = ["-m", f"ckpt={a_run}", "k=[5],[20]", f"out={tmp_path}", *QUICK]
    monkeypatch.setattr(sys, "argv", ["eval.knn.py", *words])
    start(knn.run, SCHEMAS[knn], command="eval.knn")
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["knn_k-20.json", "knn_k-5.json"]


def test_the_linear_probe_writes_its_grid_and_its_choice(a_run):
    call(linear_probe, f"ckpt={a_run}", *FEW_HEADS)
    written = json.loads((a_run / "eval" / "linear_probe.json").read_text())
    assert 0.0 <= written["metrics"]["top1"] <= written["metrics"]["top5"] <= 1.0
    grid, choice = written["protocol"]["grid"], written["protocol"]["choice"]
    assert len(grid) == 4
    assert (choice["lr"], choice["weight_decay"]) in {(row["lr"], row["weight_decay"]) for row in grid}
    assert (written["protocol"]["held_out"], written["protocol"]["num_held_out"]) == (
        "5 folds, each held out in turn",
        120,
    )


def test_a_run_its_checkpoint_and_its_export_are_one_backbone(a_run, tmp_path):
    of_run = call(knn, f"ckpt={a_run}")["metrics"]
    of_step = call(knn, f"ckpt={a_run}/checkpoints/step_00000012")["metrics"]
    exported = checkpoint.export(checkpoint.load_backbone(a_run), tmp_path / "export")
    of_export = call(knn, f"ckpt={exported}", *SMALL)
    assert of_run == of_step == of_export["metrics"]
    assert of_export["path"] == str(exported / "eval" / "knn_embedded.json")


def test_ckpt_random_is_the_backbone_that_the_same_seed_starts_from(a_run):
    untrained = call(knn, "ckpt=random", *TINY, *SMALL)
    assert untrained["metrics"] == call(knn, f"ckpt={a_run}")["metrics"]
    folder = "runs/random_resnet18_args.channels-8-8-16-16_args.layers-1-1-1-1_embedded/seed0"
    assert untrained["path"] == f"{folder}/eval/knn.json"
    assert call(knn, "ckpt=random", "seed=1", *TINY, *SMALL)["metrics"] != untrained["metrics"]


def test_raw_pixels_are_a_baseline_of_their_own():
    result = call(knn, "ckpt=pixels", *SMALL)
    assert result["protocol"]["centered"] is True
    assert result["protocol"]["features"]["dimensions"] == 3 * 32 * 32
    assert Path("runs/pixels_embedded/eval/knn.json").is_file()


def test_one_test_image_is_enough():
    few = ["data=embedded", "data.source.num_train=24", "data.source.num_test=1"]
    result = call(knn, "ckpt=pixels", *few, "k=[100]")
    assert result["metrics"]["top1"] in (0.0, 1.0)
    assert "k=100 is more than the bank's 24 images" in result["protocol"]["notes"][0]


def test_the_limit_of_the_run_holds_unless_another_is_given(a_run):
    assert call(knn, f"ckpt={a_run}", "data.limit=60")["protocol"]["data"]["num_train"] == 60


def test_the_next_command_repeats_what_was_typed_of_the_subject(monkeypatch, capsys):
    words = ["ckpt=random", *TINY, *SMALL, "k=[3]", "seed=2"]
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["eval.knn.py", *words, *QUICK])
    start(knn.run, knn.KnnConfig, command="eval.knn")
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: python -m eval.linear_probe ")
    assert shlex.split(command) == ["ckpt=random", *TINY, *SMALL, "seed=2", *QUICK]


def test_untrained_backbones_are_called_as_they_were_typed_and_share_no_folder(monkeypatch):
    typed = ([], ["model.init=xavier_normal"], ["++model.args.channels=[8,8,16,16]"])
    told, folders = [], []

    def keep(config):
        told.append(untrained_title(config))
        folders.append(untrained_folder(config, data="embedded"))
        return {"metrics": {}}

    for model in ("resnet10", "resnet18"):
        for words in typed:
            GlobalHydra.instance().clear()
            monkeypatch.setattr(sys, "argv", ["eval.knn.py", "ckpt=random", f"model={model}", *words])
            start(keep, knn.KnnConfig, command="eval.knn")
    assert told[:2] == ["untrained resnet10", "untrained resnet10, init=xavier_normal"]
    assert folders[0] == Path("runs/random_resnet10_embedded/seed0")
    assert len(set(folders)) == len(folders)
    called = [["model=resnet10"], ["model=resnet18"], ["model=resnet18", "model.init=xavier_normal"]]
    configs = [composed(knn, "ckpt=random", *words) for words in called]  # from Python, nothing is typed
    assert len({untrained_folder(config, data="embedded") for config in configs}) == 3


# ---- labels and splits ---------------------------------------------------------------------------------------------


def write_images(root: Path, *folders: str, each: int = 6) -> Path:
    source = Embedded("train", num_train=each * len(folders))
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for place in range(each):
            Image.fromarray(np.asarray(source.read(number * each + place))).save(root / folder / f"{place}.png")
    return root


def test_a_labelled_folder_without_test_split_has_a_fifth_held_out_and_says_so(tmp_path, capsys):
    root = write_images(tmp_path / "photos", "cats", "dogs", each=10)
    result = call(knn, "ckpt=pixels", "data=folder", f"data.root={root}")
    data = result["protocol"]["data"]
    assert (data["num_train"], data["num_test"]) == (16, 4)
    assert data["test_split"] == "20% held out of train, stratified, seed 0"
    assert "note: there is no test split" in capsys.readouterr().out


def test_classes_are_joined_by_name_not_by_number(tmp_path):
    root = write_images(tmp_path / "photos", "train/ant", "train/bee", "train/cat")
    for name in ("bee", "cat"):
        shutil.copytree(root / "train" / name, root / "test" / name)
    result = call(knn, "ckpt=pixels", "data=folder", f"data.root={root}", "k=[1]")
    assert result["metrics"]["top1"] == 1.0  # each test image lies in train


def test_a_folder_without_labels_is_refused_with_the_layout_that_it_needs(tmp_path):
    root = write_images(tmp_path / "photos", "all")
    with pytest.raises(ValueError, match=r"(?s)eval.knn needs labels; data=folder at .* has none.*train/<class>"):
        call(knn, "ckpt=pixels", "data=folder", f"data.root={root}")


def test_a_test_class_that_train_lacks_is_refused_by_name(tmp_path):
    root = write_images(tmp_path / "photos", "train/ant", "train/bee", "test/ant", "test/wasp")
    with pytest.raises(ValueError, match="lacks: wasp"):
        call(knn, "ckpt=pixels", "data=folder", f"data.root={root}")


def test_the_data_of_a_checkpoint_may_have_moved(a_run, tmp_path):
    root = write_images(tmp_path / "photos", "train/ant", "train/bee", "test/ant", "test/bee")
    folder = tmp_path / "moved" / "checkpoints" / "step_00000012"
    shutil.copytree(a_run / "checkpoints" / "step_00000012", folder)
    data = {"name": "folder", "root": "/gone", "source": {"_target_": "ssl.data.folder.Folder", "root": "/gone"}}
    rewrite_config(folder, {"data": data, "seed": 0})
    with pytest.raises(ValueError, match=r"(?s)/gone.*give data.root="):
        call(knn, f"ckpt={tmp_path / 'moved'}")
    assert not (tmp_path / "moved" / "eval").exists()
    assert call(knn, f"ckpt={tmp_path / 'moved'}", f"data.root={root}")["protocol"]["data"]["num_test"] == 12


def test_a_checkpoint_names_no_code_but_ours(a_run, tmp_path):
    folder = tmp_path / "theirs" / "checkpoints" / "step_00000012"
    shutil.copytree(a_run / "checkpoints" / "step_00000012", folder)
    rewrite_config(folder, {"data": {"name": "x", "source": {"_target_": "os.system", "command": "true"}}, "seed": 0})
    with pytest.raises(ValueError, match=r"may only name parts of ssl\.data\."):
        call(knn, f"ckpt={tmp_path / 'theirs'}")


def rewrite_config(folder: Path, config: dict) -> None:
    """Put another config into a checkpoint, with its hash."""
    (folder / "run.yaml").write_text(OmegaConf.to_yaml(config))
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["run.yaml"] = hashlib.sha256((folder / "run.yaml").read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))


# ---- refusals ------------------------------------------------------------------------------------------------------


def refuse(monkeypatch, capsys, module, *words: str) -> tuple[int, str]:
    """Exit code and message of a command that must fail."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
    with pytest.raises(SystemExit) as end:
        start(module.run, SCHEMAS[module], command=module.__name__)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return end.value.code, said


@pytest.mark.parametrize("module", [knn, linear_probe])
def test_a_missing_ckpt_ends_with_code_2_and_the_ways_to_give_one(module, monkeypatch, capsys):
    code, said = refuse(monkeypatch, capsys, module)
    assert code == 2
    assert f"{module.__name__} needs ckpt=" in said
    assert "ckpt=random model=resnet18" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ckpt=nowhere"], "ckpt=nowhere does not exist"),
        (["ckpt=pixels", "temprature=[0.1]"], "did you mean temperature?"),
        (["ckpt=pixels", "k=[many]"], "many"),
        (["ckpt=pixels", "data=cifar11"], "cifar10"),
        (["ckpt=pixels", "k=[0]"], "k must name"),
        (["ckpt=random"], "give model="),
        (["ckpt=pixels", "model=resnet18"], "model= has no effect"),
        (["ckpt=pixels", "data.root=/x"], "data.root has no effect"),
        (["ckpt=pixels", "out=a_file/eval"], "give another out="),
    ],
)
def test_mistakes_end_with_one_message_and_code_1(words, message, monkeypatch, capsys):
    Path("a_file").touch()
    code, said = refuse(monkeypatch, capsys, knn, *words)
    assert code == 1
    assert message in said


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_checkpoints_are_refused(damage, a_run, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "run"
    folder = run_dir / "checkpoints" / "step_00000012"
    if damage == "empty":
        run_dir.mkdir()
    else:
        shutil.copytree(a_run / "checkpoints" / "step_00000012", folder)
        weights = (folder / "model.safetensors").read_bytes()
        if damage == "truncated":
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        else:
            (folder / "state.json").write_text('{"epoch": 3}')
    code, said = refuse(monkeypatch, capsys, knn, f"ckpt={run_dir}")
    assert code == 1
    assert str(run_dir) in said
    assert not (run_dir / "eval").exists()
