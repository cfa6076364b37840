"""Saves that fail: on full, read-only and forbidden disks, in part of a run and for good."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from eval.held_out import HeldOut
from ssl import checkpoint
from ssl.data.embedded import Embedded
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone
from ssl.optim import make_optimizer, parameter_groups, state_to_tensors
from ssl.pretrain import run
from ssl.saving import CannotSave, Saver, fallback_folder
from tests.test_pretrain import METHODS, SHORT, assert_equal_runs, composed

VIT = {"name": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
KEPT = {"keep_last": 2, "keep_every_steps": None, "max_failed": 3}


def write(run_dir: Path, step: int) -> Path:
    """The checkpoint of a tiny method whose weights are a function of the step."""
    torch.manual_seed(step)
    backbone, spec = build_backbone(image_size=(32, 32), **VIT)
    method = SimCLR(backbone, temperature=0.2, projection_dim=8, image_size=(32, 32))
    optimizer = make_optimizer(parameter_groups(method, weight_decay=0.1), name="adamw", lr=1e-3)
    return checkpoint.save(
        run_dir,
        step=step,
        method=method,
        spec=spec,
        optimizer_tensors=state_to_tensors(optimizer),
        ema=None,
        config_yaml="seed: 3\n",
        state={"epoch": 0.5},
        mean=[0.5] * 3,
        std=[0.25] * 3,
    )


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def names_in(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def num_bytes(tmp_path_factory) -> int:
    """The size of one checkpoint."""
    return size_of(write(tmp_path_factory.mktemp("size"), 1))


class Disk:
    """A small file system in memory, mounted for a test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path))

    def resize(self, num_bytes: int) -> None:
        """Make it as large as what is on it and `num_bytes` more."""
        usage = shutil.disk_usage(self.path)
        self._mount("-o", f"remount,size={usage.used + num_bytes}", str(self.path))

    def read_only(self, on: bool) -> None:
        self._mount("-o", f"remount,{'ro' if on else 'rw'}", str(self.path))

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, *words: str) -> None:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        small = Disk(tmp_path / "disk")
    except OSError as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    yield small
    small.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def saver(disk: Disk, tmp_path: Path, said: list[str]) -> Saver:
    return Saver(disk.path / "run", write, **KEPT, fallback=tmp_path / "elsewhere", warn=said.append)


def test_too_little_room_is_told_in_numbers_before_a_byte_is_written(disk: Disk, num_bytes: int):
    run_dir = disk.path / "run"
    write(run_dir, 1)
    disk.resize(num_bytes // 2)
    with pytest.raises(
        checkpoint.NoRoom, match=r"step 2 could not be written to .*run/checkpoints: No space"
    ) as raised:
        write(run_dir, 2)
    needed, free = [float(word) * 2**20 for word in str(raised.value).replace("(", " ").split() if _is_number(word)][
        -2:
    ]
    assert num_bytes <= needed + 2**17
    assert needed <= num_bytes * 1.2 + 2**17
    assert free == pytest.approx(shutil.disk_usage(disk.path).free, abs=2**17)
    assert names_in(run_dir) == ["step_00000001"]


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def test_a_disk_that_fills_while_it_is_written_to_leaves_no_trace(disk: Disk, num_bytes: int, monkeypatch):
    run_dir = disk.path / "run"
    write(run_dir, 1)
    disk.resize(num_bytes // 2)
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: None)  # a quota shows no limit beforehand
    with pytest.raises(OSError, match="No space left on device"):
        write(run_dir, 2)
    assert names_in(run_dir) == ["step_00000001"]
    assert checkpoint.load_backbone(run_dir).step == 1


def test_the_run_goes_on_and_saves_again_when_there_is_room(disk: Disk, num_bytes: int, saver: Saver, said: list[str]):
    assert saver.save(1)
    disk.resize(num_bytes // 2)
    assert not saver.save(2)
    assert not saver.save(3)
    assert "2 of trainer.max_failed_saves=3 failed in a row" in said[1]
    assert str(disk.path / "run/checkpoints/step_00000001") in said[1]
    disk.resize(4 * num_bytes)
    assert saver.save(4)
    assert saver.failed == 0  # so that the next failures are counted from there
    disk.resize(num_bytes // 2)
    assert [saver.save(5), saver.save(6)] == [False, False]


def test_a_read_only_disk_is_named_as_such(disk: Disk, saver: Saver, said: list[str]):
    assert saver.save(1)
    disk.read_only(True)
    assert not saver.save(2)
    assert "Read-only file system" in said[0]
    assert names_in(disk.path / "run") == ["step_00000001"]
    disk.read_only(False)
    assert saver.save(3)


def test_a_folder_without_permission_is_named_as_such(tmp_path: Path, said: list[str]):
    if os.geteuid() != 0:
        pytest.skip("changing the user needs root")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    saver = Saver(tmp_path / "run", write, **KEPT, warn=said.append)
    os.seteuid(65534)  # nobody
    try:
        os.access(folder, os.R_OK)
        assert not saver.save(1)
    finally:
        os.seteuid(0)
    assert "Permission denied" in said[0]
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("number", "advice"), [(errno.EDQUOT, "quota -s"), (errno.EIO, "Input/output error")])
def test_quotas_and_failing_disks_are_named_as_such(tmp_path: Path, monkeypatch, number: int, advice: str):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "sync", fail)  # where a delayed write of such a disk comes to light
    said: list[str] = []
    assert not Saver(tmp_path, write, **KEPT, warn=said.append).save(1)
    assert advice in said[0]
    assert names_in(tmp_path) == []


def test_the_largest_file_a_process_may_write_is_met_without_a_trace(tmp_path: Path, said: list[str]):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = Saver(tmp_path, write, **KEPT, warn=said.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert not saver.save(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in said[0]
    assert names_in(tmp_path) == []
    assert saver.save(2)


def test_what_the_next_save_makes_superfluous_goes_first_where_room_is_short(
    disk: Disk, num_bytes: int, saver: Saver, said: list[str]
):
    assert saver.save(10)
    assert saver.save(20)
    disk.resize(num_bytes)  # less than a save asks for, and with one checkpoint gone it is more
    assert saver.save(30)
    assert "removed step_00000010 before step 30" in said[0]
    assert names_in(disk.path / "run") == ["step_00000020", "step_00000030"]


def test_the_only_whole_checkpoint_is_never_removed_to_make_room(disk: Disk, num_bytes: int, saver: Saver):
    run_dir = disk.path / "run"
    assert saver.save(10)
    assert saver.save(20)
    (run_dir / "checkpoints" / "step_00000020" / "method.safetensors").write_bytes(b"damaged")
    disk.resize(num_bytes // 10)
    assert not saver.save(30)
    assert names_in(run_dir) == ["step_00000010", "step_00000020"]


def test_after_the_last_failure_the_step_is_elsewhere_and_the_command_puts_it_back(
    disk: Disk, num_bytes: int, saver: Saver, tmp_path: Path
):
    run_dir = disk.path / "run"
    assert saver.save(1)
    disk.resize(num_bytes // 2)
    assert [saver.save(2), saver.save(3)] == [False, False]
    with pytest.raises(CannotSave) as raised:
        saver.save(4)
    ended = raised.value
    assert (ended.step, ended.exit_code) == (4, 1)
    assert ended.folder == fallback_folder(run_dir, tmp_path / "elsewhere")
    assert checkpoint.load_backbone(ended.folder).step == 4
    assert checkpoint.load_backbone(run_dir).step == 1
    disk.resize(4 * num_bytes)
    subprocess.run(["sh", "-c", str(ended).splitlines()[-1]], check=True)
    assert checkpoint.load_backbone(run_dir).step == 4


def test_a_final_step_goes_elsewhere_at_the_first_failure(disk: Disk, num_bytes: int, saver: Saver, said: list[str]):
    disk.resize(num_bytes // 2)
    with pytest.raises(CannotSave, match="instead"):
        saver.save(7, final=True)
    assert not said


def test_where_the_other_place_fails_too_the_last_checkpoint_is_named(disk: Disk, num_bytes: int, said: list[str]):
    saver = Saver(disk.path / "run", write, **KEPT, fallback=disk.path / "elsewhere", warn=said.append)
    assert saver.save(1)
    disk.resize(num_bytes // 2)
    with pytest.raises(
        CannotSave, match=r"Nor could it be saved elsewhere.*last checkpoint is .*step_00000001"
    ) as raised:
        saver.save(2, final=True)
    assert raised.value.folder is None


def test_a_folder_of_another_user_is_not_written_to(tmp_path: Path):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run").write_text("no folder at all")
    place = fallback_folder(out, elsewhere)
    place.parent.mkdir()
    place.symlink_to(tmp_path / "theirs")
    with pytest.raises(CannotSave, match="belongs to someone else"):
        Saver(out, write, **KEPT, fallback=elsewhere).save(1, final=True)
    assert not list((tmp_path / "theirs").iterdir())


def test_no_two_runs_share_the_other_place(tmp_path: Path):
    assert fallback_folder(Path("runs/a/seed0"), None).is_relative_to(tempfile.gettempdir())
    places = {fallback_folder(tmp_path / name, None) for name in ("a/seed0", "b/seed0", "a_seed0", "x/a/seed0")}
    assert len(places) == 4
    assert fallback_folder(Path("runs/a"), None) == fallback_folder(Path.cwd() / "runs" / "a", None)


def test_what_a_killed_save_or_removal_left_goes_with_the_next_save(tmp_path: Path):
    for name in (".partial_step_00000009", ".removed_step_00000003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model.safetensors").write_text("half")
    write(tmp_path, 10)
    assert names_in(tmp_path) == ["step_00000010"]


def test_a_removal_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, newest=3, keep_last=1, keep_every_steps=None)
    monkeypatch.undo()
    assert [step for step, _ in checkpoint.steps_saved(tmp_path)] in ([2, 3], [1, 2, 3])
    for _, folder in checkpoint.steps_saved(tmp_path):
        checkpoint.verify(folder, checkpoint.read_state(folder))


def _save_on_ranks(out: str) -> list[str]:
    """Fail twice, then for good, with a run folder that is a file."""
    saver = Saver(Path(out), write, keep_last=1, keep_every_steps=None, max_failed=3, fallback=f"{out}_elsewhere")
    outcomes = [str(saver.save(1)), str(saver.save(2))]
    try:
        saver.save(3)
    except CannotSave as error:
        outcomes += [str(error), str(error.folder)]
    return outcomes


def test_all_ranks_learn_the_outcome_and_end_together(tmp_path: Path, two_ranks):
    out = tmp_path / "run"
    out.write_text("no folder")
    first, second = two_ranks.run(_save_on_ranks, str(out))
    assert first == second
    assert first[:2] == ["False", "False"]
    assert checkpoint.load_backbone(first[3]).step == 3


def test_the_best_weights_that_a_checkpoint_knows_of_outlive_saves_that_fail(tmp_path: Path):
    write(tmp_path, 3)
    card = checkpoint.steps_saved(tmp_path)[0][1] / "state.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"evaluations": {"held_out": {"best_step": 3}}}))
    watch = HeldOut(Embedded("train", num_train=4), folder=tmp_path, patience=2)
    for best in (3, 6, 9):  # two saves more, which fail once their state was asked for
        (tmp_path / f"best_{best:08d}.safetensors").touch()
        watch.best_step = best
        watch.state()
    assert sorted(path.name for path in tmp_path.glob("best_*")) == [
        "best_00000003.safetensors",
        "best_00000009.safetensors",
    ]


def test_best_weights_stay_where_the_checkpoints_cannot_be_listed(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("no folder")
    watch = HeldOut(Embedded("train", num_train=4), folder=tmp_path, patience=2)
    watch.best_step = 6
    for step in (3, 6):
        (tmp_path / f"best_{step:08d}.safetensors").touch()
    assert watch.state()["best_step"] == 6
    assert len(list(tmp_path.glob("best_*"))) == 2
    assert checkpoint.last_saved(tmp_path).startswith("not known")


def test_the_last_checkpoint_is_named_or_said_to_be_none(tmp_path: Path):
    assert checkpoint.last_saved(tmp_path) == "none"
    assert checkpoint.last_saved(tmp_path) != checkpoint.last_saved(write(tmp_path, 3).parent.parent)
    assert checkpoint.last_saved(tmp_path) == str(tmp_path / "checkpoints" / "step_00000003")


class AtWarning(logging.Handler):
    """Calls a function at the n-th failed save of a run."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self.number, self.act, self.messages = number, act, []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if len(self.messages) == self.number:
            self.act()


@pytest.fixture
def at_warning() -> Iterator[Callable[[int, Callable[[], None]], AtWarning]]:
    log, added = logging.getLogger("ssl.saving"), []

    def add(number: int, act: Callable[[], None]) -> AtWarning:
        added.append(AtWarning(number, act))
        log.addHandler(added[-1])
        return added[-1]

    yield add
    for handler in added:
        log.removeHandler(handler)


WORDS = [*METHODS["simclr"], *SHORT, "trainer.steps=8", "trainer.checkpoint_every_steps=2", "trainer.pictures=false"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(composed(*WORDS), out=out)
    return out


def test_a_run_on_a_full_disk_recovers_and_ends_with_the_same_weights(disk: Disk, undisturbed: Path, at_warning):
    needed = size_of(checkpoint.steps_saved(undisturbed)[-1][1])
    out = disk.path / "run"
    disk.resize(needed // 2)  # the logs have room, a checkpoint has none
    heard = at_warning(2, lambda: disk.resize(4 * needed))
    run(composed(*WORDS), out=out)
    assert len(heard.messages) == 2
    assert [step for step, _ in checkpoint.steps_saved(out)] == [6, 8]
    assert_equal_runs(out, undisturbed)


def test_a_run_whose_disk_stays_full_ends_elsewhere_and_goes_on_from_there(
    disk: Disk, undisturbed: Path, tmp_path: Path
):
    needed = size_of(checkpoint.steps_saved(undisturbed)[-1][1])
    out = disk.path / "run"
    disk.resize(needed // 2)
    words = [*WORDS, f"trainer.fallback={tmp_path / 'elsewhere'}"]
    with pytest.raises(CannotSave) as raised:
        run(composed(*words), out=out)
    assert raised.value.step == 6  # the third checkpoint that failed
    disk.resize(4 * needed)
    subprocess.run(["sh", "-c", str(raised.value).splitlines()[-1]], check=True)
    run(composed(*words), out=out)
    assert_equal_runs(out, undisturbed)
