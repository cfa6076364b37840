"""Backbones whose tokens keep their places on a map from the first layer to the last, as Swin's and ConvNeXt's do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ssl.models.backbones import MISFITS

FIRST_LAYERS = ("patch_embed", "stem")  # what timm calls the layer that turns pixels into tokens
MAPS_FIT = "model=swin_t, model=convnext_t, or model=timm with the name of another Swin or ConvNeXt"


@dataclass(frozen=True)
class TokenMap:
    """Where a backbone's tokens and its features lie on the image: sizes are (height, width)."""

    first_layer: str
    """The module whose output are the tokens."""
    token_size: tuple[int, int]  # pixels
    token_dim: int
    token_axis: int  # of the channels of a map of tokens: 1, or 3
    cell_size: tuple[int, int]  # pixels for which a vector of the last map stands
    grid_size: tuple[int, int]  # of the last map
    dim: int
    axis: int  # of the channels of the last map
    unreached: tuple[str, ...]
    """Parameters that stand behind the last map, such as a norm of what was pooled."""


def find_token_map(model: nn.Module, *, image_size: tuple[int, int], in_chans: int) -> TokenMap | None:
    """How a backbone maps images of (height, width) pixels, None where tokens have no place of their own to be masked.

    One rule for all families. The first layer, which timm calls `patch_embed` or `stem`, cuts the image into patches
    that do not overlap, so that a token knows its own pixels alone, and `forward_features` goes on from the map of
    these tokens to a map of features. Computes shapes only. Raises ValueError where cells do not divide the image.
    """
    first_layer = next((name for name in FIRST_LAYERS if isinstance(getattr(model, name, None), nn.Module)), None)
    if first_layer is None:
        return None
    cut = _only_cut(getattr(model, first_layer))
    if cut is None:
        return None
    traced = _trace(model, first_layer, torch.empty(1, in_chans, *image_size, device="meta"))
    if traced is None:
        return None
    tokens, features, unreached = traced
    token_size = (int(cut.stride[0]), int(cut.stride[1]))
    nhwc = getattr(model, "output_fmt", None) == "NHWC"
    token_axis = _channel_axis(tokens, cut.out_channels, prefer_last=nhwc)
    dim = int(getattr(model, "num_features", 0))
    axis = _channel_axis(features, dim, prefer_last=nhwc)
    if token_axis is None or axis is None:
        return None
    rows, columns = (size for place, size in enumerate(features) if place not in (0, axis))
    cell_size = (image_size[0] // rows, image_size[1] // columns)
    _check_division(image_size, token_size, cell_size, (rows, columns), model_label(model))
    return TokenMap(
        first_layer, token_size, cut.out_channels, token_axis, cell_size, (rows, columns), dim, axis, unreached
    )


def check_token_map(model: nn.Module, *, image_size: tuple[int, int], in_chans: int, needed_by: str) -> TokenMap:
    """`find_token_map`, and ValueError, naming what fits, where the backbone has none."""
    found = find_token_map(model, image_size=image_size, in_chans=in_chans)
    if found is None:
        raise ValueError(
            f"{needed_by} masks tokens in their places, and needs a backbone whose first layer cuts the image into "
            f"patches that do not overlap and which keeps them on a map to the end, got {model_label(model)}; "
            f"try {MAPS_FIT}; plain vision transformers take method=mae."
        )
    return found


def last_norm(model: nn.Module, token_map: TokenMap) -> nn.Module:
    """The norm that a model applies to its pooled features, where it also fits each cell of the map; else an identity.

    ConvNeXt has it in its head: cells that pass through it give it a gradient, and their mean the right scale.
    """
    norm = getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (token_map.dim,):
        return nn.Identity()
    return norm if isinstance(norm, LayerNorm2d) == (token_map.axis == 1) else nn.Identity()


def _only_cut(layer: nn.Module) -> nn.Conv2d | None:
    """The convolution that cuts the image, where nothing else in the layer looks beyond one place; else None."""
    windows = [part for part in layer.modules() if _pair(getattr(part, "kernel_size", 1)) != (1, 1)]
    if len(windows) != 1 or not isinstance(windows[0], nn.Conv2d):
        return None
    conv = windows[0]
    whole = conv.kernel_size == conv.stride and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return conv if whole else None


def _pair(size: object) -> object:
    return (size, size) if isinstance(size, int) else size


def _trace(
    model: nn.Module, first_layer: str, image: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]] | None:
    """Shapes of tokens and features, and the parameters that features do not depend on; None where they are no maps."""

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.forward_features(x)  # pyright: ignore[reportCallIssue]

    whole = Features()
    seen: list[object] = []
    handle = getattr(model, first_layer).register_forward_hook(lambda layer, given, output: seen.append(output))
    modes = [(module, module.training) for module in model.modules()]
    parameters = {name: p.detach().to("meta").requires_grad_() for name, p in whole.named_parameters()}
    buffers = {name: buffer.to("meta") for name, buffer in whole.named_buffers()}
    try:
        whole.eval()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            features = torch.func.functional_call(whole, {**parameters, **buffers}, image)
    except MISFITS:
        return None
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    tokens = seen[0] if len(seen) == 1 else None
    if not all(isinstance(each, Tensor) and each.ndim == 4 for each in (tokens, features)):
        return None
    assert isinstance(tokens, Tensor)
    gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    unreached = [name.removeprefix("model.") for name, g in zip(parameters, gradients) if g is None]
    return tuple(tokens.shape), tuple(features.shape), tuple(unreached)


def _channel_axis(shape: tuple[int, ...], channels: int, *, prefer_last: bool) -> int | None:
    """Which axis of a map (B, C, h, w) or (B, h, w, C) holds so many channels; None where neither does."""
    fitting = [axis for axis in (1, 3) if shape[axis] == channels]
    return max(fitting) if prefer_last and fitting else min(fitting, default=None)


def _check_division(
    image_size: tuple[int, int],
    token_size: tuple[int, int],
    cell_size: tuple[int, int],
    grid_size: tuple[int, int],
    name: str,
) -> None:
    for side, token, cell, count in zip(image_size, token_size, cell_size, grid_size):
        halvings = cell // token
        if cell * count != side or cell % token or halvings & (halvings - 1):
            raise ValueError(
                f"{name} gives {grid_size[0]} x {grid_size[1]} features for {image_size[0]} x {image_size[1]} pixels, "
                f"which do not divide the image evenly; set data.image_size to a multiple of {_stride(side, token)}, "
                "or a smaller model.patch_size."
            )


def _stride(side: int, token: int) -> int:
    """The next power of two of a token that is near a side: what a pyramid of that depth halves down to one cell."""
    stride = token
    while stride * 2 <= min(side, 8 * token):
        stride *= 2
    return stride


def model_label(model: nn.Module) -> str:
    """timm's name of a model, for a message."""
    return getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
