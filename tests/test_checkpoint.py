"""Checkpoints: whole or absent, strict, and readable by timm alone."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch

from ssl import checkpoint
from ssl.averaging import averaged_copy
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone, pooled_features
from ssl.optim import make_optimizer, parameter_groups, state_to_tensors

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
VIT = {"name": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
RESNET = {"name": "resnet18", "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "stem": "standard"}


def made(model: dict = VIT, *, seed: int = 0):
    torch.manual_seed(seed)
    backbone, spec = build_backbone(image_size=(32, 32), **model)
    return SimCLR(backbone, temperature=0.2, projection_dim=8, image_size=(32, 32)), spec


def save(run_dir: Path, step: int, method, spec, *, ema=None) -> Path:
    optimizer = make_optimizer(parameter_groups(method, weight_decay=0.1), name="adamw", lr=1e-3)
    return checkpoint.save(
        run_dir,
        step=step,
        method=method,
        spec=spec,
        optimizer_tensors=state_to_tensors(optimizer),
        ema=ema,
        config_yaml="seed: 3\n",
        state={"epoch": 0.5},
        mean=MEAN,
        std=STD,
    )


def resume(run_dir: Path, method, *, ema=None, warnings: list[str] | None = None):
    warn = warnings.append if warnings is not None else pytest.fail
    return checkpoint.resume(run_dir, method=method, ema=ema, check=lambda folder: None, warn=warn)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2, for tests that only read or that copy it."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, 1, *made(seed=1))
    save(folder, 2, *made(seed=2))
    return folder


@pytest.mark.parametrize(
    "ckpt", ["", "checkpoints", "checkpoints/step_00000002", "checkpoints/step_00000002/state.json"]
)
def test_a_run_its_checkpoint_and_a_file_in_it_name_the_same_backbone(run_dir: Path, ckpt: str):
    loaded = checkpoint.load_backbone(run_dir / ckpt)
    expected = made(seed=2)[0].backbone.state_dict()
    assert loaded.step == 2
    assert loaded.config == {"seed": 3}
    assert (loaded.mean, loaded.std, loaded.run_dir) == (MEAN, STD, run_dir)
    assert not loaded.model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_timm_alone_loads_a_checkpoint_and_an_export_with_equal_features(tmp_path: Path, model: dict):
    method, spec = made(model)
    folder = save(tmp_path / "run", 1, method, spec)
    out = checkpoint.export(checkpoint.load_backbone(folder), tmp_path / "export")
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = pooled_features(method.backbone.eval(), image)
        for place in (folder, out):
            theirs = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
            torch.testing.assert_close(theirs(image), ours)
            assert list(theirs.pretrained_cfg["mean"]) == MEAN
    again = checkpoint.load_backbone(out)
    assert (again.spec, again.mean) == (spec, MEAN)


def test_resume_gives_back_method_average_and_optimizer_state(tmp_path: Path):
    method, spec = made(seed=1)
    ema = {name: tensor + 1 for name, tensor in averaged_copy(method).items()}
    save(tmp_path, 7, method, spec, ema=ema)
    other, _ = made(seed=2)
    other_ema = averaged_copy(other)
    state, tensors = resume(tmp_path, other, ema=other_ema)
    assert state["step"] == 7
    assert all(
        torch.equal(a, b) for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert all(torch.equal(other_ema[name], ema[name]) for name in ema)
    assert tensors
    loaded = checkpoint.load_backbone(tmp_path)
    assert loaded.weights == "ema"
    assert torch.equal(loaded.model.state_dict()["cls_token"], ema["backbone.cls_token"])


def test_a_run_without_checkpoints_starts_at_its_beginning(tmp_path: Path):
    assert resume(tmp_path, made()[0]) is None


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run_dir: Path, tmp_path: Path, damage: str):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    newest = run / "checkpoints" / "step_00000002"
    weights = newest / "method.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "remove":
        weights.unlink()
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        (newest / "state.json").write_text('{"format": 1, "st')
    warnings: list[str] = []
    method, _ = made(seed=5)
    state, _ = resume(run, method, warnings=warnings)
    assert state["step"] == 1
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    expected = made(seed=1)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in method.state_dict().items())
    with pytest.raises(ValueError, match="step_00000002"):
        checkpoint.load_backbone(run)
    (run / "checkpoints" / "step_00000001" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none is whole"):
        resume(run, method, warnings=[])


def test_a_checkpoint_of_another_model_is_refused_with_the_keys(run_dir: Path):
    with pytest.raises(ValueError, match=r"missing from it \(backbone\..*left over"):
        resume(run_dir, made(RESNET)[0])
    wider = {**VIT, "model_args": {**VIT["model_args"], "embed_dim": 64}}
    with pytest.raises(ValueError, match=r"is \(32,\) there, \(64,\)"):
        resume(run_dir, made(wider)[0])


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.load_backbone(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not an export"):
        checkpoint.load_backbone(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        checkpoint.load_backbone(tmp_path)


def test_a_pickle_is_never_run(run_dir: Path, tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    target = run / "checkpoints" / "step_00000002" / "model.safetensors"
    torch.save({"cls_token": Payload()}, target)
    state_path = target.with_name("state.json")
    state = json.loads(state_path.read_text())
    state["sha256"]["model.safetensors"] = checkpoint.sha256(target)  # a forger can write the hash too
    state_path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not a safetensors file"):
        checkpoint.load_backbone(run)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_checkpoints_before_it_whole(run_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as on a full disk, without one
    try:
        with pytest.raises(OSError, match=r"step 3 could not be written to .*MiB free"):
            save(run, 3, *made(seed=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in checkpoint.steps_saved(run)] == [1, 2]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000001", "step_00000002"}
    assert checkpoint.load_backbone(run).step == 2


def test_old_checkpoints_go_and_the_kept_ones_stay(tmp_path: Path):
    method, spec = made()
    for step in (10, 20, 25, 30, 35):
        save(tmp_path, step, method, spec)
        checkpoint.prune(tmp_path, newest=step, keep_last=2, keep_every_steps=20)
    assert [step for step, _ in checkpoint.steps_saved(tmp_path)] == [20, 30, 35]
