"""EffNet against its paper's tables and figure (arXiv:1801.06434)."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssl.models.backbones import build_backbone
from ssl.models.effnet import EffNet, EffNetBlock


def on_meta(**args: Any) -> EffNet:
    with torch.device("meta"):
        return cast(EffNet, timm.create_model("effnet", num_classes=0, **args)).eval()


def maps_of_layers(model: nn.Module) -> list[tuple[int, ...]]:
    """(C, H, W) behind each convolution, and behind its pooling where that follows."""
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.empty(1, 3, 32, 32, device="meta"))
    return shapes


def test_layers_are_those_of_table_1() -> None:
    assert maps_of_layers(on_meta()) == [
        (32, 32, 32),  # 1x1x32
        (32, 32, 32),  # dw 1x3
        (32, 16, 32),  # + 1d mp
        (32, 16, 32),  # dw 3x1
        (64, 16, 16),  # 2x1x64 + 1d stride
        (64, 16, 16),
        (64, 16, 16),
        (64, 8, 16),
        (64, 8, 16),
        (128, 8, 8),
        (128, 8, 8),
        (128, 8, 8),
        (128, 4, 8),
        (128, 4, 8),
        (256, 4, 4),
    ]


def test_operations_are_those_of_table_2() -> None:
    model, given = on_meta(), 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal given
        given += output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert f"{counter.get_total_flops() / 2 / 1e6:.1f}" == "5.6"  # multiply-adds
    assert f"{(counter.get_total_flops() + given) / 1e6:.1f}" == "11.4"


def test_parameters_are_those_of_the_layers_of_table_1() -> None:
    convolutions = 0
    for inputs, inner, outputs in [(3, 32, 64), (64, 64, 128), (128, 128, 256)]:
        convolutions += inputs * inner + 3 * inner + 3 * inner + 2 * inner * outputs
    norms = 2 * (3 * 32 + 64 + 3 * 64 + 128 + 3 * 128 + 256)
    parameters = sum(p.numel() for p in on_meta().parameters())
    assert parameters == convolutions + norms
    assert f"{parameters / 1e6:.2f}" == "0.11"


def normed(x: Tensor, layer: Any) -> Tensor:
    return functional.leaky_relu(functional.batch_norm(x, layer[1].running_mean, layer[1].running_var))


def test_a_block_computes_figure_1a() -> None:
    torch.manual_seed(0)
    block: Any = cast(EffNet, timm.create_model("effnet", stage_chs=(6,), num_classes=0)).eval().stages[0]
    x = torch.randn(1, 3, 6, 4)
    padded = functional.pad(
        normed(torch.einsum("oi,bihw->bohw", block.pointwise[0].weight[..., 0, 0], x), block[0]), [1, 1]
    )
    row = torch.zeros(1, 3, 6, 4)
    for h in range(6):
        for w in range(4):
            row[:, :, h, w] = (padded[:, :, h, w : w + 3] * block.rows[0].weight[:, 0, 0]).sum(-1)
    row = normed(row, block.rows)
    pooled = functional.pad(torch.maximum(row[:, :, 0::2], row[:, :, 1::2]), [0, 0, 1, 1])  # (1, 3, 1 + 3 + 1, 4)
    column = torch.zeros(1, 3, 3, 4)
    for h in range(3):
        for w in range(4):
            column[:, :, h, w] = (pooled[:, :, h : h + 3, w] * block.columns[0].weight[:, 0, :, 0]).sum(-1)
    column = normed(column, block.columns)
    left, right = block.expand[0].weight[:, :, 0, 0], block.expand[0].weight[:, :, 0, 1]
    expanded = torch.einsum("oi,bihw->bohw", left, column[..., 0::2])
    expanded = expanded + torch.einsum("oi,bihw->bohw", right, column[..., 1::2])
    torch.testing.assert_close(block(x), normed(expanded, block.expand))


def test_the_last_convolution_of_a_block_reads_every_value() -> None:
    layer = EffNetBlock(4, 8, norm_act=nn.BatchNorm2d).expand
    x = torch.randn(1, 4, 4, 6, requires_grad=True)
    cast(Any, layer)[0](x).sum().backward()
    assert cast(Tensor, x.grad).all()


@pytest.mark.parametrize(("width", "channels"), [(0.25, [16, 32, 64]), (0.3, [20, 38, 76]), (2, [128, 256, 512])])
def test_width_scales_the_outputs_of_the_blocks_to_even_numbers(width: float, channels: list[int]) -> None:
    model = on_meta(width=width)
    assert [info["num_chs"] for info in model.feature_info] == channels
    assert [cast(Any, stage).pointwise[0].out_channels for stage in model.stages] == [chs // 2 for chs in channels]
    assert all(math.isclose(chs, full * width, abs_tol=1) for chs, full in zip(channels, (64, 128, 256)))


@pytest.mark.parametrize("image_size", [(32, 32), (33, 47), (8, 8), (224, 160)])
def test_any_image_of_eight_pixels_and_more_gives_a_vector(image_size: tuple[int, int]) -> None:
    model, _ = build_backbone("effnet", image_size=image_size, model_args={"width": 0.25})
    assert model.eval()(torch.randn(2, 3, *image_size)).shape == (2, 64)


def test_a_smaller_image_is_told_which_size_fits() -> None:
    with pytest.raises(ValueError, match=r"fits data\.image_size=32"):
        build_backbone("effnet", image_size=(4, 4))
