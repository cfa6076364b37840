"""Which rank a process is, from what srun tells it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ssl.ranks import FIRST_PORT, NUM_PORTS, adopt_slurm, first_host

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NODELIST": "localhost,gpu-[03-05]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_CPUS_ON_NODE": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def adopted(**changes: str) -> dict[str, str]:
    environment = {**STEP, **changes}
    adopt_slurm(environment)
    return {name: value for name, value in environment.items() if not name.startswith("SLURM_")}


def test_a_task_of_srun_is_the_rank_of_its_number():
    assert adopted() == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "7",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(FIRST_PORT + 41),
    }
    assert adopted(SLURM_NODEID="3", SLURM_PROCID="6", SLURM_LOCALID="0")["LOCAL_WORLD_SIZE"] == "1"


def test_cores_that_slurm_has_bound_to_a_task_are_not_shared_out_again():
    assert "LOCAL_WORLD_SIZE" not in adopted(SLURM_CPUS_ON_NODE="10000")


def test_tasks_on_one_node_meet_on_the_loopback_address():
    assert adopted(SLURM_STEP_NUM_NODES="1", SLURM_STEP_NODELIST="nowhere")["MASTER_ADDR"] == "127.0.0.1"


def test_jobs_and_steps_beside_each_other_meet_on_ports_of_their_own():
    ports = {
        int(adopted(SLURM_JOB_ID=job, SLURM_STEP_ID=step)["MASTER_PORT"]) for job in ("7", "8") for step in ("0", "1")
    }
    assert len(ports) == 4
    assert all(FIRST_PORT <= port < FIRST_PORT + NUM_PORTS for port in ports)
    assert int(adopted(SLURM_JOB_ID="99999999")["MASTER_PORT"]) < FIRST_PORT + NUM_PORTS


def test_what_is_set_already_stays():
    assert adopted(RANK="0", WORLD_SIZE="1") == {"RANK": "0", "WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert meeting.items() <= adopted(**meeting).items()


@pytest.mark.parametrize("missing", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_a_batch_script_is_no_rank_although_its_job_has_several_tasks(missing: str):
    environment = {name: value for name, value in STEP.items() if name != missing} | {"SLURM_NTASKS": "7"}
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


def test_one_task_is_no_group():
    assert adopted(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0") == {}


@pytest.mark.parametrize(
    "nodes", ["n1", "n[1-2]", "gpu-[03-07,9],login", "a1,b2", "rack[2-3]-node[011-020]", "n[9,12-13]"]
)
def test_the_first_host_is_the_first_that_slurm_itself_lists(nodes: str, tmp_path: Path):
    if shutil.which("scontrol") is None:
        pytest.skip("scontrol is not installed (apt-get install slurm-wlm)")
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\nNodeName=n1\n")
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    listed = subprocess.check_output(["scontrol", "show", "hostnames", nodes], env=environment, text=True)
    assert first_host(nodes) == listed.split()[0]
