"""The only training loop: autocast, accumulation, DistributedDataParallel, clipping, skipping of bad steps, saving.

It knows nothing of methods, configs or data beyond what its arguments say. With fused Adam or AdamW no device is waited
for between two logged steps; with other optimizers, and in fp16, one number a step: whether to skip it.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ssl.distributed as distributed
from ssl.averaging import Average, running_statistics_kept, weights_of
from ssl.guard import RunningStatistics, StepGuard
from ssl.methods.base import Batch, Method
from ssl.online import StopRun
from ssl.profiling import OUTSIDE, StepProfiler
from ssl.randomness import step_seed
from ssl.sharding import clip_grad_norm, is_sharded, local
from ssl.slow_ranks import SlowRanks
from ssl.stopping import Agreement, StopRequests
from ssl.unlogged import UnloggedSteps
from ssl.watchdog import DATA, GATHER, LOG, STEP, Watchdog


class NotFinite(ValueError):
    """The loss, the gradient or the weights became NaN or infinite, or the loss kept lying far above what it was."""


@dataclass
class Trainer:
    """What one run needs between its first and its last step.

    `lr` gives a step's learning rate; `log(step, metrics)`, `save(step, final)` and `evaluate(step)` are called with
    the number of completed steps, so that the loop owns no file and no tracker; `final` says that no save will follow.
    What `evaluate` returns is logged with the step; the StopRun that it may raise ends the run once the step is saved.

    A step that the guard calls bad moves nothing: no weight, no average of them, no running statistic. After more than
    `max_bad_steps` of them in a row the run ends; `save_failed(first bad step, why)` keeps what is needed to look at it
    and returns where.
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
    save: Callable[[int, bool], None] = lambda step, final: None
    last_saved: Callable[[], str] = lambda: "none"
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every_steps: int = 1
    end_step: int | None = None  # where the schedule ends; a run may be cut before
    profiler: StepProfiler | None = None
    spike_deviations: float | None = None
    max_bad_steps: int = 10
    save_failed: Callable[[int, str], str] = lambda step, why: "nowhere"
    warn: Callable[[str], None] = lambda text: None
    deadline: float | None = None  # of time.monotonic(): then the run saves and stops
    watchdog: Watchdog | None = None
    slow_ranks: SlowRanks | None = None
    scaler: Any = field(init=False)
    parallel: nn.Module = field(init=False)
    guard: StepGuard = field(init=False)
    unlogged: UnloggedSteps = field(init=False)

    def __post_init__(self) -> None:
        self.guard = StepGuard(self.device, spike_deviations=self.spike_deviations)
        self.unlogged = UnloggedSteps(self.device)
        # The fused kernel itself can leave everything as it is where a number on the device says so: no wait for it.
        fused = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW) and bool(
            self.optimizer.defaults.get("fused")
        )
        self.decides_on_device = self.device.type == "cuda" and fused and self.dtype != torch.float16
        self._statistics = RunningStatistics(self.method)
        self._num_told = 0
        self._own_seconds = 0.0  # since the last logged step, in which this rank worked and waited for no other
        # The hosts of devices only start a forward pass, a cut one waits for the weights of the others, and a compiled
        # one does not tell how long it waits.
        self._forward_is_own = self.device.type == "cpu" and not is_sharded(self.method) and not self.compile
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.compile:
            self.method.compile()
        self.parallel = self.method
        if distributed.world_size() > 1 and not is_sharded(self.method):
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

        Raises NotFinite after too many bad steps in a row, or where the weights are spoiled; with the last completed
        step saved, Stopped after a signal or the deadline, and StopRun where an evaluation ends the run.
        """
        self.method.train()
        clock = _Clock()
        timed = start_step
        agreement = Agreement()
        with StopRequests(deadline=self.deadline) as requests:
            for step in range(start_step, stop_step):
                done = step + 1
                self._beat(done, DATA)
                batch = self._next(batches, clock)
                self._beat(done, STEP)
                lr = self.lr(step)
                self.set_lr(self.optimizer, lr)
                self.unlogged.add(self.step(batch, step))
                last = done == stop_step
                evaluating = self._evaluates_at(done)
                verdict = None
                if done % self.log_every_steps == 0 or last or done == 1 or evaluating:
                    self._beat(done, GATHER)
                    metrics = self._collect()
                    self._name_slow_ranks(clock)
                    metrics |= {"lr": lr, **clock.lap(global_batch_size * (done - timed))}
                    timed = done
                    if evaluating:
                        with self._part(OUTSIDE), self._paused("evaluating"):
                            found, verdict = self._evaluate(done)
                        metrics |= found
                        clock.restart()
                    self._beat(done, LOG)
                    self.log(done, metrics)
                self._beat(done, STEP)
                stop_code = agreement.reached(requests.code)
                stopping = bool(stop_code) or verdict is not None
                if done % self.checkpoint_every_steps == 0 or last or stopping:
                    self._check_weights(done)
                    self.unlogged.settle()
                    saving = time.perf_counter()
                    with self._part(OUTSIDE), self._paused("saving"):
                        self.save(done, last or stopping)
                    clock.start += time.perf_counter() - saving  # throughput is that of training
                if verdict is not None:
                    raise verdict
                if stop_code and not last:
                    raise requests.stopped(done, stop_code)
                if self.profiler is not None:
                    profiling = time.perf_counter()
                    self.profiler.step_done()
                    clock.start += time.perf_counter() - profiling

    def _next(self, batches: Iterator[Batch], clock: _Clock) -> Batch:
        began = time.perf_counter()
        with self._part("waiting for data"):
            batch = next(batches)
        clock.waited += time.perf_counter() - began
        return batch

    def _part(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.profiler is None else self.profiler.part(name)

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        """A forward pass, whose time is this rank's own but for what it waits for others in it."""
        began, waited = time.perf_counter(), distributed.seconds_in_exchanges()
        with self._part("forward"):
            yield
        if self._forward_is_own:
            self._own_seconds += time.perf_counter() - began - (distributed.seconds_in_exchanges() - waited)

    def _beat(self, step: int, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(step, phase)

    def _paused(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.watchdog is None else self.watchdog.paused(phase)

    def _name_slow_ranks(self, clock: _Clock) -> None:
        if self.slow_ranks is not None:
            own, self._own_seconds = self._own_seconds + clock.waited, 0.0
            said = self.slow_ranks.note(own, clock.waited)
            if said is not None:
                self.warn(said)

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
        """One optimizer step on this rank's share, unless it is bad; returns its scalars, averaged over the accumulated
        parts, on the device. `skipped` is 1 for a step that moved nothing. Raises NotFinite after too many in a row.
        """
        self._statistics.keep()
        metrics = self.backward(batch, step)
        with self._part("optimizer"):
            self.scaler.unscale_(self.optimizer)
            metrics["grad_norm"] = self._clip()
            scaling = self.scaler.is_enabled() and self.scaler.get_scale() > 1
            bad = self.guard.judge(metrics["loss"], metrics["grad_norm"], step, tolerant=scaling)
            if self.decides_on_device:
                self._update_unless(bad, step)
            elif not bad.item():
                self.scaler.step(self.optimizer)
                self._average(step, None)
            else:
                self._statistics.put_back()
                self._average(step, bad)
                self._check_row()
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        metrics["skipped"] = bad.float()
        return metrics

    def _clip(self) -> Tensor:
        """The norm of all gradients together, before they are clipped."""
        if is_sharded(self.method):
            return clip_grad_norm(self.method.parameters(), self.clip_grad_norm)
        if self.clip_grad_norm is not None:
            return nn.utils.clip_grad_norm_(self.method.parameters(), self.clip_grad_norm)
        gradients = [parameter.grad for parameter in self.method.parameters() if parameter.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _update_unless(self, bad: Tensor, step: int) -> None:
        """Move everything without a wait for `bad`, a bool on the device; what it forbids is left out there."""
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        self._statistics.put_back_where(bad)
        self._average(step, bad)

    def _average(self, step: int, bad: Tensor | None) -> None:
        if self.average is not None:
            self.average.update(self.method, step + 1, unless=bad)

    def _check_row(self) -> None:
        """Raise NotFinite where too many steps in a row were bad."""
        seen = self.guard.read()
        if seen.counted > self._num_told:
            self._num_told = seen.counted
            self.warn(f"skipped {seen.counted} of the run's steps: {seen.why()}")
        if seen.in_a_row <= self.max_bad_steps:
            return
        kept = self.save_failed(seen.first, seen.why())
        raise NotFinite(
            f"{seen.in_a_row} steps in a row were skipped, more than trainer.max_bad_steps={self.max_bad_steps}: "
            f"{seen.why()}. Last good checkpoint: {self.last_saved()}. The first of them is kept in {kept}: "
            "python -m ssl.replay failed=<that folder> looks at it. Try a lower optim.base_lr, a longer "
            "schedule.warmup_epochs, trainer.clip_grad_norm=1, or trainer.precision=fp32"
        )

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Leave the gradients of this rank's share in the parameters, scaled by the loss scaler; return its scalars."""
        parts = _split(batch, self.accumulation)
        if self.method.couples_images and len(parts) > 1:
            return self._backward_coupled(parts, step)
        return self._backward(parts, step)

    def _backward(self, parts: list[Batch], step: int) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            views = self.prepare(part)
            with self._no_sync(unless=number == len(parts) - 1):
                self.seed_part(step, number)
                with self._forward(), self.autocast():
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
        with torch.no_grad(), running_statistics_kept(self.method):
            for number, part in enumerate(parts):
                self.seed_part(step, number)
                views = self.prepare(part)
                with self._forward(), self.autocast():
                    embeddings.append(self.method(views, embed_only=True))
        joined = torch.cat(embeddings).detach().requires_grad_()  # (B, V, Z)
        with self._forward(), self.autocast():
            outputs = self.method.contrast(joined)  # pyright: ignore[reportCallIssue]
        with self._part("backward"):
            (gradient,) = torch.autograd.grad(self.scaler.scale(outputs["loss"]), joined)
        start = 0
        for number, part in enumerate(parts):
            with self._no_sync(unless=number == len(parts) - 1):
                self.seed_part(step, number)
                views = self.prepare(part)
                with self._forward(), self.autocast():
                    again = self.parallel(views, embed_only=True)
                with self._part("backward"):
                    again.backward(gradient[start : start + len(again)].to(again.dtype))
                start += len(again)
        return {name: value.detach().float() for name, value in outputs.items()}

    def prepare(self, part: Batch) -> Batch:
        """A part on the device, with its views."""
        began = time.perf_counter()
        with self._part("copy to device"):
            moved = to_device(part, self.device)
        with self._part("augment"), torch.no_grad():
            views = self.augment(moved)
            if self.channels_last:
                views["views"] = [view.contiguous(memory_format=torch.channels_last) for view in views["views"]]
        self._own_seconds += time.perf_counter() - began
        return views

    def seed_part(self, step: int, part: int) -> None:
        """Set the random numbers of a part's dropout and drop path."""
        torch.manual_seed(step_seed(self.seed, step, distributed.rank(), part))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The run's precision, for what is computed within."""
        enabled = self.dtype != torch.float32
        # Its cache of weights in lower precision would hold those of all blocks until the forward pass ends; with
        # activation checkpointing nothing else does.
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=not is_sharded(self.method))

    def _no_sync(self, *, unless: bool) -> contextlib.AbstractContextManager[Any]:
        if unless or not isinstance(self.parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _collect(self) -> dict[str, float]:
        """The scalars of the steps since the last line, averaged over steps and ranks, skipped ones left out: the one
        place where the device is waited for. `skipped_steps` counts the whole run's.
        """
        names, rows = self.unlogged.over_ranks()
        rows = rows.cpu()  # (steps, names)
        self.unlogged.clear()
        skipped = rows[:, names.index("skipped")] > 0
        if skipped.any():
            self._check_row()
        means = rows[~skipped].mean(dim=0).tolist()  # NaN where all were skipped
        metrics = {name: mean for name, mean in zip(names, means, strict=True) if name != "skipped"}
        metrics["skipped_steps"] = float(self.guard.read().total)
        return metrics

    def _check_weights(self, done: int) -> None:
        """Raise NotFinite where the last update spoiled the weights, which its loss, taken before, does not show."""
        weights = [local(parameter.detach()) for parameter in self.method.parameters()]
        sums = torch.stack([weight.sum(dtype=torch.float32) for weight in weights])
        if is_sharded(self.method):
            sums = distributed.sum_over_ranks(sums)
        if not sums.isfinite().all():
            raise NotFinite(
                f"the weights are not finite after step {done}; nothing of it was saved. Last good checkpoint: "
                f"{self.last_saved()}. Try a lower optim.base_lr, trainer.clip_grad_norm=1, or trainer.precision=fp32"
            )


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


def _split(batch: Batch, count: int) -> list[Batch]:
    """A batch as `count` equal parts along the images, in order."""
    if count == 1:
        return [batch]
    size = len(batch["index"])
    assert size % count == 0, f"{size} images do not split into {count} equal parts"
    return [rows_of(batch, slice(start, start + size // count)) for start in range(0, size, size // count)]


def rows_of(value: Any, rows: slice | Tensor) -> Any:
    """Some rows of every tensor in a batch."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: rows_of(each, rows) for key, each in value.items()}
    return [rows_of(each, rows) for each in value]


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
