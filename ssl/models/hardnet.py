"""HarDNet: DenseNet with few links, chosen for low memory traffic (Chao et al. 2019, arXiv:1909.00948).

HarDNet-68 and 39DS are built from table 1, and 68DS is 68 with the depthwise-separable layers of figure 3b. HarDNet-85
is in the authors' code alone (github.com/PingoLH/Pytorch-HarDNet), whose table gives its 36.7 M parameters and 9.1 G
multiply-adds. Parameters equal table 4. Multiply-adds equal it where every output of a BatchNorm counts as two, which
its numbers seem to do: convolutions and classifier alone take 0.43, 0.78 and 4.25 G in 39DS, 68DS and 68, where the
table has 0.44, 0.79 and 4.3.

What the paper leaves open is as in that code: a width k * m^n is rounded to an even number, a depthwise convolution has
no activation behind it, the first pooling is 3 x 3 and the others 2 x 2. Two things differ from the code. Activations
are ReLU, as the paper says, where the code has ReLU6 (`act_layer="relu6"`). No dropout is built in; the code has 0.05
(DS), 0.1 (68) or 0.2 (85) before the classifier, which is `drop_rate`, and in 85 also 0.1 before the last 1 x 1
convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, ConvNormAct, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import checkpoint as recomputed
from timm.models._features import feature_take_indices  # timm's own models take it from here
from torch import Tensor, nn

__all__ = ["HarDBlock", "HarDNet", "HarDStage", "layer_links", "layer_width"]

MakeLayer = Callable[[int, int], nn.Module]  # from the channels in and out


def layer_links(layer: int) -> list[int]:
    """The inputs of a block's layer, counted from 1: layer - 2^n for every 2^n that divides it; 0 is the block's input.

    Section 3.1. Nearest first.
    """
    return [layer - 2**n for n in range(layer.bit_length()) if layer % 2**n == 0]


def layer_width(layer: int, growth_rate: int, multiplier: float) -> int:
    """The channels of a block's layer: k * m^n with the greatest 2^n that divides it, rounded to an even number.

    Section 3.1; the rounding is the authors' code's.
    """
    power = (layer & -layer).bit_length() - 1
    return 2 * int((growth_rate * multiplier**power + 1) / 2)


class HarDBlock(nn.Module):
    """A harmonic dense block and its 1 x 1 transition: (B, in_chs, H, W) to (B, out_chs, H, W).

    The transition reads the last layer and those of odd number (section 3.2).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        depth: int,
        growth_rate: int,
        multiplier: float,
        layer: MakeLayer,
        **conv: Any,
    ) -> None:
        super().__init__()
        numbers = range(1, depth + 1)
        widths = [in_chs, *(layer_width(number, growth_rate, multiplier) for number in numbers)]
        self.links = [layer_links(number) for number in numbers]
        self.kept = [number for number in numbers if number % 2 or number == depth]
        self.layers = nn.ModuleList(
            layer(sum(widths[link] for link in links), widths[number]) for number, links in zip(numbers, self.links)
        )
        self.transition = ConvNormAct(sum(widths[number] for number in self.kept), out_chs, 1, **conv)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers one after the other, each on what its links gave."""
        found = [x]
        for layer, links in zip(self.layers, self.links):
            found.append(layer(torch.cat([found[link] for link in links], dim=1)))
        return self.transition(torch.cat([found[number] for number in self.kept], dim=1))


class HarDStage(nn.Module):
    """Half the resolution, then harmonic dense blocks: (B, in_chs, 2H, 2W) to (B, out_chs, H, W)."""

    def __init__(
        self,
        in_chs: int,
        blocks: Sequence[Sequence[int]],
        *,
        downsample: nn.Module,
        make_block: Callable[..., HarDBlock],
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential()
        for index, (depth, growth_rate, out_chs) in enumerate(blocks):
            block = make_block(in_chs, out_chs, depth=depth, growth_rate=growth_rate)
            self.blocks.add_module(str(index), block)
            in_chs = out_chs

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, each again in the backward pass where `grad_checkpointing` is set."""
        x = self.downsample(x)
        for block in self.blocks:
            x = cast(Tensor, recomputed(block, x)) if self.grad_checkpointing else block(x)
        return x


class HarDNet(nn.Module):
    """A HarDNet in timm's interface, (B, C, H, W) to (B, num_classes).

    `stem_chs` are the two layers before the first pooling. `stages` give for each block its depth, its growth rate k
    and the channels t of its transition, as table 1 does; each stage halves the resolution first. `multiplier` is m;
    `depthwise` builds the DS models. There are no residual blocks, so there is no drop path.
    """

    def __init__(
        self,
        stem_chs: Sequence[int],
        stages: Sequence[Sequence[Sequence[int]]],
        multiplier: float,
        *,
        depthwise: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        conv: dict[str, Any] = {"act_layer": get_act_layer(act_layer), "norm_layer": get_norm_layer(norm_layer)}
        layer = partial(_separable_layer if depthwise else _dense_layer, **conv)
        make_block = partial(HarDBlock, multiplier=multiplier, layer=layer, **conv)

        first, width = stem_chs
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, first, 3, stride=2, **conv),
            ConvNormAct(first, width, 1 if depthwise else 3, **conv),
        )
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "stem.1"}]
        self.stages = nn.Sequential()
        for index, blocks in enumerate(stages):
            downsample = _depthwise(width, stride=2, **conv) if depthwise else _pooling(is_first=index == 0)
            self.stages.add_module(str(index), HarDStage(width, blocks, downsample=downsample, make_block=make_block))
            width = blocks[-1][-1]
            self.feature_info.append({"num_chs": width, "reduction": 4 * 2**index, "module": f"stages.{index}"})

        self.num_features = width
        self.head = ClassifierHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = width * self.head.global_pool.feat_mult()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every convolution anew from He et al.'s normal distribution (arXiv:1502.01852), by its inputs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's rules that tell the layers apart: by stage, or by block."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block's activations again in the backward pass."""
        for stage in self.stages:
            cast(HarDStage, stage).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer; none at 0 classes."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the stem (0) and of the stages (1 to 4), and before them the last one, as timm gives them.

        `norm` changes nothing: there is no norm behind the last stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"HarDNet gives maps of (B, C, H, W), got output_fmt={output_fmt!r}; use NCHW")
        wanted, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        found = [x] if 0 in wanted else []
        for index, stage in enumerate(list(self.stages)[: last if stop_early else None], start=1):
            x = stage(x)
            if index in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these maps, and return their numbers."""
        wanted, last = feature_take_indices(len(self.stages) + 1, indices)
        self.stages = self.stages[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, C, H, W) to (B, num_features, H/32, W/32)."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map, (B, num_features, h, w) to (B, num_features), and classify it unless `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, C, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _dense_layer(in_chs: int, out_chs: int, **conv: Any) -> nn.Module:
    return ConvNormAct(in_chs, out_chs, 3, **conv)


def _separable_layer(in_chs: int, out_chs: int, **conv: Any) -> nn.Module:
    """Pointwise first: a layer's input is wide and its output narrow (section 3.3)."""
    return nn.Sequential(ConvNormAct(in_chs, out_chs, 1, **conv), _depthwise(out_chs, **conv))


def _depthwise(chs: int, *, stride: int = 1, **conv: Any) -> nn.Module:
    return ConvNormAct(chs, chs, 3, stride=stride, groups=chs, apply_act=False, **conv)


def _pooling(*, is_first: bool) -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1) if is_first else nn.MaxPool2d(2, stride=2)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:1909.00948",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg() for name in ("hardnet39ds", "hardnet68", "hardnet68ds", "hardnet85")}
)

STAGES_68 = (((8, 14, 128),), ((16, 16, 256), (16, 20, 320)), ((16, 40, 640),), ((4, 160, 1024),))
ARGS_39 = {
    "stem_chs": (24, 48),
    "stages": (((4, 16, 96),), ((16, 20, 320),), ((8, 64, 640),), ((4, 160, 1024),)),
    "multiplier": 1.6,
}
ARGS_68 = {"stem_chs": (32, 64), "stages": STAGES_68, "multiplier": 1.7}
ARGS_85 = {
    "stem_chs": (48, 96),
    "stages": (
        ((8, 24, 192),),
        ((16, 24, 256), (16, 28, 320)),
        ((16, 36, 480), (16, 48, 720)),
        ((4, 256, 1280),),
    ),
    "multiplier": 1.7,
}


def _create_hardnet(variant: str, pretrained: bool, **kwargs: Any) -> HarDNet:
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(HarDNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def hardnet39ds(pretrained: bool = False, **kwargs: Any) -> HarDNet:
    """HarDNet-39DS: 3.5 M parameters, 0.43 G multiply-adds at 224."""
    return _create_hardnet("hardnet39ds", pretrained, **{**ARGS_39, "depthwise": True, **kwargs})


@register_model
def hardnet68(pretrained: bool = False, **kwargs: Any) -> HarDNet:
    """HarDNet-68: 17.6 M parameters, 4.25 G multiply-adds at 224."""
    return _create_hardnet("hardnet68", pretrained, **{**ARGS_68, **kwargs})


@register_model
def hardnet68ds(pretrained: bool = False, **kwargs: Any) -> HarDNet:
    """HarDNet-68DS: 4.2 M parameters, 0.78 G multiply-adds at 224."""
    return _create_hardnet("hardnet68ds", pretrained, **{**ARGS_68, "depthwise": True, **kwargs})


@register_model
def hardnet85(pretrained: bool = False, **kwargs: Any) -> HarDNet:
    """HarDNet-85: 36.7 M parameters, 9.07 G multiply-adds at 224."""
    return _create_hardnet("hardnet85", pretrained, **{**ARGS_85, **kwargs})
