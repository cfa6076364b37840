"""The only training loop: autocast, accumulation, DistributedDataParallel, clipping, finite check, saving.

It knows nothing of methods, configs or data beyond what its arguments say, and no device is waited for between two
logged steps.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import ssl.distributed as distributed
from ssl.averaging import Average, weights_of
from ssl.methods.base import Batch, Method
from ssl.online import StopRun
from ssl.profiling import OUTSIDE, StepProfiler
from ssl.randomness import step_seed


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM), and has saved the step it had completed."""

    def __init__(self, step: int, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name} after step {step}, which is saved; the same command continues")
        self.step = step


class NotFinite(ValueError):
    """The loss became NaN or infinite."""


@dataclass
class Trainer:
    """What one run needs between its first and its last step.

    `lr` gives a step's learning rate; `log(step, metrics)`, `save(step)` and `evaluate(step)` are called with the
    number of completed steps, so that the loop owns no file and no tracker. What `evaluate` returns is logged with the
    step; the StopRun that it may raise ends the run once the step is saved.
    """

    method: Method
    augment: nn.Module
    optimizer: torch.optim.Optimizer
    lr: Callable[[int], float]
    set_lr: Callable[[torch.optim.Optimizer, float], None]
    device: torch.device
    dtype: torch.dtype
    seed: int
    accumulation: int = 1
    clip_grad_norm: float | None = None
    average: Average | None = None
    channels_last: bool = False
    compile: bool = False
    log_every_steps: int = 10
    checkpoint_every_steps: int = 500
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    save: Callable[[int], None] = lambda step: None
    last_saved: Callable[[], str] = lambda: "none"
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every_steps: int = 1
    end_step: int | None = None  # where the schedule ends; a run may be cut before
    profiler: StepProfiler | None = None
    scaler: Any = field(init=False)
    parallel: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.compile:
            self.method.compile()
        self.parallel = self.method
        if distributed.world_size() > 1:
            # Running statistics stay each rank's own: the step needs none of them, and synchronised BatchNorm makes
            # them equal. torch renamed the switch in 2.15.
            names = inspect.signature(DistributedDataParallel.__init__).parameters
            switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            own_buffers: dict[str, Any] = {switch: False}
            self.parallel = DistributedDataParallel(
                self.method,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **own_buffers,
            )

    def fit(self, batches: Iterator[Batch], *, start_step: int, stop_step: int, global_batch_size: int) -> None:
        """Train from `start_step` to `stop_step`.

        Raises NotFinite on a loss that is not a number; with the last completed step saved, Stopped after a signal and
        StopRun where an evaluation ends the run.
        """
        self.method.train()
        pending: list[tuple[int, dict[str, Tensor]]] = []
        clock = _Clock()
        with _signals() as caught:
            for step in range(start_step, stop_step):
                waited = time.perf_counter()
                with self._part("waiting for data"):
                    batch = next(batches)
                clock.waited += time.perf_counter() - waited
                lr = self.lr(step)
                self.set_lr(self.optimizer, lr)
                pending.append((step + 1, self.step(batch, step)))
                done = step + 1
                last = done == stop_step
                evaluating = self._evaluates_at(done)
                verdict = None
                if done % self.log_every_steps == 0 or last or done == start_step + 1 or evaluating:
                    metrics = self._collect(pending)
                    images = global_batch_size * len(pending)
                    metrics |= {"lr": lr, **clock.lap(images)}
                    pending.clear()
                    if evaluating:
                        with self._part(OUTSIDE):
                            found, verdict = self._evaluate(done)
                        metrics |= found
                        clock.restart()
                    self.log(done, metrics)
                stopping = self._agreed(caught, done) or verdict is not None
                if done % self.checkpoint_every_steps == 0 or last or stopping:
                    self._collect(pending)
                    self._check_weights(done)
                    saving = time.perf_counter()
                    with self._part(OUTSIDE):
                        self.save(done)
                    clock.start += time.perf_counter() - saving  # throughput is that of training
                if verdict is not None:
                    raise verdict
                if stopping and not last:
                    raise Stopped(done, caught[0] if caught else "another rank")
                if self.profiler is not None:
                    profiling = time.perf_counter()
                    self.profiler.step_done()
                    clock.start += time.perf_counter() - profiling

    def _part(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.profiler is None else self.profiler.part(name)

    def _evaluates_at(self, done: int) -> bool:
        """At each multiple of `evaluate_every_steps` and at the end of the schedule, but not where a run is cut."""
        return self.evaluate is not None and (done % self.evaluate_every_steps == 0 or done == self.end_step)

    def _evaluate(self, done: int) -> tuple[dict[str, float], StopRun | None]:
        """The evaluations' metrics, and the verdict of one that ends the run: it may have put back earlier weights."""
        assert self.evaluate is not None
        average = self.average.tensors if self.average is not None and self.average.ready(done) else None
        self.method.eval()
        try:
            with torch.no_grad(), weights_of(self.method, average):
                return self.evaluate(done), None
        except StopRun as verdict:
            return verdict.metrics, verdict
        finally:
            self.method.train()

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimizer step on this rank's share; returns its scalars, averaged over the accumulated parts, on the
        device.
        """
        parts = _split(batch, self.accumulation)
        if self.method.couples_images and len(parts) > 1:
            metrics = self._backward_coupled(parts, step)
        else:
            metrics = self._backward(parts, step)
        with self._part("optimizer"):
            if self.clip_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.method.parameters(), self.clip_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update(self.method, step + 1)
        return metrics

    def _backward(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            views = self._prepare(part)
            with self._no_sync(unless=number == len(parts) - 1):
                self._seed(step, number)
                with self._part("forward"), self._autocast():
                    outputs = self.parallel(views)
                with self._part("backward"):
                    self.scaler.scale(outputs["loss"] / len(parts)).backward()
            for name, value in outputs.items():
                value = value.detach().float() / len(parts)
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _backward_coupled(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        """Accumulation that keeps all negatives (gradient caching, Gao et al. 2021, arXiv:2101.06983).

        Embed every part without a graph; take the loss and its gradient in the embeddings over the whole global batch;
        embed each part again with a graph, under the same random numbers, and send its share of that gradient back.
        """
        embeddings = []
        with torch.no_grad(), _running_statistics_kept(self.method):
            for number, part in enumerate(parts):
                self._seed(step, number)
                views = self._prepare(part)
                with self._part("forward"), self._autocast():
                    embeddings.append(self.method(views, embed_only=True))
        joined = torch.cat(embeddings).detach().requires_grad_()  # (B, V, Z)
        with self._part("forward"), self._autocast():
            outputs = self.method.contrast(joined)  # pyright: ignore[reportCallIssue]
        with self._part("backward"):
            (gradient,) = torch.autograd.grad(self.scaler.scale(outputs["loss"]), joined)
        start = 0
        for number, part in enumerate(parts):
            with self._no_sync(unless=number == len(parts) - 1):
                self._seed(step, number)
                views = self._prepare(part)
                with self._part("forward"), self._autocast():
                    again = self.parallel(views, embed_only=True)
                with self._part("backward"):
                    again.backward(gradient[start : start + len(again)].to(again.dtype))
                start += len(again)
        return {name: value.detach().float() for name, value in outputs.items()}

    def _prepare(self, part: Batch) -> Batch:
        with self._part("copy to device"):
            moved = to_device(part, self.device)
        with self._part("augment"), torch.no_grad():
            views = self.augment(moved)
            if self.channels_last:
                views["views"] = [view.contiguous(memory_format=torch.channels_last) for view in views["views"]]
        return views

    def _seed(self, step: int, part: int) -> None:
        torch.manual_seed(step_seed(self.seed, step, distributed.rank(), part))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _no_sync(self, *, unless: bool) -> contextlib.AbstractContextManager[Any]:
        if unless or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _collect(self, pending: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
        """The pending steps' scalars, averaged over steps and ranks: the one place where the device is waited for."""
        if not pending:
            return {}
        names = list(pending[0][1])
        rows = torch.stack(
            [torch.stack([metrics[name].float() for name in names]) for _, metrics in pending]
        )  # (steps, names)
        rows = distributed.mean_over_ranks(rows).cpu()
        losses = rows[:, names.index("loss")]
        if not losses.isfinite().all():
            at = int((~losses.isfinite()).nonzero()[0])
            step = pending[at][0]
            raise NotFinite(
                f"the loss is {losses[at].item()} at step {step} (lr {self.lr(step - 1):.3g}, "
                f"{dtype_name(self.dtype)}); nothing of it was saved. Last good checkpoint: "
                f"{self.last_saved()}. Try a lower optim.base_lr, a longer schedule.warmup_epochs, "
                "trainer.clip_grad_norm=1, or trainer.precision=fp32"
            )
        return dict(zip(names, rows.mean(dim=0).tolist(), strict=True))

    def _check_weights(self, done: int) -> None:
        """Raise NotFinite where the last update spoiled the weights, which its loss, taken before, does not show."""
        sums = torch.stack([parameter.detach().sum(dtype=torch.float32) for parameter in self.method.parameters()])
        if not sums.isfinite().all():
            raise NotFinite(
                f"the weights are not finite after step {done}; nothing of it was saved. Last good checkpoint: "
                f"{self.last_saved()}. Try a lower optim.base_lr, trainer.clip_grad_norm=1, or trainer.precision=fp32"
            )

    def _agreed(self, caught: list[str], done: int) -> bool:
        """Whether to stop now. Several ranks agree at logged steps only, so that other steps need no exchange."""
        if distributed.world_size() == 1:
            return bool(caught)
        if done % self.log_every_steps:
            return False
        flag = torch.tensor([float(bool(caught))], device=self.device)
        return bool(distributed.sum_over_ranks(flag).item() > 0)


class _Clock:
    """Throughput and the share of time spent waiting for data, since the last lap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    def lap(self, images: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        metrics = {"images_per_second": images / seconds, "data_wait": self.waited / seconds}
        self.start, self.waited = now, 0.0
        return metrics

    def restart(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect the names of stop signals; a second Ctrl-C stops at once, while launchers may send SIGTERM twice.

    Outside the main thread nothing is installed.
    """
    caught: list[str] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    try:
        for each in (signal.SIGINT, signal.SIGTERM):
            previous[each] = signal.signal(each, note)
    except ValueError:  # not the main thread
        previous.clear()
    try:
        yield caught
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch statistics are used and running ones left alone: the second embedding of the same images updates them,
    once.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [
        (norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def _split(batch: Batch, count: int) -> list[Batch]:
    """A batch as `count` equal parts along the images, in order."""
    if count == 1:
        return [batch]
    size = len(batch["index"])
    assert size % count == 0, f"{size} images do not split into {count} equal parts"
    return [_rows(batch, slice(start, start + size // count)) for start in range(0, size, size // count)]


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: _rows(each, rows) for key, each in value.items()}
    return [_rows(each, rows) for each in value]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch's tensors on the device, but for the views' parameters: `Augment` reads those on the host, without a
    wait.
    """
    return {key: value if key == "parameters" else _moved(value, device) for key, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return [_moved(each, device) for each in value]


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype: `auto` is bf16 where the hardware computes in it, else fp32."""
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("trainer.precision=fp16 needs a GPU; on the CPU take bf16 or fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` as the settings call it, and so on."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself (AVX512-BF16 or AMX); elsewhere bf16 autocast is slower than
    fp32.
    """
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and bool(torch.cpu._is_avx512_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def total_steps(*, epochs: float | None, steps: int | None, steps_per_epoch: int) -> tuple[int, int]:
    """(steps that the schedule spans, step at which the run stops). `steps` cuts a run of `epochs`; alone, it is the
    length.

    Raises ValueError where neither is given or one is not positive.
    """
    if epochs is None and steps is None:
        raise ValueError("the run has no length: give trainer.epochs or trainer.steps")
    if (epochs is not None and epochs <= 0) or (steps is not None and steps <= 0):
        raise ValueError(f"trainer.epochs and trainer.steps must be positive, got epochs={epochs}, steps={steps}")
    if epochs is None:
        assert steps is not None
        return steps, steps
    span = max(math.ceil(epochs * steps_per_epoch), 1)
    return span, span if steps is None else min(steps, span)
