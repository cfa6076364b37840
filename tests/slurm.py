"""A real Slurm on this machine's loopback: munge, a controller and three nodes, in a private folder, for the tests.

    def test_...(slurm):
        job = slurm.submit("launch/slurm.sbatch", "method=mae", cwd=ROOT)
        slurm.wait(job, "COMPLETED")

Partition `main` has the nodes n1 and n2. Partitions `low`, `spot` and `high` share n3, where a job of `high` preempts
one of `low` after a time of grace and one of `spot` at once. There is no accounting (slurmdbd).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "setpriv")
CPUS = {"n1": 16, "n2": 16, "n3": 2}
"""Of each node, as Slurm counts them: jobs may share the real ones."""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Gres=gpu:8"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
"""States that a job stays in."""
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1
PartitionName=low Nodes=n3 PriorityTier=1 GraceTime={grace}
PartitionName=spot Nodes=n3 PriorityTier=1
PartitionName=high Nodes=n3 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    absent = [name for name in NEEDED if found(name) is None]
    return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)" if absent else None


def found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """The daemons, and Slurm's commands as methods."""

    def __init__(self, *, grace: int = 20) -> None:
        """`grace` is the partition low's GraceTime: seconds that a preempted job has after its SIGTERM."""
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._configure(grace)
            self._start()
        except BaseException:
            self.close()
            raise

    def _configure(self, grace: int) -> None:
        for name in ("munge", "state", *(f"spool.{node}" for node in CPUS)):
            (self.folder / name).mkdir(mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        controller, *ports = free_ports(1 + len(CPUS))
        nodes = "\n".join(NODE.format(name=name, port=port, cpus=CPUS[name]) for name, port in zip(CPUS, ports))
        conf = CONF.format(folder=self.folder, controller=controller, nodes=nodes, user=getpass.getuser(), grace=grace)
        (self.folder / "slurm.conf").write_text(conf)
        for number in range(8):  # GPUs that a job can ask for; nothing can be computed on them
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={self.folder}/gpu[0-7]\n")

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        wait_for(lambda: (munge / "socket").exists(), "munged's socket", seconds=10)
        self._daemon("slurmctld", "-D")
        for node in CPUS:
            self._daemon("slurmd", "-D", "-N", node)
        wait_for(self._idle, "three idle nodes", seconds=30, explain=self.logs)

    def _daemon(self, name: str, *words: str) -> None:
        """Started so that it dies with this process, whatever ends it."""
        program = found(name)
        assert program is not None
        command = ["setpriv", "--pdeathsig", "KILL", program, *words]
        with (self.folder / f"{name}{words[-1] if name == 'slurmd' else ''}.log").open("wb") as log:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._daemons.append(daemon)

    def _idle(self) -> bool:
        shown = self._run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False)
        return {tuple(line.split()) for line in shown.splitlines()} == {(node, "idle") for node in CPUS}

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))

    def _run(self, *words: str, check: bool = True, **options: Any) -> str:
        ended = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False, **options
        )
        assert ended.returncode == 0 or not check, f"{' '.join(words)}: {ended.stderr}{self.logs()}"
        return ended.stdout

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """`sbatch <words>`; returns the job's number."""
        environment = {**self.environment, **variables}
        ended = subprocess.run(
            ["sbatch", "--parsable", *words], env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def wrap(self, command: str, *words: str, home: Path) -> str:
        """Submit a shell command as a job, whose output goes to a file in `home`; returns the job's number."""
        return self.submit(*words, f"--output={home}/%j.out", f"--wrap={command}", cwd=home)

    def jobs(self) -> list[str]:
        """The numbers of all jobs that Slurm remembers."""
        return re.findall(r"^JobId=(\d+)", self._run("scontrol", "show", "job", "--oneliner"), flags=re.MULTILINE)

    def show(self, job: str) -> Mapping[str, str]:
        """What `scontrol show job` says, by its names: JobState, Restarts, ExitCode..."""
        words = self._run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def signal(self, job: str, number: signal.Signals) -> None:
        """Send a signal to the job's steps, as Slurm does before the time limit."""
        self._run("scancel", f"--signal={number.name.removeprefix('SIG')}", job)

    def cancel(self, job: str) -> None:
        self._run("scancel", job)

    def steps(self, job: str) -> str:
        """The names of the job's steps that are running."""
        return self._run("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%j")

    def requeued(self, job: str, *, seconds: float = 90) -> None:
        """Wait until a job that ran is back in the queue. Fails at once where it ended instead."""
        self._wait(job, lambda record: record["JobState"] == "PENDING" and record["Restarts"] != "0", seconds=seconds)

    def restart(self, job: str, *, seconds: float = 90) -> None:
        """Wait until a job is requeued, and let it start again now: Slurm would hold it for two minutes.

        Not at once: the nodes refuse what was signed in the second in which they were told to end the job.
        """
        self.requeued(job, seconds=seconds)

        def started(record: Mapping[str, str]) -> bool:
            if record["JobState"] != "PENDING":
                return True
            if datetime.fromisoformat(record["EligibleTime"]) - datetime.now() > timedelta(seconds=10):
                self._run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            return False

        self._wait(job, started, allowed=FINAL, seconds=30)

    def wait(self, job: str, state: str, *, seconds: float = 90) -> None:
        """Wait for a state. Fails at once where the job ended in another one."""
        self._wait(job, lambda record: record["JobState"] == state, allowed={state}, seconds=seconds)

    def _wait(
        self,
        job: str,
        condition: Callable[[Mapping[str, str]], bool],
        *,
        seconds: float,
        allowed: Collection[str] = (),
    ) -> None:
        def reached() -> bool:
            record = self.show(job)
            state = record["JobState"]
            assert state in allowed or state not in FINAL, f"job {job} is {state}\n{self.output(job)}"
            return condition(record)

        wait_for(reached, f"job {job}", seconds=seconds, explain=lambda: self.output(job))

    def output(self, job: str) -> str:
        """What the job has printed, and Slurm's record of it."""
        record = self.show(job)
        files = {record.get("StdOut", ""), record.get("StdErr", "")} - {""}
        said = [f"--- {name}\n{Path(name).read_text()[-6000:]}" for name in sorted(files) if Path(name).exists()]
        return "\n".join([str(dict(record)), *said])

    def close(self) -> None:
        """Cancel every job and end the daemons and whatever else they started."""
        with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
            self._run("scancel", "--signal=KILL", f"--user={getpass.getuser()}", check=False)
            self._run("scancel", f"--user={getpass.getuser()}", check=False)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        for pid in self._descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _descendants(self) -> list[int]:
        """Processes of jobs: those that have this Slurm's folder in their environment, but for this one."""
        mark = f"SLURM_CONF={self.folder}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                    found.append(int(entry.parent.name))
        return found


def wait_for(
    condition: Callable[[], bool], what: str, *, seconds: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Look every tenth of a second until `condition` holds; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{explain()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
