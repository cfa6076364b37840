"""A run as a manifest for Kubeflow Trainer, from the same words as the run itself.

    python -m launch.kubernetes method=mae model=vit_b launch=kubernetes launch.nodes=2 launch.container=IMAGE \\
        launch.options.volumes.runs=CLAIM out=/runs/mae | kubectl apply -f -

A TrainJob (Trainer v2) and not a PyTorchJob: v1 is no longer developed, and starts a lost pod again by itself, where a
rank that is lost takes all with it. The TrainJob stands on a TrainingRuntime of its own, because torch-distributed, the
cluster's, says nothing of failures, of the time that a pod has to save, or of volumes. Each pod runs the command as on
any of several machines; its exit code (launch/README.md) tells the cluster whether starting again makes sense.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.config import register
from eval.finetune import FinetuneConfig
from ssl.config import CONF, PretrainConfig, check, missing_values, plain, register_schemas
from ssl.durations import seconds_of

API = "trainer.kubeflow.org/v1alpha1"
CONTAINER = "node"  # the name by which the operator finds whom to tell the rendezvous
COMMANDS: dict[str, tuple[str, type]] = {
    "ssl.pretrain": ("pretrain", PretrainConfig),
    "eval.finetune": ("finetune", FinetuneConfig),
}
STOPPED = 143  # a pod told to leave, and the others, which stop with it
FOR_GOOD = (1, 2, 124)  # a mistake, no ckpt=, trainer.max_time: starting again would end the same way
MOST_OF_A_NAME = 48  # of the 63 characters of a pod's name, which goes on -node-0-99
OPTIONS = (
    "namespace",
    "workdir",
    "python",
    "volumes",
    "shared_memory_gib",
    "env",
    "node_selector",
    "tolerations",
    "queue",
)


def manifest(words: Sequence[str]) -> list[dict[str, Any]]:
    """The TrainingRuntime and the TrainJob of a command line, `[ssl.pretrain] key=value ...`.

    Raises ValueError for words that do not compose, and for a run that could not go on in other pods.
    """
    module, words = ("ssl.pretrain", words) if not words or "=" in words[0] else (words[0], words[1:])
    if module not in COMMANDS:
        raise ValueError(f"{module} is not a command for a cluster; give {' or '.join(COMMANDS)}, or settings alone")
    config = composed(module, words)
    launch = plain(config.launch)
    check_run(config, launch)
    name = job_name(config, module)
    about = {"name": name} | ({"namespace": namespace} if (namespace := launch["options"]["namespace"]) else {})
    queue = launch["options"]["queue"]
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return [
        {
            "apiVersion": API,
            "kind": "TrainingRuntime",
            "metadata": {**about, "labels": {"trainer.kubeflow.org/framework": "torch"}},
            "spec": {
                "mlPolicy": {"numNodes": launch["nodes"], "torch": {}},
                "template": {"spec": job_set(config, launch, module, words)},
            },
        },
        {
            "apiVersion": API,
            "kind": "TrainJob",
            "metadata": {**about, **labels},
            "spec": {
                "runtimeRef": {"apiGroup": API.split("/")[0], "kind": "TrainingRuntime", "name": name},
                "trainer": {"numNodes": launch["nodes"], "numProcPerNode": launch["devices"]},
            },
        },
    ]


def composed(module: str, words: Sequence[str]) -> DictConfig:
    """The config that the command will have in the pods. Raises ValueError with Hydra's words where there is none."""
    config_name, schema = COMMANDS[module]
    register_schemas()
    if schema is not PretrainConfig:
        register(schema)
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose(config_name, overrides=list(words), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        raise ValueError(f"{error}{cause}") from error
    chosen = config.hydra.runtime.choices.launch
    if chosen != "kubernetes":
        raise ValueError(f"launch={chosen} says nothing of pods; give launch=kubernetes and what it needs")
    del config.hydra
    check_given(config)
    check(config, schema)
    return config


def check_given(config: DictConfig) -> None:
    """Raise ValueError that names all at once that must be given and is not."""
    missing = {f"{name}=..." for name in missing_values(OmegaConf.to_container(config))}
    missing |= set() if config.launch.container else {"launch.container=IMAGE"}
    missing |= set() if config.out else {"out=/runs/<name>"}
    if missing:
        named = {"launch.options.volumes.runs=...": "launch.options.volumes.runs=CLAIM"}
        raise ValueError(f"this must be given: {', '.join(sorted(named.get(word, word) for word in missing))}")


def check_run(config: DictConfig, launch: Mapping[str, Any]) -> None:
    """Raise ValueError for a run that would be lost with its pod, and for settings that mean nothing here."""
    for key in ("nodes", "devices", "cpus_per_device", "memory_gib"):
        if launch[key] is None or not launch[key] > 0:
            raise ValueError(f"launch.{key} must be above 0 for a pod; got {launch[key]}")
    for key in ("partition", "account"):
        if launch[key] is not None:
            raise ValueError(
                f"launch.{key}={launch[key]} has no effect on Kubernetes; launch.options.queue= is Kueue's"
            )
    unknown = sorted(set(launch["options"]) - set(OPTIONS))
    if unknown:
        raise ValueError(f"launch.options.{unknown[0]} has no effect; launch.options takes {', '.join(OPTIONS)}")
    mounts = [f"/{name}" for name in launch["options"]["volumes"]]
    out = PurePosixPath(config.out or "runs")
    if not any(out.is_relative_to(mount) and out != PurePosixPath(mount) for mount in mounts) or ".." in out.parts:
        raise ValueError(
            f"out={config.out} is lost with the pod; give a folder below one of the volumes, such as "
            f"out={mounts[0] if mounts else '/runs'}/<name> (launch.options.volumes has {', '.join(mounts) or 'none'})"
        )


def job_name(config: DictConfig, module: str) -> str:
    """`launch.name`, or the command and the last part of `out`: lower case, digits and dashes, a letter first."""
    text = config.launch.name or f"{module.split('.')[1]}-{PurePosixPath(config.out).name}"
    name = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:MOST_OF_A_NAME].strip("-")


def job_set(config: DictConfig, launch: Mapping[str, Any], module: str, words: Sequence[str]) -> dict[str, Any]:
    """All pods of the run as one: they start and end together, and are started again together."""
    limit = (
        {}
        if launch["time"] is None
        else {"activeDeadlineSeconds": round(seconds_of(launch["time"], key="launch.time"))}
    )
    again = "RestartJobSetAndIgnoreMaxRestarts"
    by_policy = {"onJobFailureReasons": ["PodFailurePolicy"]}
    asked_to_leave = ["DisruptionTarget", f"exit code {STOPPED}"]  # parts of what the Job says of why it failed
    job = {
        **limit,
        "backoffLimit": 0,  # one pod that fails is all that fail
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": _exit_codes(STOPPED)},
                {"action": "FailJob", "onExitCodes": _exit_codes(*FOR_GOOD)},
            ]
        },
        "template": {"spec": pod(config, launch, module, words)},
    }
    return {
        "failurePolicy": {
            "maxRestarts": launch["max_restarts"],
            "restartStrategy": "BlockingRecreate",  # not before the last of the old pods has left the run's folder
            "rules": [
                {"name": "asked_to_leave", "action": again, **by_policy, "onJobFailureMessagePatterns": asked_to_leave},
                {"name": "for_good", "action": "FailJobSet", **by_policy},
                *([{"name": "next", "action": again, "onJobFailureReasons": ["DeadlineExceeded"]}] if limit else []),
            ],
        },
        "replicatedJobs": [
            {
                "name": CONTAINER,
                "template": {
                    "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                    "spec": job,
                },
            }
        ],
    }


def pod(config: DictConfig, launch: Mapping[str, Any], module: str, words: Sequence[str]) -> dict[str, Any]:
    """One node of the run."""
    options, devices = launch["options"], launch["devices"]
    amounts = {"cpu": str(launch["cpus_per_device"] * devices), "memory": f"{launch['memory_gib']:g}Gi"}
    if config.trainer.device.name != "cpu":
        amounts["nvidia.com/gpu"] = str(devices)
    memory = {"medium": "Memory", "sizeLimit": f"{options['shared_memory_gib']:g}Gi"}
    claims = options["volumes"].items()
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch["shutdown_seconds"],
        "containers": [
            {
                "name": CONTAINER,
                "image": launch["container"],
                "workingDir": options["workdir"],
                "command": ["/bin/bash", "-c", script(launch, module, words)],
                "env": [_variable(name, value) for name, value in options["env"].items()],
                "resources": {"requests": amounts, "limits": dict(amounts)},
                "volumeMounts": [
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                    *({"name": _label(name), "mountPath": f"/{name}"} for name, _ in claims),
                ],
            }
        ],
        "volumes": [
            {"name": "shared-memory", "emptyDir": memory},
            *({"name": _label(name), "persistentVolumeClaim": {"claimName": claim}} for name, claim in claims),
        ],
    }
    if options["node_selector"]:
        spec["nodeSelector"] = dict(options["node_selector"])
    if options["tolerations"]:
        spec["tolerations"] = [{"key": key, "operator": "Exists"} for key in options["tolerations"]]
    return spec


def script(launch: Mapping[str, Any], module: str, words: Sequence[str]) -> str:
    """What a pod does: the command as typed, told by the operator's variables which of the machines it is."""
    workdir, python = (shlex.quote(launch["options"][key]) for key in ("workdir", "python"))
    lines = [
        "set -eu",
        *launch["setup"],
        f"export PYTHONPATH={workdir}",
        "export NODE_RANK=$PET_NODE_RANK MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT",
        f"exec {python} -u -m {module} {shlex.join(words)}",
    ]
    return "\n".join(lines) + "\n"


def text(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documents as YAML, scripts as they are read."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Keeps the lines of a text of several."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _lines(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _lines)


def _exit_codes(*codes: int) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": "In", "values": list(codes)}


def _variable(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"name": name, "value": str(value)}
    if set(value) != {"secret", "key"}:
        raise ValueError(
            f"launch.options.env.{name} must be a value, or {{secret: NAME, key: KEY}} for a part of a Secret; got "
            f"{dict(value)}"
        )
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": value["secret"], "key": value["key"]}}}


def _label(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", str(name).lower()).strip("-")


def main() -> None:
    """Print the manifest of the command line, or what is wrong with it."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        print(text(manifest(words)), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
