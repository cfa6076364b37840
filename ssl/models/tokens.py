"""The tokens of chosen patches, through the parts of a timm vision transformer."""

from __future__ import annotations

from typing import cast

import torch
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl.models.backbones import is_token_model


def check_token_model(backbone: nn.Module, *, needed_by: str) -> VisionTransformer:
    """Return the backbone as the vision transformer it is; ValueError where its tokens cannot be chosen."""
    name = getattr(backbone, "default_cfg", {}).get("architecture", type(backbone).__name__)
    if not is_token_model(backbone):
        raise ValueError(
            f"{needed_by} needs a backbone that splits the image into tokens, each of one patch, got {name}; "
            "try model=vit_b, or model=timm with a name that timm builds as a plain VisionTransformer."
        )
    model = cast(VisionTransformer, backbone)
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(f"{needed_by} chooses {name}'s patches itself; leave patch_drop_rate out of model.args.")
    return model


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Return each image's tokens at its own indices: (B, N, D) and (B, K) to (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def encode(backbone: nn.Module, image: Tensor, keep: Tensor | None = None) -> Tensor:
    """Encode the kept patches of each image, (B, C, H, W) to (B, prefix+K, D), through timm's own layers.

    `keep` (B, K) holds patch indices, row by row; None keeps all and equals timm's `forward_features`. Class and
    register tokens stand in front and are never dropped. Blocks see the kept tokens only. Raises ValueError where the
    backbone is no plain vision transformer.
    """
    model = check_token_model(backbone, needed_by="encode")
    if keep is None:
        return model.forward_features(image)  # (B, prefix+N, D)
    x = model._pos_embed(model.patch_embed(image))  # (B, prefix+N, D)
    prefix, patches = x[:, : model.num_prefix_tokens], x[:, model.num_prefix_tokens :]
    x = torch.cat([prefix, take(patches, keep)], dim=1)  # (B, prefix+K, D)
    x = model.norm_pre(x)
    if model.grad_checkpointing:
        x = cast(Tensor, checkpoint_seq(model.blocks, x))
    else:
        x = model.blocks(x)
    return model.norm(x)  # (B, prefix+K, D)
