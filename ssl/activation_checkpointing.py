"""`trainer.activation_checkpointing=true`: a block's activations are computed again in the backward pass, not kept.

Chen et al. 2016, arXiv:1604.06174. Each block keeps its input alone, and is run a second time under the random numbers
of the first. timm's own `set_grad_checkpointing` is left alone: there a second pass moves BatchNorm's running
statistics twice, and layers outside the backbone, such as MAE's decoder, have no part in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssl.averaging import running_statistics_kept
from ssl.sharding import blocks_of


def checkpoint_activations(method: nn.Module) -> None:
    """Let each block of `method` compute its activations again in the backward pass. Call it before sharding.

    Raises ValueError where there are no blocks.
    """
    blocks = blocks_of(method)
    if not blocks:
        raise ValueError(
            f"trainer.activation_checkpointing=true has no effect on {type(method.backbone).__name__}, which has no "
            "blocks; set it to false"
        )
    for block in blocks:
        block.forward = _recomputed(block)


def _recomputed(block: nn.Module) -> Callable[..., Any]:
    """`block.forward`, of which only the inputs are kept. Hooks on the block itself stay outside and run once."""
    forward = block.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        contexts = (contextlib.nullcontext(), running_statistics_kept(block))  # of the first pass and of the second
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)

    return recomputed
