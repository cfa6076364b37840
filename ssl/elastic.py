"""The processes of one start, through torch elastic, which this project's launcher drives from another thread."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ssl.stopping import SIGNALS

MEETING_SECONDS = 900
"""How long the machines of a run wait for each other."""


NUM_PORTS = 10
"""Starts of a run on several machines take turns at so many ports: none meets a machine that is still at an earlier."""


@dataclass(frozen=True)
class Machines:
    """How many processes run here, and on how many machines in all; `head` and `port` are where those meet."""

    devices: int
    nodes: int = 1
    node_rank: int = 0
    head: str = "localhost"
    port: int = 0


class Agent(threading.Thread):
    """Starts `devices` times `python -m ssl.worker <place>` and waits until all have ended, or one has failed and the
    others are ended too.

    It runs in a thread so that the main one is free to handle signals. It starts the processes once: a process that
    dies takes the group with it, and another start is another agent, with another meeting place (torch 2.15's own
    restarts meet at the dead one's address again, pytorch#135712).
    """

    def __init__(self, place: Path, machines: Machines, *, attempt: int) -> None:
        """`attempt` counts the starts of this run."""
        super().__init__(name="torch elastic", daemon=True)
        self.place = place
        self.exit_codes: dict[int, int] = {}
        """By rank, of the processes that failed or were killed; a signal's number is negative."""
        self.error: Exception | None = None
        here = machines.nodes == 1  # else static: no machine has to find out which of them is the head
        who = {"is_host": True} if here else {"rank": machines.node_rank}
        self.config = LaunchConfig(
            min_nodes=machines.nodes,
            max_nodes=machines.nodes,
            nproc_per_node=machines.devices,
            run_id="ssl",
            max_restarts=0,
            rdzv_backend="c10d" if here else "static",
            rdzv_endpoint="localhost:0" if here else f"{machines.head}:{machines.port + attempt % NUM_PORTS}",
            rdzv_configs={**who, "timeout": MEETING_SECONDS},
            local_addr="localhost" if here else None,
            logs_specs=DefaultLogsSpecs(log_dir=str(place)),
        )

    def run(self) -> None:
        # The processes inherit this: they take signals once they can handle them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        _quiet()
        try:
            elastic_launch(self.config, sys.executable)("-u", "-m", "ssl.worker", str(self.place))
        except ChildFailedError as error:
            self.exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except Exception as error:
            self.error = error


def _quiet() -> None:
    """What elastic would say of an end in many lines, the launcher says in one."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
