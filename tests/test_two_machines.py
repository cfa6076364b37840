"""launch/several_machines.sh on two machines: two network namespaces joined by a cable, with nothing else in common but
the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssl.checkpoint import steps_saved
from ssl.pretrain import run
from tests.test_pretrain import METHODS, SHORT, composed, metrics_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "several_machines.sh"
ADDRESSES = ("10.231.7.1", "10.231.7.2")
WORDS = [*METHODS["mae"], *SHORT, "trainer.precision=fp32", "trainer.pictures=false", "online=none"]
WORDS += ["trainer.checkpoint_every_steps=4"]


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces that see each other under ADDRESSES, as eth0."""
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed (apt-get install iproute2)")
    names = (f"ssl-{os.getpid()}-0", f"ssl-{os.getpid()}-1")
    if ip("netns", "add", names[0], check=False).returncode:
        pytest.skip("network namespaces need root")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            for pid in ip("netns", "pids", name, check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name, check=False)


def start(machine: str, rank: int, said: Path, *words: str) -> subprocess.Popen[str]:
    """The script on one machine; what it prints is in the file `said`."""
    options = [
        "--nodes",
        "2",
        "--node-rank",
        str(rank),
        "--head",
        ADDRESSES[0],
        "--devices",
        "1",
        "--interface",
        "eth0",
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with said.open("w") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", machine, SCRIPT, *options, *words],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def reaches(said: Path, pattern: str, *, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while re.search(f"^{pattern}", said.read_text(), re.MULTILINE) is None:
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.05)


def test_two_machines_train_as_one_does_and_come_back_from_a_lost_process(
    machines: tuple[str, str], tmp_path: Path
) -> None:
    out, said = tmp_path / "run", [tmp_path / f"said{rank}.txt" for rank in range(2)]
    words = [*WORDS, "trainer.epochs=50", f"out={out}"]
    both = [start(machine, rank, said[rank], *words) for rank, machine in enumerate(machines)]
    reaches(said[0], "step 5/")
    workers = subprocess.check_output(["pgrep", "-f", "ssl.worker .*/ssl_launch_"], text=True).split()
    there = [pid for pid in ip("netns", "pids", machines[1]).stdout.split() if pid in workers]
    assert len(there) == 1
    os.kill(int(there[0]), signal.SIGKILL)
    reaches(said[1], "rank 1 on .* was killed by SIGKILL, .* starting all again from step")
    reaches(said[0], "rank 0 on .* lost the others, .* starting all again from step")
    reaches(said[0], "training again: step")
    for machine in both:
        machine.send_signal(signal.SIGTERM)
    assert [machine.wait(60) for machine in both] == [143, 143], said[0].read_text() + said[1].read_text()
    step = steps_saved(out)[-1][0]
    assert "2 ranks x 8 images" in said[0].read_text()
    assert "step 1/" not in said[1].read_text()  # the first rank speaks for all

    run(composed(*words, f"trainer.steps={step}"), out=tmp_path / "alone")
    together, alone = metrics_of(out), metrics_of(tmp_path / "alone")
    assert [row["step"] for row in together] == [row["step"] for row in alone] == list(range(1, step + 1))
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], rel=1e-4)


def test_the_script_says_what_is_missing() -> None:
    for options, message in [
        (["--node-rank", "0", "--head", "a"], "--nodes is missing"),
        (["--nodes", "2", "--head", "a"], "--node-rank is missing"),
        (["--nodes", "2", "--node-rank", "0"], "--head is missing"),
        (["--nodes"], "--nodes needs a value"),
        (["--node", "2"], "--node is not an option"),
    ]:
        ended = subprocess.run([SCRIPT, *options], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr.startswith(message)
    assert "usage: " in subprocess.check_output([SCRIPT, "--help"], text=True)


def test_the_script_hands_on_where_the_machines_meet(tmp_path: Path) -> None:
    spy = tmp_path / "python"
    spy.write_text('#!/bin/sh\necho "$PYTHONPATH $NODE_RANK $MASTER_ADDR $MASTER_PORT $GLOO_SOCKET_IFNAME" "$@"\n')
    spy.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(spy), "PYTHONPATH": "before"}
    options = ["--nodes", "2", "--node-rank", "1", "--head", "node0", "--port", "4000", "--interface", "eth1"]
    printed = subprocess.check_output(
        [SCRIPT, *options, "method=mae", "data.root=a folder"], env=environment, text=True
    )
    assert printed == f"{ROOT}:before 1 node0 4000 eth1 -m ssl.pretrain launch.nodes=2 method=mae data.root=a folder\n"
