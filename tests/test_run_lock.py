"""One run at a time in a run folder, whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ssl import run_lock
from ssl.checkpoint import steps_saved
from ssl.pretrain import run
from ssl.run_lock import NAME, RunLock
from tests.test_pretrain import METHODS, SHORT, composed

QUICK = {"beat": 0.02, "silent": 0.2}


def in_a_child(task: Callable[[], None]) -> tuple[int, int]:
    """Start `task` in a forked process; returns its pid and a pipe that says when it has come to its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            task()
            os.write(writing, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def end(pid: int, reading: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reading)


def hold(out: Path) -> tuple[int, int]:
    """A process that holds the run folder until it is killed."""
    pid, reading = in_a_child(lambda: RunLock(out, **QUICK).__enter__())
    assert os.read(reading, 4) == b"done"
    return pid, reading


def record_of(out: Path) -> dict:
    return json.loads((out / NAME).read_text())


def write_record(out: Path, **changes) -> dict:
    """Leave the record of a run that ended without a word."""
    record = run_lock._own_record() | changes
    (out / NAME).write_text(json.dumps(record))
    return record


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without flock, such as Lustre mounted without it."""

    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_second_run_is_refused_with_host_process_and_start_of_the_first(tmp_path: Path):
    holder = hold(tmp_path)
    since = record_of(tmp_path)["since"]
    try:
        named = re.escape(f"process {holder[0]} on {socket.gethostname()}, since {since}")
        with pytest.raises(ValueError, match=f"{named}.*out="):
            RunLock(tmp_path, **QUICK).__enter__()
        assert record_of(tmp_path)["pid"] == holder[0]
    finally:
        end(*holder)


def test_a_killed_run_is_succeeded_at_once_with_one_line(tmp_path: Path, caplog):
    holder = hold(tmp_path)
    end(*holder)
    assert (tmp_path / NAME).exists()
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):  # with the usual limits: it must not wait for them
        assert record_of(tmp_path)["pid"] == os.getpid()
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: taking over from process {holder[0]} on {socket.gethostname()}, which is gone"
    ]


def test_the_folder_is_free_again_after_the_end_and_after_an_exception(tmp_path: Path):
    def fail() -> None:
        with RunLock(tmp_path, **QUICK):
            assert (tmp_path / NAME).exists()
            raise KeyError("whatever ends the run")

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert not (tmp_path / NAME).exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "run lock"]


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path: Path):
    with RunLock(tmp_path, **QUICK):
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):
            RunLock(tmp_path, **QUICK).__enter__()
        assert (tmp_path / NAME).exists()


def test_a_child_that_outlives_the_run_does_not_keep_the_folder_locked(tmp_path: Path):
    def run_and_leave_a_child() -> None:
        RunLock(tmp_path, **QUICK).__enter__()
        child = os.fork()
        if child == 0:
            signal.pause()
        (tmp_path / "child").write_text(str(child))

    holder = in_a_child(run_and_leave_a_child)
    assert os.read(holder[1], 4) == b"done"
    child = int((tmp_path / "child").read_text())
    end(*holder)
    try:
        os.kill(child, 0)  # it lives
        with RunLock(tmp_path, **QUICK):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_releases_nothing(tmp_path: Path):
    with RunLock(tmp_path, **QUICK) as lock:
        child, reading = in_a_child(lock.release)
        assert os.read(reading, 4) == b"done"
        end(child, reading)
        assert record_of(tmp_path)["pid"] == os.getpid()
        with pytest.raises(ValueError, match="another run is at work"):
            RunLock(tmp_path, **QUICK).__enter__()


def test_without_flock_a_living_process_is_respected(tmp_path: Path, no_flock):
    holder = hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"process {holder[0]} on"):
            RunLock(tmp_path, **QUICK).__enter__()
    finally:
        end(*holder)
    with RunLock(tmp_path, **QUICK):
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_without_flock_a_process_number_given_out_again_does_not_pass_for_the_run(tmp_path: Path, no_flock):
    write_record(tmp_path, pid=os.getppid(), began="1")  # a process that lives, and began at another time
    with RunLock(tmp_path, **QUICK):
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_without_flock_the_earlier_of_two_that_come_at_once_gives_way(tmp_path: Path, no_flock, monkeypatch):
    first_write = RunLock._write

    def overtaken(lock: RunLock, file: int) -> None:
        first_write(lock, file)
        write_record(tmp_path, pid=7, host="other", token="theirs")

    monkeypatch.setattr(RunLock, "_write", overtaken)
    with pytest.raises(ValueError, match="process 7 on other"):
        RunLock(tmp_path, **QUICK).__enter__()


def test_a_run_on_another_machine_is_respected_while_its_record_changes(tmp_path: Path):
    record = write_record(tmp_path, host="node7", machine=["node7", "boot", "pid:[1]"], pid=41)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            record["beats"] += 1
            partial = tmp_path / "partial"
            partial.write_text(json.dumps(record))
            partial.replace(tmp_path / NAME)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ValueError, match=r"process 41 on node7, since .*remove .*run\.lock"):
            RunLock(tmp_path, beat=0.02, silent=5.0).__enter__()
    finally:
        stop.set()
        beating.join()
    assert record_of(tmp_path)["host"] == "node7"


def test_a_run_on_another_machine_that_fell_silent_is_succeeded(tmp_path: Path, caplog):
    write_record(tmp_path, host="node7", machine=["node7", "boot", "pid:[1]"], pid=41)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path, **QUICK):
        assert record_of(tmp_path)["pid"] == os.getpid()
    assert "watching for 0.2 s" in caplog.text
    assert "taking over from process 41 on node7" in caplog.text


def test_the_holder_keeps_rewriting_its_record(tmp_path: Path):
    def beats_at_least(number: int) -> None:
        while record_of(tmp_path)["beats"] < number:
            os.sched_yield()

    with RunLock(tmp_path, beat=0.005):
        watching = threading.Thread(target=beats_at_least, args=(3,), daemon=True)
        watching.start()
        watching.join(timeout=20)
        assert not watching.is_alive()


def test_a_torn_or_foreign_lock_file_stops_nobody(tmp_path: Path):
    for content in ("", '{"pid": 1', "[1, 2]", '{"pid": "x"}'):
        (tmp_path / NAME).write_text(content)
        with RunLock(tmp_path, **QUICK):
            assert record_of(tmp_path)["pid"] == os.getpid()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="cannot be opened"):
        RunLock(tmp_path, **QUICK).__enter__()
    assert (tmp_path / "precious").read_text() == "keep"


def _enter_held_folder(out: str) -> str:
    try:
        with RunLock(Path(out), **QUICK):
            return "entered"
    except ValueError as error:
        return str(error)


def test_all_ranks_are_refused_alike(tmp_path: Path, two_ranks):
    holder = hold(tmp_path)
    try:
        first, second = two_ranks.run(_enter_held_folder, str(tmp_path))
        assert first == second
        assert f"process {holder[0]} " in first
    finally:
        end(*holder)
    assert two_ranks.run(_enter_held_folder, str(tmp_path)) == ["entered", "entered"]


def test_a_pretraining_run_holds_its_folder_and_lets_it_go(tmp_path: Path):
    out = tmp_path / "run"
    words = [*METHODS["simclr"], *SHORT, "trainer.steps=2"]
    holder = hold(out)
    try:
        with pytest.raises(ValueError, match=f"process {holder[0]} on .*Give another out="):
            run(composed(*words), out=out)
        assert [path.name for path in out.iterdir()] == [NAME]  # not a word was written into the other's folder
    finally:
        end(*holder)
    run(composed(*words), out=out)
    assert steps_saved(out)[-1][0] == 2
    assert not (out / NAME).exists()
