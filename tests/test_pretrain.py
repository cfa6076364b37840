"""`python -m ssl.pretrain`, from the command line's words to the files in the run folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from ssl.checkpoint import load_backbone, steps_saved
from ssl.config import CONF, PretrainConfig, check, register_schemas
from ssl.data.views import make_views
from ssl.optim import make_optimizer, parameter_groups
from ssl.pretrain import run
from ssl.schedules import make_schedule

ROOT = Path(__file__).resolve().parents[1]
TINY_VIT = ["model=vit_micro", "model.args={embed_dim:32,depth:2,num_heads:2}"]
TINY_RESNET = ["model=resnet10", "model.args={layers:[1,1,1,1],channels:[8,8,16,16]}"]
TINY_DECODER = ["method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_heads=2"]
SHORT = [
    "data.limit=48",
    "trainer.global_batch_size=16",
    "trainer.epochs=4",
    "trainer.device=cpu",
    "trainer.log_every_steps=1",
    "wandb.mode=disabled",
    "loader.threads=1",
]
METHODS = {
    "mae": ["method=mae", *TINY_VIT, *TINY_DECODER],
    "simclr": ["method=simclr", *TINY_RESNET],
    "relative_location": ["method=relative_location", *TINY_RESNET, "method.hidden_dim=32"],
}


def composed(*overrides: str) -> DictConfig:
    register_schemas()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("pretrain", overrides=list(overrides))


def metrics_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def weights_of(out: Path) -> dict[str, dict]:
    folder = steps_saved(out)[-1][1]
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_equal_runs(first: Path, second: Path) -> None:
    assert metrics_of(first) == metrics_of(second)
    ours, theirs = weights_of(first), weights_of(second)
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        different = [key for key, tensor in tensors.items() if not tensor.equal(theirs[name][key])]
        assert not different, f"{name}: {different}"


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """One uninterrupted run of each method: 10 steps, with accumulation and a moving average."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    run(composed(*METHODS[request.param], *SHORT, *EXTRA), out=out)
    return request.param, out


EXTRA = ["trainer.steps=10", "trainer.device_batch_size=8", "trainer.ema_decay=0.9", "trainer.clip_grad_norm=1.0"]


def test_a_run_leaves_what_the_contract_says(finished: tuple[str, Path]):
    method, out = finished
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["trainer"]["steps"] == 10
    assert method in config["method"]["_target_"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert {"step", "epoch", "loss", "lr", "images_per_second", "data_wait", "bad_images"} <= lines[0].keys()
    if method == "relative_location":
        assert 0 <= lines[-1]["accuracy"] <= 1
    assert [step for step, _ in steps_saved(out)] == [10]
    recipe = json.loads((out / "recipe.json").read_text())
    assert {row["weight_decay"] for row in recipe["groups"]} >= {0.0}
    assert (out / "pictures" / "views_00000010.png").exists()
    assert (out / "pictures" / "reconstructions_00000010.png").exists() == (method == "mae")
    assert load_backbone(out).weights == "ema"


@pytest.mark.parametrize("threads", [1, 3])
def test_five_steps_and_five_more_equal_ten(finished: tuple[str, Path], tmp_path: Path, threads: int):
    method, out = finished
    if threads == 3 and method != "mae":
        pytest.skip("the number of threads acts before the method")
    words = [*METHODS[method], *SHORT, *EXTRA, f"loader.threads={threads}"]
    run(composed(*words, "trainer.steps=5"), out=tmp_path / "run")
    assert steps_saved(tmp_path / "run")[-1][0] == 5
    run(composed(*words, "trainer.steps=10"), out=tmp_path / "run")
    assert_equal_runs(tmp_path / "run", out)


def test_a_run_that_is_complete_changes_nothing(finished: tuple[str, Path], tmp_path: Path, capsys):
    method, out = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    run(composed(*METHODS[method], *SHORT, *EXTRA), out=copy)
    assert "already complete at step 10" in capsys.readouterr().out
    assert_equal_runs(copy, out)


def test_another_recipe_in_the_same_folder_is_refused_with_the_differences(finished: tuple[str, Path], tmp_path: Path):
    method, out = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    words = [*METHODS[method], *SHORT, *EXTRA, "trainer.steps=11", "optim.base_lr=0.123", "seed=4"]
    with pytest.raises(ValueError, match=r"optim.base_lr: .* -> 0.123\s+seed: 0 -> 4\s+.*accept_changes=true"):
        run(composed(*words), out=copy)
    run(composed(*words, "accept_changes=true"), out=copy)
    assert metrics_of(copy)[-1]["step"] == 11


def test_other_images_in_the_same_folder_are_refused_and_moved_ones_are_not(tmp_path: Path):
    sizes = [(40, 40)] * 8
    words = [
        *METHODS["mae"],
        "data=folder",
        "trainer.global_batch_size=4",
        "trainer.epochs=null",
        "wandb.mode=disabled",
    ]
    words.append("trainer.device=cpu")
    roots = [photos(tmp_path / name, sizes) for name in ("first", "moved", "other")]
    (roots[2] / "7.jpg").write_bytes((roots[2] / "0.jpg").read_bytes())
    run(composed(*words, f"data.root={roots[0]}", "trainer.steps=2"), out=tmp_path / "run")
    run(composed(*words, f"data.root={roots[1]}", "trainer.steps=2"), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds a run on other images.*accept_changes=true"):
        run(composed(*words, f"data.root={roots[2]}", "trainer.steps=2"), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"trainer.steps: 2 -> 3"):  # without epochs it is the schedule's span
        run(composed(*words, f"data.root={roots[0]}", "trainer.steps=3"), out=tmp_path / "run")


def test_what_the_run_will_be_is_said_before_the_first_step(tmp_path: Path, capsys):
    run(composed(*METHODS["mae"], *SHORT, "trainer.steps=1", "optim.base_lr=1e-3"), out=tmp_path)
    said = capsys.readouterr().out
    before = said[: said.index("step 1/1")]
    assert "48 images of 32x32 held in memory" in before
    assert "global batch 16 = 1 rank x 16 images x 1 accumulation step" in before
    assert "lr 6.25e-5 = base_lr 1e-3 x 16 / 256 (linear)" in before
    assert "GFLOP per image" in before
    assert "M parameters" in before
    assert f"next: python -m eval.knn ckpt={tmp_path}" in said


def test_how_long_it_will_take_is_said_after_the_first_steps(tmp_path: Path, capsys):
    run(composed(*METHODS["mae"], *SHORT, "trainer.steps=4"), out=tmp_path)
    said = capsys.readouterr().out
    assert said.index("step 2/4") < said.index("for the 2 steps to come") < said.index("step 3/4")


def photos(root: Path, sizes: list[tuple[int, int]]) -> Path:
    import numpy as np
    from PIL import Image

    root.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        coarse = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(root / f"{number}.jpg")
    return root


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_photos_of_any_size_trains_at_224_pixels(tmp_path: Path, method: str):
    root = photos(tmp_path / "photos", [(240, 320), (300, 200), (97, 130), (256, 256)])
    (root / "notes.txt").write_text("not an image")
    words = [*METHODS[method], "data=folder", f"data.root={root}", "trainer.global_batch_size=4", "trainer.steps=2"]
    run(composed(*words, "trainer.device=cpu", "wandb.mode=disabled", "loader.threads=2"), out=tmp_path / "run")
    loaded = load_backbone(tmp_path / "run")
    assert loaded.spec.image_size == (224, 224)
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.global_batch_size=1000"], "global_batch_size between 1 and 48"),
        (["method=mae", "model=resnet10"], "needs a backbone that splits the image into tokens"),
        (["model=timm", "model.name=resnet5000"], "resnet5000"),
        (["data=folder", "data.root=/nowhere/at/all"], "/nowhere/at/all"),
        (["data=folder"], r"data\.root=\.\.\."),
        (["trainer.epochs=0"], "must be positive"),
        (["+foo=1"], "nothing reads foo"),
        (["+trainer.foo=1"], r"nothing reads trainer\.foo"),
        (["schedule.milestones=[3]"], "has no effect with schedule.name=cosine"),
        (["data.image_size=abc"], "data.image_size is one size"),
        (["method._target_=ssl.methods.nothing.Here"], "cannot be found"),
        (["optim.options.nesterov=true"], "optim.options"),
        (["trainer.precision=fp16"], "needs a GPU"),
        (["trainer.keep_last=0"], "keep_last must be at least 1"),
        (["trainer.log_every_steps=0"], "log_every_steps must be at least 1"),
        (["trainer.ema_decay=1.5"], "ema_decay must lie in"),
        (["method.temperature=low"], "SimCLR was given a value of a wrong type"),
        (["+method.foo=1"], "SimCLR: .*'foo'; in a config it takes temperature"),
        (["augment.views=[3]"], "augment.views was given a value of a wrong type"),
        (["model=vit_micro", "data.image_size=30"], "patches of 4 x 4"),
    ],
)
def test_bad_settings_are_refused_in_words_before_training(tmp_path: Path, overrides: list[str], message: str):
    words = ["method=simclr", *SHORT, *overrides]
    if "optim.options.nesterov=true" in overrides:
        words = [*METHODS["mae"], *SHORT, "++optim.options.nesterov=true"]
    with pytest.raises(ValueError, match=message):
        run(composed(*words), out=tmp_path / "run")
    assert not steps_saved(tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_images_need_be_neither_square_nor_coloured(tmp_path: Path, method: str):
    root = photos(tmp_path / "photos", [(40, 60), (50, 50), (64, 48), (33, 49)])
    words = [*METHODS[method], "data=folder", f"data.root={root}", "data.image_size=[32,48]", "data.channels=1"]
    words += ["data.mean=[0.5]", "data.std=[0.25]", "trainer.global_batch_size=4", "trainer.steps=2"]
    if method == "simclr":  # the other two recipes touch no colour
        words.append(
            "augment.views=[{count: 2, scale: [0.2, 1.0], flip: 0.5, jitter: 0.8, brightness: 0.4, contrast: 0.4}]"
        )
    run(composed(*words, "trainer.device=cpu", "wandb.mode=disabled"), out=tmp_path / "run")
    loaded = load_backbone(tmp_path / "run")
    assert (loaded.spec.image_size, loaded.spec.in_chans) == ((32, 48), 1)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes_into_parts_that_can_be_built(experiment: str):
    config = composed(f"experiment={experiment}", "data.root=/some/where")
    check(config, PretrainConfig)
    views = make_views(OmegaConf.to_container(config.augment.views, resolve=True))
    assert len(views) == (2 if "simclr" in experiment or experiment == "demo" else 1)
    groups = parameter_groups(torch.nn.Linear(2, 2), weight_decay=config.optim.weight_decay)
    make_optimizer(groups, name=config.optim.name, lr=0.1, **OmegaConf.to_container(config.optim.options))
    schedule = make_schedule(
        config.schedule.name.name,
        steps_per_epoch=10,
        total_steps=int(10 * config.trainer.epochs),
        warmup_epochs=config.schedule.warmup_epochs,
        min_factor=config.schedule.min_factor,
        milestones=list(config.schedule.milestones),
        gamma=config.schedule.gamma,
    )
    assert 0 < schedule.factor(0) <= 1


def test_overrides_too_long_for_a_folder_name_do_not_collide(tmp_path: Path):
    long = ["trainer.checkpoint_every_steps=100", "schedule.warmup_epochs=0", "trainer.clip_grad_norm=1"]
    words = [*TINY_VIT, *SHORT, *long, "trainer.steps=1", "data.limit=16,20"]
    ended = command("-m", *[word for word in words if word != "data.limit=48"], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 2


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path):
    out = tmp_path / "run"
    words = [*METHODS["mae"], *SHORT, "trainer.epochs=2000", f"out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-u", "-m", "ssl.pretrain", *words]
    with subprocess.Popen(
        start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step 3/"):
                child.send_signal(signal.SIGINT)
                break
        _, said = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "Traceback" not in said
    assert "stopped by SIGINT after step" in said
    stopped_at = steps_saved(out)[-1][0]
    assert metrics_of(out)[-1]["step"] == stopped_at
    run(composed(*words, f"trainer.steps={stopped_at + 1}"), out=out)
    assert [line["step"] for line in metrics_of(out)] == list(range(1, stopped_at + 2))


def command(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "ssl.pretrain", *words],
        cwd=cwd or ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.epoch=5"], ["did you mean trainer.epochs?", "global_batch_size"]),
        (["method=mea"], ["mae", "simclr", "relative_location"]),
        (["trainer.epochs=many"], ["many", "trainer.epochs"]),
        (["data=folder", "data.root=/nowhere", "out=OUT"], ["error: ", "/nowhere"]),
    ],
)
def test_a_mistake_ends_with_a_message_and_no_traceback(tmp_path: Path, words: list[str], expected: list[str]):
    ended = command(*[word.replace("OUT", str(tmp_path / "run")) for word in words])
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    for part in expected:
        assert part in ended.stderr


def test_a_sweep_gives_each_run_its_folder(tmp_path: Path):
    words = [*TINY_VIT, *SHORT, "trainer.steps=1", "seed=0,1", "optim.base_lr=1e-3,1e-2"]
    ended = command("-m", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    folders = sorted(path.parent.relative_to(tmp_path) for path in tmp_path.rglob("metrics.jsonl"))
    assert len(folders) == 4
    assert all(folder.parts[:2] == ("runs", "mae_vit_micro_embedded") for folder in folders)
    assert not any("=" in str(folder) for folder in folders)


def test_a_sweep_goes_on_behind_a_run_that_fails(tmp_path: Path):
    ended = command("-m", *TINY_VIT, *SHORT, "trainer.steps=1", "trainer.global_batch_size=999,8", cwd=tmp_path)
    assert ended.returncode == 1
    assert "global_batch_size between 1 and 48" in ended.stderr
    assert "1 of the sweep's runs failed" in ended.stderr
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 1


def test_an_unwritable_out_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="give another out="):
        run(composed(*METHODS["mae"], *SHORT), out=tmp_path / "file" / "run")
