"""`trainer.shard=full`: weights, gradients, optimizer state and averages cut over the ranks (FSDP).

Each tensor is cut along its first dimension, a rank keeping one piece. A block's weights are gathered when the block
runs and let go behind it, in the forward pass and again in the backward pass (Zhao et al. 2023, arXiv:2304.11277;
torch.distributed.fsdp.fully_shard). They are gathered in fp32 and autocast as without sharding, so that losses are
those of DistributedDataParallel at every precision. Below fp32 the price is that autograd keeps the rounded copies,
whole, from the forward to the backward pass; activation checkpointing makes them again block by block.

Everything here is the identity for a method that is not cut, so callers need not ask.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import ssl.distributed as distributed
from ssl.tensor_stream import LazyTensor, StoredTensor, whole

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor | LazyTensor]

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which have no forward of their own


def blocks_of(method: nn.Module) -> list[nn.Module]:
    """The layers that a method runs one after the other: its backbone's blocks, and rows of them in its heads, as MAE's
    decoder.

    A backbone's are what timm's `group_matcher` tells apart, or else its children. None contains another.
    """
    backbone: nn.Module = method.backbone  # pyright: ignore[reportAssignmentType]
    found = _matched_blocks(backbone) or _children(backbone)
    inside = set(backbone.modules())
    for module in method.modules():
        if module not in inside and _is_row(module):
            found += module.children()
            inside |= set(module.modules())
    return found


def _matched_blocks(backbone: nn.Module) -> list[nn.Module]:
    matcher: Any = getattr(backbone, "group_matcher", None)
    rules = None if matcher is None else matcher(coarse=False)
    if not isinstance(rules, dict):  # some models give a function of names
        return []
    patterns = [re.compile(each if isinstance(each, str) else each[0]) for each in _as_list(rules.get("blocks", []))]
    patterns = [pattern for pattern in patterns if pattern.groups]  # others name single layers, not a row of them
    found: dict[str, nn.Module] = {}
    for name, module in backbone.named_modules():
        is_whole_name = any(pattern.fullmatch(name) or pattern.fullmatch(f"{name}.") for pattern in patterns)
        if is_whole_name and not any(name.startswith(f"{outer}.") for outer in found) and _is_block(module):
            found[name] = module
    return list(found.values())


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) and not isinstance(value, str) else [value]


def _children(module: nn.Module) -> list[nn.Module]:
    """The children of a module, those of a plain container, which a model may run one by one, in its place."""
    found: list[nn.Module] = []
    for child in module.children():
        is_plain = isinstance(child, CONTAINERS) or type(child) is nn.Sequential
        found += _children(child) if is_plain else [child] * _is_block(child)
    return found


def _is_block(module: nn.Module) -> bool:
    return not isinstance(module, CONTAINERS) and any(True for _ in module.parameters())


def _is_row(module: nn.Module) -> bool:
    """Whether a module is a row of layers of one kind, each made of several."""
    layers = list(module.children())
    if not isinstance(module, nn.Sequential | nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
        return False
    return all(_is_block(layer) and any(True for _ in layer.children()) for layer in layers)


def shard(method: nn.Module, device: torch.device) -> None:
    """Cut the parameters of `method`, which is on `device`, over all ranks: call it after all that replaces layers.

    Every rank must hold the same weights. Parameters are DTensors afterwards, also in the state dict; buffers stay
    whole. One process cuts nothing, and says so. Raises ValueError for parameters that are single numbers, which cannot
    be cut.
    """
    if distributed.world_size() == 1:
        log.warning("trainer.shard=full has no effect with one process, which has nobody to share with")
        return
    check_divisible(method)
    for parameter in method.parameters():
        parameter.data = parameter.data.contiguous()  # torch cuts no others, so channels_last weights are changed back
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in blocks_of(method):
        fully_shard(block, mesh=mesh)
    # torch takes what runs first for the root, and an evaluation may run a block before the method ever ran.
    fully_shard(method, mesh=mesh)._get_fsdp_state()._lazy_init()


def rounded_note(method: nn.Module, dtype: torch.dtype, *, recomputed: bool) -> str | None:
    """What to know about the rounded weights of a cut method whose passes compute in `dtype`; None for nothing.

    `recomputed` is whether its activations are computed again in the backward pass.
    """
    if dtype == torch.float32 or recomputed or not is_sharded(method):
        return None
    rounded = sum(p.numel() * dtype.itemsize for p in method.parameters() if p.ndim > 1)  # of layers that multiply
    return (
        f"trainer.shard=full cuts the weights, but each rank keeps up to {rounded / 2**20:,.1f} MiB of rounded copies "
        "until its backward pass has used them; trainer.activation_checkpointing=true makes them again block by block, "
        "trainer.precision=fp32 needs none"
    )


def check_divisible(method: nn.Module) -> None:
    """Raise ValueError for a method with parameters that cannot be cut."""
    single = [name for name, parameter in method.named_parameters() if parameter.ndim == 0]
    if single:
        raise ValueError(
            f"trainer.shard=full cannot cut parameters of one number, as {single[0]} is; "
            "take another model=, or set trainer.shard=none"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(module, FSDPModule)


def has_pieces(model: nn.Module) -> bool:
    """Whether parts of a model are cut: then it is on its device, and must not be moved."""
    return any(isinstance(part, FSDPModule) for part in model.modules())


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor is cut over the ranks."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor, which shares its memory; a tensor that is not cut, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered_weights(method: nn.Module) -> Iterator[None]:
    """Let each rank hold all weights while this is open, so that it can run `method` or its backbone alone, as often
    as it likes: without gradients, and without the others. Every rank must open and close it.

    Reading the state dict inside cuts the weights again.
    """
    parts = [module for module in method.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for number, part in enumerate(parts):
            part.reshard()
            part.set_reshard_after_forward(number > 0, recurse=False)  # the first is the method itself
            _forget_forward_passes(part)


def _forget_forward_passes(part: FSDPModule) -> None:
    """Let the next backward pass know nothing of what ran before: torch notes the order of all forward passes, those
    without gradients too, and gathers weights ahead of time by it. Ranks that ran apart would wait for each other.
    """
    state: Any = part._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]  # 2.11
    for group in filter(None, groups):
        group.comm_ctx.post_forward_order.clear()
        group._post_forward_indices.clear()


@torch.no_grad()
def fill(destination: Tensor, source: Tensor | LazyTensor) -> None:
    """Copy the whole tensor `source` into `destination`, or of a cut one this rank's rows; of a stored one no more is
    read.
    """
    if not isinstance(destination, DTensor):
        destination.copy_(whole(source))
        return
    piece = destination.to_local()
    rows = -(-destination.shape[0] // destination.device_mesh.size())  # as torch.chunk cuts
    start = min(distributed.rank() * rows, destination.shape[0])
    stop = start + piece.shape[0]
    piece.copy_(source.rows(start, stop) if isinstance(source, StoredTensor) else whole(source)[start:stop])


@torch.no_grad()
def exchange(first: Tensor, second: Tensor) -> None:
    """Let two tensors of one kind swap their values, in place."""
    first, second = local(first.detach()), local(second.detach())
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients of all ranks together; where it is above `max_norm` they are scaled down to that."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = whole_norms(gradients).norm()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole_norms(pieces: list[Tensor]) -> Tensor:
    """The norms (N,) of N tensors of which each rank gives its pieces, in one exchange."""
    own = torch.stack(torch._foreach_norm(pieces)).float()  # (N,)
    return distributed.sum_over_ranks(own.square()).sqrt()


class WholeTensor:
    """A cut tensor as the first rank sees it: gathered when it is asked for."""

    def __init__(self, number: int, tensor: DTensor) -> None:
        self._number, self._tensor = number, tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def whole(self) -> Tensor:
        distributed.from_main(self._number)  # the others wait for it, in Gathering
        return self._tensor.full_tensor()


class Gathering:
    """Lets the first rank read cut tensors as whole ones, in any order and as often as it likes, one at a time.

        with Gathering() as gathering:
            weights = gathering.of(method.state_dict())
            if distributed.is_main():
                ...  # reads some of them, or fails

    The other ranks take part until the first one leaves the block, however it does.
    """

    def __init__(self) -> None:
        self._cut: list[DTensor] = []

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | LazyTensor]:
        """The same tensors, cut ones to be read whole. Every rank must call it with the same names."""
        found: dict[str, Tensor | LazyTensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                found[name] = WholeTensor(len(self._cut), tensor)
                self._cut.append(tensor)
            else:
                found[name] = tensor
        return found

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._cut:
            return
        if distributed.is_main():
            distributed.from_main(None)
            return
        while (number := distributed.from_main(None)) is not None:
            self._cut[number].full_tensor()
