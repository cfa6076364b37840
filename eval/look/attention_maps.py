"""Where the tokens of a vision transformer look: its attention, layer by layer, and what that comes to together."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm.layers.attention as timm_attention
import torch
from timm.models import beit, eva, vision_transformer_relpos
from torch import Tensor, nn

from eval.look.layer_places import token_grid
from eval.look.result import DoesNotApply
from ssl.models.attention import attend_by_matmul
from ssl.models.backbones import pooled_features

READABLE = (
    timm_attention.Attention,
    timm_attention.AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    vision_transformer_relpos.RelPosAttention,
)
"""timm's layers that, without a fused kernel, hand their weights to `attn_drop` before they apply them."""
FUSIONS = ("mean", "min", "max")
INSTEAD = "what=gradcam and what=occlusion show where any backbone looks"


def check_attention(model: nn.Module, image_size: tuple[int, int]) -> Mapping[str, nn.Module]:
    """The attention layers of a vision transformer by name. Raises DoesNotApply for a model without a global one."""
    name = type(model).__name__
    layers = {key: part for key, part in model.named_modules() if isinstance(part, (*READABLE, nn.MultiheadAttention))}
    others = {
        type(part).__name__
        for key, part in model.named_modules()
        if "Attention" in type(part).__name__ and "Pool" not in type(part).__name__ and key not in layers
    }
    if any("Window" in other for other in others):
        raise DoesNotApply(f"what=attention: {name} attends within windows, which gives no map of the image; {INSTEAD}")
    if not layers and not others:
        raise DoesNotApply(f"what=attention needs a vision transformer, got {name}, which has no attention; {INSTEAD}")
    if others or token_grid(model, image_size) is None:
        unknown = ", ".join(sorted(others)) or f"the tokens of {name}"
        raise DoesNotApply(f"what=attention cannot read {unknown} of {name}; {INSTEAD}")
    return layers


def attention_maps(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The attention of each layer to normalised images (B, C, H, W), as `read_attention` gives it."""
    return read_attention(model, (image.shape[-2], image.shape[-1]))(image)


def read_attention(model: nn.Module, image_size: tuple[int, int]) -> Callable[[Tensor], list[Tensor]]:
    """A function from normalised images (B, C, H, W) to the attention of each layer, the first layer first.

    Each is (B, heads, T, T), rows are queries and sum to 1; T counts the tokens in front too. They are what timm's own
    layers compute without a fused kernel, on a copy of the model, and what torchvision's return. Raises DoesNotApply as
    `check_attention`.
    """
    check_attention(model, image_size)
    model = attend_by_matmul(copy.deepcopy(model)).eval()
    found: list[Tensor] = []
    for layer in check_attention(model, image_size).values():
        if isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_pre_hook(_ask_for_weights, with_kwargs=True)
            layer.register_forward_hook(lambda _layer, _inputs, output: found.append(output[1].detach()))
        else:
            drop = layer.attn_drop
            assert isinstance(drop, nn.Module)
            drop.register_forward_pre_hook(lambda _drop, inputs: found.append(inputs[0].detach().clone()))

    @torch.no_grad()
    def read(image: Tensor) -> list[Tensor]:
        found.clear()
        pooled_features(model, image)
        return list(found)

    return read


def _ask_for_weights(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "need_weights": True, "average_attn_weights": False}


def rollout(maps: Sequence[Tensor], *, fusion: str = "mean", discard: float = 0.0) -> Tensor:
    """What each token of the last layer has of each token of the image: (B, T, T), rows sum to 1.

    Abnar and Zuidema 2020 (arXiv:2005.00928, section 3): heads are fused, half of each layer is its residual
    connection, and layers are multiplied, A_L ... A_1. `maps` are (B, heads, T, T), the first layer first. `fusion` is
    mean, min or max; `discard` of each row's fused weights, the least ones, are set to 0. Rows are made to sum to 1;
    of one of which nothing is left, as of heads that look at different tokens by min, the residual stays.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"attention.fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
    if not 0 <= discard < 1:
        raise ValueError(f"attention.discard must be a share from 0 to below 1, got {discard}")
    eye = torch.eye(maps[0].shape[-1], device=maps[0].device)  # (T, T)
    joint = eye.expand(len(maps[0]), -1, -1)  # (B, T, T)
    for each in maps:
        fused = each.float().mean(1) if fusion == "mean" else getattr(each.float(), f"a{fusion}")(1)  # (B, T, T)
        least = fused.argsort(dim=-1, stable=True)[..., : int(discard * fused.shape[-1])]
        fused = fused.scatter(-1, least, 0.0)
        fused = fused / fused.sum(-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)
        mixed = 0.5 * fused + 0.5 * eye
        joint = mixed / mixed.sum(-1, keepdim=True) @ joint
    return joint


def seen_by(attention: Tensor, num_prefix: int, *, query: str) -> Tensor:
    """What one query has of each patch, (..., T, T) to (..., N); the tokens in front are left out, not shared out.

    `query` is `class`, the first token, or `mean`, the mean of all patches' rows.
    """
    rows = attention[..., 0, :] if query == "class" else attention[..., num_prefix:, :].mean(-2)
    return rows[..., num_prefix:]


def head_entropy(attention: Tensor) -> Tensor:
    """How evenly heads spread their attention, (B, heads, T, T) to (heads,): 1 is evenly over all, 0 on one token.

    The mean of the queries' entropies over log T.
    """
    attention = attention.double()
    entropy = -torch.special.xlogy(attention, attention).sum(-1)  # (B, heads, T)
    return (entropy.mean((0, 2)) / math.log(attention.shape[-1])).float()


def head_distance(attention: Tensor, grid_size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """How far a patch looks in each head, in pixels: (B, heads, T, T) to (heads,).

    Dosovitskiy et al. 2020 (arXiv:2010.11929, Fig. 7 and appendix D.7): the distance from a patch to the others,
    weighted by its attention to them. The tokens in front are left out, and rows made to sum to 1 without them.
    """
    num = math.prod(grid_size)
    patches = attention[..., -num:, -num:].float()  # (B, heads, N, N)
    patches = patches / patches.sum(-1, keepdim=True).clamp_min(1e-12)
    rows, columns = (
        (torch.arange(count, device=attention.device) + 0.5) * side / count
        for count, side in zip(grid_size, image_size)
    )
    centre = torch.cartesian_prod(rows, columns).float()  # (N, 2)
    return (patches * torch.cdist(centre, centre)).sum(-1).mean((0, 2))
