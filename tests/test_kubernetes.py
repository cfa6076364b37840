"""`python -m launch.kubernetes`: the manifest against the operator's own types, and what its pods do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from kubeflow_trainer_api import models

import ssl.pretrain as pretrain
from launch.kubernetes import main, manifest, text
from ssl.config import CONF, register_schemas
from ssl.stopping import LOST_CONTACT

WORDS = ["launch=kubernetes", "launch.container=registry/ssl:1", "launch.options.volumes.runs=claim", "out=/runs/mae"]
GIB = 2**30


def rendered(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime and the job, as a cluster reads them."""
    GlobalHydra.instance().clear()
    runtime, job = yaml.safe_load_all(text(manifest([*WORDS, *words])))
    return runtime, job


def parts(runtime: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The set of jobs, the job, the pod and the container of a runtime."""
    jobs = runtime["spec"]["template"]["spec"]
    (replicated,) = jobs["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return jobs, job, job["template"]["spec"], container


VARIANTS = [
    [],
    ["launch.nodes=4", "launch.devices=2", "launch.time=12h", "launch.name=My Run", "launch.setup=[module load cuda]"],
    [
        "launch.options.namespace=team",
        "launch.options.queue=gpu",
        "+launch.options.volumes.data=photos",
        "data=folder",
        "data.root=/data/photos",
        "+launch.options.env.WANDB_API_KEY={secret:wandb,key:api}",
        "+launch.options.env.NCCL_DEBUG=INFO",
        "+launch.options.node_selector.pool=h100",
    ],
    ["trainer.device=cpu", "launch.devices=2", "launch.options.tolerations=[]"],
]


@pytest.mark.parametrize("words", VARIANTS, ids=["plain", "sized", "named", "cpu"])
def test_the_operators_types_take_all_of_the_manifest_and_know_every_field(words):
    runtime, job = rendered(*words)
    for document, kind in ((runtime, models.TrainerV1alpha1TrainingRuntime), (job, models.TrainerV1alpha1TrainJob)):
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert kind.__name__ == f"TrainerV1alpha1{document['kind']}"
        assert without_empty(kind.from_dict(document).to_dict()) == without_empty(document)  # a field they lack is lost


def without_empty(node: Any) -> Any:
    """The types write what is empty as nothing."""
    if isinstance(node, dict):
        return {key: without_empty(value) for key, value in node.items() if value not in ([], {}, None)}
    return [without_empty(each) for each in node] if isinstance(node, list) else node


def test_a_field_that_the_operator_does_not_have_would_be_found():
    runtime, _ = rendered()
    runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestart"] = 3
    read = models.TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict()
    assert without_empty(read) != without_empty(runtime)
    runtime["spec"]["mlPolicy"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        models.TrainerV1alpha1TrainingRuntime.from_dict(runtime)


def test_a_pod_has_what_the_launch_group_says():
    words = ["launch.nodes=3", "launch.devices=4", "launch.cpus_per_device=6", "launch.memory_gib=100"]
    runtime, job = rendered(*words, "launch.shutdown_seconds=77", "launch.options.shared_memory_gib=9")
    _, _, pod, container = parts(runtime)
    assert container["image"] == "registry/ssl:1"
    amounts = {"cpu": "24", "memory": "100Gi", "nvidia.com/gpu": "4"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    assert pod["terminationGracePeriodSeconds"] == 77
    assert runtime["spec"]["mlPolicy"]["numNodes"] == 3
    assert job["spec"]["trainer"] == {"numNodes": 3, "numProcPerNode": 4}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "9Gi"}
    assert mounts["/runs"]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert "nvidia.com/gpu" not in parts(rendered("trainer.device=cpu")[0])[3]["resources"]["limits"]


@pytest.mark.parametrize(("nodes", "devices"), [(2, 8), (1, 1)])
def test_the_pod_runs_the_words_that_were_typed_as_one_of_the_machines(tmp_path, nodes, devices):
    words = [f"launch.nodes={nodes}", f"launch.devices={devices}", "wandb.name='a run; $(date)'", "method=simclr"]
    runtime, _ = rendered(*words, f"launch.options.workdir={tmp_path}", "launch.options.python=./record")
    container = parts(runtime)[3]
    (tmp_path / "record").write_text('#!/bin/sh\nenv > said\nfor word; do printf "%s\\n" "$word" >> words; done\n')
    (tmp_path / "record").chmod(0o755)
    operator = {
        "PET_NNODES": str(nodes),
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "mae-node-0-0",
        "PET_MASTER_PORT": "29400",
    }
    subprocess.run(container["command"], cwd=container["workingDir"], env={**os.environ, **operator}, check=True)
    said = dict(line.split("=", 1) for line in (tmp_path / "said").read_text().splitlines() if "=" in line)
    assert (said["NODE_RANK"], said["MASTER_ADDR"], said["MASTER_PORT"]) == ("1", "mae-node-0-0", "29400")
    assert said["PYTHONPATH"] == str(tmp_path)
    ran = (tmp_path / "words").read_text().splitlines()
    assert ran[:3] == ["-u", "-m", "ssl.pretrain"]
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("pretrain", overrides=ran[3:])
    assert (config.launch.nodes, config.launch.devices) == (nodes, devices)
    assert (config.wandb.name, config.out, config.method._target_) == (
        "a run; $(date)",
        "/runs/mae",
        "ssl.methods.simclr.SimCLR",
    )


def what_happens(runtime: dict[str, Any], *, code: int, disrupted: bool = False) -> str:
    """What the cluster does when a pod ends, by Kubernetes' rules for pods of a job and JobSet's for failed jobs.

    The messages are those of Kubernetes' job controller (pkg/controller/job/pod_failure_policy.go).
    """
    jobs, job, _, container = parts(runtime)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule["action"] == "FailJob"
        if "onPodConditions" in rule and disrupted:
            reason, message = (
                "PodFailurePolicy",
                "Pod ns/a has condition DisruptionTarget matching FailJob rule at index 0",
            )
            break
        codes = rule.get("onExitCodes", {"values": []})
        if code in codes["values"]:
            assert codes["containerName"] == container["name"]
            reason = "PodFailurePolicy"
            message = f"Container node for pod ns/a failed with exit code {code} matching FailJob rule at index 1"
            break
    for rule in jobs["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_was_lost_is_started_again_and_what_was_wrong_is_not():
    runtime, _ = rendered("launch.max_restarts=7")
    jobs, job, pod, _ = parts(runtime)
    assert (job["backoffLimit"], pod["restartPolicy"], jobs["failurePolicy"]["maxRestarts"]) == (0, "Never", 7)
    assert what_happens(runtime, code=137) == "RestartJobSet"  # killed, out of memory
    assert what_happens(runtime, code=LOST_CONTACT) == "RestartJobSet"
    for code in (1, 2, 124):
        assert what_happens(runtime, code=code) == "FailJobSet"
    for disrupted in (True, False):  # the pod that had to leave, and those that stopped with it
        assert what_happens(runtime, code=143, disrupted=disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert what_happens(runtime, code=137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


def test_a_time_limit_is_that_of_one_job_and_the_next_goes_on():
    runtime, _ = rendered("launch.time=1d12h")
    jobs, job, *_ = parts(runtime)
    assert job["activeDeadlineSeconds"] == 36 * 3600
    rules = {reason: rule for rule in jobs["failurePolicy"]["rules"] for reason in rule["onJobFailureReasons"]}
    assert rules["DeadlineExceeded"]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert "activeDeadlineSeconds" not in parts(rendered()[0])[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=runs/mae"], "out=runs/mae is lost with the pod.*out=/runs/<name>"),
        (["out=/runs"], "a folder below one of the volumes"),
        (["out=/runs/../tmp"], "is lost with the pod"),
        (["launch.partition=gpu"], "launch.partition=gpu has no effect on Kubernetes"),
        (["launch.nodes=0"], "launch.nodes must be above 0"),
        (["launch.time=soon"], "launch.time=soon"),
        (["+launch.options.pods=3"], "launch.options.pods has no effect"),
        (["+launch.options.env.KEY={secrt:a,key:b}"], "secret: NAME"),
        (["trainer.epoch=3"], "epoch"),
        (["launch.options.volumes.runs=???"], r"must be given: launch.options.volumes.runs=CLAIM$"),
        (["eval.knn", "ckpt=runs/a"], "eval.knn is not a command for a cluster"),
    ],
)
def test_what_would_be_lost_or_has_no_effect_is_refused(words, message):
    GlobalHydra.instance().clear()
    typed = [*words, *WORDS] if "=" not in words[0] else [*WORDS, *words]
    with pytest.raises(ValueError, match=message):
        text(manifest(typed))


def test_all_that_is_missing_is_named_at_once():
    GlobalHydra.instance().clear()
    needed = "data.root=..., launch.container=IMAGE, launch.options.volumes.runs=CLAIM, out=/runs/<name>"
    with pytest.raises(ValueError, match=f"^this must be given: {re.escape(needed)}$"):
        manifest(["launch=kubernetes", "data=folder"])


def test_another_launch_group_says_nothing_of_pods():
    GlobalHydra.instance().clear()
    with pytest.raises(ValueError, match="launch=auto says nothing of pods; give launch=kubernetes"):
        manifest(["method=mae", "out=/runs/mae"])


def test_the_job_is_named_as_kubernetes_wants_it():
    names = [rendered(f"out=/runs/{out}")[1]["metadata"]["name"] for out in ("mae", "MAE_B.2/seed0", "x" * 80)]
    names.append(rendered("launch.name=3 words")[1]["metadata"]["name"])
    assert names[0] == "pretrain-mae"
    assert all(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(f"{name}-node-0-99") <= 63 for name in names)


def test_fine_tuning_goes_the_same_way():
    GlobalHydra.instance().clear()
    words = ["eval.finetune", "ckpt=/runs/mae", *WORDS[:-1], "out=/runs/tuned"]
    runtime, _ = yaml.safe_load_all(text(manifest(words)))
    last = parts(runtime)[3]["command"][-1].splitlines()[-1]
    assert shlex.split(last)[:6] == ["exec", "python", "-u", "-m", "eval.finetune", "ckpt=/runs/mae"]


def test_outside_of_a_pod_the_group_is_refused_with_the_way_into_one(monkeypatch, capsys):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(sys, "argv", ["ssl.pretrain.py", *WORDS])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    assert end.value.code == 1
    assert "python -m launch.kubernetes with the same words" in capsys.readouterr().err


def test_the_command_prints_the_manifest_or_one_message(monkeypatch, capsys):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["launch.kubernetes", *WORDS])
    main()
    assert [document["kind"] for document in yaml.safe_load_all(capsys.readouterr().out)] == [
        "TrainingRuntime",
        "TrainJob",
    ]
    monkeypatch.setattr(sys, "argv", ["launch.kubernetes", *WORDS, "out=here"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: out=here is lost")
