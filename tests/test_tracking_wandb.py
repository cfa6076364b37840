"""wandb as it is, without an account: what it does where it dies, hangs, has no disk or no network."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ssl.wandb_run as wandb_run
from ssl.pretrain import run
from ssl.tracking import Tracker
from tests.test_pretrain import METHODS, SHORT, composed

ROOT = Path(__file__).resolve().parents[1]
PICTURE = np.zeros((4, 6, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """No key, no mode and no network settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home" / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def sent_to_wandb(run_dir: Path) -> list[dict]:
    """The rows in all offline folders of a run, in the order in which `wandb sync` uploads them."""
    rows = []
    for folder in sorted((run_dir / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in found.splitlines()]
        rows += [record for record in records if record.get("type") == "history"]
    return rows


def steps_on_wandb(run_dir: Path) -> list[int]:
    found = [re.search(r'"step\\?":\D*(\d+)', json.dumps(row)) for row in sent_to_wandb(run_dir)]
    return [int(match.group(1)) for match in found if match]


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing happened in 30 s")


def service() -> subprocess.Popen:
    """wandb-core, which this process has started."""
    from wandb.sdk import wandb_setup

    return wandb_setup._singleton._connection._proc._process  # pyright: ignore


def ready(tracker: Tracker) -> bool:
    wandb = tracker._wandb
    return wandb.run is not None and not wandb._waiting and wandb._deadline is None


@pytest.fixture(params=["SIGKILL", "SIGTERM", "SIGSTOP"])
def struck(request, monkeypatch) -> Iterator[list[float]]:
    """wandb-core gets a signal at the third logged step; returns the seconds that each log call took."""
    seconds: list[float] = []
    log = Tracker.log

    def log_and_strike(tracker: Tracker, step: int, metrics: dict) -> None:
        if step == 3:
            until(lambda: ready(tracker))
            service().send_signal(getattr(signal, request.param))
        began = time.perf_counter()
        log(tracker, step, metrics)
        seconds.append(time.perf_counter() - began)

    monkeypatch.setattr(Tracker, "log", log_and_strike)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2)
    return seconds


def test_a_run_whose_wandb_process_is_killed_or_hangs_goes_on_with_one_warning(tmp_path, struck, caplog):
    words = [*METHODS["mae"], *SHORT, "trainer.steps=8", "trainer.pictures=false", "wandb.mode=offline"]
    began = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        run(composed(*words), out=tmp_path / "run")
    assert time.perf_counter() - began < 30
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 9))
    assert len(struck) == 8
    assert max(struck) < 5
    assert sum("the run goes on without it" in message for message in caplog.messages) == 1
    assert [thread for thread in threading.enumerate() if thread.name == "wandb"] == []


def test_a_call_that_does_not_return_in_its_time_ends_wandb_and_is_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "CALL_SECONDS", 0.2)
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=10_000)
    until(lambda: ready(tracker))
    stopped = service()
    stopped.send_signal(signal.SIGSTOP)
    caplog.clear()
    caplog.set_level(logging.WARNING)
    longest, step = 0.0, 0
    while not caplog.messages:
        step += 1
        began = time.perf_counter()
        tracker.log(step, {"words": "x" * 100_000})
        longest = max(longest, time.perf_counter() - began)
        assert step < 5000
        threading.Event().wait(0.01)
    tracker.close()
    assert longest < 5
    assert caplog.messages[0] == "wandb: does not answer; the run goes on without it"
    assert stopped.returncode == -signal.SIGKILL
    assert len(lines(tmp_path)) == step


def test_rows_that_do_not_fit_the_queue_are_dropped_counted_and_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "MOST_WAITING", 0)
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=3)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert "3 rows or pictures were not sent" in caplog.text
    assert len(lines(tmp_path)) == 3
    assert steps_on_wandb(tmp_path) == []


def test_each_step_is_sent_once_over_all_starts_and_one_command_uploads_them(tmp_path, capsys):
    first = Tracker(tmp_path, wandb_mode="offline", total_steps=12)
    for step in range(1, 11):
        first.log(step, {"loss": 1.0})
    first.close()
    again = Tracker(tmp_path, wandb_mode="offline", total_steps=12, resume_step=5)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    for step in range(6, 13):
        again.log(step, {"loss": 1.0})
    again.close()
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 13))
    assert steps_on_wandb(tmp_path) == list(range(1, 13))
    assert "loss" in json.dumps(sent_to_wandb(tmp_path)[0])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("to upload this run to wandb: wandb sync ")
    named = subprocess.run(
        f"ls -d {said.split('wandb sync ')[1]}", shell=True, capture_output=True, text=True, check=True
    )
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [Path(line).resolve() for line in named.stdout.split()] == folders
    assert len(folders) == 2


def test_rows_that_an_earlier_start_did_not_send_are_sent_by_the_next(tmp_path):
    tracker = Tracker(tmp_path, wandb_mode="disabled", total_steps=9)
    for step in (1, 2, 3, 4):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=9, resume_step=3)
    tracker.log(4, {"loss": 1.0})
    tracker.close()
    assert steps_on_wandb(tmp_path) == [1, 2, 3, 4]


def test_after_a_killed_run_no_step_is_there_twice_and_what_is_new_is_there(tmp_path):
    script = f"""
import os, signal, time
from ssl.tracking import Tracker
tracker = Tracker({str(tmp_path)!r}, wandb_mode="offline", total_steps=10)
for step in range(1, 9):
    tracker.log(step, {{"loss": 1.0}})
while tracker._wandb._sent < 6:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    sent = int((tmp_path / "wandb_step").read_text())
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=10, resume_step=4)
    for step in range(5, 11):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, 11))
    steps = steps_on_wandb(tmp_path)
    assert len(set(steps)) == len(steps)
    assert set(range(sent + 1, 11)) <= set(steps)


def test_a_run_that_was_stopped_waits_for_wandb_for_a_shorter_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "STOPPED_SECONDS", 0.5)
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=10)
    until(lambda: ready(tracker))
    service().send_signal(signal.SIGSTOP)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        tracker.close()
    assert "was not finished after 0.5 s" in caplog.text


def test_a_run_from_before_sent_steps_were_noted_goes_by_its_metrics(tmp_path):
    (tmp_path / "wandb_id").write_text("0a1b2c3d\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    tracker = Tracker(tmp_path, wandb_mode="offline", total_steps=9, resume_step=1)
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert steps_on_wandb(tmp_path) == [4]


def test_without_a_key_wandb_is_offline_in_the_run_folder_and_keeps_its_id(tmp_path):
    for start in (0, 10):
        tracker = Tracker(tmp_path, config={"seed": 0}, wandb_name="a", total_steps=20, resume_step=start)
        assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
        tracker.log(start + 10, {"loss": 0.5})
        tracker.images(start + 10, "views", PICTURE)
        tracker.close()
        assert tracker._wandb.mode == "offline"
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{(tmp_path / 'wandb_id').read_text().strip()}.wandb"}
    assert sum("views" in json.dumps(row) for row in sent_to_wandb(tmp_path)) == 2
    assert steps_on_wandb(tmp_path) == [10, 10, 20, 20]  # a row and a picture each
    assert "WANDB_DATA_DIR" not in os.environ
    assert not list((tmp_path / "home").rglob("artifacts"))


def test_wandb_mode_of_the_environment_is_followed_and_the_setting_beats_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(tmp_path / "a", total_steps=1)
    tracker.close()
    assert not (tmp_path / "a" / "wandb").exists()
    tracker = Tracker(tmp_path / "b", wandb_mode="offline", total_steps=1)
    tracker.close()
    assert (tmp_path / "b" / "wandb").exists()


def test_online_without_a_key_goes_offline_with_a_warning_and_no_prompt(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(tmp_path, wandb_mode="online", total_steps=1)
        tracker.close()
    assert tracker._wandb.mode == "offline"
    assert "no API key" in caplog.text


def test_a_key_without_a_network_goes_offline_with_one_warning_and_the_run_does_not_wait(tmp_path):
    script = f"""
import time
from ssl import tracking, wandb_run
wandb_run.INIT_SECONDS = 1
began = time.perf_counter()
tracker = tracking.Tracker({str(tmp_path)!r}, total_steps=1)
tracker.log(1, {{"loss": 1.0}})
waited = time.perf_counter() - began
tracker.close()
print(tracker._wandb.mode, waited < 1)
"""
    environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "offline True"
    assert [line for line in done.stderr.splitlines() if "wandb" in line] == done.stderr.splitlines()
    assert done.stderr.count("going on offline") == 1
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert steps_on_wandb(tmp_path) == [1]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MiB, full but for a few pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", shlex.quote(str(folder))], check=True)


@pytest.mark.parametrize("full_from", ["the start", "step 3"])
def test_a_full_disk_costs_no_line_and_no_time(small_disk, monkeypatch, caplog, full_from):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 5)
    monkeypatch.chdir(small_disk.parent)

    def fill() -> None:
        with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    if full_from == "the start":
        (small_disk / "run").mkdir()
        fill()
    tracker = Tracker(small_disk / "run", wandb_mode="offline", total_steps=2000)
    began = time.perf_counter()
    for step in range(1, 301):
        if step == 3 and full_from == "step 3":
            until(lambda: ready(tracker))
            fill()
        tracker.log(step, {"loss": 1.0, "words": "x" * 200})
        tracker.images(step, "views", PICTURE)
    assert time.perf_counter() - began < 10
    assert (small_disk / "run" / "metrics.jsonl").read_text().count("\n") < 300
    (small_disk / "filler").unlink()
    tracker.close()
    assert [row["step"] for row in lines(small_disk / "run")] == list(range(1, 301))
    assert sum("metrics.jsonl cannot be written" in message for message in caplog.messages) == 1
    assert sum(".png cannot be written" in message for message in caplog.messages) == 1
