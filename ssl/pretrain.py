"""`python -m ssl.pretrain method=mae model=vit_b`: pretrain a backbone on images.

`run` is the table of contents of a run: each part is built in order from plain values; no config object goes deeper.
"""

from __future__ import annotations

import ssl.interrupted  # before what takes seconds
import ssl.runtime  # before torch  # noqa: F401

# isort: split
import logging
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import ssl.distributed as distributed
from ssl.command import choices, run_command, run_folder
from ssl.config import PretrainConfig, build, check, check_trainer, locate, plain, register_schemas
from ssl.data.image_size import choose_image_size
from ssl.data.subset import limit, limit_note
from ssl.launch import launch
from ssl.methods.base import Method, build_method
from ssl.models.backbones import BackboneSpec, build_backbone, model_name
from ssl.models.initialize import initialize, same_weights
from ssl.objective import check_objective, find_objective
from ssl.run_lock import RunLock
from ssl.run_plan import plan_run
from ssl.starts import note_command
from ssl.sweep import Outcome
from ssl.trainer import choose_dtype
from ssl.training import Images, train
from ssl.watchdog import group_timeout

log = logging.getLogger(__name__)


def run(config: DictConfig, *, out: Path) -> dict[str, float]:
    """Pretrain as `config` says, in the run folder `out`, from its last checkpoint if it has one; returns the last
    metrics.
    """
    check(config, PretrainConfig)
    settings = config.trainer
    check_trainer(settings)
    device = distributed.start(settings.device.name, timeout=group_timeout(settings.hang_timeout))
    dtype = choose_dtype(settings.precision.name, device)

    # ---- data, model and method ------------------------------------------------------------------------------------
    data = config.data
    if data.source.get("download"):
        with distributed.fail_together():
            if distributed.local_rank() == 0:  # one process of a machine downloads
                build(data.source, split="train")
    with distributed.fail_together():
        _open_run_folder(out)
        source = build(data.source, split="train")
        too_many = limit_note(source, data.limit)
        if too_many is not None and distributed.is_main():
            log.warning(too_many)
        source = limit(source, data.limit, seed=config.seed)
        image_size = choose_image_size(plain(data.image_size), source)
        torch.manual_seed(config.seed)
        method, spec = make_method(config, image_size)
        evaluations = {name: build(node) for name, node in config.online.items()}
    images = Images(
        source,
        channels=data.channels,
        mean=list(data.mean),
        std=list(data.std),
        in_memory_gib=data.in_memory_gib,
        max_bad_fraction=data.max_bad_fraction,
        settings=plain(data),
    )

    # ---- train -----------------------------------------------------------------------------------------------------
    with RunLock(out):
        metrics = train(
            config,
            schema=PretrainConfig,
            out=out,
            method=method,
            spec=spec,
            images=images,
            device=device,
            dtype=dtype,
            evaluations=evaluations,
            next_command=f"python -m eval.knn ckpt={out}",
        )
    distributed.stop()  # not after an error: the other ranks may be waiting, and the launcher ends them
    return metrics


def make_method(config: DictConfig, image_size: tuple[int, int]) -> tuple[Method, BackboneSpec]:
    """The method that `config` names, with its backbone, for images of (height, width) pixels."""
    in_chans = config.data.channels
    backbone, spec = build_backbone(
        model_name(plain(config.model)),
        image_size=image_size,
        in_chans=in_chans,
        patch_size=config.model.patch_size,
        stem=config.model.stem.name,
        stem_side=_stem_side(plain(config.method), image_size),
        drop_path=config.model.drop_path,
        model_args=plain(config.model.args),
    )
    rule = plain(config.model)["init"]
    initialize(backbone, rule)
    given = None if rule is None else [parameter.detach().clone() for parameter in backbone.parameters()]
    method = build_method(config.method, backbone=backbone, image_size=image_size, in_chans=in_chans)
    if given is not None and not all(map(same_weights, given, backbone.parameters())):
        raise ValueError(
            f"model.init={rule} has no effect: {type(method).__name__} gives the backbone weights of its own, as its "
            "paper says; set model.init=null"
        )
    return method, spec


def main() -> None:
    """The command line."""
    register_schemas()
    run_command(_task, config_name="pretrain")


def _task(config: DictConfig) -> Outcome:
    chosen = choices()
    default = Path("runs") / f"{chosen['method']}_{chosen['model']}_{chosen['data']}" / f"seed{config.seed}"
    out = run_folder(default, config.out)
    note_command("ssl.pretrain", out)
    check(config, PretrainConfig)
    if config.trainer.plan:
        if distributed.is_main():
            print(plan_run(config, out=out, make_method=make_method).describe())
        return Outcome({}, out)
    check_objective(config)
    metrics = launch(config, run=lambda: run(config, out=out), command="ssl.pretrain", out=out)
    return Outcome(metrics, out, find_objective(config, metrics, out=out) if distributed.is_main() else None)


def _open_run_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the run folder out={out} cannot be made: {error.strerror}; give another out=") from error
    if not os.access(out, os.W_OK):
        raise OSError(f"the run folder out={out} is not writable; give another out=")


def _stem_side(method: dict[str, Any], image_size: tuple[int, int]) -> int | None:
    """What `model.stem=auto` looks at, where the method shows the backbone patches instead of images."""
    stem_size = getattr(locate(method["_target_"]), "stem_size", None)
    return None if stem_size is None else stem_size(image_size, **method)


if __name__ == "__main__":
    main()
