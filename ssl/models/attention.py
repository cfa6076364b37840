"""How timm's attention layers compute."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def attend_by_matmul(model: Module) -> Module:
    """Let the attention layers of `model` use plain matrix products; returns it.

    On the CPU they beat the fused attention kernel in bf16.
    """
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # pyright: ignore
    return model
