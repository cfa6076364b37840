"""Two processes joined by gloo, started once and shared by every test that needs more than one rank.

    def _gather(start: int) -> list[float]:          # at the top level of a test file: it is sent by its name
        return all_gather(torch.tensor([start + rank()])).tolist()

    def test_...(two_ranks):
        first, second = two_ranks.run(_gather, 3)

A function that raises gives its traceback here, as an AssertionError. One that does not come back, because the ranks
wait for each other, is ended after a time limit. Either way the next call gets fresh processes.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

# Nothing heavy is imported at the top: a child imports this file before it sets the number of threads.

GRACE = 2.0
"""Seconds that the other ranks have to answer once one has raised."""


class Pool:
    """A few ranks that run a function together."""

    def __init__(self, num_ranks: int = 2, *, timeout: float = 240.0) -> None:
        self.num_ranks = num_ranks
        self.timeout = timeout
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)`, importable by its name, on every rank; return what each returned, by rank."""
        if not self._processes:
            self._start()
        task = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(task)
        answers = self._collect()
        if len(answers) == self.num_ranks and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.num_ranks)]
        self._kill()
        raise AssertionError(_explain(function.__name__, self.num_ranks, answers))

    def close(self) -> None:
        """Ask every rank to leave the group and end."""
        processes, self._processes = self._processes, []
        for connection in self._connections:
            connection.close()
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        assert all(code == 0 for code in codes), f"the ranks did not end cleanly: exit codes {codes}"

    def _start(self) -> None:
        import torch.distributed as dist

        # The store lives here, on a port that the system chose, so that no other process can take it in between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self._processes, self._connections = [], []
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self.num_ranks, self._store.port, theirs, self.timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """Answers by rank, as far as they came in time: (True, result) or (False, traceback)."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.num_ranks and (left := deadline - time.monotonic()) > 0:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            for connection in wait(waiting, timeout=left):
                assert isinstance(connection, Connection)
                rank = self._connections.index(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(timeout=GRACE)
                    answers[rank] = (False, f"the process ended, exit code {self._processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _explain(name: str, num_ranks: int, answers: dict[int, tuple[bool, Any]]) -> str:
    lines = [f"{name} failed on {num_ranks} ranks"]
    for rank in range(num_ranks):
        if rank not in answers:
            lines.append(f"--- rank {rank} did not come back; it was ended")
        elif not answers[rank][0]:
            lines.append(f"--- rank {rank}:\n{answers[rank][1]}")
    return "\n".join(lines)


def _serve(rank: int, num_ranks: int, port: int, connection: Connection, timeout: float) -> None:
    """A rank: join the group, answer calls until the other end is closed, leave the group."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 joins the parent's store instead of opening one on the port
    )
    from datetime import timedelta

    import torch

    from ssl import distributed

    torch.set_num_threads(1)
    distributed.start("cpu", timeout=timedelta(seconds=timeout))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            break
        try:
            function, args = pickle.loads(task)
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)
    distributed.stop()
    assert not torch.distributed.is_initialized()
