"""`python -m ssl.pretrain method=mae model=vit_b`: pretrain a backbone on images.

`run` is the table of contents of a run: each part is built in order from plain values; no config object goes deeper.
"""

from __future__ import annotations

import ssl.openmp  # before torch  # noqa: F401

# isort: split
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import ssl.checkpoint as checkpoint
import ssl.distributed as distributed
from ssl.command import choices, run_command, run_folder
from ssl.config import PretrainConfig, build, check, check_trainer, locate, plain, register_schemas, wrong_types
from ssl.data.augment import Augment
from ssl.data.image_size import choose_image_size
from ssl.data.loader import Loader
from ssl.data.sources import Source, checksum
from ssl.data.subset import limit
from ssl.data.views import make_views
from ssl.launch import hydra_flags, num_processes, run_processes
from ssl.methods.base import Batch, Method
from ssl.models.backbones import build_backbone, is_token_model
from ssl.optim import make_optimizer, parameter_groups, scaled_lr, set_lr, state_to_tensors, tensors_to_state
from ssl.pictures import reconstruction_panel, views_panel
from ssl.plan import averaged_copy, describe_plan
from ssl.recipe import BatchArithmetic, batch_arithmetic, effective_recipe, lr_arithmetic, recipe_table
from ssl.schedules import make_schedule
from ssl.tracking import Tracker
from ssl.trainer import Trainer, choose_dtype, dtype_name, to_device, total_steps

log = logging.getLogger(__name__)

FREE = (
    "out",
    "accept_changes",
    "wandb",
    "loader",
    "trainer.steps",
    "trainer.device",
    "trainer.devices",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_steps",
    "trainer.keep_last",
    "trainer.keep_every_steps",
    "trainer.pictures",
    "trainer.compile",
    "data.root",  # the images themselves are compared
    "data.source.root",
    "data.source.download",
    "data.source.held_gib",
    "data.in_memory_gib",
    "data.max_bad_fraction",
)
"""Settings that may change between two starts of one run: it stays the same run."""


def run(config: DictConfig, *, out: Path) -> dict[str, float]:
    """Pretrain as `config` says, in the run folder `out`, from its last checkpoint if it has one; returns the last
    metrics.
    """
    check(config, PretrainConfig)
    settings = config.trainer
    check_trainer(settings)
    device = distributed.start(settings.device.name)
    dtype = choose_dtype(settings.precision.name, device)
    _open_run_folder(out)

    # ---- data ------------------------------------------------------------------------------------------------------
    data = config.data
    first_here = distributed.local_rank() == 0
    if data.source.get("download") and not first_here:
        distributed.barrier()  # one process of a machine downloads
    source = build(data.source, split="train")
    if data.source.get("download") and first_here:
        distributed.barrier()
    if data.limit is not None:
        source = limit(source, data.limit, seed=config.seed)
    image_size = choose_image_size(plain(data.image_size), source)

    # ---- model and method ------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    backbone, spec = build_backbone(
        config.model.name,
        image_size=image_size,
        in_chans=data.channels,
        patch_size=config.model.patch_size,
        stem=config.model.stem.name,
        stem_side=_stem_side(plain(config.method), image_size),
        drop_path=config.model.drop_path,
        model_args=plain(config.model.args),
    )
    method: Method = build(config.method, backbone=backbone, image_size=image_size, in_chans=data.channels)
    channels_last = not is_token_model(backbone)
    method.to(device)
    if channels_last:
        method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if settings.sync_batchnorm:
        distributed.sync_batchnorm(method)
    if device.type == "cpu" and dtype == torch.bfloat16:
        _attend_by_matmul(method)

    # ---- views -----------------------------------------------------------------------------------------------------
    with wrong_types("augment.views"):
        views = make_views(plain(config.augment.views))
    augment = Augment(views, mean=list(data.mean), std=list(data.std)).to(device)
    loader = Loader(
        source,
        views,
        size=method.view_size,
        channels=data.channels,
        seed=config.seed,
        num_noise=method.num_noise,
        threads=config.loader.threads,
        in_memory_gib=data.in_memory_gib,
        max_bad_fraction=data.max_bad_fraction,
        prefetch=config.loader.prefetch,
        pin_memory=device.type == "cuda",
    )
    global_batch_size = settings.global_batch_size
    steps_per_epoch = loader.steps_per_epoch(global_batch_size)
    span, stop_step = total_steps(epochs=settings.epochs, steps=settings.steps, steps_per_epoch=steps_per_epoch)

    # ---- recipe ----------------------------------------------------------------------------------------------------
    batch = batch_arithmetic(
        global_batch_size, world_size=distributed.world_size(), device_batch_size=settings.device_batch_size
    )
    optim = config.optim
    peak_lr = scaled_lr(optim.base_lr, global_batch_size=global_batch_size, scaling=optim.scaling.name)
    groups = parameter_groups(method, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay)
    with wrong_types("optim.options"):
        optimizer = make_optimizer(groups, name=optim.name, lr=peak_lr, **plain(optim.options))
    schedule = make_schedule(
        config.schedule.name.name,
        steps_per_epoch=steps_per_epoch,
        total_steps=span,
        warmup_epochs=config.schedule.warmup_epochs,
        min_factor=config.schedule.min_factor,
        milestones=plain(config.schedule.milestones),
        gamma=config.schedule.gamma,
    )
    ema = averaged_copy(method) if settings.ema_decay is not None else None

    # ---- the past of this run --------------------------------------------------------------------------------------
    config_yaml = OmegaConf.to_yaml(config, resolve=True)
    resumed = checkpoint.resume(
        out, method=method, ema=ema, warn=log.warning, check=lambda folder: _same_recipe(config, folder)
    )
    start_step, scaler_state = 0, {}
    if resumed is not None:
        state, optimizer_tensors = resumed
        if not config.accept_changes:
            _same_images(state, source, out)
        tensors_to_state(optimizer, optimizer_tensors)
        start_step, scaler_state = state["step"], state["scaler"]
        del resumed, optimizer_tensors  # a second copy of the optimizer's state, not needed while training
    steps = distributed.all_gather(torch.tensor([start_step], device=device)).tolist()
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks would continue from different steps, {steps}: out={out} must be one shared folder")

    # ---- what this run will be, in words ---------------------------------------------------------------------------
    main = distributed.is_main()
    few = _first_images(loader, device, count=8)
    # On every rank: it runs the method forward, where contrastive losses wait for the others.
    plan = describe_plan(method, augment, few, stop_step=stop_step, steps_per_epoch=steps_per_epoch)
    tracker = Tracker(
        out,
        config=plain(config),
        wandb_mode=config.wandb.mode.name,
        wandb_project=config.wandb.project,
        wandb_name=config.wandb.name or f"{out.parent.name}/{out.name}",
        wandb_group=config.wandb.group,
        total_steps=stop_step,
        is_main=main,
        resume_step=start_step,
    )
    if main:
        (out / "config.yaml").write_text(config_yaml)
        rows = effective_recipe(optimizer, method, lr=peak_lr)
        (out / "recipe.json").write_text(json.dumps(rows, indent=2) + "\n")
        arithmetic = lr_arithmetic(optim.base_lr, global_batch_size=global_batch_size, scaling=optim.scaling.name)
        announcement = [
            f"{out}" + (f": continuing from step {start_step}" if start_step else ""),
            f"{loader.describe()}{_ignored_note(source)}, views of {'x'.join(map(str, method.view_size))}",
            f"{plan}; {dtype_name(dtype)} on {device}",
            f"{batch}{_statistics_note(batch, method)}",
            f"{arithmetic}; {schedule.describe()}",
            recipe_table(rows),
        ]
        print("\n".join(announcement), flush=True)

    # ---- train -----------------------------------------------------------------------------------------------------
    latest: dict[str, float] = {}

    def on_log(step: int, metrics: dict[str, float]) -> None:
        latest.update(metrics)
        tracker.log(step, {"epoch": step / steps_per_epoch, **metrics, "bad_images": len(loader.bad)})

    def on_save(step: int) -> None:
        distributed.barrier()
        if main:
            checkpoint.save(
                out,
                step=step,
                method=method,
                spec=spec,
                optimizer_tensors=state_to_tensors(optimizer),
                ema=ema,
                config_yaml=config_yaml,
                state={
                    "epoch": step / steps_per_epoch,
                    "seed": config.seed,
                    "num_images": len(source),
                    "images": checksum(source),
                    "scaler": trainer.scaler.state_dict(),
                    "metrics": latest,
                },
                mean=list(data.mean),
                std=list(data.std),
            )
            checkpoint.prune(out, newest=step, keep_last=settings.keep_last, keep_every_steps=settings.keep_every_steps)
            if settings.pictures:
                _show(tracker, step, method, augment, few, mean=list(data.mean), std=list(data.std))
        distributed.barrier()  # nobody leaves, or says that it is saved, before it is

    trainer = Trainer(
        method,
        augment,
        optimizer,
        lr=lambda step: peak_lr * schedule.factor(step),
        set_lr=set_lr,
        device=device,
        dtype=dtype,
        seed=config.seed,
        accumulation=batch.accumulation,
        clip_grad_norm=settings.clip_grad_norm,
        ema=ema,
        ema_decay=settings.ema_decay or 0.0,
        channels_last=channels_last,
        compile=settings.compile,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        log=on_log,
        save=on_save,
        last_saved=lambda: str(next(reversed(checkpoint.steps_saved(out)), ("", "none"))[1]),
    )
    if scaler_state and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(scaler_state)
    try:
        with loader:
            batches = loader.batches(
                start_step=start_step,
                stop_step=stop_step,
                global_batch_size=global_batch_size,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            )
            trainer.fit(batches, start_step=start_step, stop_step=stop_step, global_batch_size=global_batch_size)
        if main:
            was = "was already complete" if start_step >= stop_step else "is complete"
            print(
                f"the run {was} at step {max(start_step, stop_step)}: {out}\nnext: python -m eval.knn ckpt={out}",
                flush=True,
            )
    finally:
        tracker.close()
    distributed.stop()  # not after an error: the other ranks may be waiting, and the launcher ends them
    return latest


def main() -> None:
    """The command line."""
    register_schemas()
    run_command(_task, config_name="pretrain")


def _task(config: DictConfig) -> dict[str, float]:
    chosen = choices()
    default = Path("runs") / f"{chosen['method']}_{chosen['model']}_{chosen['data']}" / f"seed{config.seed}"
    out = run_folder(default, config.out)
    count = num_processes(config.trainer.device.name, config.trainer.devices)
    if count == 1:
        return run(config, out=out)
    check(config, PretrainConfig)
    overrides = HydraConfig.get().overrides
    words = [word for word in overrides.task if not word.startswith("out=")]
    words += [word for word in overrides.hydra if word.startswith("hydra.searchpath")]
    quoted = str(out).replace("'", "\\'")
    code = run_processes(count, [*hydra_flags(sys.argv[1:]), *words, f"out='{quoted}'"])
    if code:
        raise ChildProcessError(f"the run on {count} processes ended with exit code {code}; what was saved is in {out}")
    return {}


def _open_run_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"the run folder out={out} cannot be made: {error.strerror}; give another out=") from error
    if not os.access(out, os.W_OK):
        raise OSError(f"the run folder out={out} is not writable; give another out=")


def _same_recipe(config: DictConfig, folder: Path) -> None:
    """Raise ValueError with the differences where the run in `folder` was made by another recipe, unless that was
    asked for.
    """
    if config.accept_changes:
        return
    before = _flat(plain(OmegaConf.create((folder / "run.yaml").read_text())))
    now = _flat(plain(config))
    free = tuple(key for key in FREE if key != "trainer.steps" or config.trainer.epochs is not None)
    changed = [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    if changed:
        raise ValueError(
            f"{folder.parent.parent} holds a run of another recipe:\n  "
            + "\n  ".join(changed)
            + "\nGive another out= for a new run, or accept_changes=true to continue this one under the new recipe"
        )


def _same_images(state: Mapping[str, Any], source: Source, out: Path) -> None:
    """Raise ValueError where the run was trained on other images than the data's root holds now."""
    if (state["num_images"], state["images"]) != (len(source), checksum(source)):
        raise ValueError(
            f"{out} holds a run on other images ({state['num_images']:,}; {source.name} has {len(source):,}); "
            "give another out= for a new run, or accept_changes=true to continue on these"
        )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _attend_by_matmul(method: Method) -> None:
    """On the CPU timm's plain matrix products beat the fused attention kernel in bf16."""
    for module in method.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # pyright: ignore


def _stem_side(method: dict[str, Any], image_size: tuple[int, int]) -> int | None:
    """What `model.stem=auto` looks at, where the method shows the backbone patches instead of images."""
    stem_size = getattr(locate(method["_target_"]), "stem_size", None)
    return None if stem_size is None else stem_size(image_size, **method)


def _ignored_note(source: Source) -> str:
    return f" ({source.num_ignored:,} other files ignored)" if source.num_ignored else ""


def _statistics_note(batch: BatchArithmetic, method: Method) -> str:
    norms = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in method.modules())
    if batch.accumulation == 1 or not norms:
        return ""
    return f"; BatchNorm's statistics are those of each part of {batch.device_batch_size} images"


def _first_images(loader: Loader, device: torch.device, *, count: int) -> Batch:
    """The first images of the set, as the method sees them in epoch 0."""
    batches = loader.sequential(batch_size=min(count, len(loader)))
    batch = next(iter(batches))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return to_device(batch, device)


def _show(
    tracker: Tracker, step: int, method: Method, augment: Augment, few: Batch, *, mean: list[float], std: list[float]
) -> None:
    """Pictures of what the method sees, and of what it makes of it where it makes something."""
    training = method.training
    method.eval()  # so that pictures draw no random numbers and move no statistics
    with torch.no_grad():
        batch = augment(few)
        tracker.images(step, "views", views_panel(batch["views"], mean=mean, std=std))
        reconstruct = getattr(method, "reconstruct", None)
        if reconstruct is not None:
            panels = reconstruct(batch["views"][0], batch["noise"])
            tracker.images(step, "reconstructions", reconstruction_panel(panels, mean=mean, std=std))
    method.train(training)


if __name__ == "__main__":
    main()
