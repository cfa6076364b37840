"""Runs of several processes: how they start, what they are told, how they end, and what becomes of a lost one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import ssl.distributed as distributed
import ssl.launch as launch
import ssl.stopping
import ssl.worker
from ssl.checkpoint import steps_saved
from ssl.config import PretrainConfig, plain
from ssl.elastic import Machines
from ssl.launch import Ending, _Requests, find_machines
from ssl.launch_files import Report, Task, Workers, read_task, write_report, write_task
from ssl.pretrain import run
from ssl.stopping import Stopped
from tests import forks
from tests.run_folder import write_run
from tests.test_pretrain import METHODS, SHORT, composed, metrics_of

SMALL = [*METHODS["mae"], *SHORT, "trainer.precision=fp32", "trainer.pictures=false", "online=none"]
TWO = ["trainer.devices=2", "trainer.checkpoint_every_steps=4"]


class Launched:
    """A command that starts two processes, as a fork; what it printed, and the processes that it started."""

    def __init__(self, home: Path, *words: str, command: str = "ssl.pretrain") -> None:
        self.said_in = home / "said.txt"
        self.places = home / "launch"
        self.places.mkdir(exist_ok=True)
        self.process: BaseProcess = forks.start(
            [command, *words],
            home=home,
            said=self.said_in,
            before=forget_temporary_folder,
            TMPDIR=str(self.places),
            OMP_NUM_THREADS="1",
        )

    @property
    def said(self) -> str:
        return self.said_in.read_text() if self.said_in.exists() else ""

    def workers(self, *, start: int = 0) -> dict[int, int]:
        """The pids of the processes of the given start, by rank."""
        found = self.places.glob(f"ssl_launch_*/{start}/rank_*.pid")
        return {int(path.stem.removeprefix("rank_")): int(path.read_text()) for path in found}

    def appear(self, *, start: int = 0) -> dict[int, int]:
        """Both processes of a start, once they have begun."""
        until(lambda: len(self.workers(start=start)) == 2, lambda: self.said)
        return self.workers(start=start)

    def reaches(self, pattern: str) -> None:
        """Wait until a line that was printed begins with a pattern."""
        until(lambda: re.search(f"^{pattern}", self.said, re.MULTILINE) is not None, lambda: self.said)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def code(self) -> int | None:
        self.process.join(120)
        return self.process.exitcode


def forget_temporary_folder() -> None:
    """Let TMPDIR be read again, which the process that commands are forked from has read."""
    tempfile.tempdir = None


def until(condition: Callable[[], bool], explain: Callable[[], str], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.02)


def alive(pids: dict[int, int]) -> list[int]:
    """Of some processes, those that run; a zombie does not."""
    found = []
    for pid in pids.values():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if state != "Z" else []
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts commands; whatever is left of them at the end is killed."""
    started: list[Launched] = []

    def begin(*words: str, **options: str) -> Launched:
        started.append(Launched(tmp_path, *words, **options))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.join()
        for path in each.places.glob("ssl_launch_*/*/rank_*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)


# ---- runs that train -------------------------------------------------------------------------------------------------


def test_a_killed_rank_and_then_a_killed_launcher_cost_no_more_than_steps_since_a_checkpoint(
    start: Callable[..., Launched], tmp_path: Path
):
    out = tmp_path / "run"
    launched = start(*SMALL, *TWO, "trainer.epochs=200", f"out={out}")
    launched.reaches("step 6/")
    os.kill(launched.workers()[1], signal.SIGKILL)
    began = time.monotonic()
    launched.reaches("training again: step [0-9]+ was done")
    bound = time.monotonic() - began
    line = re.search(r"rank 1 on (\S+) was killed by SIGKILL, .* starting all again from step (\d+)", launched.said)
    assert line, launched.said
    assert line[1] == os.uname().nodename
    assert int(line[2]) >= 4
    shown = re.search(r"training again: step (\d+) was done ([0-9.]+) s after the loss", launched.said)
    assert shown
    assert int(shown[1]) > int(line[2])
    assert float(shown[2]) <= bound + 1
    assert alive(launched.workers()) == []

    workers = launched.appear(start=1)
    launched.process.kill()
    until(lambda: alive(workers) == [], lambda: f"left behind: {alive(workers)}")
    assert list(launched.places.glob("ssl_launch_*")) == []
    step = steps_saved(out)[-1][0]
    assert step > int(line[2])
    assert step % 4 or metrics_of(out)[-1]["step"] == step  # saved where it was, between two checkpoints

    run(composed(*SMALL, "trainer.epochs=200", f"trainer.steps={step}"), out=tmp_path / "alone")
    for together, alone in zip(metrics_of(out), metrics_of(tmp_path / "alone"), strict=True):
        assert together["step"] == alone["step"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def test_two_processes_give_back_their_result_and_leave_what_one_process_leaves(
    start: Callable[..., Launched], tmp_path: Path
):
    words = [*SMALL, "trainer.steps=2", "seed=0", f"out={tmp_path / 'run'}"]
    launched = start("-m", *words, "trainer.devices=2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert launched.code() == 0, launched.said
    run(composed(*words), out=tmp_path / "alone")
    assert (tmp_path / "run" / "checkpoints" / "step_00000002").is_dir()
    outcome = json.loads(next((tmp_path / "sweep").rglob("outcome.json")).read_text())
    assert outcome["metrics"]["loss"] == pytest.approx(metrics_of(tmp_path / "alone")[-1]["loss"], rel=1e-4)
    assert launched.said.count("global batch 16 = 2 ranks x 8 images") == 1
    assert alive(launched.workers()) == []


def test_a_signal_reaches_the_processes_and_the_step_is_saved(start: Callable[..., Launched], tmp_path: Path):
    out = tmp_path / "run"
    launched = start(*SMALL, *TWO, "trainer.epochs=2000", f"out={out}")
    launched.reaches("step 2/")
    launched.send(signal.SIGUSR2)
    assert launched.code() == 128 + signal.SIGUSR2, launched.said
    step = steps_saved(out)[-1][0]
    assert launched.said.count(f"stopped by SIGUSR2 after step {step}, which is saved") == 1
    assert metrics_of(out)[-1]["step"] == step
    assert "Traceback" not in launched.said, launched.said


def test_a_mistake_that_all_ranks_share_is_said_once(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, "trainer.global_batch_size=999", f"out={tmp_path / 'run'}")
    assert launched.code() == 1
    assert launched.said.count("error: ") == 1
    assert launched.said.count("global_batch_size between 1 and 48") == 1
    assert "Traceback" not in launched.said, launched.said
    assert list(launched.places.glob("ssl_launch_*")) == []


@pytest.mark.parametrize(
    ("command", "words", "written"),
    [
        ("eval.finetune", ["recipe=simclr", "trainer.device=cpu"], "finetune/simclr/seed0/eval/finetune.json"),
        ("eval.linear_probe", ["protocol=mae", "device=cpu"], "eval/linear_probe_mae.json"),
    ],
)
def test_evaluations_that_train_do_so_on_two_processes(
    start: Callable[..., Launched], tmp_path: Path, command: str, words: list[str], written: str
):
    judged = write_run(tmp_path / "run")
    words = [f"ckpt={judged}", *words, "trainer.devices=2", "trainer.steps=1", "trainer.global_batch_size=8"]
    launched = start(*words, "trainer.pictures=false", "wandb.mode=disabled", command=command)
    assert launched.code() == 0, launched.said
    assert "global batch 8 = 2 ranks x 4 images" in launched.said
    result = json.loads((judged / written).read_text())
    assert 0 <= result["metrics"]["top1"] <= 1
    assert launched.said.count("written: ") == 1


# ---- processes that are caught while they start: no torch is loaded, so these are quick ------------------------------


def test_a_group_is_started_again_only_so_often(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, "launch.max_restarts=2", f"out={tmp_path / 'run'}")
    for attempt in range(3):
        os.kill(launched.appear(start=attempt)[attempt % 2], signal.SIGKILL)
    assert launched.code() == 75, launched.said
    assert "starting all again from step 0 (2 of 2 restarts)" in launched.said
    assert "that is 3 times since step 0, and launch.max_restarts=2" in launched.said
    assert "Traceback" not in launched.said, launched.said


def test_ctrl_c_before_training_ends_all_in_order(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, f"out={tmp_path / 'run'}")
    workers = launched.appear()
    launched.send(signal.SIGINT)
    assert launched.code() == 130, launched.said
    assert "stopped by SIGINT outside of training" in launched.said
    assert "Traceback" not in launched.said, launched.said
    assert alive(workers) == []


def test_a_second_ctrl_c_ends_all_at_once(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, f"out={tmp_path / 'run'}")
    workers = launched.appear()
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)  # so that the first cannot end them
    launched.send(signal.SIGINT)
    launched.process.join(0.5)
    assert launched.process.is_alive()
    began = time.monotonic()
    launched.send(signal.SIGINT)
    assert launched.code() == 130, launched.said
    assert time.monotonic() - began < 10
    assert "Traceback" not in launched.said, launched.said
    assert alive(workers) == []


def test_processes_that_do_not_end_within_shutdown_seconds_are_killed(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, "launch.shutdown_seconds=1", f"out={tmp_path / 'run'}")
    workers = launched.appear()
    for pid in workers.values():
        os.kill(pid, signal.SIGSTOP)
    launched.send(signal.SIGTERM)
    assert launched.code() == 143, launched.said
    assert "launch.shutdown_seconds=1" in launched.said
    assert alive(workers) == []


def test_processes_end_with_a_launcher_that_is_killed_before_they_train(start: Callable[..., Launched], tmp_path: Path):
    launched = start(*SMALL, *TWO, f"out={tmp_path / 'run'}")
    workers = launched.appear()
    launched.process.kill()
    until(lambda: alive(workers) == [], lambda: f"left behind: {alive(workers)}")


# ---- which processes there are ---------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_does_the_work_itself(alone: pytest.MonkeyPatch):
    assert find_machines(composed("trainer.device=cpu")) is None
    assert find_machines(composed("trainer.device=cpu", "launch=none")) is None


def test_processes_are_as_many_as_asked_for(alone: pytest.MonkeyPatch):
    assert find_machines(composed("trainer.device=cpu", "trainer.devices=3")) == Machines(3)
    assert find_machines(composed("trainer.device=cpu", "launch.devices=3")) == Machines(3)


def test_a_rank_of_a_launcher_starts_no_others(alone: pytest.MonkeyPatch):
    alone.setenv("RANK", "1")
    alone.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_machines(composed("trainer.device=cpu", "trainer.devices=2")) is None
    with pytest.raises(ValueError, match=r"trainer.devices=4 has no effect: a launcher has started 2 processes"):
        find_machines(composed("trainer.device=cpu", "trainer.devices=4"))


def test_each_machine_of_several_says_which_it_is(alone: pytest.MonkeyPatch):
    several = composed("trainer.device=cpu", "launch.nodes=2")
    with pytest.raises(ValueError, match=r"launch.nodes=2 needs NODE_RANK, MASTER_ADDR, MASTER_PORT"):
        find_machines(several)
    alone.setenv("NODE_RANK", "1")
    alone.setenv("MASTER_ADDR", "10.0.0.1")
    alone.setenv("MASTER_PORT", "29500")
    assert find_machines(several) == Machines(1, nodes=2, node_rank=1, head="10.0.0.1", port=29500)
    alone.setenv("NODE_RANK", "2")
    with pytest.raises(ValueError, match="NODE_RANK=2 must be from 0 to 1"):
        find_machines(several)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch=none", "trainer.devices=2"], "trainer.devices=2 have no effect"),
        (["launch=none", "launch.nodes=2"], "launch.nodes=2"),
        (["trainer.devices=0"], "must be at least 1"),
    ],
)
def test_settings_without_effect_are_refused(alone: pytest.MonkeyPatch, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        find_machines(composed("trainer.device=cpu", *words))


# ---- what the processes say ------------------------------------------------------------------------------------------


def report(rank: int, code: int, message: str = "", **values: Any) -> Report:
    return Report(rank=rank, host="node7", code=code, message=message, **values)


def reports(*each: Report) -> dict[int, Report]:
    return {one.rank: one for one in each}


def test_the_result_is_that_of_the_first_rank_of_a_machine():
    ended = Ending(reports(report(3, 0, result={"loss": 2.0}), report(2, 0, result={"loss": 1.0})))
    assert ended.result() == {"loss": 1.0}
    assert not ended.is_lost


def test_a_mistake_is_no_loss_although_its_peers_lose_contact(capsys: pytest.CaptureFixture[str]):
    ended = Ending(reports(report(0, 75, "Connection closed by peer"), report(1, 1, "no such file")), {0: 75, 1: 1})
    with pytest.raises(ValueError, match="no such file"):
        ended.result()
    assert capsys.readouterr().err == ""


def test_another_rank_is_heard_only_where_it_says_something_else(capsys: pytest.CaptureFixture[str]):
    shared = [report(0, 1, "bad rate"), report(1, 1, "bad rate"), report(2, 1, "no GPU here")]
    with pytest.raises(ValueError, match="bad rate"):
        Ending(reports(*shared), {0: 1, 1: 1, 2: 1}).result()
    assert capsys.readouterr().err == "[rank 2] no GPU here\n"


def test_an_error_of_the_programs_names_its_rank():
    with pytest.raises(ChildProcessError, match="rank 1: TypeError: 3"):
        Ending(reports(report(1, 1, "TypeError: 3", is_plain=False)), {1: 1}).result()


def test_a_process_that_ends_without_a_word_is_no_result():
    with pytest.raises(ChildProcessError, match="rank 1 ended with exit code 3"):
        Ending(reports(report(0, 75, "")), {0: 75, 1: 3}).result()


@pytest.mark.parametrize(
    ("codes", "said", "told"),
    [
        ({1: -signal.SIGSEGV, 0: -signal.SIGTERM}, reports(), "rank 1 on HOST was killed by SIGSEGV"),
        ({0: -signal.SIGBUS, 1: 75}, reports(report(1, 75, "Read error")), "rank 0 on HOST was killed by SIGBUS"),
        ({1: 75}, reports(), "rank 1 on HOST gave up"),
        ({1: -9}, reports(report(0, 143, "stopped")), "rank 1 on HOST was killed by SIGKILL"),
        (
            {0: 75, 1: 75, 2: -signal.SIGTERM},
            reports(report(0, 75, "Read error"), report(1, 75, "ECC error", is_fault=True)),
            r"rank 1 on node7 ended by a fault of its device, .*\(ECC error\)",
        ),
        ({0: 75}, reports(report(0, 75, "Read error")), r"rank 0 on node7 lost the others, .*\(Read error\)"),
    ],
)
def test_a_loss_names_the_process_that_was_lost_first(codes: dict[int, int], said: dict[int, Report], told: str):
    ended = Ending(said, codes, lost_at=time.time())
    assert ended.result() is None
    assert ended.is_lost
    assert re.match(told.replace("HOST", os.uname().nodename), ended.how())


@pytest.mark.parametrize("code", [124, 130, 143, 138, 140])
def test_a_stop_is_no_loss_and_keeps_its_code_and_step(code: int):
    ended = Ending(reports(report(0, code, "stopped", step=7), report(1, code, "stopped", step=7)))
    with pytest.raises(Stopped) as stopped:
        ended.result()
    assert (stopped.value.exit_code, stopped.value.step) == (code, 7)


def test_nothing_is_started_again_once_it_was_asked_to_stop(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        Ending(reports(), {0: -9, 1: -9}, asked=signal.SIGTERM).result()
    assert end.value.code == 143
    assert "before the processes had saved" in capsys.readouterr().err


def test_a_task_and_a_report_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = Task("ssl.pretrain", "runs/a $b", 3.5, 20, launcher=7, began=0.1)
    config = composed(*SMALL, "optim.base_lr=1.0000000000000002e-5")
    write_task(tmp_path, task, OmegaConf.to_yaml(config, resolve=True))
    found, path = read_task(tmp_path)
    assert found == task
    merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.load(path))
    assert plain(merged) == plain(config)
    assert merged.trainer.device == config.trainer.device

    monkeypatch.setenv("RANK", "3")
    write_report(tmp_path, code=0, result={"loss": np.float32(0.5), "path": tmp_path})
    (back,) = Workers(tmp_path).reports().values()
    assert (back.rank, back.code, back.result) == (3, 0, {"loss": 0.5, "path": str(tmp_path)})


def test_only_commands_of_the_table_are_run(tmp_path: Path):
    place = tmp_path / "launch" / "0"
    ended = worker(place, Task("os.system", "x", 1.0, 20, launcher=os.getpid(), began=time.monotonic()))
    assert ended.returncode == 1
    assert Workers(place).reports()[0].message == "KeyError: 'os.system'"


def test_a_process_whose_launcher_died_before_it_began_does_nothing_and_leaves_nothing(tmp_path: Path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    place = tmp_path / "launch" / "0"
    ended = worker(place, Task("os.system", "x", 60.0, 20, launcher=gone.pid, began=time.monotonic()))
    assert "os.system" not in ended.stderr
    assert not place.parent.exists()


def worker(place: Path, task: Task) -> subprocess.CompletedProcess[str]:
    """A process of a launcher's that has left it a task, once it has ended."""
    place.mkdir(parents=True)
    write_task(place.parent, task, "{}")
    words = [sys.executable, "-m", "ssl.worker", str(place)]
    environment = {**os.environ, "RANK": "0", "PYTHONPATH": str(forks.ROOT)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


# ---- between two starts ----------------------------------------------------------------------------------------------


def test_two_ctrl_c_after_a_sigterm_end_all_at_once():
    requests = _Requests()
    for number, at_once in [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)]:
        requests._note(number, None)
        assert requests.at_once is at_once
    assert requests.number == signal.SIGTERM


def test_a_signal_between_two_starts_is_heard_and_no_other_start_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[int] = []

    def lose(*_: Any, attempt: int, **__: Any) -> Ending:
        started.append(attempt)
        return Ending({}, {0: -9}, lost_at=time.time())

    def listed_while_a_signal_comes(out: Path) -> list[tuple[int, Path]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return []

    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(launch, "_start_once", lose)
    monkeypatch.setattr(launch, "steps_saved", listed_while_a_signal_comes)
    settings = composed("launch.max_restarts=9").launch
    with pytest.raises(SystemExit) as end:
        launch._run_and_restart(Machines(2), tmp_path, settings, out=tmp_path)
    assert end.value.code == 128 + signal.SIGUSR1
    assert started == [0]
    assert "ended by SIGUSR1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_stop_knows_who_handled_the_signal_before_the_launcher():
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with _Requests() as requests, pytest.raises(Stopped) as stopped:
            Ending(reports(report(0, 140, "stopped", step=7)), earlier=requests.earlier).result()
    finally:
        signal.signal(signal.SIGUSR2, before)
    stopped.value.pass_on()
    assert called == [signal.SIGUSR2]


def test_a_start_goes_on_from_the_newest_whole_checkpoint_although_a_damaged_one_is_newer(tmp_path: Path):
    write_run(tmp_path)
    ((step, folder),) = steps_saved(tmp_path)
    newer = folder.with_name(f"step_{step + 1:08}")
    shutil.copytree(folder, newer)
    (newer / "model.safetensors").write_bytes(b"cut short")
    assert launch._last_whole_step(tmp_path, unless=0) == step


def test_a_folder_that_cannot_be_listed_for_a_moment_counts_as_it_was(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("no folder")
    assert launch._last_whole_step(tmp_path, unless=5) == 5


# ---- one process of a launcher's, in this one ------------------------------------------------------------------------


def one_attempt(place: Path, end: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[int, Report]:
    """The exit code of a process whose run is `end`, and what it reports."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ssl.worker, "_run", lambda task, config: end())
    monkeypatch.setattr(ssl.stopping, "_launched", None)
    task = Task("ssl.pretrain", "x", 1.0, 20, launcher=os.getpid(), began=time.monotonic())
    return ssl.worker._attempt(place, task, place), Workers(place).reports()[0]


def raises(error: Exception) -> Callable[[], Any]:
    def end() -> Any:
        raise error

    return end


def test_a_fault_of_a_device_is_a_loss_and_memory_that_does_not_suffice_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code, said = one_attempt(tmp_path, raises(torch.AcceleratorError("uncorrectable ECC error")), monkeypatch)
    assert (code, said.code, said.is_fault) == (75, 75, True)
    code, said = one_attempt(tmp_path, raises(torch.OutOfMemoryError("CUDA out of memory")), monkeypatch)
    assert (code, said.code, said.is_fault) == (1, 1, False)


@pytest.mark.parametrize(("end", "code"), [(lambda: 0.5, 0), (raises(Stopped(7, signal.SIGTERM)), 143)])
def test_a_process_tells_how_it_ended_although_it_cannot_leave_the_group(
    end: Callable[[], Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "stop", raises(RuntimeError("Connection closed by peer")))
    assert one_attempt(tmp_path, end, monkeypatch)[0] == 0
    assert Workers(tmp_path).reports()[0].code == code
