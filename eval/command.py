"""What the evaluation commands share: a `ckpt=` that must be given, a JSON, a line that a person reads."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import ssl.distributed as distributed
from eval.config import EvalConfig, register
from eval.protocols import brief, protocol_difference, read_result
from eval.results import write_results
from eval.subject import Judged, read_features
from ssl.command import run_command
from ssl.config import check
from ssl.sweep import Outcome

Score = Callable[[DictConfig, Judged], tuple[dict[str, float], dict[str, Any], str]]
"""From what is judged to (metrics, settings for the protocol, how it is called in the printed line).

Settings may hold `details`, which stand beside the protocol in the JSON.
"""

USAGE = """{command} needs ckpt=, what is judged:
  python -m {command} ckpt=runs/<run>              the last checkpoint of a run
  python -m {command} ckpt=runs/<run>/checkpoints/step_00001000
  python -m {command} ckpt=timm:resnet50.a1_in1k data=<name>        weights of timm's hub
  python -m {command} ckpt=mae.pth model=vit_b data=<name>          a file of mae, mmselfsup, solo-learn, timm
  python -m {command} ckpt=random model=resnet18   an untrained backbone
  python -m {command} ckpt=pixels                  no backbone"""


def judge(
    config: DictConfig, score: Score, *, command: str, next_command: str, multi_label: bool = False
) -> dict[str, Any]:
    """Score what is judged, write `<out>/<name>.json` and print the outcome; returns what was written."""
    result = report(config, read_features(config, command=command, multi_label=multi_label), score)
    if distributed.is_main():
        print(f"next: {next_command} {same_subject(config)}", flush=True)
    return result


def report(config: DictConfig, judged: Judged, score: Score) -> dict[str, Any]:
    """Score features that have been read, write the JSON and print the outcome; returns what was written."""
    began, read_before = time.perf_counter(), judged.feature_seconds
    metrics, settings, how = score(config, judged)
    details = settings.pop("details", None)
    wall_seconds = time.perf_counter() - began
    read_here = judged.feature_seconds - read_before
    protocol = {
        **judged.protocol,
        **settings,
        "notes": judged.notes + settings.get("notes", []),
        "score_seconds": round(wall_seconds - read_here, 2),
        "wall_seconds": round(wall_seconds, 2),
    }
    path = judged.folder / f"{judged.name}.json"
    result = {"metrics": metrics, "protocol": protocol, "path": str(path)}
    if not distributed.is_main():
        return result
    replaced = replaces(path, protocol)
    write_results(path, metrics=metrics, protocol=protocol, details=details)
    data = protocol["data"]
    print(
        f"{how}: {in_words(metrics)} of {data['num_test']:,} test images, {data['num_classes']} classes, "
        f"from {data['num_train']:,} of train; {data['name']}, {judged.subject.title}"
    )
    for note in protocol["notes"]:
        print(f"note: {note}")
    print(f"written: {path}{replaced}", flush=True)
    return result


def replaces(path: Path, protocol: dict[str, Any]) -> str:
    """What a person must know before an older result goes: that it was measured in another way, or on other images."""
    if not path.exists():
        return ""
    try:
        differing = protocol_difference(read_result(path)["protocol"], protocol)
    except ValueError:
        return ""  # no result of ours
    if not differing:
        return ""
    shown = ", ".join(f"{name} {brief(old)} -> {brief(new)}" for name, (old, new) in list(differing.items())[:3])
    return f", in the place of one of another protocol ({shown}); name= keeps both"


def in_words(metrics: Mapping[str, float]) -> str:
    """The headline metrics as a person reads them: `top-1 61.2% +- 0.4 (top-5 90.1%)`, or mAP."""
    name = "top1" if "top1" in metrics else "map"
    spread = f" +- {100 * metrics[f'{name}_std']:.1f}" if f"{name}_std" in metrics else ""
    top5 = f" (top-5 {metrics['top5']:.1%})" if "top5" in metrics else ""
    return f"{'top-1' if name == 'top1' else 'mAP'} {metrics[name]:.1%}{spread}{top5}"


def same_subject(config: DictConfig) -> str:
    """The words of the command line that name the same subject on the same images again."""
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    shared = {field.name for field in fields(EvalConfig)} - {"name"}
    words = [word for word in typed if word.split("=")[0].split(".")[0] in shared]
    words = [word for word in words if not word.startswith("pooling=[")]  # a grid's; other commands read one pooling
    own = f"ckpt={config.ckpt}"
    return shlex.join(words if own in words else [own])  # called from Python nothing was typed


Objective = Callable[[dict[str, Any]], float | None]
"""From a result to what a sweep optimizes: held-out images or no labels, never the test split."""


def start(
    run: Callable[[DictConfig], dict[str, Any]],
    schema: type,
    *,
    command: str,
    objective: Objective = lambda result: None,
) -> None:
    """The command line of `schema`; a sweep is told the `objective`, nothing where there is none.

    A missing `ckpt` ends it with exit code 2, another mistake with 1 and a message.
    """
    register(schema)

    def task(config: DictConfig) -> Outcome:
        if config.ckpt is None:
            print(USAGE.format(command=command), file=sys.stderr)
            raise SystemExit(2)
        check(config, schema)
        if distributed.world_size() > 1:
            distributed.start(config.device.name)
        result = run(config)
        distributed.stop()  # not after an error: the other ranks may wait in a collective for ever
        return Outcome(result["metrics"], result.get("path"), objective(result))

    run_command(task, config_name=command.removeprefix("eval."))
