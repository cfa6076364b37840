"""ShuffleNet v1 against its paper's tables and figures (arXiv:1707.01083) and the table of its authors' code."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssl.models.backbones import build_backbone
from ssl.models.shufflenet_v1 import ChannelShuffle, ShuffleNetV1, ShuffleUnit, inner_channels

GROUPS = (1, 2, 3, 4, 8)
NAMES = [f"shufflenet_v1_g{groups}_x{width}" for groups in GROUPS for width in ("0_25", "0_5", "1_0", "1_5", "2_0")]


def on_meta(name: str) -> ShuffleNetV1:
    with torch.device("meta"):
        return cast(ShuffleNetV1, timm.create_model(name)).eval()


def mega_multiply_adds(model: ShuffleNetV1, *, with_classifier: bool) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    classifier = 0 if with_classifier else model.num_features * model.num_classes
    return (counter.get_total_flops() / 2 - classifier) / 1e6


@pytest.mark.parametrize(("groups", "millions"), list(zip(GROUPS, ["143", "140", "137", "133", "137"])))
def test_convolutions_take_the_multiply_adds_of_table_1(groups: int, millions: str) -> None:
    model = on_meta(f"shufflenet_v1_g{groups}_x1_0")
    assert f"{mega_multiply_adds(model, with_classifier=False):.0f}" == millions


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("shufflenet_v1_g1_x0_25", "13"),  # paper, table 2
        ("shufflenet_v1_g2_x0_25", "13"),
        ("shufflenet_v1_g3_x0_25", "13"),
        ("shufflenet_v1_g4_x0_25", "13"),
        ("shufflenet_v1_g3_x0_5", "38"),
        ("shufflenet_v1_g3_x1_5", "292"),  # paper, table 5
        ("shufflenet_v1_g3_x2_0", "524"),
        ("shufflenet_v1_g8_x0_5", "40"),  # the authors' code
        ("shufflenet_v1_g8_x1_0", "138"),
        ("shufflenet_v1_g8_x1_5", "290"),
        ("shufflenet_v1_g8_x2_0", "522"),
    ],
)
def test_whole_networks_take_the_multiply_adds_of_the_authors_tables(name: str, millions: str) -> None:
    assert f"{mega_multiply_adds(on_meta(name), with_classifier=True):.0f}" == millions


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_networks_of_half_width_take_a_million_multiply_adds_more_or_less_than_table_2(groups: int) -> None:
    model = on_meta(f"shufflenet_v1_g{groups}_x0_5")
    assert mega_multiply_adds(model, with_classifier=True) == pytest.approx(38, abs=1)


@pytest.mark.parametrize(
    ("name", "millions"),  # the authors' code, whose classifier has no bias
    [
        ("shufflenet_v1_g3_x0_5", "0.7"),
        ("shufflenet_v1_g8_x0_5", "1.0"),
        ("shufflenet_v1_g3_x1_0", "1.9"),
        ("shufflenet_v1_g8_x1_0", "2.4"),
        ("shufflenet_v1_g3_x1_5", "3.4"),
        ("shufflenet_v1_g8_x1_5", "4.3"),
        ("shufflenet_v1_g3_x2_0", "5.4"),
        ("shufflenet_v1_g8_x2_0", "6.5"),
    ],
)
def test_parameters_equal_the_authors_table(name: str, millions: str) -> None:
    model = on_meta(name)
    assert f"{(sum(p.numel() for p in model.parameters()) - model.num_classes) / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    ("groups", "channels"),  # table 1
    [(1, (144, 288, 576)), (2, (200, 400, 800)), (3, (240, 480, 960)), (4, (272, 544, 1088)), (8, (384, 768, 1536))],
)
def test_stages_give_the_maps_of_table_1(groups: int, channels: tuple[int, ...]) -> None:
    model = on_meta(f"shufflenet_v1_g{groups}_x1_0")
    maps = model.forward_intermediates(torch.empty(1, 3, 224, 224, device="meta"), intermediates_only=True)
    expected = [(24, 112), *zip(channels, (28, 14, 7))]
    assert [tuple(each.shape) for each in maps] == [(1, chs, side, side) for chs, side in expected]
    assert [len(cast(nn.Sequential, stage)) for stage in model.stages] == [4, 8, 4]


@pytest.mark.parametrize("name", NAMES)
def test_widths_scale_the_stages_of_table_1(name: str) -> None:
    model = on_meta(name)
    groups, width = name.removeprefix("shufflenet_v1_g").split("_x")
    full = on_meta(f"shufflenet_v1_g{groups}_x1_0")
    factor = float(width.replace("_", "."))
    assert [info["num_chs"] for info in model.feature_info[1:]] == [
        info["num_chs"] * factor for info in full.feature_info[1:]
    ]
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


def test_all_groups_have_all_widths() -> None:
    assert sorted(timm.list_models("shufflenet_v1*")) == sorted(NAMES)


@pytest.mark.parametrize("groups", GROUPS)
def test_inner_channels_are_the_multiple_of_the_groups_nearest_to_a_quarter(groups: int) -> None:
    for out_chs in range(groups, 50 * groups):
        nearest = min(abs(out_chs / 4 - each) for each in range(groups, 30 * groups, groups))
        inner = inner_channels(out_chs, groups)
        assert inner % groups == 0
        assert abs(out_chs / 4 - inner) == nearest


@pytest.mark.parametrize(("groups", "each"), [(2, 5), (3, 4), (4, 4), (8, 1)])
def test_shuffle_is_the_papers_transposition(groups: int, each: int) -> None:
    x = torch.randn(2, groups * each, 3, 5)
    expected = torch.empty_like(x)
    for group in range(groups):
        for place in range(each):
            expected[:, place * groups + group] = x[:, group * each + place]
    torch.testing.assert_close(ChannelShuffle(groups)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [2, 3])
def test_after_the_shuffle_every_group_has_channels_of_each(groups: int) -> None:
    before = torch.arange(groups).repeat_interleave(2 * groups)  # the group of each channel
    after = ChannelShuffle(groups)(before[None, :, None, None].float()).flatten()
    for group in after.chunk(groups):
        assert set(group.tolist()) == set(range(groups))


def test_only_the_first_pointwise_convolution_is_not_grouped() -> None:
    pointwise = [
        module.groups
        for module in on_meta("shufflenet_v1_g3_x1_0").modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
    ]
    assert pointwise == [1] + [3] * (2 * 16 - 1)


def make_unit(in_chs: int, out_chs: int, *, stride: int, **args: Any) -> ShuffleUnit:
    torch.manual_seed(0)
    unit = ShuffleUnit(
        in_chs,
        out_chs,
        groups=3,
        first_groups=3,
        stride=stride,
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
        **args,
    )
    return unit.eval()


def group_by_group(x: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution in 3 groups, as 3 convolutions."""
    return torch.cat([functional.conv2d(a, b) for a, b in zip(x.chunk(3, dim=1), weight.chunk(3))], dim=1)


def branch_of_figure_2(unit: Any, x: Tensor) -> Tensor:
    x = functional.relu(unit.reduce.bn(group_by_group(x, unit.reduce.conv.weight)))
    count = x.shape[1]
    x = x[:, [group * (count // 3) + place for place in range(count // 3) for group in range(3)]]
    filters = unit.depthwise.conv.weight
    stride = 2 if unit.pool is not None else 1
    x = torch.cat(
        [functional.conv2d(x[:, c : c + 1], filters[c : c + 1], stride=stride, padding=1) for c in range(count)], dim=1
    )
    return unit.expand.bn(group_by_group(unit.depthwise.bn(x), unit.expand.conv.weight))


def test_a_unit_adds_its_branch_as_figure_2b() -> None:
    unit, x = make_unit(24, 24, stride=1), torch.randn(2, 24, 5, 7)
    torch.testing.assert_close(unit(x), functional.relu(x + branch_of_figure_2(unit, x)))


def test_a_unit_with_a_stride_joins_its_branch_and_the_average_as_figure_2c() -> None:
    unit, x = make_unit(12, 36, stride=2), torch.randn(2, 12, 5, 7).relu()  # as it comes out of the unit before
    average = functional.avg_pool2d(x, 3, stride=2, padding=1)
    expected = functional.relu(torch.cat([average, branch_of_figure_2(unit, x)], dim=1))
    torch.testing.assert_close(unit(x), expected)


@pytest.mark.parametrize(("in_chs", "out_chs", "stride"), [(25, 25, 1), (12, 37, 2), (36, 36, 2)])
def test_channels_that_groups_do_not_divide_are_refused(in_chs: int, out_chs: int, stride: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut into 3 groups"):
        make_unit(in_chs, out_chs, stride=stride)


def test_drop_path_rises_linearly_and_leaves_out_units_with_a_stride() -> None:
    model = timm.create_model("shufflenet_v1_g3_x0_25", drop_path_rate=0.3, depths=(1, 3, 2))
    rates = [getattr(cast(Any, unit).drop_path, "drop_prob", None) for stage in model.stages for unit in stage]
    expected = [None, None, 0.3 * 2 / 5, 0.3 * 3 / 5, None, 0.3]
    assert [rate is None for rate in rates] == [rate is None for rate in expected]
    assert [rate for rate in rates if rate] == pytest.approx([rate for rate in expected if rate])


def test_a_dropped_branch_leaves_the_units_input() -> None:
    unit, x = make_unit(24, 24, stride=1, drop_path=0.5), torch.randn(64, 24, 3, 3)
    whole = functional.relu(x + 2 * branch_of_figure_2(unit, x))  # kept branches are scaled by 1 / (1 - 0.5)
    cast(nn.Module, unit.drop_path).train()
    given = unit(x)
    dropped = (given == functional.relu(x)).flatten(1).all(dim=1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(given[~dropped], whole[~dropped])
    unit.eval()
    torch.testing.assert_close(unit(x), functional.relu(x + branch_of_figure_2(unit, x)))


def test_drop_path_is_a_setting_of_the_training_run() -> None:
    model, spec = build_backbone("shufflenet_v1_g3_x0_25", image_size=(64, 64), drop_path=0.1)
    assert sum(getattr(module, "drop_prob", 0) > 0 for module in model.modules()) == 13  # of 16 units, 3 with a stride
    assert "drop_path_rate" not in spec.model_args
