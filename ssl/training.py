"""One run of the training loop, from a method and its images to checkpoints: the same for pretraining and fine-tuning.

`train` reads as the table of contents of what they share; what comes before it is each command's own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import ssl.checkpoint as checkpoint
import ssl.distributed as distributed
from ssl.activation_checkpointing import checkpoint_activations
from ssl.averaging import StochasticWeightAverage, average_note, averaged_lr, make_average, renew_statistics
from ssl.config import build, plain, wrong_types
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.sources import Source, checksum
from ssl.data.views import make_views
from ssl.failed_step import FailedStep, write_failed_step
from ssl.methods.base import Method
from ssl.models.attention import attend_by_matmul
from ssl.models.backbones import BackboneSpec, is_token_model
from ssl.online import Evaluation, OnlineSubject, evaluate_all, show_start
from ssl.optim import make_optimizer, parameter_groups, scaled_lr, set_lr, state_to_tensors
from ssl.past import take_up
from ssl.plan import describe_plan, flops_per_image, utilization
from ssl.profile_report import write_summary
from ssl.profiling import Profile, StepProfiler, is_profiled
from ssl.recipe import (
    BatchArithmetic,
    active_parts,
    batch_arithmetic,
    effective_recipe,
    lr_arithmetic,
    parts_line,
    recipe_table,
)
from ssl.run_pictures import RunPictures, first_images
from ssl.run_report import Report, Reporter
from ssl.saving import Saver
from ssl.schedules import make_schedule
from ssl.sharding import Gathering, Tensors, rounded_note, shard
from ssl.slow_ranks import SlowRanks
from ssl.stopping import deadline_of
from ssl.tracking import Tracker
from ssl.trainer import Trainer, dtype_name, to_device, total_steps
from ssl.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """The images that a run trains on, and how they are read."""

    source: Source
    channels: int
    mean: list[float]
    std: list[float]
    in_memory_gib: float
    max_bad_fraction: float
    settings: dict[str, Any]
    """The plain data config that they come from."""


def train(
    config: DictConfig,
    *,
    schema: type,
    out: Path,
    method: Method,
    spec: BackboneSpec,
    images: Images,
    device: torch.device,
    dtype: torch.dtype,
    evaluations: Mapping[str, Evaluation],
    next_command: str | None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train `method` as `config`, a TrainingConfig and more, says, in the run folder `out`, from its last checkpoint if
    it has one; returns the last metrics.

    `evaluations` are called every `trainer.eval_every_epochs`. `card` is stored in each checkpoint's state.json.
    `next_command` is printed at the end, None where the caller goes on. Raises ValueError for settings that do not go
    together and for a run of another recipe in `out`, StopRun where an evaluation ended the run, now or before.
    """
    settings = config.trainer
    page = config.get("report")  # a probe's training has none
    report: Report | None = build(page) if page else None
    source, mean, std = images.source, images.mean, images.std
    deadline = deadline_of(settings.max_time)

    # ---- the model on its device -----------------------------------------------------------------------------------
    channels_last = not is_token_model(method.backbone)
    method.to(device)
    if channels_last:
        method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if settings.sync_batchnorm:
        distributed.sync_batchnorm(method)
    if device.type == "cpu" and dtype == torch.bfloat16:
        attend_by_matmul(method)
    if settings.activation_checkpointing:
        checkpoint_activations(method)
    if settings.shard.name == "full":
        shard(method, device)
        note = rounded_note(method, dtype, recomputed=settings.activation_checkpointing)
        if note is not None and distributed.is_main():
            log.warning(note)

    # ---- views -----------------------------------------------------------------------------------------------------
    with wrong_types("augment.views"):
        views = make_views(plain(config.augment.views))
    augment = Augment(views, mean=mean, std=std).to(device)
    loader = Loader(
        source,
        views,
        size=method.view_size,
        channels=images.channels,
        seed=config.seed,
        num_noise=method.num_noise,
        threads=config.loader.threads,
        in_memory_gib=images.in_memory_gib,
        max_bad_fraction=images.max_bad_fraction,
        prefetch=config.loader.prefetch,
        pin_memory=device.type == "cuda",
        fill=images.mean,
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
    groups = parameter_groups(
        method, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, lr_scales=method.lr_scales
    )
    with wrong_types("optim.options"):
        optimizer = make_optimizer(groups, name=optim.name, lr=peak_lr, **plain(optim.options))
    shape = plain(config.schedule)
    schedule = make_schedule(shape.pop("name"), steps_per_epoch=steps_per_epoch, total_steps=span, **shape)
    average = make_average(method, settings, steps_per_epoch=steps_per_epoch, span=span)
    lr = averaged_lr(schedule, peak_lr, average, settings.swa_lr_factor)

    # ---- the past of this run --------------------------------------------------------------------------------------
    config_yaml = OmegaConf.to_yaml(config, resolve=True)
    source_checksum = checksum(source)  # once: a read that fails at a later save does not make it another set
    began = time.perf_counter()
    past = take_up(
        config,
        out,
        schema=schema,
        method=method,
        average=average,
        optimizer=optimizer,
        images=(len(source), source_checksum),
        where=source.name,
        evaluations=evaluations,
        stop_step=stop_step,
    )
    start_step, latest = past.step, past.metrics
    loader.bad_list.learn(past.bad_images)

    # ---- what this run will be, in words ---------------------------------------------------------------------------
    main = distributed.is_main()
    few = first_images(loader, device, count=8)
    # On every rank: it runs the method forward, where contrastive losses wait for the others.
    flops = flops_per_image(method, augment, few)
    plan = describe_plan(method, flops, stop_step=stop_step, steps_per_epoch=steps_per_epoch)
    use = utilization(
        flops, device=device, dtype=dtype, convolutional=channels_last, num_devices=distributed.world_size()
    )
    profiling = is_profiled(settings.profile_steps, start_step=start_step, stop_step=stop_step)
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
    rows = effective_recipe(optimizer, method, lr=peak_lr)
    parts = active_parts(plain(config), module=method, optimizer=optimizer, schedule=schedule, lr=peak_lr)
    recipe_json = json.dumps({"notes": list(method.notes), "parts": parts, "groups": rows}, indent=2) + "\n"
    _write_on_main({out / "config.yaml": config_yaml, out / "recipe.json": recipe_json})
    if main:
        arithmetic = lr_arithmetic(optim.base_lr, global_batch_size=global_batch_size, scaling=optim.scaling.name)
        announcement = [
            f"{out}" + (f": continuing from step {start_step}" if start_step else ""),
            f"{loader.describe()}{_ignored_note(source)}, views of {'x'.join(map(str, method.view_size))}",
            f"{plan}; {dtype_name(dtype)} on {device}",
            *filter(None, [use.describe()]),
            f"{batch}{_statistics_note(batch, method)}",
            f"{arithmetic}; {schedule.describe()}{average_note(average, settings)}",
            *method.notes,
            parts_line(parts),
            recipe_table(rows),
        ]
        tracker.say("\n".join(announcement))

    # ---- train -----------------------------------------------------------------------------------------------------
    ended: list[str] = []

    def count_bad_images() -> int:  # on every rank
        for found in distributed.from_every(loader.bad_list.news()):
            loader.bad_list.learn(found)
        return len(loader.bad_list.counted)

    def on_log(step: int, metrics: dict[str, float]) -> None:
        mfu = use.mfu(metrics["images_per_second"])
        metrics |= {} if mfu is None else {"mfu": mfu}
        metrics["bad_images"] = count_bad_images()
        latest.update(metrics)
        if metrics["loss"] != metrics["loss"]:  # every step since the last line was skipped: JSON has no such number
            latest["loss"] = None
        tracker.log(step, {"epoch": step / steps_per_epoch, **metrics})
        reporter.logged(step)

    def subject(step: int) -> OnlineSubject:
        return OnlineSubject(
            method=method,
            image_size=spec.image_size,
            channels=images.channels,
            mean=mean,
            std=std,
            data=images.settings,
            device=device,
            dtype=dtype,
            seed=config.seed,
            step=step,
            last=step == span,
            epoch=step / steps_per_epoch,
            threads=config.loader.threads,
            warn=log.warning if main else lambda text: None,
        )

    def on_evaluate(step: int) -> dict[str, float]:
        return evaluate_all(evaluations, subject(step), ended)

    def averages_at(step: int) -> dict[str, Tensor] | None:
        return average.tensors if average is not None and average.ready(step) else None

    def train_seconds() -> float:
        return past.seconds + time.perf_counter() - began

    def write(run_dir: Path, step: int) -> None:
        averages = averages_at(step)
        with Gathering() as gathering:  # on every rank
            weights = gathering.of(method.state_dict())
            optimizer_tensors = gathering.of(state_to_tensors(optimizer))
            ema = None if averages is None else gathering.of(averages)
            if main:
                write_whole(run_dir, step, weights, optimizer_tensors, ema)

    def write_whole(
        run_dir: Path, step: int, weights: Tensors, optimizer_tensors: Tensors, ema: Tensors | None
    ) -> None:
        checkpoint.save(
            run_dir,
            step=step,
            method=weights,
            spec=spec,
            optimizer_tensors=optimizer_tensors,
            ema=ema,
            config_yaml=config_yaml,
            state={
                "epoch": step / steps_per_epoch,
                "seed": config.seed,
                "num_images": len(source),
                "images": source_checksum,
                "scaler": trainer.scaler.state_dict(),
                "guard": trainer.guard.state(),
                "unlogged": trainer.unlogged.state(),
                "bad_images": {str(index): why for index, why in sorted(loader.bad_list.counted.items())},
                "metrics": latest,
                "train_seconds": round(train_seconds(), 2),
                "world_size": distributed.world_size(),
                "evaluations": {n: e.state() for n, e in evaluations.items() if hasattr(e, "state")},  # pyright: ignore
                "ended": ended[0] if ended else None,
                **(card or {}),
            },
            mean=mean,
            std=std,
        )

    pictures = RunPictures(tracker, method, augment, few, mean, std)
    reporter = Reporter(
        report,
        out=out,
        start_step=start_step,
        stop_step=stop_step,
        tracker=tracker,
        method=method,
        source=source,
        subject=subject,
        average=averages_at,
        train_seconds=train_seconds,
        images_per_second=lambda: latest.get("images_per_second"),
    )
    saver = Saver(
        out,
        write,
        keep_last=settings.keep_last,
        keep_every_steps=settings.keep_every_steps,
        max_failed=settings.max_failed_saves,
        fallback=settings.fallback,
        everywhere=True,
    )

    def on_save(step: int, final: bool) -> None:
        if isinstance(average, StochasticWeightAverage) and average.ready(step) and (step == span or ended):
            shown = loader.sequential(batch_size=min(batch.device_batch_size, len(loader)))  # on every rank
            renew_statistics(method, average, (augment(to_device(each, device)) for each in shown))
        count_bad_images()  # so that the checkpoint knows those of all ranks
        saver.save(step, final=final)
        tracker.flush()  # the save may have made room
        if settings.pictures:
            pictures.show(step)
        reporter.saved(step, final)

    def on_failed(step: int, why: str) -> str:
        folder = out / "failed" / "checkpoints" / checkpoint.folder_name(step - 1)
        problem = saver.attempt(out / "failed", step - 1)
        if problem is None and main:
            failed = FailedStep(step=step, reason=why, precision=dtype_name(dtype), device=device.type, images=[])
            problem = _keep_failed(folder, failed, loader, global_batch_size)
        problem = distributed.from_main(problem)
        return f"{folder}" if problem is None else f"no folder: {problem}"

    def on_profile(profile: Profile) -> None:
        tracker.say(write_summary(profile, loader, out / "profile"))

    profiler = None
    if main and profiling:
        profiler = StepProfiler(
            settings.profile_steps,
            folder=out / "profile",
            device=device,
            global_batch_size=global_batch_size,
            report=on_profile,
        )
    watchdog = Watchdog(settings.hang_timeout, out)
    trainer = Trainer(
        method,
        augment,
        optimizer,
        lr=lr,
        set_lr=set_lr,
        device=device,
        dtype=dtype,
        seed=config.seed,
        accumulation=batch.accumulation,
        clip_grad_norm=settings.clip_grad_norm,
        average=average,
        channels_last=channels_last,
        compile=settings.compile,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        log=on_log,
        save=on_save,
        last_saved=lambda: checkpoint.last_saved(out),
        evaluate=on_evaluate if evaluations and settings.eval_every_epochs else None,
        evaluate_every_steps=max(round((settings.eval_every_epochs or 1) * steps_per_epoch), 1),
        end_step=span,
        profiler=profiler,
        spike_deviations=settings.spike_deviations,
        max_bad_steps=settings.max_bad_steps,
        save_failed=on_failed,
        warn=log.warning if main else lambda text: None,
        deadline=deadline,
        watchdog=watchdog,
        slow_ranks=SlowRanks() if distributed.world_size() > 1 else None,
    )
    if past.guard is not None:
        trainer.guard.load(past.guard)
    trainer.unlogged.load(past.unlogged)
    if past.scaler and trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(past.scaler)
    with contextlib.ExitStack() as closing:  # each is closed, whatever the others run into
        closing.callback(tracker.close)
        closing.callback(watchdog.close)
        if profiler is not None:
            closing.callback(profiler.close)
        if trainer.evaluate is not None and start_step == 0 and stop_step >= min(trainer.evaluate_every_steps, span):
            with watchdog.paused("evaluating"):
                show_start(evaluations, subject(0))
        with loader, reporter:
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
            what_next = f"\nnext: {next_command}" if next_command else ""
            tracker.say(f"the run {was} at step {max(start_step, stop_step)}: {out}{what_next}")
    return latest


def _write_on_main(texts: Mapping[Path, str]) -> None:
    """Write small files on the first rank. Raises OSError on every rank where that is not possible."""
    problem = None
    if distributed.is_main():
        path = None
        try:
            for path, text in texts.items():
                path.write_text(text)
        except OSError as error:
            problem = f"{path} could not be written: {error.strerror}; make room, or give another out="
    problem = distributed.from_main(problem)
    if problem is not None:
        raise OSError(problem)


def _keep_failed(folder: Path, failed: FailedStep, loader: Loader, global_batch_size: int) -> str | None:
    """Add a step and its global batch to the checkpoint in `folder`; why that was not possible, else None."""
    number = failed.step - 1
    batches = loader.batches(start_step=number, stop_step=failed.step, global_batch_size=global_batch_size)
    batch = next(iter(batches))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    images = [loader.source.describe(index) for index in batch["index"].tolist()]
    try:
        write_failed_step(folder, replace(failed, images=images), batch)
    except OSError as error:
        return str(error)
    return None


def _ignored_note(source: Source) -> str:
    return f" ({source.num_ignored:,} other files ignored)" if source.num_ignored else ""


def _statistics_note(batch: BatchArithmetic, method: Method) -> str:
    norms = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.training for part in method.modules())
    if batch.accumulation == 1 or not norms:
        return ""
    return f"; BatchNorm's statistics are those of each part of {batch.device_batch_size} images"
