"""BN-Inception, also called Inception v2 (Ioffe and Szegedy 2015, arXiv:1502.03167), from figure 5 of its appendix.

The figure contradicts itself: the branches it gives for 4c and 4d have 608 channels together, and its column of outputs
says 576 and, after 4e, 1024. `bn_inception` follows the outputs, with 96 channels in place of 128 behind the pooling of
4c and 4d, as the authors' own code does (tensorflow/models, slim's inception_v2), and has the separable first
convolution with depth multiplier 8 of the figure's footnote: 11.2 M parameters, 1.93 G multiply-adds at 224.

`bn_inception_caffe` follows the branches, with 608 channels and a plain first convolution, as the models in wide use
do (Caffe's and its ports to Torch and MXNet): 11.3 M parameters, and the 2.03 G multiply-adds that arXiv:1709.01507
counts in table 2.

The figure gives the heights and widths of 3c and 4e before their stride of 2. Section 4.2 counts 13.6 M parameters,
which neither model has. Convolutions have no bias before BatchNorm (section 3.2). Averages leave the padding out, as
in the authors' code. There are no auxiliary classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, ConvNormAct, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm's own models take it from here
from torch import Tensor, nn

__all__ = ["BNInception", "InceptionModule", "Widths"]


class Widths(NamedTuple):
    """A row of figure 5: the channels of a module's layers.

    `one` is 0 where the module halves the resolution; `projection` is 0 where it passes its pooled input through.
    """

    one: int
    three_reduce: int
    three: int
    double_reduce: int
    double: int
    pool: str  # avg or max
    projection: int


class InceptionModule(nn.Module):
    """Four branches side by side: 1 x 1, 3 x 3, two 3 x 3, and pooling; (B, in_chs, H, W) to (B, out_chs, H, W).

    A module without a 1 x 1 branch halves H and W. Raises ValueError for a pooling other than avg and max.
    """

    def __init__(self, in_chs: int, widths: Widths, **conv: Any) -> None:
        super().__init__()
        if widths.pool not in ("avg", "max"):
            raise ValueError(f"An Inception module pools by avg or max, got {widths.pool!r}; use one of the two.")
        stride = 1 if widths.one else 2
        self.out_chs = widths.one + widths.three + widths.double + (widths.projection or in_chs)
        self.branches = nn.ModuleList()
        if widths.one:
            self.branches.append(ConvNormAct(in_chs, widths.one, 1, **conv))
        self.branches.append(
            nn.Sequential(
                ConvNormAct(in_chs, widths.three_reduce, 1, **conv),
                ConvNormAct(widths.three_reduce, widths.three, 3, stride=stride, **conv),
            )
        )
        self.branches.append(
            nn.Sequential(
                ConvNormAct(in_chs, widths.double_reduce, 1, **conv),
                ConvNormAct(widths.double_reduce, widths.double, 3, **conv),
                ConvNormAct(widths.double, widths.double, 3, stride=stride, **conv),
            )
        )
        pool = nn.Sequential(
            nn.MaxPool2d(3, stride, padding=1)
            if widths.pool == "max"
            else nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        )
        if widths.projection:
            pool.append(ConvNormAct(in_chs, widths.projection, 1, **conv))
        self.branches.append(pool)

    def forward(self, x: Tensor) -> Tensor:
        """Join what the branches give along the channels, in the figure's order."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class BNInception(nn.Module):
    """A BN-Inception in timm's interface, (B, C, H, W) to (B, num_classes).

    `stem_chs` are the widths of the three convolutions before the first module; `stages` have a row of figure 5, as in
    `Widths`, for each module. `stem_multiplier` is the depth multiplier of the separable first convolution, 0 for a
    plain one. There are no residual blocks, so there is no drop path.
    """

    def __init__(
        self,
        stem_chs: Sequence[int],
        stages: Sequence[Sequence[Sequence[Any]]],
        *,
        stem_multiplier: int = 8,
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
        self.grad_checkpointing = False
        conv: dict[str, Any] = {"act_layer": get_act_layer(act_layer), "norm_layer": get_norm_layer(norm_layer)}

        first, reduce, width = stem_chs
        self.stem = _stem(in_chans, first, stem_multiplier, **conv)
        second = nn.Sequential(
            nn.MaxPool2d(3, stride=2, padding=1),
            ConvNormAct(first, reduce, 1, **conv),
            ConvNormAct(reduce, width, 3, **conv),
        )
        self.stages = nn.Sequential(second)
        self.feature_info = [
            {"num_chs": first, "reduction": 2, "module": f"stem.{len(self.stem) - 1}"},
            {"num_chs": width, "reduction": 4, "module": "stages.0"},
        ]
        reduction = 4
        for index, rows in enumerate(stages, start=1):
            stage = nn.Sequential(nn.MaxPool2d(3, stride=2, padding=1)) if index == 1 else nn.Sequential()
            for row in rows:
                module = InceptionModule(width, Widths(*row), **conv)
                stage.append(module)
                width = module.out_chs
                reduction *= 1 if row[0] else 2
            reduction *= 2 if index == 1 else 1
            self.stages.append(stage)
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{index}"})

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
        """timm's rules that tell the layers apart: by stage, or by module."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each module's activations again in the backward pass."""
        self.grad_checkpointing = enable

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
            raise ValueError(f"BNInception gives maps of (B, C, H, W), got output_fmt={output_fmt!r}; use NCHW")
        wanted, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        found = [x] if 0 in wanted else []
        for index, stage in enumerate(list(self.stages)[: last if stop_early else None], start=1):
            x = self._run(stage, x)
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
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map, (B, num_features, h, w) to (B, num_features), and classify it unless `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, C, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint_seq(stage, x)) if self.grad_checkpointing else stage(x)


def _stem(in_chans: int, out_chs: int, multiplier: int, **conv: Any) -> nn.Sequential:
    """7 x 7 with stride 2; separable: `multiplier` filters for each channel, then 1 x 1 with nothing in between."""
    if not multiplier:
        return nn.Sequential(ConvNormAct(in_chans, out_chs, 7, stride=2, **conv))
    width = in_chans * multiplier
    spatial = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, groups=in_chans, bias=False)
    return nn.Sequential(spatial, ConvNormAct(width, out_chs, 1, **conv))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "paper_ids": "arXiv:1502.03167",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "bn_inception.untrained": _cfg(first_conv="stem.0"),
        "bn_inception_caffe.untrained": _cfg(first_conv="stem.0.conv"),
    }
)

STEM_CHS = (64, 64, 192)


def _stages(projection: int) -> tuple[tuple[Widths, ...], ...]:
    """Figure 5, with the channels behind the pooling of 4c and 4d."""
    return (
        (  # 28 x 28
            Widths(64, 64, 64, 64, 96, "avg", 32),  # 3a
            Widths(64, 64, 96, 64, 96, "avg", 64),  # 3b
        ),
        (  # 14 x 14
            Widths(0, 128, 160, 64, 96, "max", 0),  # 3c
            Widths(224, 64, 96, 96, 128, "avg", 128),  # 4a
            Widths(192, 96, 128, 96, 128, "avg", 128),  # 4b
            Widths(160, 128, 160, 128, 160, "avg", projection),  # 4c
            Widths(96, 128, 192, 160, 192, "avg", projection),  # 4d
        ),
        (  # 7 x 7
            Widths(0, 128, 192, 192, 256, "max", 0),  # 4e
            Widths(352, 192, 320, 160, 224, "avg", 128),  # 5a
            Widths(352, 192, 320, 192, 224, "max", 128),  # 5b
        ),
    )


def _create_bn_inception(variant: str, pretrained: bool, **kwargs: Any) -> BNInception:
    feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True}
    return build_model_with_cfg(BNInception, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def bn_inception(pretrained: bool = False, **kwargs: Any) -> BNInception:
    """BN-Inception as its authors' code has it: 11.2 M parameters, 1.93 G multiply-adds at 224."""
    args = {"stem_chs": STEM_CHS, "stages": _stages(96), **kwargs}
    return _create_bn_inception("bn_inception", pretrained, **args)


@register_model
def bn_inception_caffe(pretrained: bool = False, **kwargs: Any) -> BNInception:
    """BN-Inception as Caffe's model has it: 11.3 M parameters, 2.03 G multiply-adds at 224."""
    args = {"stem_chs": STEM_CHS, "stages": _stages(128), "stem_multiplier": 0, **kwargs}
    return _create_bn_inception("bn_inception_caffe", pretrained, **args)
