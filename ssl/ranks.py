"""Which rank this process is where Slurm's srun started it, in the variables that torchrun would have set."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

FIRST_PORT, NUM_PORTS = 10000, 20000
"""Below the ports that Linux gives to outgoing connections."""


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where srun started several tasks and no other launcher did, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT from its variables; those that are set already stay.

    A batch script's own process is no task of a step, although it has SLURM_PROCID too, and is left alone.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1 or "SLURM_PROCID" not in environment:
        return
    several = int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1
    values = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(num_tasks),
        "MASTER_PORT": str(_port(environment)),
    }
    if "MASTER_ADDR" not in environment:
        values["MASTER_ADDR"] = _address(first_host(environment["SLURM_STEP_NODELIST"])) if several else "127.0.0.1"
    if len(os.sched_getaffinity(0)) >= int(environment.get("SLURM_CPUS_ON_NODE", "0")):
        values["LOCAL_WORLD_SIZE"] = str(
            _tasks_here(environment)
        )  # the tasks share the cores: none is bound to its own
    for name, value in values.items():
        environment.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: `gpu-[03-07,9],login` gives `gpu-03`."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _port(environment: Mapping[str, str]) -> int:
    """The same on every task of a step, and another one for the job beside it."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + (job + 997 * step) % NUM_PORTS


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this node, from a list as `2(x3),1`: two on each of three nodes and one on the fourth."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def _address(node: str) -> str:
    """A node's name where it resolves, else the address that Slurm itself reaches it by."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", node], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return node
    found = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return found[1] if found else node
