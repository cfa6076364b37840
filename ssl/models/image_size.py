"""A pretrained backbone rebuilt for images of another size."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl.models.backbones import BackboneSpec, build_backbone
from ssl.tensor_files import load_strictly

REBUILT = ("img_size", "patch_size", "dynamic_img_size")  # what build_backbone puts into model_args itself


def at_image_size(
    model: nn.Module, spec: BackboneSpec, image_size: tuple[int, int]
) -> tuple[nn.Module, BackboneSpec, str]:
    """The backbone with the same weights for images of (height, width) pixels, its description, and what was done.

    Position embeddings of a vision transformer are resampled by timm, bicubic and antialiased; patches keep their size.
    A convolutional backbone keeps every weight. Raises ValueError where the model does not fit the size, or has weights
    whose shapes follow it.
    """
    old, new = _sides(spec.image_size), _sides(image_size)
    args = {key: value for key, value in spec.model_args.items() if key not in REBUILT}
    other, other_spec = build_backbone(
        spec.architecture,
        image_size=image_size,
        in_chans=spec.in_chans,
        patch_size=_patch_size(spec),
        stem=spec.stem,
        model_args=args,
    )
    tensors = dict(model.state_dict())
    done = f"the images are {new}, the backbone was made for {old}"
    if isinstance(model, VisionTransformer) and model.pos_embed is not None:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        before, after = _grid(model), _grid(other)
        with torch.no_grad():
            tensors["pos_embed"] = resample_abs_pos_embed(
                model.pos_embed, list(after), list(before), num_prefix_tokens=prefix
            )  # (1, prefix+N, D)
        done += (
            f": its position embeddings were resampled from {before[0]}x{before[1]} to {after[0]}x{after[1]} patches"
            " (bicubic, antialiased)"
        )
    load_strictly(
        other, tensors, f"{spec.architecture} of {old} images", advice=f"leave data.image_size out, or set it to {old}"
    )
    return other.train(model.training), other_spec, done


def _patch_size(spec: BackboneSpec) -> int | tuple[int, int] | None:
    size = spec.model_args.get("patch_size")
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else size


def _grid(model: nn.Module) -> tuple[int, int]:
    rows, columns = model.patch_embed.grid_size  # pyright: ignore
    return int(rows), int(columns)


def _sides(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
