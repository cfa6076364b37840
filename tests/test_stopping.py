"""What asks a run to stop: signals, the time limit, and who handled the signal before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ssl.distributed as distributed
import ssl.stopping as stopping
from ssl.checkpoint import steps_saved
from ssl.pretrain import run
from ssl.stopping import SIGNALS, TIME_IS_UP, Agreement, Stopped, StopRequests
from tests.test_pretrain import SHORT, TINY_VIT, assert_equal_runs, composed

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_its_handler_comes_back(number: int):
    before = signal.getsignal(number)
    with StopRequests() as requests:
        assert requests.code == 0
        os.kill(os.getpid(), number)
        assert requests.code == number
    assert signal.getsignal(number) is before


def test_the_first_signal_is_the_one_that_is_told():
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.code == signal.SIGUSR2


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_time_is_up_at_the_deadline_and_not_before():
    with StopRequests(deadline=time.monotonic() + 3600) as requests:
        assert requests.code == 0
    with StopRequests(deadline=time.monotonic()) as requests:
        assert requests.code == TIME_IS_UP


@pytest.mark.parametrize(
    ("code", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGUSR2, 140), (TIME_IS_UP, 124)],
)
def test_exit_codes_are_those_that_shells_give(code: int, expected: int):
    assert Stopped(3, code).exit_code == expected


def test_what_handled_the_signal_before_is_called_once_the_step_is_saved():
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGUSR2)
            stopped = requests.stopped(5, requests.code)
        assert called == []
        stopped.pass_on()
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_one_process_agrees_with_itself_at_once():
    agreement = Agreement()
    assert agreement.reached(0) == 0
    assert agreement.reached(signal.SIGTERM) == signal.SIGTERM


def test_after_ctrl_c_the_next_one_ends_the_process_whatever_it_waits_for():
    code = (
        "import os, signal, threading, time\n"
        "from ssl.stopping import StopRequests\n"
        "with StopRequests() as requests:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert requests.code == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGINT


def test_a_run_at_its_time_limit_saves_and_goes_on(tmp_path: Path):
    words = ["method=mae", *TINY_VIT, *SHORT]
    run(composed(*words), out=tmp_path / "whole")
    with pytest.raises(Stopped, match=r"trainer\.max_time") as stopped:
        run(composed(*words, "trainer.max_time=0.001s"), out=tmp_path / "cut")
    assert stopped.value.exit_code == 124
    assert steps_saved(tmp_path / "cut")[-1][0] == stopped.value.step == 1
    run(composed(*words, "trainer.max_time=1h"), out=tmp_path / "cut")
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_time_limit_counts_from_the_launcher_however_often_processes_are_started_again(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stopping, "_launched", None)
    stopping.count_time_from(100.0)
    for _ in range(2):
        distributed.start("cpu")
        assert stopping.deadline_of("90s") == 190.0
    assert stopping.deadline_of(None) is None


def test_the_time_limit_of_a_lone_run_counts_from_where_it_begins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "_launched", None)
    before = time.monotonic()
    distributed.start("cpu")
    after = time.monotonic()
    first = stopping.deadline_of("60s")
    assert first is not None
    assert before + 60 <= first <= after + 60
    assert stopping.deadline_of("60s") == first
