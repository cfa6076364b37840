"""NT-Xent, SimCLR's contrastive loss, in chunks of anchors and over all ranks.

Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations (arXiv:2002.05709), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl.distributed import all_gather, rank
from ssl.products import product

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Similarities held at once: 4 MiB in fp32, which stay in a CPU's cache, and 64 MiB. On a CPU 2**22 take as long."""

EPS = 1e-12
"""What F.normalize divides shorter vectors by."""


def nt_xent(embeddings: Tensor, *, temperature: float, chunk_size: int | None = None) -> Tensor:
    """Mean over this rank's 2B embeddings of -log softmax of the positive among the 2N-1 others of all ranks.

    `embeddings` (B, V=2, Z) are two views of B images, not normalised; every rank brings the same B. `chunk_size`
    anchors are compared at a time; it changes memory, not the result. Computed in fp32, in fp64 for fp64 embeddings.
    DistributedDataParallel's average of the gradients over ranks is the gradient of the mean over all 2N anchors.
    Raises ValueError for another number of views and for a temperature that is not positive.
    """
    return nt_xent_and_top1(embeddings, temperature=temperature, chunk_size=chunk_size)[0]


def nt_xent_and_top1(embeddings: Tensor, *, temperature: float, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """`nt_xent`, and the share of anchors that are strictly nearer to their positive than to all others, detached."""
    if embeddings.dim() != 3 or embeddings.shape[1] != 2:
        raise ValueError(
            f"nt_xent takes embeddings (B, V=2, Z), two views of each image; got {tuple(embeddings.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; published recipes use 0.1 to 0.5")
    with torch.autocast(embeddings.device.type, enabled=False), _full_fp32():
        anchors = normalise(embeddings).flatten(0, 1)  # (2B, Z), the views of an image side by side
        keys = all_gather(anchors)  # (2N, Z)
        chunk_size = chunk_size or _fitting_chunk(anchors, keys)
        others = None if keys is anchors else keys
        loss, top1 = _NTXent.apply(anchors, others, rank() * len(anchors), temperature, chunk_size)  # pyright: ignore[reportGeneralTypeIssues]
    return loss, top1


def normalise(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1 along the last dimension, in at least fp32."""
    return _Normalise.apply(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))  # pyright: ignore[reportReturnType]


class _Normalise(torch.autograd.Function):
    """F.normalize, whose own backward holds five tensors of the embeddings' size where two do."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = embeddings.norm(dim=-1, keepdim=True)
        result = embeddings / length.clamp_min(EPS)
        ctx.save_for_backward(result, length)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        result, length = ctx.saved_tensors
        along = torch.linalg.vecdot(gradient, result).unsqueeze(-1)  # (..., 1), the part that only changes the length
        along *= length >= EPS  # what is shorter is divided by EPS, and its length does change
        return torch.addcmul(gradient, result, along, value=-1).div_(length.clamp_min(EPS))


@contextmanager
def _full_fp32() -> Iterator[None]:
    """No TF32 in here, even if the run allows it elsewhere: its 10 bits times 1/T are seen in the loss."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _fitting_chunk(anchors: Tensor, keys: Tensor) -> int:
    elements = CHUNK_ELEMENTS.get(anchors.device.type, CHUNK_ELEMENTS["cuda"])
    return min(max(elements // len(keys), 1), len(anchors))


class _NTXent(torch.autograd.Function):
    """Loss and gradient in one sweep over chunks of anchors, so that nothing of size 2N x 2N is ever held.

    Three matrix multiplications per chunk and one exponential per pair; cross entropy over the whole matrix takes as
    many multiplications but several more passes over memory. Backward keeps the gradient itself, (2B + 2N) x Z, or on
    one rank, where anchors are the keys, their sum.
    Using the symmetry of the one-rank matrix was tried: 1.5 times faster again, but another path with limits on T.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, anchors: Tensor, others: Tensor | None, first: int, temperature: float, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """`anchors` (A, Z) are rows first, first + 1, ... of `others` (M, Z), or all there are where that is None; rows
        2i and 2i + 1 are positives.
        """
        keys = anchors if others is None else others
        num_anchors = len(anchors)
        needs_gradient = any(ctx.needs_input_grad)
        key_gradient = torch.zeros_like(keys) if needs_gradient else anchors
        anchor_gradient = key_gradient if others is None or not needs_gradient else torch.zeros_like(anchors)
        losses = anchors.new_empty(num_anchors)
        hits = torch.empty(num_anchors, dtype=torch.bool, device=anchors.device)
        itself = torch.arange(first, first + num_anchors, device=anchors.device)
        positive = itself ^ 1  # the even rows' neighbour is above, the odd ones' below
        for start in range(0, num_anchors, chunk_size):
            part = slice(start, min(start + chunk_size, num_anchors))
            logits = product(anchors[part] / temperature, keys)  # (A', M)
            positive_column = positive[part, None]
            positive_logit = logits.gather(1, positive_column)  # (A', 1)
            logits.scatter_(1, itself[part, None], -torch.inf).scatter_(1, positive_column, -torch.inf)
            nearest_negative = logits.amax(1, keepdim=True)  # (A', 1), -inf where N = 1
            shift = torch.maximum(nearest_negative, positive_logit)  # the largest exponent is 0 at any temperature
            weights = logits.sub_(shift).exp_()  # (A', M), 0 at the anchor itself and its positive
            positive_weight = (positive_logit - shift).exp()
            total = weights.sum(1, keepdim=True) + positive_weight
            losses[part] = (total.log() + shift - positive_logit).squeeze(1)
            hits[part] = (positive_logit > nearest_negative).squeeze(1)
            if needs_gradient:  # of the loss by the logits: softmax, less 1 at the positive
                weights.scatter_(1, positive_column, positive_weight - total)
                total *= temperature * num_anchors
                anchor_gradient[part] += product(weights, keys.t()).div_(total)
                key_gradient.addmm_(weights.t(), anchors[part] / total)
            del logits, weights  # before the next chunk's take as much
        if needs_gradient:
            ctx.save_for_backward(*([key_gradient] if others is None else [anchor_gradient, key_gradient]))
        top1 = hits.to(losses.dtype).mean()
        ctx.mark_non_differentiable(top1)
        return losses.mean(), top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [_times(gradient, loss_gradient) for gradient in ctx.saved_tensors]
        return *gradients, *[None] * (5 - len(gradients))


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """The product; without memory of its own where the factor is 1, as it is when a loss's own backward is called.

    Only on a CPU, where reading the factor waits for nobody. What follows reads the gradient and leaves it as it is.
    """
    can_read = factor.device.type == "cpu" and not torch.compiler.is_compiling()
    return gradient if can_read and factor.item() == 1 else gradient * factor
