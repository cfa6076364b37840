"""A rank that makes a mistake is told from one that is lost, on all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import ssl.command as command
import ssl.distributed as distributed
import ssl.worker as worker
from ssl.last_words import WAIT_SECONDS, LastWords
from ssl.launch import Ending
from ssl.launch_files import Report, Task, Workers
from tests.pool import Pool

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:561] /gloo/ Connection closed by peer")


def _last_words_of_the_first() -> tuple[str | None, float]:
    words = LastWords(distributed.shared_store("test of last words"), distributed.world_size())
    began = time.monotonic()
    if distributed.rank() == 0:
        words.tell("no such file")
    took = time.monotonic() - began
    distributed.barrier()  # where the second waits meanwhile
    words.close()
    return words.heard, took


def test_all_ranks_have_heard_before_the_one_that_made_the_mistake_leaves(two_ranks: Pool):
    (first, took), (second, _) = two_ranks.run(_last_words_of_the_first)
    assert first == second == "no such file"
    assert took < WAIT_SECONDS


def test_the_first_mistake_is_the_one_that_all_tell():
    store = dist.HashStore()
    one, other = LastWords(store, 2), LastWords(store, 2)
    assert one.of_another() is None
    one.tell("no such file")
    other.tell("no such image")
    assert one.of_another() == other.of_another() == "no such file"
    one.close()
    other.close()


def test_one_process_has_nobody_to_tell():
    distributed.tell_mistake("no such file")
    assert distributed.mistake_of_another() is None


@pytest.mark.parametrize(("heard", "code", "message"), [("no such file", 1, "no such file"), (None, 75, str(LOST))])
def test_contact_that_is_lost_to_a_mistake_is_that_mistake(
    heard: str | None, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def lose(*_: Any) -> None:
        raise LOST

    monkeypatch.setattr(distributed, "mistake_of_another", lambda: heard)
    monkeypatch.setattr(command, "check_submitted", lose)
    ending = command._attempt(lose, None, catch=(ValueError,))  # pyright: ignore[reportArgumentType]
    assert (ending.code, ending.is_said) == (code, heard is not None)
    assert message in str(ending.message)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(worker, "_run", lose)
    task = Task("ssl.pretrain", "x", 1.0, 20, launcher=0, began=time.monotonic())
    assert worker._attempt(tmp_path, task, tmp_path) == code
    said = Workers(tmp_path).reports()[0]
    assert (said.code, said.message, said.is_heard) == (code, message, heard is not None)


def test_a_launcher_says_a_mistake_once_and_of_the_rank_that_made_it(capsys: pytest.CaptureFixture[str]):
    heard = Report(0, "node7", 1, "TypeError: 3", is_heard=True)
    made = Report(1, "node7", 1, "TypeError: 3", is_plain=False)
    with pytest.raises(ChildProcessError, match="rank 1: TypeError: 3"):
        Ending({0: heard, 1: made}, {0: 1, 1: 1}).result()
    with pytest.raises(ValueError, match="TypeError: 3"):  # on another machine than that rank's
        Ending({0: heard}, {0: 1}).result()
    assert capsys.readouterr().err == ""
