"""Processes that train together: joining them, gathering with gradients, statistics over all of them.

Everything here is the identity, or does nothing, where there is one process, so callers need not ask.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl.last_words import LastWords
from ssl.ranks import adopt_slurm

TIMEOUT = timedelta(minutes=20)
"""How long a rank waits for the others before it fails: long enough for rank 0 to write a large checkpoint."""
_timeout = TIMEOUT
_began: float | None = None
_last_words: LastWords | None = None
_seconds_in_exchanges = 0.0


def start(device: str, *, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the processes that torchrun, srun or whatever sets RANK and WORLD_SIZE started; return this one's device.

    `device` is `auto`, `cpu`, `cuda` or one GPU's name; of several processes each takes the GPU of its LOCAL_RANK.
    Raises ValueError where there is no such device, or where the launcher's variables are incomplete.
    """
    global _timeout, _began
    _began = time.monotonic()
    adopt_slurm()
    chosen = _choose_device(device)
    _timeout = timeout
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set but {', '.join(missing)} is not; "
                "start with `torchrun --nproc-per-node N -m ssl.pretrain ...`, or unset WORLD_SIZE"
            )
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        global _last_words
        _host_group()  # while all are here: later a rank may have ended, and the others would wait for it to join
        _last_words = LastWords(shared_store("last words"), dist.get_world_size())
    return chosen


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"trainer.device={device} is not supported; choose auto, cpu or cuda")
    if chosen.type == "cpu":
        return chosen
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = chosen.index if chosen.index is not None and world_size() == 1 else local_rank()
    if num_gpus == 1 and "SLURM_STEP_ID" in os.environ:
        index = 0  # --gpus-per-task shows each task its own GPU alone
    if index >= num_gpus:
        raise ValueError(
            f"trainer.device={device} asks for GPU {index} but torch sees {num_gpus}; "
            "use trainer.device=cpu, or start no more processes than there are GPUs (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)


def stop() -> None:
    """Leave the group, if one was joined."""
    global _last_words
    if _last_words is not None:
        _last_words.close()
        _last_words = None
    if dist.is_initialized():
        _host_groups.clear()
        dist.destroy_process_group()


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error says that other ranks, or where they meet, are gone or silent: no mistake of this one's."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def is_device_fault(error: BaseException) -> bool:
    """Whether an error says that this process's GPU failed, which another start may not meet again; one whose memory
    does not suffice has not.
    """
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def tell_mistake(words: str) -> None:
    """Tell the other ranks, which will lose this one, why it leaves: by a mistake, that another start would repeat."""
    if _last_words is not None:
        _last_words.tell(words)


def mistake_of_another() -> str | None:
    """What another rank told by `tell_mistake`, to ask for where contact is lost; None where none did."""
    return None if _last_words is None else _last_words.of_another()


def began() -> float:
    """When this process last began to join the others, in seconds of time.monotonic(); now, where it has not."""
    return time.monotonic() if _began is None else _began


def rank() -> int:
    """This process's number among all, 0 where it is alone. Known from the launcher's variables before `start`."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes train together. Known from the launcher's variables before `start`."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def shared_store(name: str) -> dist.Store | None:
    """Keys and values that all ranks share, on a connection of its own, so that a thread can use it while the main
    thread waits on its own; None for one process.

    It is empty: a launcher's store may outlive a start of the run, so each call, which all ranks make together, gets
    other keys.
    """
    if not dist.is_initialized():
        return None
    number = int(gather_rows(torch.tensor([time.time_ns()]))[0])
    return dist.PrefixStore(f"{name}/{number}", dist.distributed_c10d._get_default_store().clone())


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def is_said_by_first(words: str, *, seconds: float = 2.0) -> bool:
    """Whether the first rank ends with the same words as this one, so that they need not be printed again.

    Every rank that ends with words asks; no collective is needed, which another rank might not take part in. The first
    rank is waited for `seconds`: it may not end at all.
    """
    if not dist.is_initialized():
        return False
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_main():
            store.set(f"said/{words}", "")
            return False
        until = time.monotonic() + seconds
        while not store.check([f"said/{words}"]):  # its own wait prints warnings of its own
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True
    except RuntimeError:  # it has not answered, or is gone with its process
        return False


def all_gather(x: Tensor) -> Tensor:
    """Join `x` of all ranks in rank order: (B, ...) on each to (W*B, ...) on all. B must be the same everywhere.

    Differentiable. Backward gives the gradient of the sum over ranks of their losses, since each rank's `x` takes part
    in every rank's loss; DistributedDataParallel's averaging then makes it the gradient of their mean. Every rank must
    run backward through it, or the others wait.
    """
    return x if not dist.is_initialized() else _AllGather.apply(x)  # pyright: ignore[reportReturnType]


def seconds_in_exchanges() -> float:
    """How long this process was in `all_gather` and `sum_over_ranks` so far, which a forward pass may call: on the CPU
    mostly to wait for the other ranks; on devices, which wait themselves, next to nothing.
    """
    return _seconds_in_exchanges


def _clock() -> float:
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()  # a compiled graph has no clock


def _count_seconds(since: float) -> None:
    global _seconds_in_exchanges
    if not torch.compiler.is_compiling():
        _seconds_in_exchanges += time.perf_counter() - since


def gather_rows(x: Tensor) -> Tensor:
    """Join the rows of every rank's CPU tensor, (n_r, ...) on each, in rank order to (sum of n_r, ...) on all.

    Ranks may hold different numbers of rows, also none. Not differentiable.
    """
    if not dist.is_initialized():
        return x
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(x)], device=device))
    longest = int(counts.max())
    padded = torch.zeros((longest, *x.shape[1:]), dtype=x.dtype, device=device)
    padded[: len(x)] = x
    every = padded.new_empty((len(counts) * longest, *x.shape[1:]))
    dist.all_gather_into_tensor(every, padded)
    parts = every.cpu().split(longest) if longest else []
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist())]) if parts else x


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        joined = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))  # (W*B, ...)
        since = _clock()
        dist.all_gather_into_tensor(joined, x.contiguous())
        _count_seconds(since)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.contiguous()
        if dist.get_backend() == "gloo":  # whose reduce_scatter came late and is itself an all_reduce
            gradient = gradient.clone()  # autograd may hand the same tensor to others
            dist.all_reduce(gradient)
            return gradient.chunk(dist.get_world_size())[dist.get_rank()]  # (B, ...)
        part = gradient.new_empty((gradient.shape[0] // dist.get_world_size(), *gradient.shape[1:]))  # (B, ...)
        dist.reduce_scatter_tensor(part, gradient)
        return part


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's `x`, detached, the same on all ranks."""
    total = x.detach().clone()
    if dist.is_initialized():
        since = _clock()
        dist.all_reduce(total)
        _count_seconds(since)
    return total


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of every rank's floating `x`, detached, the same on all ranks."""
    return sum_over_ranks(x) / (dist.get_world_size() if dist.is_initialized() else 1)


def from_main(value: Any) -> Any:
    """Rank 0's `value`, a small thing that pickle knows, on every rank. What the others give is not looked at."""
    if world_size() == 1 or not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def from_every(value: Any) -> list[Any]:
    """Every rank's `value`, a small thing that pickle knows, in rank order, on every rank."""
    if world_size() == 1 or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A part of a run that may fail on one rank alone, such as reading a file that its machine lacks: where it does, it
    fails on every rank, with a ValueError that says of which rank what went wrong. All ranks enter together.
    """
    try:
        yield
    except Exception as error:
        if is_lost_contact(error):
            raise
        said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        try:
            told = _joined(from_every((said, socket.gethostname())))
        except RuntimeError:  # another rank is gone: this one's own error stays
            raise error from None
        if told == said or not isinstance(error, ValueError | OSError):  # else the traceback tells where
            raise
        raise ValueError(told) from error
    told = _joined(from_every((None, socket.gethostname())))
    if told is not None:
        raise ValueError(told)


def _joined(said: list[tuple[str | None, str]]) -> str | None:
    """What the ranks, given as (words or None, host), say went wrong: once where all say the same; None for nothing."""
    words = {text for text, _ in said}
    if len(words) == 1:
        return said[0][0]
    first: dict[str, str] = {}
    for number, (text, host) in enumerate(said):
        if text is not None:
            first.setdefault(text, f"rank {number} on {host}: {text}")
    return "\n".join(first.values())


def sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace each BatchNorm in `module` by one whose statistics are those of the joined batch; return the module.

    Call it after `start` and after the module is on its device: torch's own SyncBatchNorm serves CUDA, ours the rest.
    Parameters, buffers and the keys of the state dict stay what they were. With one process nothing is replaced.
    """
    if world_size() == 1:
        return module
    replaced: dict[nn.Module, nn.Module] = {}  # a layer used at two places stays one layer
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                if child not in replaced:
                    replaced[child] = _synchronised(child)
                setattr(parent, name, replaced[child])
    return _synchronised(module) if isinstance(module, _BatchNorm) else module


def _synchronised(norm: _BatchNorm) -> nn.Module:
    if isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm)):
        return norm
    if any(tensor.is_cuda for tensor in norm.state_dict().values()):
        from timm.layers.norm_act import convert_sync_batchnorm  # torch's, and aware of timm's fused activations

        return convert_sync_batchnorm(norm)
    return SyncBatchNorm(norm)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the joined batch of all ranks, on any device; batches may differ in size, or be empty.

    torch's SyncBatchNorm trains on accelerators alone. Here each rank's count, mean and squared deviations are gathered
    with gradients and combined (Chan et al. 1979, which does not cancel as a sum of squares would), so that autograd
    gives the joint gradient.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        """Take over the parameters and buffers of `norm`, and the activation that timm's BatchNormAct2d carries."""
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            mean, var = self._joint_statistics(input)
        elif self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
        else:  # not tracked: this rank's own batch, as torch's SyncBatchNorm does outside training
            var, mean = torch.var_mean(_at_least_fp32(input), _all_but_channels(input), correction=0)
        scale = torch.rsqrt(var + self.eps)  # (C,)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale  # (C,)
        shape = (1, -1) + (1,) * (input.dim() - 2)
        output = (_at_least_fp32(input) * scale.view(shape) + shift.view(shape)).to(input.dtype)  # (B, C, ...)
        return self.act(self.drop(output))

    def _joint_statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x, dims = _at_least_fp32(input), _all_but_channels(input)
        count = x.numel() // x.shape[1]
        if count > 0:
            var, mean = torch.var_mean(x, dims, correction=0)  # (C,), (C,)
        else:
            var = mean = x.sum(dims)  # zeros that stay in the graph: every rank must take part in backward
        own = torch.cat([mean, var * count, mean.new_tensor([count])])  # (2C+1,)
        every = all_gather(own[None])  # (W, 2C+1)
        means, deviations, counts = every.split([len(mean), len(mean), 1], dim=1)  # (W, C), (W, C), (W, 1)
        total = counts.sum()
        if total <= 1:
            raise ValueError(f"BatchNorm needs more than 1 value per channel to train, got {tuple(input.shape)} in all")
        mean = (means * counts).sum(0) / total  # (C,)
        deviation = deviations.sum(0) + ((means - mean).square() * counts).sum(0)  # (C,)
        if self.track_running_stats:
            self._track(mean.detach(), (deviation / (total - 1)).detach())
        return mean, deviation / total

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


class HostMax:
    """The largest of every rank's whole number, exchanged between the hosts while devices and hosts work on."""

    def __init__(self) -> None:
        self._group = _host_group()
        self._running: tuple[Any, Tensor] | None = None

    def swap(self, own: int) -> int:
        """Send `own` on its way, and return the largest of what was sent at the call before, 0 at the first.

        Every rank must call it equally often.
        """
        agreed = 0
        if self._running is not None:
            work, value = self._running
            work.wait()
            agreed = int(value.item())
        value = torch.tensor([own], dtype=torch.int64)
        self._running = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value
        return agreed


_host_groups: dict[Any, Any] = {}


def _host_group() -> Any:
    """A gloo group of all ranks for what hosts tell each other, made once; the main one may be on the devices."""
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()
        _host_groups[world] = dist.new_group(backend="gloo", timeout=_timeout)
    return _host_groups[world]
