"""ShuffleNet v1: grouped 1 x 1 convolutions with channels shuffled in between (Zhang et al. 2017, arXiv:1707.01083).

Units are those of figure 2, stages those of table 1, whose 143, 140, 137, 133 and 137 M multiply-adds for 1, 2, 3, 4
and 8 groups are those of the convolutions; the classifier adds 0.6 to 1.5 M. The first 1 x 1 convolution of all is not
grouped (table 1, note).

The width scales the channels (section 4); of the first convolution, and of channels that groups do not divide, the
paper says nothing. The first convolution has 12, 12, 24, 24 and 48 channels at width 0.25, 0.5, 1, 1.5 and 2, from 0.5
on as in the authors' code (github.com/megvii-model/ShuffleNet-Series). Whole networks then take 13 M multiply-adds at
0.25 and 37 to 39 M at 0.5, where table 2 has 13 and 38, and with 3 groups 292 M at 1.5 and 524 M at 2, as in table 5.
With 8 groups 12 is 16, as in that code: 40 M at 0.5, as the code's authors count, and 16 M at 0.25. The channels inside
a unit, a quarter of its output, are rounded to a multiple of the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, ConvNormAct, DropPath, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm's own models take it from here
from torch import Tensor, nn

__all__ = ["ChannelShuffle", "ShuffleNetV1", "ShuffleUnit", "inner_channels", "stage_channels", "stem_channels"]

STAGE_2_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # table 1, by the number of groups
STEM_CHANNELS = {0.25: 12, 0.5: 12, 1.0: 24, 1.5: 24, 2.0: 48}  # by the width


def stage_channels(groups: int, width: float) -> tuple[int, int, int]:
    """The outputs of stages 2 to 4: table 1 times the width."""
    first = round(STAGE_2_CHANNELS[groups] * width)
    return first, 2 * first, 4 * first


def stem_channels(groups: int, width: float) -> int:
    """The channels of the first convolution, so many that the groups divide what the first unit adds to them."""
    chs = STEM_CHANNELS[width]
    return 16 if groups == 8 and chs == 12 else chs


def inner_channels(out_chs: int, groups: int) -> int:
    """The channels inside a unit: the multiple of the groups nearest to a quarter of its output, at least one."""
    return max(groups, (out_chs + 2 * groups) // (4 * groups) * groups)


class ChannelShuffle(nn.Module):
    """Give every group channels of each group before it: g x n channels, read as (g, n), become (n, g).

    Section 3.1; the authors' code does the inverse, which mixes as much and numbers the channels another way.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) with C a multiple of the groups."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)

    def extra_repr(self) -> str:
        """The groups, for `print(model)`."""
        return f"groups={self.groups}"


class ShuffleUnit(nn.Module):
    """The unit of figure 2, (B, in_chs, H, W) to (B, out_chs, H, W), or with stride 2 to half of H and W.

    With stride 1 the branch is added to the input (b), with stride 2 joined to its average (c). There only the branch
    passes the activation: ReLU would leave the average of what has passed it as it is. Raises ValueError where the
    groups do not divide the channels.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        groups: int,
        first_groups: int,
        stride: int,
        act_layer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        inner = inner_channels(out_chs, groups)
        branch_chs = out_chs - in_chs if stride == 2 else out_chs
        if branch_chs < 1 or branch_chs % groups or in_chs % first_groups:
            raise ValueError(
                f"A ShuffleNet unit of {in_chs} to {out_chs} channels and stride {stride} cannot be cut into {groups} "
                f"groups: the branch has {branch_chs} channels; choose widths that are multiples of {groups}."
            )
        conv: dict[str, Any] = {"norm_layer": norm_layer, "act_layer": act_layer}
        self.reduce = ConvNormAct(in_chs, inner, 1, groups=first_groups, **conv)
        self.shuffle = ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = ConvNormAct(inner, inner, 3, stride=stride, groups=inner, apply_act=False, **conv)
        self.expand = ConvNormAct(inner, branch_chs, 1, groups=groups, apply_act=False, **conv)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.drop_path = DropPath(drop_path) if drop_path and stride == 1 else nn.Identity()
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        """Run the branch beside the input or its average."""
        branch = self.expand(self.depthwise(self.shuffle(self.reduce(x))))
        if self.pool is not None:
            return torch.cat([self.pool(x), self.act(branch)], dim=1)
        return self.act(x + self.drop_path(branch))


class ShuffleNetV1(nn.Module):
    """A ShuffleNet v1 in timm's interface, (B, C, H, W) to (B, num_classes).

    `stem_chs` is the width of the first convolution, `stage_chs` are the outputs of the stages and `depths` their
    units, the first of which halves the resolution. `drop_path_rate` is that of the last unit; units with a stride have
    none, for lack of a residual addition.
    """

    def __init__(
        self,
        groups: int,
        stem_chs: int,
        stage_chs: Sequence[int],
        depths: Sequence[int] = (4, 8, 4),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        conv: dict[str, Any] = {"act_layer": get_act_layer(act_layer), "norm_layer": get_norm_layer(norm_layer)}

        self.stem = nn.Sequential(ConvNormAct(in_chans, stem_chs, 3, stride=2, **conv))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = nn.Sequential()
        self.feature_info = [{"num_chs": stem_chs, "reduction": 2, "module": "stem.0"}]
        rates = iter(cast(list[float], calculate_drop_path_rates(drop_path_rate, sum(depths))))
        width = stem_chs
        for index, (out_chs, depth) in enumerate(zip(stage_chs, depths, strict=True)):
            stage = nn.Sequential()
            for unit in range(depth):
                stage.append(
                    ShuffleUnit(
                        width,
                        out_chs,
                        groups=groups,
                        first_groups=groups if index or unit else 1,
                        stride=1 if unit else 2,
                        drop_path=next(rates),
                        **conv,
                    )
                )
                width = out_chs
            self.stages.append(stage)
            self.feature_info.append({"num_chs": width, "reduction": 8 * 2**index, "module": f"stages.{index}"})

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
        """timm's rules that tell the layers apart: by stage, or by unit."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each unit's activations again in the backward pass."""
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
        """The maps of the stem (0) and of the stages (from 1; the paper counts from 2), and before them the last one.

        `norm` changes nothing: there is no norm behind the last stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"ShuffleNetV1 gives maps of (B, C, H, W), got output_fmt={output_fmt!r}; use NCHW")
        wanted, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        found = [x] if 0 in wanted else []
        x = self.pool(x)
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
        x = self.pool(self.stem(x))
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
        "paper_ids": "arXiv:1707.01083",
        **kwargs,
    }


def _name(groups: int, width: float) -> str:
    return f"shufflenet_v1_g{groups}_x{width}".replace(".", "_")


VARIANTS = {_name(groups, width): (groups, width) for groups in STAGE_2_CHANNELS for width in STEM_CHANNELS}
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in VARIANTS})


def _entry_point(name: str, groups: int, width: float) -> Callable[..., ShuffleNetV1]:
    def create(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV1:
        args = {
            "groups": groups,
            "stem_chs": stem_channels(groups, width),
            "stage_chs": stage_channels(groups, width),
            **kwargs,
        }
        feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
        return build_model_with_cfg(ShuffleNetV1, name, pretrained, feature_cfg=feature_cfg, **args)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ShuffleNet v1 with {groups} groups at width {width}."
    return register_model(create)


globals().update({name: _entry_point(name, *variant) for name, variant in VARIANTS.items()})
