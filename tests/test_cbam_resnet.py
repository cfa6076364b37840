"""ResNets with CBAM against their paper's table and equations (arXiv:1807.06521), and in timm's interface."""

from __future__ import annotations

from typing import Any, cast

import pytest
import timm
import torch
from timm.layers.cbam import CbamModule
from timm.layers.drop import DropPath
from timm.models import group_parameters
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssl.models import families
from ssl.models.backbones import build_backbone

NAMES = ("cbam_resnet18", "cbam_resnet34", "cbam_resnet50", "cbam_resnet101")
TINY: dict[str, Any] = {"channels": (16, 32, 32, 32), "num_classes": 5, "zero_init_last": False}


def tiny(name: str, **args: Any) -> ResNet:
    torch.manual_seed(0)
    return cast(ResNet, timm.create_model(name, **{**TINY, **args}))


def image() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))  # (B, C, H, W)


def on_meta(name: str) -> ResNet:
    with torch.device("meta"):
        return cast(ResNet, timm.create_model(name)).eval()


def blocks_of(model: nn.Module) -> list[BasicBlock | Bottleneck]:
    return [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]


def billions_of_multiply_adds(model: nn.Module) -> str:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return f"{counter.get_total_flops() / 2e9:.3f}"


@pytest.mark.parametrize(
    ("name", "millions"),  # table 4
    [
        ("cbam_resnet18", "11.78"),
        ("cbam_resnet34", "21.96"),
        ("cbam_resnet50", "28.09"),
        ("cbam_resnet101", "49.33"),
    ],
)
def test_parameters_equal_the_papers_table(name: str, millions: str) -> None:
    assert f"{sum(p.numel() for p in on_meta(name).parameters()) / 1e6:.2f}" == millions


@pytest.mark.parametrize(("name", "billions"), [("cbam_resnet18", "1.815"), ("cbam_resnet34", "3.665")])  # table 4
def test_multiply_adds_equal_the_papers_table(name: str, billions: str) -> None:
    assert billions_of_multiply_adds(on_meta(name)) == billions


@pytest.mark.parametrize(
    ("name", "own", "in_the_paper"),  # table 4 and the strides of He et al. 2015
    [("cbam_resnet50", "4.096", "3.864"), ("cbam_resnet101", "7.813", "7.581")],
)
def test_multiply_adds_equal_the_papers_table_with_its_strides(name: str, own: str, in_the_paper: str) -> None:
    model = on_meta(name)
    assert billions_of_multiply_adds(model) == own
    for block in blocks_of(model):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    assert billions_of_multiply_adds(model) == in_the_paper


@pytest.mark.parametrize("name", NAMES)
def test_every_block_has_one_attention_of_the_papers_sizes(name: str) -> None:
    model = on_meta(name)
    attentions = [module for module in model.modules() if isinstance(module, CbamModule)]
    assert attentions == [block.se for block in blocks_of(model)]
    for attention in attentions:
        assert attention.channel.fc1.in_channels == 16 * attention.channel.fc1.out_channels
        assert attention.spatial.conv.conv.kernel_size == (7, 7)


def by_the_equations(attention: CbamModule, x: Tensor) -> Tensor:
    """Equations 2 and 3 for (B, C, H, W), from the layer's weights, the spatial map's BatchNorm in eval mode."""
    w0, w1 = attention.channel.fc1, attention.channel.fc2
    batch, channels, height, width = x.shape

    def mlp(pooled: Tensor) -> Tensor:
        hidden = functional.relu(pooled @ w0.weight.flatten(1).T + cast(Tensor, w0.bias))  # (B, C/16)
        return hidden @ w1.weight.flatten(1).T + cast(Tensor, w1.bias)  # (B, C)

    places = x.reshape(batch, channels, height * width)
    gate = torch.sigmoid(mlp(places.mean(2)) + mlp(places.max(2).values))
    x = x * gate.reshape(batch, channels, 1, 1)
    descriptor = torch.stack([x.sum(1) / channels, x.max(1).values], dim=1)  # (B, 2, H, W)
    conv, bn = attention.spatial.conv.conv, cast(nn.BatchNorm2d, attention.spatial.conv.bn)
    found = functional.conv2d(descriptor, conv.weight, padding=3)
    running_mean, running_var = cast(Tensor, bn.running_mean), cast(Tensor, bn.running_var)
    found = (found - running_mean) / (running_var + bn.eps).sqrt() * bn.weight + bn.bias
    return x * torch.sigmoid(found)


@pytest.mark.parametrize("name", ["cbam_resnet18", "cbam_resnet50"])
def test_blocks_refine_the_residual_branch_before_the_addition(name: str) -> None:
    model = tiny(name)
    for _ in range(3):
        model(image())  # gives the BatchNorms statistics to differ from 0 and 1
    block = blocks_of(model.eval())[2]  # the first that has another resolution, or the third of the first stage
    attention = cast(CbamModule, block.se)
    nn.init.normal_(cast(Tensor, attention.channel.fc1.bias))
    nn.init.normal_(cast(Tensor, attention.channel.fc2.bias))
    x = torch.randn(2, block.conv1.in_channels, 10, 6)
    residual = block.bn1(block.conv1(x))
    residual = block.bn2(block.conv2(residual.relu()))
    if isinstance(block, Bottleneck):
        residual = block.bn3(block.conv3(residual.relu()))
    shortcut = x if block.downsample is None else block.downsample(x)
    expected = (by_the_equations(attention, residual) + shortcut).relu()
    torch.testing.assert_close(block(x), expected)


def test_drop_path_grows_to_its_rate_behind_the_attention() -> None:
    dropped = [block.drop_path for block in blocks_of(tiny("cbam_resnet18", drop_path_rate=0.7))]
    assert dropped[0] is None
    assert [cast(DropPath, each).drop_prob for each in dropped[1:]] == pytest.approx([i / 10 for i in range(1, 8)])


def test_small_images_get_the_small_stem() -> None:
    model, spec = build_backbone("cbam_resnet18", image_size=(32, 32))
    assert spec.stem == "small"
    assert model.forward_features(torch.randn(2, 3, 32, 32)).shape == (2, 512, 4, 4)


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


def test_the_head_averages_the_last_map_and_classifies_it() -> None:
    model = tiny("cbam_resnet18").eval()
    features = model.forward_features(image())  # (B, 32, 2, 2)
    assert features.shape == (4, model.num_features, 2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(image()), cast(nn.Module, model.get_classifier())(pooled))
    model.reset_classifier(0)
    torch.testing.assert_close(model(image()), pooled)


@pytest.mark.parametrize("coarse", [True, False])
def test_every_parameter_belongs_to_a_layer(coarse: bool) -> None:
    model = tiny("cbam_resnet18", num_classes=0)
    layers = cast(dict[str, int], group_parameters(model, model.group_matcher(coarse=coarse), reverse=True))
    assert set(layers) == {parameter for parameter, _ in model.named_parameters()}
    assert sorted(set(layers.values())) == list(range(5 if coarse else 9))  # the stem, four stages or eight blocks
    assert layers["layer1.0.se.channel.fc1.weight"] == layers["layer1.0.conv1.weight"]


def test_checkpointing_computes_blocks_twice_and_the_same_gradients() -> None:
    def gradients(*, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        model, calls = tiny("cbam_resnet18"), []
        model.set_grad_checkpointing(checkpointing)
        for block in blocks_of(model):
            block.conv1.register_forward_hook(lambda *_: calls.append(1))
        model(image()).square().sum().backward()
        return {key: cast(Tensor, p.grad) for key, p in model.named_parameters()}, len(calls)

    (kept, once), (again, twice) = gradients(checkpointing=False), gradients(checkpointing=True)
    assert once == 8
    assert twice > once  # timm runs the last of a sequence once
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cbam_resnet18", "cbam_resnet50"])
def test_every_parameter_gets_a_gradient_in_bfloat16(name: str) -> None:
    model = tiny(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model(image()), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        gradient = cast(Tensor, parameter.grad)
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


@pytest.mark.parametrize("name", NAMES)
def test_names_are_timms_with_channels_and_classes_of_choice(name: str) -> None:
    assert hasattr(families, "cbam_resnet")  # whose import registers them
    model = timm.create_model(name, **{**TINY, "in_chans": 1, "num_classes": 3}).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 3
