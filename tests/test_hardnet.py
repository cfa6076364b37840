"""HarDNet against its paper's tables, rules and figures (arXiv:1909.00948), and in timm's interface."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, cast

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssl.models import families
from ssl.models.backbones import build_backbone
from ssl.models.hardnet import HarDBlock, HarDNet, HarDStage, layer_links, layer_width

NAMES = ("hardnet39ds", "hardnet68", "hardnet68ds", "hardnet85")
TINY: dict[str, Any] = {
    "stem_chs": (4, 8),
    "stages": [[[4, 4, 8]], [[8, 4, 12], [4, 4, 12]], [[4, 6, 16]], [[2, 8, 24]]],
    "num_classes": 5,
}


def tiny(name: str, **args: Any) -> HarDNet:
    torch.manual_seed(0)
    return cast(HarDNet, timm.create_model(name, **{**TINY, **args}))


def image(batch: int = 4, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))  # (B, C, H, W)


def stage_blocks(model: nn.Module) -> list[HarDBlock]:
    return [module for module in model.modules() if isinstance(module, HarDBlock)]


def on_meta(name: str) -> HarDNet:
    with torch.device("meta"):
        return cast(HarDNet, timm.create_model(name)).eval()


@pytest.mark.parametrize(
    ("name", "millions"),  # table 4; of HarDNet-85, which is not in the paper, the table of the authors' code
    [("hardnet39ds", "3.5"), ("hardnet68ds", "4.2"), ("hardnet68", "17.6"), ("hardnet85", "36.7")],
)
def test_parameters_equal_the_authors_tables(name: str, millions: str) -> None:
    assert f"{sum(p.numel() for p in on_meta(name).parameters()) / 1e6:.1f}" == millions


@pytest.mark.parametrize(
    ("name", "digits", "billions"),  # as above
    [("hardnet39ds", 2, "0.44"), ("hardnet68ds", 2, "0.79"), ("hardnet68", 1, "4.3"), ("hardnet85", 1, "9.1")],
)
def test_multiply_adds_with_two_operations_per_normed_value_equal_the_authors_tables(
    name: str, digits: int, billions: str
) -> None:
    model, normed = on_meta(name), 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal normed
        normed += output.numel()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert f"{(counter.get_total_flops() / 2 + 2 * normed) / 1e9:.{digits}f}" == billions


@pytest.mark.parametrize("name", NAMES)
def test_the_number_in_the_name_counts_the_layers(name: str) -> None:
    model = on_meta(name)
    layers = 2 + sum(len(block.layers) + 1 for block in stage_blocks(model)) + 1  # stem, blocks, classifier
    assert layers == int(re.sub(r"\D", "", name))


def test_links_are_those_of_the_papers_rule() -> None:
    for layer in range(1, 65):
        expected = {j for j in range(layer) for n in range(8) if layer % 2**n == 0 and layer - 2**n == j}
        assert set(layer_links(layer)) == expected
        assert len(layer_links(layer)) == len(expected)


def test_links_of_a_block_of_eight_are_those_of_figure_two() -> None:
    assert [layer_links(layer) for layer in range(1, 9)] == [
        [0],
        [1, 0],
        [2],
        [3, 2, 0],
        [4],
        [5, 4],
        [6],
        [7, 6, 4, 0],
    ]


@pytest.mark.parametrize(
    ("growth_rate", "multiplier"), [(14, "1.7"), (16, "1.6"), (20, "1.7"), (36, "1.7"), (160, "1.6")]
)
def test_widths_are_the_even_numbers_nearest_to_the_papers(growth_rate: int, multiplier: str) -> None:
    for layer in range(1, 17):
        zeros = len(f"{layer:b}") - len(f"{layer:b}".rstrip("0"))  # the greatest n of which 2^n divides the layer
        exact = growth_rate * Fraction(multiplier) ** zeros
        width = layer_width(layer, growth_rate, float(multiplier))
        assert width % 2 == 0
        assert abs(width - exact) <= 1


@pytest.mark.parametrize("name", ["hardnet68", "hardnet39ds"])
def test_a_block_computes_the_papers_loop(name: str) -> None:
    block = stage_blocks(tiny(name))[1].eval()  # of depth 8
    x = torch.randn(2, 8, 5, 7)
    outputs = {0: x}
    for k in range(1, 9):
        sources = [outputs[k - 2**n] for n in range(4) if k % 2**n == 0]
        outputs[k] = block.layers[k - 1](torch.cat(sources, dim=1))
    joined = torch.cat([outputs[k] for k in (1, 3, 5, 7, 8)], dim=1)  # section 3.2: the odd layers and the last
    torch.testing.assert_close(block(x), block.transition(joined), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hardnet39ds", "hardnet68ds"])
def test_all_but_the_first_convolution_of_ds_models_are_pointwise_or_depthwise(name: str) -> None:
    first, *others = [module for module in on_meta(name).modules() if isinstance(module, nn.Conv2d)]
    assert first.kernel_size == (3, 3)
    assert first.groups == 1
    assert {conv.kernel_size for conv in others} == {(1, 1), (3, 3)}
    assert all(conv.groups == (1 if conv.kernel_size == (1, 1) else conv.in_channels) for conv in others)


def test_ds_layers_are_pointwise_before_they_are_depthwise() -> None:
    layer = [
        module for module in stage_blocks(tiny("hardnet39ds"))[0].layers[1].modules() if isinstance(module, nn.Conv2d)
    ]
    assert [(conv.kernel_size, conv.groups) for conv in layer] == [((1, 1), 1), ((3, 3), layer[1].out_channels)]


def test_depthwise_convolutions_have_no_activation_behind_them() -> None:
    pointwise, depthwise = cast(nn.Sequential, stage_blocks(tiny("hardnet39ds"))[0].layers[0])
    x = pointwise(image(side=16).repeat(1, 3, 1, 1)[:, :8])  # (B, 4, 16, 16)
    assert x.min() == 0
    assert depthwise(x).min() < 0


def test_activations_are_relu_and_may_be_the_released_codes_relu6() -> None:
    def kinds(model: nn.Module) -> set[str]:
        return {type(module).__name__ for module in model.modules() if "ReLU" in type(module).__name__}

    assert kinds(tiny("hardnet68")) == {"ReLU"}
    assert kinds(tiny("hardnet68", act_layer="relu6")) == {"ReLU6"}


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_have_the_sizes_that_feature_info_gives(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
        maps = model(torch.empty(2, 3, 96, 64))
    info = model.feature_info
    assert info.reduction() == [2, 4, 8, 16, 32]
    assert [tuple(each.shape) for each in maps] == [
        (2, channels, 96 // stride, 64 // stride) for channels, stride in zip(info.channels(), info.reduction())
    ]


@pytest.mark.parametrize("name", ["hardnet68", "hardnet39ds"])
def test_feature_maps_are_the_models_own(name: str) -> None:
    model, x = tiny(name).eval(), image()
    by_hand = [model.stem(x)]
    for stage in model.stages:
        by_hand.append(stage(by_hand[-1]))
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x), rtol=0, atol=0)
    torch.testing.assert_close(maps, by_hand, rtol=0, atol=0)
    extractor = tiny(name, features_only=True).eval()  # of the same seed
    torch.testing.assert_close(extractor(x), by_hand, rtol=0, atol=0)


def test_a_model_pruned_to_a_stage_still_gives_its_map() -> None:
    model, x = tiny("hardnet68").eval(), image()
    whole = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    assert len(model.stages) == 2
    pruned = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    torch.testing.assert_close(pruned, whole, rtol=0, atol=0)


def test_stopping_early_leaves_the_later_stages_out() -> None:
    model, calls = tiny("hardnet68").eval(), []
    model.stages[2].register_forward_hook(lambda *_: calls.append(2))
    model.forward_intermediates(image(), indices=[0, 2], stop_early=True)
    assert not calls
    model.forward_intermediates(image(), indices=[0, 2])
    assert calls == [2]


def test_maps_in_another_format_are_refused() -> None:
    with pytest.raises(ValueError, match="NCHW"):
        tiny("hardnet68").forward_intermediates(image(), output_fmt="NLC")


def test_the_head_averages_the_last_map_and_classifies_it() -> None:
    model = tiny("hardnet68").eval()
    features = model.forward_features(image(side=96))  # (B, 24, 3, 3)
    assert features.shape == (4, model.num_features, 3, 3)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(image(side=96)), model.get_classifier()(pooled))


def test_a_reset_classifier_has_the_new_classes_or_none() -> None:
    model, x = tiny("hardnet68").eval(), image()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    assert model(x).shape == (4, model.num_classes) == (4, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled, rtol=0, atol=0)
    model.reset_classifier(0, "catavgmax")
    assert model(x).shape == (4, model.head_hidden_size) == (4, 2 * model.num_features)


def test_drop_rate_drops_before_the_classifier() -> None:
    model = tiny("hardnet68", drop_rate=0.5)
    dropped = model.forward_head(torch.ones(64, 24, 1, 1), pre_logits=True)  # (64, 24) of 0 and 1 / (1 - 0.5)
    assert dropped.unique().tolist() == [0.0, 2.0]
    assert model.eval().forward_head(torch.ones(64, 24, 1, 1), pre_logits=True).unique().tolist() == [1.0]


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("name", ["hardnet68", "hardnet39ds"])
def test_every_parameter_belongs_to_a_layer(name: str, coarse: bool) -> None:
    model = tiny(name, num_classes=0)
    layers = cast(dict[str, int], group_parameters(model, model.group_matcher(coarse=coarse), reverse=True))
    assert set(layers) == {parameter for parameter, _ in model.named_parameters()}
    last = 5 if coarse else 6  # the stem, then four stages or five blocks, counted from 0
    assert sorted(set(layers.values())) == list(range(last))
    assert {layers[parameter] for parameter in layers if parameter.startswith("stem")} == {0}


@pytest.mark.parametrize("name", ["hardnet68", "hardnet39ds"])
def test_checkpointing_computes_blocks_twice_and_the_same_gradients(name: str) -> None:
    def gradients(*, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        model, calls = tiny(name), []
        model.set_grad_checkpointing(checkpointing)
        for block in stage_blocks(model):
            block.layers[0].register_forward_hook(lambda *_: calls.append(1))
        model(image()).square().sum().backward()
        return {key: cast(Tensor, p.grad) for key, p in model.named_parameters()}, len(calls)

    (kept, once), (again, twice) = gradients(checkpointing=False), gradients(checkpointing=True)
    assert twice == 2 * once
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["hardnet68", "hardnet39ds"])
def test_every_parameter_gets_a_gradient_in_bfloat16(name: str) -> None:
    model = tiny(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(image()), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        gradient = cast(Tensor, parameter.grad)
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_names_are_timms_with_channels_and_classes_of_choice(name: str) -> None:
    assert hasattr(families, "hardnet")  # whose import registers them
    model = timm.create_model(name, **{**TINY, "in_chans": 1, "num_classes": 3})
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 3


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"[Nn]o pretrained"):
        timm.create_model("hardnet68", pretrained=True, **TINY)


def test_a_model_without_residual_blocks_refuses_drop_path() -> None:
    with pytest.raises(ValueError, match="takes no drop path"):
        build_backbone("hardnet39ds", image_size=(64, 64), drop_path=0.1)


def test_stages_begin_with_the_halving_of_the_resolution() -> None:
    model = tiny("hardnet68")
    kernels = [cast(nn.MaxPool2d, cast(HarDStage, stage).downsample).kernel_size for stage in model.stages]
    assert kernels == [3, 2, 2, 2]
    separable = [cast(Any, stage).downsample.conv for stage in tiny("hardnet68ds").stages]
    assert all(conv.stride == (2, 2) and conv.groups == conv.in_channels for conv in separable)
