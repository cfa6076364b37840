"""EffNet: depthwise convolutions cut into rows and columns, with the pooling in between (arXiv:1801.06434).

Freeman, Roese-Koerner and Kummert 2018. The network is the EffNet of table 1: three blocks, the first of which reads
the image, whose 32 px of CIFAR-10 become maps of 16, 8 and 4 px with 64, 128 and 256 channels. Its convolutions take
5.6 M multiply-adds; table 2 counts 11.4 M operations, which is two for each and one for each value that they give.

A 1 x 2 convolution with stride 2 along the rows halves the width, so that it reads every value; table 1 names it 2 x 1
and gives no axis. The paper's classifier reads the last map value by value, which ties it to one image size; this one
reads its average. Every convolution is followed by BatchNorm and leaky ReLU, in this order and with PyTorch's slope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_norm_act_layer
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models import checkpoint as recomputed
from timm.models._features import feature_take_indices  # timm's own models take it from here
from torch import Tensor, nn

__all__ = ["EffNet", "EffNetBlock"]


class EffNetBlock(nn.Sequential):
    """The block of figure 1a, (B, in_chs, H, W) to (B, out_chs, H/2, W/2), inside with half of its output's channels.

    The height is halved by max pooling between the two depthwise convolutions, the width by the last convolution.
    """

    def __init__(self, in_chs: int, out_chs: int, *, norm_act: Callable[..., nn.Module]) -> None:
        chs = out_chs // 2
        super().__init__()
        self.pointwise = _conv(in_chs, chs, (1, 1), norm_act=norm_act)
        self.rows = _conv(chs, chs, (1, 3), padding=(0, 1), groups=chs, norm_act=norm_act)
        self.pool = nn.MaxPool2d((2, 1))
        self.columns = _conv(chs, chs, (3, 1), padding=(1, 0), groups=chs, norm_act=norm_act)
        self.expand = _conv(chs, out_chs, (1, 2), stride=(1, 2), norm_act=norm_act)


def _conv(in_chs: int, out_chs: int, kernel: tuple[int, int], *, norm_act: Callable[..., nn.Module], **conv: Any):
    return nn.Sequential(nn.Conv2d(in_chs, out_chs, kernel, bias=False, **conv), norm_act(out_chs))


class EffNet(nn.Module):
    """An EffNet in timm's interface, (B, C, H, W) to (B, num_classes).

    `stage_chs` are the outputs of the blocks, each of which halves the resolution, times `width` and rounded to even
    numbers. There are no residual blocks, so there is no drop path.
    """

    def __init__(
        self,
        stage_chs: Sequence[int] = (64, 128, 256),
        *,
        width: float = 1.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "leaky_relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        norm_act = cast(Callable[..., nn.Module], get_norm_act_layer(norm_layer, act_layer))

        self.stages = nn.Sequential()
        self.feature_info: list[dict[str, Any]] = []
        chs = in_chans
        for index, unscaled in enumerate(stage_chs):
            out_chs = max(2, 2 * round(unscaled * width / 2))
            self.stages.append(EffNetBlock(chs, out_chs, norm_act=norm_act))
            self.feature_info.append({"num_chs": out_chs, "reduction": 2 ** (index + 1), "module": f"stages.{index}"})
            chs = out_chs

        self.num_features = chs
        self.head = ClassifierHead(chs, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = chs * self.head.global_pool.feat_mult()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every convolution anew from He et al.'s normal distribution (arXiv:1502.01852), by its inputs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(self.head.fc, nn.Linear):
            nn.init.zeros_(self.head.fc.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's rules that tell the layers apart: by block, or by the layers of each."""
        if coarse:
            return {"stem": r"^stages\.0", "blocks": r"^stages\.(\d+)"}
        parts = ("pointwise", "rows", "columns", "expand")
        fine = [(rf"^stages\.(\d+)\.{part}", (order,)) for order, part in enumerate(parts)]
        return {"stem": r"^stages\.0\.pointwise", "blocks": fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block's activations again in the backward pass."""
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
        """The maps of the blocks (from 0), and before them the last one, as timm gives them.

        `norm` changes nothing: there is no norm behind the last block.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"EffNet gives maps of (B, C, H, W), got output_fmt={output_fmt!r}; use NCHW")
        wanted, last = feature_take_indices(len(self.stages), indices)
        found = []
        for index, stage in enumerate(list(self.stages)[: last + 1 if stop_early else None]):
            x = cast(Tensor, recomputed(stage, x)) if self.grad_checkpointing else stage(x)
            if index in wanted:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these maps, and return their numbers."""
        wanted, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, C, H, W) to (B, num_features, H/8, W/8)."""
        return cast(Tensor, checkpoint_seq(self.stages, x)) if self.grad_checkpointing else self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a feature map, (B, num_features, h, w) to (B, num_features), and classify it unless `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores, (B, C, H, W) to (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        "effnet.untrained": {
            "num_classes": 1000,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stages.0.pointwise.0",
            "classifier": "head.fc",
            "paper_ids": "arXiv:1801.06434",
        }
    }
)


@register_model
def effnet(pretrained: bool = False, **kwargs: Any) -> EffNet:
    """EffNet for images of 32 px: 0.11 M parameters and 5.6 M multiply-adds at 32, before the classifier."""
    feature_cfg = {"out_indices": (0, 1, 2), "flatten_sequential": True}
    return build_model_with_cfg(EffNet, "effnet", pretrained, feature_cfg=feature_cfg, **kwargs)
