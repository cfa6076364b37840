"""Checkpoints: whole or absent, strict, and readable by timm alone."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tomllib
from pathlib import Path

import pytest
import timm
import torch

from ssl import checkpoint, checkpoint_card, distributed
from ssl.averaging import averaged_copy
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone, pooled_features
from ssl.optim import make_optimizer, parameter_groups, state_to_tensors
from ssl.version import commit, project_version

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


def _make(run: Path, damage: str) -> str:
    """Damage the newest checkpoint of a run; returns what is said of it."""
    newest = run / "checkpoints" / "step_00000002"
    if damage == "an empty folder":
        shutil.rmtree(newest)
        newest.mkdir()
        return "state.json cannot be read"
    if damage == "a file":
        shutil.rmtree(newest)
        newest.write_text("")
        return "state.json cannot be read"
    if damage == "of another program":
        shutil.rmtree(newest)
        newest.mkdir()
        torch.save({"step": 2}, newest / "pytorch_model.bin")
        (newest / "config.json").write_text("{}")
        return "state.json cannot be read"
    if damage == "half removed":
        (newest / "state.json").unlink()
        (newest / "config.json").unlink()
        return "state.json cannot be read"
    change = {
        "another format": {"format": 99},
        "another step": {"step": 1},
        "no step": {"step": None},
        "a text as step": {"step": "2"},
        "no checksums": {"sha256": None},
        "checksums of other types": {"sha256": {"model.safetensors": 1}},
        "not all checksums": {"sha256": {}},
        "no backbone": {"backbone": 3},
    }[damage]
    card = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(card | change))
    return {
        "another format": "has checkpoint format 99",
        "another step": "its card says step 1",
        "no backbone": "does not describe the backbone",
    }.get(damage, "step" if "step" in damage else "lacks the checksum")


@pytest.mark.parametrize(
    "damage",
    [
        "an empty folder",
        "a file",
        "of another program",
        "half removed",
        "another format",
        "another step",
        "no step",
        "a text as step",
        "no checksums",
        "checksums of other types",
        "not all checksums",
        "no backbone",
    ],
)
def test_what_only_has_a_checkpoints_name_is_skipped_by_name_and_never_for_step_0(
    run_dir: Path, tmp_path: Path, damage: str
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    said = _make(run, damage)
    warnings: list[str] = []
    state, _ = resume(run, made(seed=5)[0], warnings=warnings)
    assert state["step"] == 1
    assert len(warnings) == 1
    assert "step_00000002" in warnings[0]
    assert said in warnings[0]
    shutil.rmtree(run / "checkpoints" / "step_00000001")
    with pytest.raises(ValueError, match=r"none is whole[\s\S]*step_00000002[\s\S]*another out="):
        resume(run, made(seed=5)[0], warnings=[])


def test_an_older_checkpoint_that_is_damaged_is_not_looked_at(run_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (run / "checkpoints" / "step_00000001" / "model.safetensors").write_bytes(b"")
    state, _ = resume(run, made(seed=5)[0])
    assert state["step"] == 2


def test_a_file_in_the_place_of_the_checkpoints_is_no_new_run(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="should hold the run's checkpoints, and cannot be read: Not a directory"):
        resume(tmp_path, made()[0])


@pytest.mark.parametrize("place", ["", "step_00000002", "step_00000002/state.json", "step_00000002/model.safetensors"])
def test_what_this_user_may_not_read_is_an_error_and_no_older_checkpoint(run_dir: Path, tmp_path: Path, place: str):
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (run / "checkpoints" / place).chmod(0o000)
    method = made()[0]
    os.seteuid(65534)  # nobody
    try:
        with pytest.raises(ValueError, match="Permission denied"):
            resume(run, method)
    finally:
        os.seteuid(0)


def test_the_same_step_is_written_again_over_a_damaged_one(run_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    (run / "checkpoints" / "step_00000002" / "method.safetensors").write_bytes(b"damaged")
    save(run, 2, *made(seed=7))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000001", "step_00000002"}
    method, _ = made(seed=5)
    resume(run, method)
    expected = made(seed=7)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in method.state_dict().items())


def test_an_earlier_version_of_the_code_is_warned_of_with_both_versions(run_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    card = run / "checkpoints" / "step_00000002" / "state.json"
    state = json.loads(card.read_text())
    assert state["versions"]["torch"] == torch.__version__
    state["versions"] |= {"torch": "1.0.0", "commit": "0" * 40, "ssl": None}
    card.write_text(json.dumps(state))
    warnings: list[str] = []
    resume(run, made(seed=5)[0], warnings=warnings)
    assert len(warnings) == 1
    assert f"torch 1.0.0 -> {torch.__version__}" in warnings[0]
    assert ("commit 0000" in warnings[0]) == (commit() is not None)
    assert "ssl None" not in warnings[0]  # what is not known is not compared
    del state["versions"]
    card.write_text(json.dumps(state))
    resume(run, made(seed=5)[0])  # of before there were versions: nothing is said


def test_the_version_is_that_of_pyproject():
    written = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
    assert project_version() == written["project"]["version"]


def _resume_on_a_rank(shared: str, own: bool) -> list[object]:
    """(step, first weight, warnings, files hashed) of this rank, whose run folder is its own or all ranks' one."""
    hashed: list[str] = []
    real, checkpoint_card.sha256 = checkpoint_card.sha256, lambda path: hashed.append(path.name) or real(path)
    method, _ = made(seed=5)
    warnings: list[str] = []
    try:
        found = resume(Path(shared) / (f"rank{distributed.rank()}" if own else "run"), method, warnings=warnings)
    except ValueError as error:
        return [str(error)]
    finally:
        checkpoint_card.sha256 = real
    weight = next(iter(method.state_dict().values())).flatten()[0].item()
    return [None if found is None else found[0]["step"], weight, warnings, hashed]


def test_one_rank_hashes_and_all_take_what_it_chose(run_dir: Path, tmp_path: Path, two_ranks):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"damaged")
    first, second = two_ranks.run(_resume_on_a_rank, str(tmp_path), False)
    assert first[:2] == second[:2]
    assert first[0] == 1
    assert "step_00000002" in first[2][0]
    assert second[2:] == [[], []]
    assert len(first[3]) >= 5


def test_ranks_that_see_different_folders_are_all_told_so(run_dir: Path, tmp_path: Path, two_ranks):
    shutil.copytree(run_dir, tmp_path / "rank0")
    (tmp_path / "rank1").mkdir()
    first, second = two_ranks.run(_resume_on_a_rank, str(tmp_path), True)
    assert "rank 1 finds something else" in first[0]
    assert "must be one folder that all ranks share" in second[0]
    shutil.rmtree(tmp_path / "rank1")
    (tmp_path / "rank0").rename(tmp_path / "rank1")  # now the first rank has none: no start at step 0 either
    first, second = two_ranks.run(_resume_on_a_rank, str(tmp_path), True)
    assert "rank 0 finds no checkpoint" in first[0]
    assert "rank 0 finds no checkpoint" in second[0]


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
