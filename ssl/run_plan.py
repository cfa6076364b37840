"""`trainer.plan=true`: what a run will need and cost, said without training, without its devices and its weights.

Everything that has a size is built on torch's meta device. Images are counted where they are at hand; elsewhere
data.limit says how many there are.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ssl.activation_checkpointing import checkpoint_activations
from ssl.checkpoint import split_backbone
from ssl.chips import bare_name, chip_named, device_peak, memory_gib, peak_tflops
from ssl.config import build, check_trainer, plain, wrong_types
from ssl.data.image_size import DEFAULT, as_size, choose_image_size
from ssl.data.loader import whole_batches
from ssl.data.subset import limit, limit_note
from ssl.data.views import make_views
from ssl.memory_plan import (
    DeviceMemory,
    device_memory,
    empty_batch,
    file_bytes,
    gib,
    kept_for_backward,
    optimizer_tensors,
    planned_flops,
)
from ssl.methods.base import Batch, Method
from ssl.models.attention import attend_by_matmul
from ssl.models.backbones import BackboneSpec, is_token_model
from ssl.optim import check_cut, make_optimizer, parameter_groups
from ssl.plan import count_parameters
from ssl.recipe import BatchArithmetic, batch_arithmetic
from ssl.sharding import check_divisible
from ssl.tracking import duration
from ssl.trainer import choose_dtype, dtype_name, total_steps

ASSUMED_MFU = {"tokens": 0.35, "convolutions": 0.15}
"""Shares of a chip's peak that training reaches, where no speed is given: rather less than careful runs report."""
KEPT_FREE = 0.08
"""Share of a device's memory for the context, kernels' workspaces and what the allocator cannot reuse."""
MEASURED_FLOP = 1e11
"""The most operations that a step may take to be measured on a CPU: a few seconds."""
LINE_BYTES = 300

MakeMethod = Callable[[DictConfig, tuple[int, int]], tuple[Method, BackboneSpec]]


@dataclass(frozen=True)
class Target:
    """The devices that a run is planned for; `memory` in bytes and `peak_tflops` are of one, None where unknown."""

    kind: str
    name: str
    here: bool
    nodes: int
    devices: int
    dtype: torch.dtype
    memory: float | None
    peak_tflops: float | None

    @property
    def world_size(self) -> int:
        return self.nodes * self.devices


@dataclass(frozen=True)
class Speed:
    """Images per second of all devices together, and where the number comes from."""

    images_per_second: float | None
    source: str


@dataclass(frozen=True)
class RunPlan:
    """A run as numbers. Sizes are bytes, `flops` operations per image and step, forward and backward."""

    target: Target
    num_images: int
    notes: list[str]
    parameters: dict[str, int]
    trained: int
    flops: float
    batch: BatchArithmetic
    steps_per_epoch: int
    start_to_stop: int
    memory: DeviceMemory
    checkpoint_files: dict[str, int]
    num_kept: int
    log_lines: int
    speed: Speed
    folder: Path
    free_disk: int

    @property
    def checkpoint(self) -> int:
        return sum(self.checkpoint_files.values())

    @property
    def disk(self) -> int:
        """What the run folder grows to, with one checkpoint more while it is written."""
        return (self.num_kept + 1) * self.checkpoint + self.log_lines * LINE_BYTES

    @property
    def warnings(self) -> list[str]:
        """What will not fit, each with what may be changed."""
        found = []
        room = None if self.target.memory is None else self.target.memory * (1 - KEPT_FREE)
        if room is not None and self.memory.total > room:
            found.append(
                f"{gib(self.memory.total)} do not fit {self.target.name}, where {gib(room)} can be used: "
                f"{self._advice(room)}"
            )
        if self.disk > self.free_disk:
            found.append(
                f"the run folder needs {gib(self.disk)}, and {self.folder} has {gib(self.free_disk)} free: give "
                "another out=, lower trainer.keep_last or raise trainer.keep_every_steps"
            )
        return found

    def _advice(self, room: float) -> str:
        parts = self.memory.parts
        growing = sum(
            size for name, size in parts.items() if name.startswith(("activations", "one block", "batch", "views"))
        )
        fixed = self.memory.total - growing
        fitting = math.floor((room - fixed) / growing * self.batch.device_batch_size)
        share = self.batch.device_batch_size * self.batch.accumulation
        sizes = [size for size in range(1, fitting + 1) if share % size == 0]
        if sizes:
            return f"trainer.device_batch_size={sizes[-1]} does, or trainer.activation_checkpointing=true may"
        return "try trainer.activation_checkpointing=true, trainer.shard=full on more devices, or a smaller model"

    def describe(self) -> str:
        """The plan as lines of text."""
        target, total = self.target, sum(self.parameters.values())
        parts = ", ".join(f"{name} {_millions(number)}" for name, number in self.parameters.items())
        frozen = "" if self.trained == total else f", {self.trained / 1e6:.2f} M of them trained"
        images = self.start_to_stop * self.batch.global_batch_size
        lines = [
            f"a plan, nothing is trained: {target.nodes} x {target.devices} devices ({target.name}), "
            f"{dtype_name(target.dtype)}",
            *self.notes,
            f"parameters: {total / 1e6:.2f} M{frozen} ({parts})",
            f"operations: {self.flops / 1e9:,.4g} GFLOP per image and step, forward and backward",
            f"images: {self.num_images:,}, {self.batch}",
            f"steps: {self.start_to_stop:,} = {self.start_to_stop / self.steps_per_epoch:.4g} epochs of "
            f"{self.steps_per_epoch:,}; {images:,} images shown",
            f"memory of each device ({gib(target.memory)}):" if target.memory else "memory of each device:",
            *self.memory.describe(),
            f"time: {self._time(images)}",
            f"checkpoint: {gib(self.checkpoint)} ({self._files()})",
            f"disk: {gib(self.disk)} for {self.num_kept} kept and one being written; {gib(self.free_disk)} are free",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def _time(self, images: int) -> str:
        if self.speed.images_per_second is None:
            return self.speed.source
        seconds = images / self.speed.images_per_second
        devices = self.target.world_size
        return (
            f"about {duration(seconds)}, {seconds * devices / 3600:,.4g} device hours, at "
            f"{self.speed.images_per_second:,.4g} images/s ({self.speed.source}); without waiting for data, "
            "communication, evaluations and saving"
        )

    def _files(self) -> str:
        return ", ".join(f"{name} {gib(size)}" for name, size in self.checkpoint_files.items())


def plan_run(config: DictConfig, *, out: Path, make_method: MakeMethod) -> RunPlan:
    """What the run of a PretrainConfig will need, with the method that `make_method` makes for an image size.

    Writes nothing, joins no group, trains nothing but a few steps of a small model, to time them.

    Raises ValueError for settings that the run itself would refuse, and where the number of images is not known.
    """
    settings, data = config.trainer, config.data
    check_trainer(settings)
    target = find_target(config)
    num_images, image_size, notes = _images(config)
    with wrong_types("augment.views"):
        num_views = len(make_views(plain(config.augment.views)))

    def make(device: str) -> Method:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            method = make_method(config, image_size)[0].to(device)
        if target.kind == "cpu" and target.dtype == torch.bfloat16:
            attend_by_matmul(method)
        return method

    method = make("meta")
    if settings.shard.name == "full" and target.world_size > 1:
        check_divisible(method)
        check_cut(config.optim.name)
    shown = {"num_views": num_views, "channels": data.channels}
    flops = planned_flops(method, **shown, device=target.kind)
    kept = kept_for_backward(method, **shown, device=target.kind, dtype=target.dtype)
    recomputed = None
    if settings.activation_checkpointing:
        checkpoint_activations(method)
        recomputed, kept = kept, kept_for_backward(method, **shown, device=target.kind, dtype=target.dtype)
    optim = config.optim
    groups = parameter_groups(
        method, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay, lr_scales=method.lr_scales
    )
    with wrong_types("optim.options"):
        state = optimizer_tensors(groups, name=optim.name, options=plain(optim.options))
    averaged = settings.ema_decay is not None or settings.swa_start_epoch is not None
    batch = batch_arithmetic(
        settings.global_batch_size, world_size=target.world_size, device_batch_size=settings.device_batch_size
    )
    steps_per_epoch = whole_batches(num_images, settings.global_batch_size, where=data.name)
    _, stop_step = total_steps(epochs=settings.epochs, steps=settings.steps, steps_per_epoch=steps_per_epoch)
    memory = device_memory(
        method,
        kept=kept,
        recomputed=recomputed,
        state=state,
        averaged=averaged,
        batch_size=batch.device_batch_size,
        shards=target.world_size if settings.shard.name == "full" else 1,
        **shown,
    )
    speed = _speed(config, target, method, make, flops=flops, batch=batch, memory=memory, num_views=num_views)
    folder = next(path for path in [out.absolute(), *out.absolute().parents] if path.is_dir())
    every = settings.keep_every_steps
    num_kept = min(settings.keep_last, math.ceil(stop_step / settings.checkpoint_every_steps))
    return RunPlan(
        target=target,
        num_images=num_images,
        notes=notes,
        parameters=parameters_by_part(method),
        trained=count_parameters(method)[1],
        flops=flops,
        batch=batch,
        steps_per_epoch=steps_per_epoch,
        start_to_stop=stop_step,
        memory=memory,
        checkpoint_files=_checkpoint_files(config, method, state, averaged=averaged),
        num_kept=num_kept + (stop_step // math.lcm(every, settings.checkpoint_every_steps) if every else 0),
        log_lines=stop_step // settings.log_every_steps,
        speed=speed,
        folder=folder,
        free_disk=shutil.disk_usage(folder).free,
    )


def find_target(config: DictConfig) -> Target:
    """Which devices, and how many, a run would have: `launch.nodes` times `trainer.devices`, of `trainer.plan_chip`."""
    settings, launch = config.trainer, config.launch
    devices = settings.devices if launch.devices is None else launch.devices
    has_gpu = torch.cuda.is_available() and settings.device.name != "cpu"
    precision = settings.precision.name
    if settings.plan_chip is not None:
        if settings.device.name == "cpu":
            raise ValueError(
                f"trainer.plan_chip={settings.plan_chip} has no effect with trainer.device=cpu; leave one out"
            )
        name = chip_named(settings.plan_chip)
        bf16 = peak_tflops(name, "bf16") is not None
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
            precision, torch.bfloat16 if bf16 else torch.float16
        )
        peak = peak_tflops(name, {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype])
        size = memory_gib(name)
        here = has_gpu and bare_name(torch.cuda.get_device_name()) == bare_name(name)
        memory = None if size is None else size * 2**30
        return Target("cuda", name, here, launch.nodes, devices or 1, dtype, memory, peak)
    if settings.device.name == "cuda" and not has_gpu:
        raise ValueError(
            "trainer.device=cuda asks for a GPU and torch sees none; give trainer.plan_chip=H100, for example, to plan "
            "for one that is not here, or trainer.device=cpu"
        )
    if has_gpu:
        device = torch.device("cuda", 0)
        dtype = choose_dtype(precision, device)
        name, _, peak = device_peak(device, dtype, convolutional=False)
        memory = float(torch.cuda.get_device_properties(device).total_memory)
        return Target("cuda", name, True, launch.nodes, devices or torch.cuda.device_count(), dtype, memory, peak)
    dtype = choose_dtype(precision, torch.device("cpu"))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / (devices or 1)
    return Target("cpu", "cpu", True, launch.nodes, devices or 1, dtype, memory, None)


def parameters_by_part(method: Method) -> dict[str, int]:
    """How many parameters the backbone and each other part have; no parameter is in two."""
    counted = {"backbone": count_parameters(method.backbone)[0]}
    inside = {id(parameter) for parameter in method.backbone.parameters()}
    for name, parameter in method.named_parameters():
        if id(parameter) not in inside:
            part = name.split(".")[0]
            counted[part] = counted.get(part, 0) + parameter.numel()
    return counted


def _images(config: DictConfig) -> tuple[int, tuple[int, int], list[str]]:
    """How many images there are and their size, from the set itself or from data.limit and data.image_size."""
    data = config.data
    try:
        here = {**plain(data.source), **({"download": False} if "download" in data.source else {})}
        source = build(here, split="train")
    except (ValueError, OSError) as error:
        if data.limit is None:
            raise ValueError(
                f"{error}\nTo plan without the images, give their number: data.limit=1281167, for example"
            ) from error
        size = as_size(plain(data.image_size)) or (DEFAULT, DEFAULT)
        note = f"the images of data={data.name} are not here: {data.limit:,} are taken from data.limit"
        return data.limit, size, [f"{note}, at {size[0]}x{size[1]} pixels"]
    note = limit_note(source, data.limit)
    source = limit(source, data.limit, seed=config.seed)
    return len(source), choose_image_size(plain(data.image_size), source), [] if note is None else [note]


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def _checkpoint_files(
    config: DictConfig, method: Method, state: Mapping[str, Tensor], *, averaged: bool
) -> dict[str, int]:
    """The size of each file of a checkpoint."""
    tensors = method.state_dict()
    backbone, rest = split_backbone(tensors)
    return {
        "model": file_bytes(backbone),
        "method": file_bytes(rest),
        "optimizer": file_bytes(state),
        **({"ema": file_bytes(tensors)} if averaged else {}),
        "config": len(OmegaConf.to_yaml(config, resolve=True)) + 2500,
    }


def _speed(
    config: DictConfig,
    target: Target,
    method: Method,
    make: Callable[[str], Method],
    *,
    flops: float,
    batch: BatchArithmetic,
    memory: DeviceMemory,
    num_views: int,
) -> Speed:
    """As given, else as measured where the device is here and the step small, else by the chip's peak."""
    given = config.trainer.plan_images_per_second
    devices = target.world_size
    if given is not None:
        return Speed(given * devices, f"trainer.plan_images_per_second={given:g} on each device")
    fits = target.memory is not None and memory.total < target.memory * (1 - KEPT_FREE)
    size = min(batch.device_batch_size, 8) if target.kind == "cpu" else batch.device_batch_size
    if target.here and fits and (target.kind == "cuda" or flops * size <= MEASURED_FLOP):
        measured = measure(make(target.kind), config, target, batch_size=size, num_views=num_views)
        return Speed(
            measured * devices, f"{measured:,.4g} on {target.name}, measured over a few steps of {size} images"
        )
    if target.peak_tflops is None:
        return Speed(
            None,
            "not known: give trainer.plan_images_per_second=, or trainer.plan_chip= for an estimate by the chip's peak",
        )
    kind = "tokens" if is_token_model(method.backbone) else "convolutions"
    share = ASSUMED_MFU[kind]
    rate = share * target.peak_tflops * 1e12 / flops
    return Speed(
        rate * devices, f"estimated: {share:.0%} of {target.name}'s {target.peak_tflops:g} TFLOP/s, {rate:,.4g} on each"
    )


def measure(method: Method, config: DictConfig, target: Target, *, batch_size: int, num_views: int) -> float:
    """Images per second of a few steps on this machine's device, on images that are already there."""
    groups = parameter_groups(method, weight_decay=config.optim.weight_decay, lr_scales=method.lr_scales)
    optimizer = make_optimizer(groups, name=config.optim.name, lr=0.0, **plain(config.optim.options))
    batch = empty_batch(method, batch_size, num_views=num_views, channels=config.data.channels, device=target.kind)
    draw = torch.Generator(target.kind).manual_seed(0)
    batch["views"] = [view.normal_(generator=draw) for view in batch["views"]]
    batch["noise"].uniform_(generator=draw)
    method.train()
    with torch.random.fork_rng(devices=[]):
        rates = [batch_size / seconds for seconds in _step_seconds(method, optimizer, batch, target)]
    return sorted(rates[1:])[len(rates[1:]) // 2]


def _step_seconds(method: Method, optimizer: torch.optim.Optimizer, batch: Batch, target: Target) -> Iterator[float]:
    for _ in range(4):
        began = time.perf_counter()
        with torch.autocast(target.kind, target.dtype, enabled=target.dtype != torch.float32):
            loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        yield time.perf_counter() - began
