"""Runs on a real Slurm: submitted, warned, preempted, out of time, robbed of a rank; each goes on to the same end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from submitit import AutoExecutor

import ssl.distributed as distributed
from ssl.config import CONF, register_schemas
from ssl.pretrain import run
from ssl.slurm import decide, job_name, seconds_of_clock
from ssl.slurm_settings import register_resolvers
from tests.forks import start
from tests.pool import Pool
from tests.slurm import Slurm, wait_for
from tests.test_pretrain import ROOT, SHORT, TINY_RESNET, assert_equal_runs, composed, metrics_of

RUN = [
    "method=simclr",
    *TINY_RESNET,
    *SHORT,
    "data.source.num_train=120",
    "data.source.num_test=36",
    "trainer.epochs=3",
    "trainer.precision=fp32",
    "optim.base_lr=0.001",  # so small a run is chaotic at the recipe's
    "trainer.checkpoint_every_steps=2",
    "trainer.pictures=false",
    "trainer.eval_every_epochs=1",
    "online=none",
]
HOLD_STEP = 3


def held(folder: Path) -> str:
    folder.mkdir()
    return f"+online.hold={{_target_:tests.hold.Hold,folder:'{folder}',step:{HOLD_STEP}}}"


def wait_for_ranks(slurm: Slurm, job: str, folder: Path, count: int) -> list[int]:
    """Wait until every rank of a run is held; their process ids."""
    files = [folder / f"held_{rank}" for rank in range(count)]

    def reached() -> bool:
        assert slurm.show(job)["JobState"] in ("PENDING", "RUNNING"), slurm.output(job)
        return all(file.exists() for file in files)

    wait_for(reached, f"job {job} to be held", seconds=120, explain=lambda: slurm.output(job))
    return [int(file.read_text()) for file in files]


class Client:
    """`python -m ssl.pretrain -m hydra/launcher=slurm ...`, which submits a job and waits for it."""

    def __init__(self, slurm: Slurm, home: Path, *words: str) -> None:
        before = set(slurm.jobs())
        self.said = home / "client.txt"
        self.process: BaseProcess = start(
            ["ssl.pretrain", "-m", "hydra/launcher=slurm", "launch=slurm", "launch.cpus_per_device=1", *words],
            home=home,
            said=self.said,
            **{name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")},
        )
        wait_for(lambda: set(slurm.jobs()) > before, "a job", seconds=60, explain=self.said.read_text)
        (self.job,) = set(slurm.jobs()) - before

    def end(self) -> str:
        """Wait for the command's end; what it said."""
        self.process.join(90)
        assert self.process.exitcode == 0, self.said.read_text()
        return self.said.read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run in one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(composed(*RUN), out=out)
    return out


def _run_on_this_rank(out: str) -> None:
    stop, distributed.stop = distributed.stop, lambda: None  # the pool's ranks stay together for the next test
    try:
        run(composed(*RUN), out=Path(out))
    finally:
        distributed.stop = stop


@pytest.fixture(scope="module")
def both(two_ranks: Pool, tmp_path_factory) -> Path:
    """The run on two ranks that nothing interrupts."""
    out = tmp_path_factory.mktemp("both") / "run"
    two_ranks.run(_run_on_this_rank, str(out))
    return out


@pytest.fixture(scope="module")
def submitted(slurm: Slurm, tmp_path_factory) -> Iterator[dict[str, tuple[str, Path, Client | None]]]:
    """Four jobs, all under way at once: job, folder and the waiting client, by what will befall them."""
    homes = {name: tmp_path_factory.mktemp(name) for name in ("limit", "warned", "preempted", "robbed")}

    def words(name: str) -> list[str]:
        return [*RUN, held(homes[name] / "hold"), f"out={homes[name]}/run"]

    def client(name: str, *settings: str) -> tuple[str, Path, Client | None]:
        waiting = Client(slurm, homes[name], *settings, *words(name))
        return waiting.job, homes[name], waiting

    def script(name: str, *settings: str) -> tuple[str, Path, Client | None]:
        job = slurm.submit(
            *settings,
            "--gpus-per-node=1",
            "--ntasks-per-node=1",
            "--cpus-per-task=1",
            f"--output={homes[name]}/slurm.out",
            "launch/slurm.sbatch",
            *words(name),
            cwd=ROOT,
            PYTHON=sys.executable,
        )
        return job, homes[name], None

    jobs = {
        # The warning comes 30 seconds earlier than it is asked for: Slurm looks that often.
        "limit": client("limit", "launch.time=1m", "launch.shutdown_seconds=5"),
        "robbed": script("robbed", "--nodes=2"),
        "warned": client("warned", "launch.nodes=2", "launch.time=30m"),
        "preempted": script("preempted", "--nodes=1", "--partition=low"),
    }
    yield jobs
    for _, _, waiting in jobs.values():
        if waiting is not None:
            waiting.process.kill()


def test_a_run_of_two_nodes_that_is_warned_goes_on_to_the_same_end(submitted, slurm: Slurm, both: Path, alone: Path):
    job, home, client = submitted["warned"]
    wait_for_ranks(slurm, job, home / "hold", 2)
    slurm.signal(job, signal.SIGUSR2)
    slurm.restart(job)
    slurm.wait(job, "COMPLETED")
    said = slurm.output(job)
    assert f"stopped by SIGUSR2 after step {HOLD_STEP}" in said or f"after step {HOLD_STEP + 1}" in said
    assert "continuing from step" in said
    assert slurm.show(job)["Restarts"] == "1"
    assert "complete" in client.end() or (home / "run" / "checkpoints" / "step_00000009").exists()
    assert_equal_runs(home / "run", both)
    losses = [line["loss"] for line in metrics_of(home / "run")]
    assert losses == pytest.approx([line["loss"] for line in metrics_of(alone)], rel=1e-4)


def test_a_killed_rank_ends_the_job_at_once_and_it_goes_on_to_the_same_end(submitted, slurm: Slurm, both: Path):
    job, home, _ = submitted["robbed"]
    pids = wait_for_ranks(slurm, job, home / "hold", 2)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    (home / "hold" / "go").touch()
    slurm.requeued(job)
    assert time.monotonic() - began < 60
    slurm.restart(job)
    slurm.wait(job, "COMPLETED")
    assert "a rank was lost by SIGKILL, restart 1 of 3: back into the queue" in slurm.output(job)
    assert "continuing from step 2" in slurm.output(job)
    assert_equal_runs(home / "run", both)
    assert not (home / "slurm.out.lost").exists(), "what was lost before does not count against a run that ended well"


def test_a_preempted_run_makes_way_and_goes_on_to_the_same_end(submitted, slurm: Slurm, alone: Path):
    job, home, _ = submitted["preempted"]
    wait_for_ranks(slurm, job, home / "hold", 1)
    urgent = slurm.wrap("true", "--partition=high", "--exclusive", home=home)
    slurm.wait(urgent, "COMPLETED")
    slurm.restart(job)
    slurm.wait(job, "COMPLETED")
    assert f"stopped by SIGTERM after step {HOLD_STEP}" in slurm.output(job)
    assert "preempted: back into the queue" in slurm.output(job)
    assert_equal_runs(home / "run", alone)


def test_a_run_at_its_time_limit_goes_on_in_the_next_job(submitted, slurm: Slurm, alone: Path):
    job, home, client = submitted["limit"]
    wait_for_ranks(slurm, job, home / "hold", 1)
    slurm.restart(job)
    slurm.wait(job, "COMPLETED")
    said = slurm.output(job)
    assert f"stopped by SIGUSR2 after step {HOLD_STEP}" in said
    assert "this job is timed-out" in said
    table = client.end()
    assert "done" in table
    assert_equal_runs(home / "run", alone)


def ends(code: int, **changes: str) -> bool:
    """Whether a job is sent into the queue again that ended with `code` and never lost a rank before."""
    record = {"JobState": "RUNNING", "PreemptTime": "None", **changes}
    return decide(code, record, lost=0, max_restarts=3)[0]


def test_only_what_no_person_and_no_mistake_ended_runs_again():
    again = {code for code in range(256) if ends(code)}
    lost = {75, *(128 + number for number in signal.Signals)} - {129, 130, 143}
    assert again == lost
    assert {128 + signal.SIGUSR1, 128 + signal.SIGUSR2, 128 + signal.SIGKILL} < again


def test_a_sigterm_is_a_preemption_where_slurm_says_so():
    assert ends(143, PreemptTime="2026-11-22T13:29:16")
    assert not ends(143)


def test_a_job_that_slurm_is_ending_is_left_to_it():
    assert not any(ends(code, JobState="COMPLETING") for code in range(256))


def test_a_rank_may_be_lost_only_so_often_in_a_row():
    record = {"JobState": "RUNNING", "PreemptTime": "None"}
    assert decide(137, record, lost=2, max_restarts=3) == (True, "a rank was lost by SIGKILL, restart 3 of 3")
    again, why = decide(75, record, lost=3, max_restarts=3)
    assert not again
    assert "losing contact with the others after 3 restarts (launch.max_restarts=3)" in why
    assert decide(140, record, lost=3, max_restarts=3)[0], "a time limit is no loss"


def test_a_job_of_an_array_is_named_by_its_place():
    assert job_name({"SLURM_JOB_ID": "14", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}) == "12_1"
    assert job_name({"SLURM_JOB_ID": "14"}) == "14"


def test_slurms_clock_is_read():
    assert seconds_of_clock("1-02:03:04") == 93784
    assert seconds_of_clock("00:00:59") == 59


ASLEEP = "trap : TERM; srun sleep 60; {python} -m ssl.slurm $?"
FIRST_TIME_OF_THE_FIRST = "[ $SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT = 0 ]"
CRASHING = "srun bash -c 'kill -SEGV $$'; {python} -m ssl.slurm $? --max-restarts=1"


def wrapped(slurm: Slurm, script: str, home: Path, *words: str) -> str:
    """A job of a shell script that finds `ssl`."""
    return slurm.wrap(
        f"export PYTHONPATH={ROOT}; {script.format(python=sys.executable)}", "--requeue", *words, home=home
    )


def test_a_job_that_a_person_cancels_stays_cancelled(slurm: Slurm, tmp_path: Path):
    job = wrapped(slurm, ASLEEP, tmp_path)
    slurm.wait(job, "RUNNING")
    wait_for(lambda: "sleep" in slurm.steps(job), "the job's step", seconds=30)
    slurm.cancel(job)
    slurm.wait(job, "CANCELLED")
    wait_for(lambda: "ended by Slurm" in slurm.output(job), "the script's end", seconds=30)
    assert slurm.show(job)["Restarts"] == "0"


def test_a_job_that_crashes_again_and_again_ends_and_says_so(slurm: Slurm, tmp_path: Path):
    job = wrapped(slurm, CRASHING, tmp_path)
    slurm.restart(job)
    slurm.wait(job, "FAILED")
    assert slurm.show(job)["ExitCode"] == f"{128 + signal.SIGSEGV}:0"
    assert "a rank was lost by SIGSEGV after 1 restarts (launch.max_restarts=1)" in slurm.output(job)


def test_a_job_of_an_array_runs_again_alone(slurm: Slurm, tmp_path: Path):
    array = wrapped(slurm, f"{FIRST_TIME_OF_THE_FIRST} || exit 0; {CRASHING}", tmp_path, "--array=0-1")
    slurm.restart(f"{array}_0")
    slurm.wait(f"{array}_0", "COMPLETED")
    slurm.wait(f"{array}_1", "COMPLETED")
    assert [slurm.show(f"{array}_{number}")["Restarts"] for number in (0, 1)] == ["1", "0"]


def test_a_job_that_slurm_preempts_at_once_is_requeued_by_slurm_alone(slurm: Slurm, tmp_path: Path):
    job = wrapped(slurm, ASLEEP, tmp_path, "--partition=spot")
    wait_for(lambda: "sleep" in slurm.steps(job), "the job's step", seconds=30)
    slurm.wait(slurm.wrap("true", "--partition=high", "--exclusive", home=tmp_path), "COMPLETED")
    slurm.requeued(job)
    assert slurm.show(job)["Restarts"] == "1"
    slurm.cancel(job)


def test_a_job_that_may_not_be_requeued_says_how_to_go_on(slurm: Slurm, tmp_path: Path):
    script = f"export PYTHONPATH={ROOT}; {sys.executable} -m ssl.slurm 140"
    job = slurm.wrap(script, "--no-requeue", home=tmp_path)
    slurm.wait(job, "FAILED")
    assert "it was submitted with --no-requeue; submit the same command once more to continue" in slurm.output(job)


def launcher(*overrides: str) -> dict[str, Any]:
    """What Hydra gives the launcher for these words on the command line."""
    register_schemas()
    register_resolvers()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose(
            "pretrain",
            overrides=["hydra/launcher=slurm", "launch=slurm", "hydra.sweep.dir=runs/sweeps/here", *overrides],
            return_hydra_config=True,
        )
    return {str(key): value for key, value in OmegaConf.to_container(config.hydra.launcher, resolve=True).items()}


def batch_script(*overrides: str) -> str:
    """The sbatch script that submitit makes of the launcher's settings."""
    settings = launcher(*overrides)
    folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
    del settings["_target_"]
    executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
    shared = OmegaConf.structured(BaseQueueConf).keys()  # what is Slurm's own goes by another name
    executor.update_parameters(**{key if key in shared else f"slurm_{key}": settings[key] for key in settings})
    return executor._executor._make_submission_file_text("the-command", "id")


def test_one_group_describes_the_whole_job(slurm: Slurm, monkeypatch):
    monkeypatch.setenv("PATH", slurm.environment["PATH"])  # submitit looks for srun
    script = batch_script(
        *("launch.nodes=4", "launch.devices=8", "launch.cpus_per_device=6", "launch.memory_gib=200", "launch.time=90m"),
        *("launch.partition=gpu", "launch.account=lab", "launch.name=mine", "+launch.options.qos=high"),
        *("launch.setup=['module load cuda']", "launch.container=image.sqsh", "launch.shutdown_seconds=240"),
    )
    head = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert head >= {"nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=6", "mem=200GB", "time=90"}
    assert head >= {"partition=gpu", "account=lab", "job-name=mine", "qos=high", "signal=USR2@240", "requeue"}
    assert head >= {"open-mode=append"}
    (srun,) = (line for line in script.splitlines() if line.startswith("srun "))
    assert "--kill-on-bad-exit=0 --wait=240 --container-image=image.sqsh" in srun
    assert script.index("module load cuda") < script.index("srun ") < script.index("-m ssl.slurm $? --max-restarts=3")


def test_a_run_on_cpus_asks_for_no_gpu():
    assert launcher("launch.devices=2", "trainer.device=cpu")["gpus_per_node"] is None
    assert launcher("trainer.devices=2")["gpus_per_node"] == 2, "trainer.devices says as much as launch.devices"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launch.time=null", "needs a time limit: give launch.time"),
        ("launch.time=soon", "launch.time=soon is not a length of time"),
        ("launch.devices=0", "launch.devices, processes per node, must be at least 1; got 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused(override: str, said: str):
    with pytest.raises(InterpolationResolutionError, match=said):
        launcher(override)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ssl.pretrain", *RUN, "launch=slurm", "launch.time=null"], "error: a Slurm job needs a time limit"),
        (["ssl.pretrain", *RUN], "error: hydra/launcher=slurm submits Slurm jobs, of which launch=auto says nothing"),
        (["eval.knn", "ckpt=runs/x"], "error: hydra/launcher=slurm reads the settings of a job from `launch`"),
    ],
    ids=["no time", "another launch group", "no launch group"],
)
def test_a_job_that_cannot_be_is_refused_without_a_traceback(words: list[str], said: str, tmp_path: Path):
    child = start([words[0], "-m", "hydra/launcher=slurm", *words[1:]], home=tmp_path, said=tmp_path / "said.txt")
    child.join(60)
    assert child.exitcode == 1
    text = (tmp_path / "said.txt").read_text()
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith(said), text


def test_jobs_that_sbatch_does_not_take_are_one_message_with_its_words(tmp_path: Path):
    for name, line in (("srun", ":"), ("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    words = ["ssl.pretrain", "-m", "hydra/launcher=slurm", "launch=slurm", *RUN]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    child = start(words, home=tmp_path, said=tmp_path / "said.txt", PATH=path)
    child.join(60)
    assert child.exitcode == 1
    text = (tmp_path / "said.txt").read_text()
    assert "error: sbatch did not take the sweep's jobs: sbatch: error: invalid partition\n" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["launch=slurm"],
            "launch=slurm describes a Slurm job, and this is none: submit it by -m hydra/launcher=slurm",
        ),
        (["hydra/launcher=slurm"], "add -m, also for a single run"),
    ],
)
def test_settings_of_a_job_without_a_job_are_refused(words: list[str], said: str, tmp_path: Path):
    child = start(["ssl.pretrain", *RUN, *words], home=tmp_path, said=tmp_path / "said.txt")
    child.join(60)
    assert child.exitcode == 1
    assert said in (tmp_path / "said.txt").read_text()
    assert not (tmp_path / "runs").exists()
