"""`python -m ssl.slurm CODE`, the last line of a Slurm batch script: the job runs again where that helps.

CODE is srun's exit code. A job that was warned of its time limit, that is preempted or that lost a rank continues from
its last checkpoint once it runs again; one that is done, that a person stopped or that cannot go on ends. Needs the
standard library alone, and Slurm's scontrol.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LOST_CONTACT = 75
"""As ssl.stopping says it, which imports more than a batch script should."""
TIME_IS_UP = 124
PREEMPTED = 128 + signal.SIGTERM
WARNED = (128 + signal.SIGUSR1, 128 + signal.SIGUSR2)
"""Exit codes of ranks that were told that the time limit is near."""
BY_HAND = (128 + signal.SIGHUP, 128 + signal.SIGINT)
STEADY_SECONDS = 3600
"""A job that loses a rank after so long has made checkpoints: what it lost before no longer counts."""


def decide(code: int, job: Mapping[str, str], *, lost: int, max_restarts: int) -> tuple[bool, str]:
    """Whether a job that ended with srun's exit code `code` is to run again, and why, in words.

    `job` is Slurm's record of it; `lost` how often in a row it has lost a rank before.
    """
    if code == 0:
        return False, "done"
    if job["JobState"] == "COMPLETING":
        return False, "ended by Slurm; it comes back where it was preempted or put in the queue again"
    if code in WARNED:
        return True, "warned of its time limit"
    if code == PREEMPTED:
        preempted = job["PreemptTime"] != "None"
        return preempted, "preempted" if preempted else "stopped by a SIGTERM that someone sent"
    if code == TIME_IS_UP:
        return False, "stopped at trainer.max_time"
    loss = lost_by(code)
    if loss is None:
        return False, f"ended with exit code {code}; see the output above"
    if lost >= max_restarts:
        return False, f"a rank was lost by {loss} after {lost} restarts (launch.max_restarts={max_restarts})"
    return True, f"a rank was lost by {loss}, restart {lost + 1} of {max_restarts}"


def lost_by(code: int) -> str | None:
    """What took a rank away that made no mistake: the signal that killed it, or the other ranks' silence."""
    if code == LOST_CONTACT:
        return "losing contact with the others"
    if code <= 128 or code in (*WARNED, *BY_HAND, PREEMPTED):
        return None
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return None


def job_name(environment: Mapping[str, str]) -> str:
    """The job as scontrol takes it. An array's own number would stand for all of its jobs."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def read_record(text: str) -> dict[str, str]:
    """What `scontrol show job --oneliner` prints, by its names."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def seconds_of_clock(text: str) -> int:
    """Slurm's [D-]HH:MM:SS in seconds."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def main() -> None:
    """The command line. Exits with CODE; where the job is to run again, Slurm ends this process before."""
    parser = argparse.ArgumentParser(prog="python -m ssl.slurm", description=__doc__)
    parser.add_argument("code", type=int, metavar="CODE", help="srun's exit code")
    parser.add_argument("--max-restarts", type=int, default=3, help="after lost ranks, in a row (default: 3)")
    arguments = parser.parse_args()
    if "SLURM_JOB_ID" not in os.environ:
        parser.error("SLURM_JOB_ID is not set: this is for a Slurm batch script, after its srun")
    job = job_name(os.environ)
    try:
        finish(job, arguments.code, max_restarts=arguments.max_restarts)
    except OSError as error:
        _say(job, f"not put in the queue again: {error}; submit the same command once more to continue")
    raise SystemExit(arguments.code)


def finish(job: str, code: int, *, max_restarts: int) -> None:
    """Say what becomes of the job, and put it in the queue again where it is to run again.

    Raises OSError with scontrol's message where Slurm refuses.
    """
    record = read_record(_scontrol("show", "job", "--oneliner", job))
    losses = Path(f"{record['StdOut']}.lost")  # beside the output, which outlives the restart
    steady = seconds_of_clock(record["RunTime"]) >= STEADY_SECONDS
    lost = 0 if steady else _read_count(losses)
    again, why = decide(code, record, lost=lost, max_restarts=max_restarts)
    _write_count(losses, lost + 1 if again and lost_by(code) else 0)
    if not again:
        _say(job, why)
        return
    if record["Requeue"] == "0":
        raise OSError(f"{why}, but it was submitted with --no-requeue")
    _say(job, f"{why}: back into the queue; it continues from its last checkpoint")
    _scontrol("requeue", job)
    time.sleep(300)  # Slurm ends this process: a batch script that ended first might count as the job's end


def _scontrol(*words: str) -> str:
    """What scontrol prints. Raises OSError with its message where it fails."""
    try:
        ended = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError("scontrol did not answer within a minute") from error
    if ended.returncode:
        raise OSError(ended.stderr.strip() or f"scontrol ended with exit code {ended.returncode}")
    return ended.stdout


def _read_count(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _write_count(path: Path, count: int) -> None:
    with contextlib.suppress(OSError):
        if count:
            path.write_text(f"{count}\n")
        else:
            path.unlink(missing_ok=True)


def _say(job: str, message: str) -> None:
    print(f"Slurm job {job}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
