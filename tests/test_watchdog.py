"""A run in which no step ends: processes that really hang, are stopped or gone, all of them at the same time."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import ssl.distributed as distributed
from ssl.checkpoint import steps_saved
from ssl.data.embedded import Embedded
from ssl.hang_report import DATA, GATHER, LOG, STEP, Report, explain
from ssl.slow_ranks import AGAIN, LOGS, SlowRanks, slowness
from ssl.watchdog import FIRST_STEP, Watchdog, group_timeout
from tests.forks import PRELOADED, start
from tests.test_pretrain import METHODS, SHORT
from tests.test_replay import FEW

TIMEOUT = 3.0
LONG = 1.5 * TIMEOUT
"""Too long for a step, and not for a first one."""
HANGS_AT = 5
STEPS = 9

# ---- what a rank does at the beginning of a step's phases ------------------------------------------------------------


def wait_for_data(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, HANGS_AT, DATA):
        threading.Event().wait()


def wait_alone(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (step, phase) == (HANGS_AT, DATA):
        threading.Event().wait()


def stop_rank_1(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, HANGS_AT, STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_rank_0(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (0, HANGS_AT, STEP):
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_all(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (step, phase) == (HANGS_AT, DATA):
        os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_lock(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, HANGS_AT, DATA):
        re.match(r"(a*)*b", "a" * 60)  # backtracks for ages in C, without letting another thread run


def leave(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, HANGS_AT, DATA):
        watchdog.close()
        threading.Event().wait()


def compile_at_first(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, 1, STEP):
        threading.Event().wait(LONG)


def evaluate_on_one(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    if (rank, step, phase) == (1, HANGS_AT, DATA):
        with watchdog.paused("evaluating"):
            threading.Event().wait(LONG)


def nothing(rank: int, step: int, phase: str, watchdog: Watchdog) -> None:
    pass


def _run_rank(rank: int, world_size: int, port: int, fault: Callable[..., None], folder: str) -> None:
    """A rank that trains on nothing, with its output in a file."""
    with open(f"{folder}/said{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    import torch

    torch.set_num_threads(1)
    distributed.start("cpu")
    with Watchdog(TIMEOUT, Path(folder)) as watchdog:
        for step in range(1, STEPS + 1):
            watchdog.beat(step, DATA)
            fault(rank, step, DATA, watchdog)
            watchdog.beat(step, STEP)
            fault(rank, step, STEP, watchdog)
            distributed.sum_over_ranks(torch.ones(1))
            time.sleep(0.02)  # so that the store hears of a step
    distributed.stop()


@dataclass
class Ranks:
    """The processes of one fault, and what became of them."""

    folder: Path
    processes: list[BaseProcess]

    def code(self, rank: int) -> int | None:
        return self.processes[rank].exitcode

    def said(self, rank: int) -> str:
        return (self.folder / f"said{rank}.txt").read_text()

    def stacks(self, rank: int) -> str:
        return (self.folder / "hang" / f"rank{rank}.txt").read_text()


BOTH = (0, 1)
FAULTS: dict[Callable[..., None], tuple[int, tuple[int, ...]]] = {
    wait_for_data: (2, BOTH),
    wait_alone: (1, (0,)),
    stop_rank_1: (2, (0,)),
    stop_rank_0: (2, (1,)),
    stop_all: (2, BOTH),
    hold_the_lock: (2, (0,)),
    leave: (2, (0,)),
    compile_at_first: (2, BOTH),
    evaluate_on_one: (2, BOTH),
    nothing: (2, BOTH),
}
"""How many ranks there are, and which of them end; the others are the launcher's to end."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[dict[Callable[..., None], Ranks]]:
    """All faults at once: waiting costs nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started: dict[Callable[..., None], Ranks] = {}
    for fault, (world_size, _) in FAULTS.items():
        folder = tmp_path_factory.mktemp(fault.__name__)
        port = _free_port()
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, port, fault, str(folder)), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        started[fault] = Ranks(folder, processes)
    try:
        _resume_after(started[stop_all], TIMEOUT + 1)
        deadline = time.monotonic() + 60
        for fault, (_, ending) in FAULTS.items():
            for rank in ending:
                started[fault].processes[rank].join(max(deadline - time.monotonic(), 0.0))
        while not started[hold_the_lock].said(1) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield started
    finally:
        for each in started.values():
            for process in each.processes:
                process.kill()
                process.join()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _is_stopped(process: BaseProcess) -> bool:
    if process.exitcode is not None:
        return False
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _resume_after(stopped: Ranks, seconds: float) -> None:
    """Wait until all ranks are stopped, then for so long again, and let them run."""
    deadline = time.monotonic() + 60
    while not all(map(_is_stopped, stopped.processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(seconds)
    for process in stopped.processes:
        os.kill(process.pid or 0, signal.SIGCONT)


def test_a_rank_that_waits_for_data_is_named_and_both_end(ranks):
    hung = ranks[wait_for_data]
    assert (hung.code(0), hung.code(1)) == (75, 75)
    assert re.search(r"rank 1 \(host \S+, pid \d+\): in step 5, waiting for data for \d s, at .*wait", hung.said(0))
    assert "rank 0: in step 5, the step itself" in hung.said(0)
    assert "trainer.hang_timeout" in hung.said(0)
    assert "in wait_for_data" in hung.stacks(1)
    assert "in sum_over_ranks" in hung.stacks(0)


def test_what_is_to_be_said_is_said_once_on_a_machine(ranks):
    assert ranks[wait_for_data].said(1) == ""


def test_one_process_that_waits_for_data_ends_with_its_phase(ranks):
    hung = ranks[wait_alone]
    assert hung.code(0) == 75
    assert "in step 5, waiting for data" in hung.said(0)
    assert "in wait_alone" in hung.stacks(0)


def test_a_stopped_rank_is_named_by_the_other(ranks):
    hung = ranks[stop_rank_1]
    assert hung.code(0) == 75
    assert re.search(r"rank 1 \(host \S+, pid \d+\) has been silent for \d s", hung.said(0))
    assert hung.processes[1].pid is not None
    assert f"pid {hung.processes[1].pid})" in hung.said(0)


def test_a_store_that_does_not_answer_is_named_and_does_not_hold_up_the_end(ranks):
    hung = ranks[stop_rank_0]
    assert hung.code(1) == 75
    assert re.search(r"the store at 127\.0\.0\.1:\d+ has not answered for \d s", hung.said(1))
    assert "in sum_over_ranks" in hung.stacks(1)


def test_a_rank_that_keeps_the_interpreter_lock_is_named_and_shows_its_stack(ranks):
    hung = ranks[hold_the_lock]
    assert hung.code(0) == 75
    assert re.search(r"rank 1 \(host \S+, pid \d+\) has been silent", hung.said(0))
    assert "in hold_the_lock" in hung.said(1)


def test_a_rank_that_left_is_named(ranks):
    hung = ranks[leave]
    assert hung.code(0) == 75
    assert "has left the run in step 5, waiting for data" in hung.said(0)


@pytest.mark.parametrize("fault", [compile_at_first, evaluate_on_one, stop_all, nothing])
def test_there_is_no_alarm_for_a_first_step_a_pause_a_suspended_job_and_a_good_run(ranks, fault: Callable[..., None]):
    good = ranks[fault]
    assert (good.code(0), good.code(1)) == (0, 0), good.said(0) + good.said(1)
    assert fault is stop_all or good.said(0) == ""  # a job that comes back may write stacks, and goes on
    assert not (good.folder / "hang").exists()


class Stuck(Embedded):
    """Images of which none can be read any more after a while, as from a file server that went away."""

    def __init__(self, split: str, **settings) -> None:
        super().__init__(split, **settings)
        self.num_read = 0

    def read(self, index: int):
        self.num_read += 1
        if self.num_read > 300:
            threading.Event().wait()
        return super().read(index)


def test_a_run_whose_images_cannot_be_read_any_more_ends_with_75_and_its_stacks(tmp_path: Path):
    words = [*METHODS["mae"], *SHORT, *FEW, f"out={tmp_path}/a", "data.in_memory_gib=0", "trainer.hang_timeout=2"]
    words += ["trainer.epochs=100", "trainer.checkpoint_every_steps=1"]
    words += ["data.source._target_=tests.test_watchdog.Stuck"]
    child = start(["ssl.pretrain", *words], home=tmp_path, said=tmp_path / "said.txt", OMP_NUM_THREADS="1")
    child.join(120)
    child.kill()
    child.join()
    said = (tmp_path / "said.txt").read_text()
    assert child.exitcode == 75, said
    ended = re.search(r"in step (\d+), waiting for data for \d s, at \S+ in \w+, called from ssl/", said)
    assert ended, said
    assert steps_saved(tmp_path / "a")[-1][0] == int(ended[1]) - 1
    assert "in read" in (tmp_path / "a" / "hang" / "rank0.txt").read_text()


def test_collectives_wait_for_longer_than_the_watchdog():
    for timeout in (1.0, 600.0, 1200.0, 7200.0):
        assert group_timeout(timeout).total_seconds() > FIRST_STEP * timeout
    assert group_timeout(1.0) == distributed.TIMEOUT  # a save may take longer than a step


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.hang_timeout is in seconds and must be above 0, got 0"):
        Watchdog(0)


def report(rank: int, *, step: int = 17, phase: str = STEP, where: str = "b.py:2 in all_reduce", **other) -> Report:
    return Report(rank, f"host{rank // 8}", 100 + rank, step, phase, 5.0, where, **other)


def test_of_many_ranks_the_late_one_is_named_and_the_others_are_counted():
    reports = [report(rank) for rank in range(1024)]
    reports[700] = report(700, phase=DATA, where="a.py:1 in read")
    text = explain(reports, silent={}, late=120.0, world_size=1024)
    assert text.splitlines()[1:] == [
        "  rank 700 (host host87, pid 800): in step 17, waiting for data for 5 s, at a.py:1 in read",
        "  ranks 0-699, 701-1023: in step 17, the step itself, at b.py:2 in all_reduce",
    ]


def test_a_rank_in_an_earlier_step_is_late_although_others_wait_for_data():
    reports = [report(0, step=18, phase=DATA), report(1, step=17, phase=STEP), report(2, step=18, phase=LOG)]
    named = explain(reports, silent={}, late=9.0).splitlines()[1]
    assert named.startswith("  rank 1 (host host0, pid 101): in step 17, the step itself")


def test_where_all_may_wait_for_each_other_the_odd_line_stands_first():
    reports = [report(rank) for rank in range(4)]
    reports[2] = report(2, where="c.py:3 in forward")
    lines = explain(reports, silent={}, late=9.0).splitlines()
    assert "all 4 ranks are in step 17, the step itself" in lines[1]
    assert lines[2] == "  rank 2: in step 17, the step itself, at c.py:3 in forward"
    assert lines[3].startswith("  ranks 0-1, 3: in step 17")
    assert "gathering metrics" in explain([report(0, phase=GATHER)] * 2, silent={}, late=9.0)


def test_silent_gone_and_missing_ranks_are_told_apart():
    reports = [report(0), report(1), report(2, ended=True)]
    lines = explain(reports, silent={1: 130.4}, late=131.0, world_size=5).splitlines()
    assert lines[0] == "no step was finished for 131 s (trainer.hang_timeout)"
    assert lines[1].startswith("  rank 1 (host host0, pid 101) has been silent for 130 s (stopped or its machine gone)")
    assert lines[2] == "  rank 2 (host host0, pid 102) has left the run in step 17, the step itself"
    assert lines[3] == "  ranks 3-4 never reported"
    assert lines[4].startswith("  rank 0: in step 17")


def _keys_of_two_calls() -> tuple[bool, str, bool]:
    first = distributed.shared_store("test")
    assert first is not None
    if distributed.rank() == 0:
        first.set("word", "here")
    word = first.get("word").decode()
    second = distributed.shared_store("test")
    assert second is not None
    return first.check(["word"]), word, second.check(["word"])


def test_a_shared_store_is_the_same_for_all_ranks_and_empty_at_each_call(two_ranks):
    assert two_ranks.run(_keys_of_two_calls) == [(True, "here", False)] * 2
    assert distributed.shared_store("test") is None


def _notes(own: list[float], data: list[float], count: int) -> list[str | None]:
    ranks = SlowRanks()
    rank = distributed.rank()
    return [ranks.note(own[rank], data[rank]) for _ in range(count)]


def test_a_slow_rank_is_named_on_all_ranks_after_some_logs_and_then_seldom(two_ranks):
    ours, theirs = two_ranks.run(_notes, [10.0, 30.0], [0.0, 19.0], LOGS + AGAIN)
    assert ours == theirs
    assert [number for number, said in enumerate(ours, 1) if said] == [LOGS, LOGS + AGAIN]
    name = socket.gethostname()
    assert ours[LOGS - 1] == f"rank 1 (host {name}) needs 3.0 times the median: it waits for data"
    assert "it computes slowly" in two_ranks.run(_notes, [30.0, 10.0], [1.0, 1.0], LOGS)[0][-1]


def test_ranks_that_are_about_as_fast_are_not_named(two_ranks):
    assert two_ranks.run(_notes, [10.0, 14.0], [1.0, 5.0], LOGS) == [[None] * LOGS] * 2
    assert _notes([10.0], [9.0], LOGS) == [None] * LOGS


def test_a_delay_that_hardly_counts_is_not_named(two_ranks):
    assert two_ranks.run(_notes, [1e-9, 1e-8], [0.0, 0.0], LOGS) == [[None] * LOGS] * 2


def test_slowness_is_relative_to_the_median():
    assert slowness([2.0, 1.0, 4.0]) == [1.0, 0.5, 2.0]
    assert slowness([3.0, 1.0]) == [3.0, 1.0]
    assert slowness([0.0, 0.0, 1.0]) == [1.0, 1.0, float("inf")]
