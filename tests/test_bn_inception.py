"""BN-Inception against figure 5 of its paper (arXiv:1502.03167) and against the published counts of Caffe's model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssl.models.bn_inception import BNInception, InceptionModule, Widths

# Figure 5: the side of the map that a module gives, then the channels of 1 x 1, 3 x 3 reduce, 3 x 3, double 3 x 3
# reduce, double 3 x 3, and behind the pooling; p for what is passed through, * for what the figure contradicts.
FIGURE_5 = """
3a 28  64  64  64  64  96  32
3b 28  64  64  96  64  96  64
3c 14   0 128 160  64  96   p
4a 14 224  64  96  96 128 128
4b 14 192  96 128  96 128 128
4c 14 160 128 160 128 160   *
4d 14  96 128 192 160 192   *
4e  7   0 128 192 192 256   p
5a  7 352 192 320 160 224 128
5b  7 352 192 320 192 224 128
"""
ROWS = [line.split() for line in FIGURE_5.split("\n") if line]
NAMES = {"bn_inception": 96, "bn_inception_caffe": 128}  # the channels for *


def on_meta(name: str) -> BNInception:
    with torch.device("meta"):
        return cast(BNInception, timm.create_model(name)).eval()


def multiply_adds(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2


def of_figure_5(projection: int) -> tuple[int, int]:
    """Parameters with two for each normed channel, and multiply-adds at 224, of the modules alone."""
    width, side_before, parameters, operations = 192, 28, 0, 0
    for _, side, *cells in ROWS:
        pool = {"p": 0, "*": projection}.get(cells[-1]) if cells[-1] in "p*" else int(cells[-1])
        assert pool is not None
        one, reduce, three, double_reduce, double = (int(cell) for cell in cells[:-1])
        large, small = side_before**2, int(side) ** 2
        for inputs, outputs, kernel, places in [
            (width, one, 1, small),
            (width, reduce, 1, large),
            (reduce, three, 9, small),
            (width, double_reduce, 1, large),
            (double_reduce, double, 9, large),
            (double, double, 9, small),
            (width, pool, 1, small),
        ]:
            parameters += inputs * outputs * kernel + 2 * outputs
            operations += inputs * outputs * kernel * places
        width, side_before = one + three + double + (pool or width), int(side)
    return parameters, operations


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_multiply_adds_are_those_of_figure_5(name: str) -> None:
    separable = name == "bn_inception"
    first = 3 * 8 * 49 + 24 * 64 if separable else 3 * 64 * 49
    second, third = 64 * 64, 64 * 192 * 9
    parameters, operations = of_figure_5(NAMES[name])
    parameters += first + second + third + 2 * (64 + 64 + 192) + 1024 * 1000 + 1000
    operations += first * 112**2 + (second + third) * 56**2 + 1024 * 1000
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds(model) == operations


def test_caffes_model_has_the_parameters_of_its_published_port() -> None:
    # Cadene's pretrainedmodels, bninception: 11,295,240, with biases that BatchNorm makes superfluous.
    model = on_meta("bn_inception_caffe")
    biases = sum(module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    assert sum(p.numel() for p in model.parameters()) + biases == 11_295_240


def test_caffes_model_has_the_multiply_adds_that_the_senet_paper_counts() -> None:
    assert f"{multiply_adds(on_meta('bn_inception_caffe')) / 1e9:.2f}" == "2.03"  # arXiv:1709.01507, table 2


def test_counts_named_in_the_documentation_are_those_of_the_authors_model() -> None:
    model = on_meta("bn_inception")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == "11.2"
    assert f"{multiply_adds(model) / 1e9:.2f}" == "1.93"


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("bn_inception", [256, 320, 576, 576, 576, 576, 576, 1024, 1024, 1024]),  # the figure's column of outputs
        ("bn_inception_caffe", [256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024]),  # the sums of its branches
    ],
)
def test_modules_give_the_maps_of_figure_5(name: str, channels: list[int]) -> None:
    model, shapes = on_meta(name), []
    for module in model.modules():
        if isinstance(module, InceptionModule):
            module.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert shapes == [(1, chs, int(row[1]), int(row[1])) for chs, row in zip(channels, ROWS, strict=True)]


def test_maps_before_the_modules_are_those_of_figure_5() -> None:
    maps = on_meta("bn_inception").forward_intermediates(
        torch.empty(1, 3, 224, 224, device="meta"), intermediates_only=True
    )
    assert [tuple(each.shape) for each in maps[:2]] == [(1, 64, 112, 112), (1, 192, 56, 56)]


def make_module(in_chs: int, *widths: Any) -> InceptionModule:
    torch.manual_seed(0)
    return InceptionModule(in_chs, Widths(*widths), act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d).eval()


def convolved(x: Tensor, layer: Any, stride: int = 1) -> Tensor:
    kernel = layer.conv.weight.shape[-1]
    return functional.relu(layer.bn(functional.conv2d(x, layer.conv.weight, stride=stride, padding=kernel // 2)))


def test_a_module_joins_its_four_branches_in_the_figures_order() -> None:
    module, x = make_module(6, 2, 3, 4, 5, 7, "avg", 8), torch.randn(2, 6, 5, 7)
    one, three, double, pool = cast(Any, module.branches)
    ones = functional.avg_pool2d(torch.ones(1, 1, 5, 7), 3, 1, 1)  # the share of each window that is no padding
    averaged = functional.avg_pool2d(x, 3, 1, 1) / ones
    expected = [
        convolved(x, one),
        convolved(convolved(x, three[0]), three[1]),
        convolved(convolved(convolved(x, double[0]), double[1]), double[2]),
        convolved(averaged, pool[1]),
    ]
    assert [each.shape[1] for each in expected] == [2, 4, 7, 8]
    torch.testing.assert_close(module(x), torch.cat(expected, dim=1))


def test_a_halving_module_passes_its_largest_inputs_through() -> None:
    module, x = make_module(6, 0, 3, 4, 5, 7, "max", 0), torch.randn(2, 6, 8, 6)
    three, double, _ = cast(Any, module.branches)
    expected = [
        convolved(convolved(x, three[0]), three[1], stride=2),
        convolved(convolved(convolved(x, double[0]), double[1]), double[2], stride=2),
        functional.max_pool2d(x, 3, 2, 1),
    ]
    torch.testing.assert_close(module(x), torch.cat(expected, dim=1))


def test_modules_pool_by_maximum_where_the_figure_says_so() -> None:
    modules = [each for each in on_meta("bn_inception").modules() if isinstance(each, InceptionModule)]
    largest = [row[0] for row, each in zip(ROWS, modules) if isinstance(cast(Any, each.branches[-1])[0], nn.MaxPool2d)]
    assert largest == ["3c", "4e", "5b"]


def test_another_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="avg or max, got 'min'"):
        make_module(6, 2, 3, 4, 5, 7, "min", 8)


def test_the_separable_first_convolution_has_eight_filters_for_each_channel() -> None:
    spatial, pointwise = cast(Any, timm.create_model("bn_inception", num_classes=0).get_submodule("stem"))
    x = torch.randn(1, 3, 20, 20)
    by_channel = [
        functional.conv2d(x[:, c : c + 1], spatial.weight[8 * c : 8 * c + 8], stride=2, padding=3) for c in range(3)
    ]
    torch.testing.assert_close(spatial(x), torch.cat(by_channel, dim=1))
    assert pointwise.conv.weight.shape == (64, 24, 1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_convolution_has_a_bias_before_batchnorm(name: str) -> None:
    convolutions = [module for module in on_meta(name).modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == (4 if name == "bn_inception" else 3) + 8 * 7 + 2 * 5
    assert all(module.bias is None for module in convolutions)
