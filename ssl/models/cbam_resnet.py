"""ResNets with CBAM (Woo et al. 2018, arXiv:1807.06521): timm's ResNet with timm's attention layer in every block.

The attention refines the residual branch before the addition (figure 3), first the channels with reduction 16, then
the places with a 7 x 7 kernel, whose map passes a BatchNorm that equation 3 leaves out and the authors' code
(github.com/Jongchan/attention-module) has.

Table 4 counts 11.78, 21.96, 28.09 and 49.33 M parameters at depth 18, 34, 50 and 101. That needs biases in the
channels' MLP: equation 2 has none (28.07 and 49.30 M at depth 50 and 101), the authors' code has them, and so do these.

Table 4 counts 1.815 and 3.665 G multiply-adds at depth 18 and 34, as these take. At depth 50 and 101 it counts 3.864
and 7.581 G, which is with the strides in the first 1 x 1 convolution of a block; in the authors' code and in timm they
lie in the 3 x 3 convolution, and these, which follow them, take 4.096 and 7.813 G.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.cbam import CbamModule
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

__all__: list[str] = []  # register_model adds the names


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "paper_ids": "arXiv:1807.06521",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg() for name in ("cbam_resnet18", "cbam_resnet34", "cbam_resnet50", "cbam_resnet101")}
)


def _create_cbam_resnet(
    variant: str, pretrained: bool, *, block: type[BasicBlock | Bottleneck], layers: tuple[int, ...], **kwargs: Any
) -> ResNet:
    attention = partial(CbamModule, rd_ratio=1 / 16, spatial_kernel_size=7, mlp_bias=True)
    block_args = {"attn_layer": attention}
    return build_model_with_cfg(
        ResNet, variant, pretrained, block=block, layers=layers, block_args=block_args, **kwargs
    )


@register_model
def cbam_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with CBAM: 11.78 M parameters, 1.815 G multiply-adds at 224."""
    return _create_cbam_resnet("cbam_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def cbam_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 with CBAM: 21.96 M parameters, 3.665 G multiply-adds at 224."""
    return _create_cbam_resnet("cbam_resnet34", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **kwargs)


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with CBAM: 28.09 M parameters, 4.096 G multiply-adds at 224."""
    return _create_cbam_resnet("cbam_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)


@register_model
def cbam_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101 with CBAM: 49.33 M parameters, 7.813 G multiply-adds at 224."""
    return _create_cbam_resnet("cbam_resnet101", pretrained, block=Bottleneck, layers=(3, 4, 23, 3), **kwargs)
