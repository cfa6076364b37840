"""What a step holds on a device and what a checkpoint holds on a disk, counted without allocating either.

Weights are on torch's meta device, and the forward pass runs on fake tensors of the planned device: shapes, types and
what autograd keeps are the real ones (FakeTensorMode knows a GPU's kernels where there is none), the numbers are never
computed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl.methods.base import Batch, Method
from ssl.optim import OPTIONS, make_optimizer, state_to_tensors
from ssl.plan import step_flops
from ssl.sharding import blocks_of

GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass beside the weights: `fixed` of them, such as the weights
    that autocast has rounded, whatever the batch, and `per_image` more for each image.
    """

    fixed: float
    per_image: float


def kept_for_backward(method: Method, *, num_views: int, channels: int, device: str, dtype: torch.dtype) -> Kept:
    """What the forward pass of a method on the meta device keeps, on a `device` of this type (cpu or cuda)."""
    few, more = (
        _kept(method, num_images, num_views=num_views, channels=channels, device=device, dtype=dtype)
        for num_images in (4, 8)
    )
    per_image = (more - few) / 4
    return Kept(fixed=few - 4 * per_image, per_image=per_image)


def _kept(method: Method, num_images: int, *, num_views: int, channels: int, device: str, dtype: torch.dtype) -> int:
    held: dict[int, Tensor] = {}  # by storage; kept, so that no other tensor takes its place
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        own = _weights_on(method, device)
        weights = {storage_of(tensor) for tensor in own.values()}
        batch = empty_batch(method, num_images, num_views=num_views, channels=channels, device=device)

        def keep(tensor: Tensor) -> Tensor:
            if storage_of(tensor) not in weights:
                held[storage_of(tensor)] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with _autocast(device, dtype), hooks:
            torch.func.functional_call(method, own, (batch,))
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def planned_flops(method: Method, *, num_views: int, channels: int, device: str) -> float:
    """`ssl.plan.flops_per_image` of a method on the meta device, on a `device` of this type."""
    num_images = 8
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        own = _weights_on(method, device)
        batch = empty_batch(method, num_images, num_views=num_views, channels=channels, device=device)
        return step_flops(method, lambda: torch.func.functional_call(method, own, (batch,))) / num_images


def _weights_on(method: Method, device: str) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
        for name, tensor in [*method.named_parameters(), *method.named_buffers()]
    }


def storage_of(tensor: Tensor) -> int:
    """A number that tensors with the same memory share, while they live."""
    return tensor.untyped_storage()._cdata


def empty_batch(method: Method, num_images: int, *, num_views: int, channels: int, device: str) -> Batch:
    """A batch as the method takes it, of no values."""
    return {
        "views": [torch.empty(num_images, channels, *method.view_size, device=device) for _ in range(num_views)],
        "noise": torch.empty(num_images, method.num_noise, device=device),
        "index": torch.empty(num_images, dtype=torch.int64, device=device),
        "label": torch.empty(num_images, dtype=torch.int64, device=device),
    }


@contextlib.contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast, which turns itself off for a GPU where there is none."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype != torch.float32)
    torch.set_autocast_dtype(device, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Their sizes together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_tensors(groups: list[dict[str, Any]], *, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the optimizer after a step, by name, on the meta device as the parameters of `groups` are."""
    optimizer = make_optimizer(
        groups, name=name, lr=1.0, **{**options, **({"fused": False} if "fused" in OPTIONS[name] else {})}
    )
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return state_to_tensors(optimizer)


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the safetensors file that would hold them: eight bytes, a header as JSON, the data."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return 8 + len(json.dumps(header, separators=(",", ":"))) + offset


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device in the middle of a step, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def describe(self) -> list[str]:
        """A line per part and one of the sum."""
        rows = [*self.parts.items(), ("together", self.total)]
        return [f"  {name:<42}{gib(size):>12}" for name, size in rows]


def device_memory(
    method: Method,
    *,
    kept: Kept,
    state: Mapping[str, Tensor],
    averaged: bool,
    batch_size: int,
    num_views: int,
    channels: int,
    shards: int,
    recomputed: Kept | None,
) -> DeviceMemory:
    """The parts for `batch_size` images at once, with what FSDP cuts divided by `shards` (1: nothing is cut).

    `recomputed` is what would be kept without activation checkpointing, None where `kept` already is without.

    Not counted are the workspaces of kernels, the communication of gradients, and what the allocator cannot reuse.
    """
    parameters = list(method.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    blocks = blocks_of(method)
    largest = max((bytes_of(block.parameters()) for block in blocks), default=0)
    view = channels * method.view_size[0] * method.view_size[1]
    activations = kept.per_image * batch_size
    # One block's backward holds the gradients of what it kept, and where that is computed again, this as well.
    full, times = (kept, 1) if recomputed is None else (recomputed, 2)
    one_block = times * full.per_image * batch_size / max(len(blocks), 1)
    return DeviceMemory(
        {
            "weights": bytes_of(parameters) / shards + bytes_of(method.buffers()),
            "gradients": bytes_of(trained) / shards,
            "optimizer": bytes_of(state.values()) / shards,
            **({"average of the weights": bytes_of(method.state_dict().values()) / shards} if averaged else {}),
            **({"weights of two blocks, gathered": 2 * largest} if shards > 1 else {}),
            "weights rounded by autocast, and the like": kept.fixed,
            f"activations, {kept.per_image / 2**20:,.1f} MiB per image": activations,
            "one block's backward (estimated)": one_block,
            "batch: uint8 crops": float(batch_size * num_views * view),
            "views: float32": float(batch_size * num_views * view * 4),
        }
    )


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    if size < 2**20:
        return f"{size / 2**10:,.1f} KiB"
    return f"{size / 2**20:,.1f} MiB" if size < GIB else f"{size / GIB:,.2f} GiB"
