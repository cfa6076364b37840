"""What timm's tools ask of a model, of BN-Inception, ShuffleNet v1 and EffNet."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from ssl.models import families
from ssl.models.backbones import BackboneSpec, backbone_from_spec, build_backbone, pooled_features

TINY_INCEPTION: dict[str, Any] = {
    "stem_chs": [4, 4, 8],
    "stages": [
        [[4, 2, 4, 2, 4, "avg", 4], [2, 2, 4, 4, 2, "max", 4]],
        [[0, 4, 6, 2, 4, "max", 0], [4, 4, 4, 2, 6, "avg", 6]],
        [[0, 4, 6, 2, 4, "max", 0]],
    ],
}
TINY: dict[str, dict[str, Any]] = {
    "bn_inception": TINY_INCEPTION,
    "bn_inception_caffe": TINY_INCEPTION,
    "shufflenet_v1_g2_x1_0": {"stem_chs": 4, "stage_chs": [12, 24, 48], "depths": [2, 3, 1]},
    "shufflenet_v1_g1_x1_0": {"stem_chs": 4, "stage_chs": [12, 24, 48], "depths": [2, 1, 1]},
    "effnet": {"width": 0.125},
}
LAYERS = {  # how many layer decay tells apart: by stage, and by block
    "bn_inception": (5, 1 + 1 + 1 + 2 + 2 + 1),  # the first stage's two convolutions are two
    "bn_inception_caffe": (5, 1 + 1 + 1 + 2 + 2 + 1),
    "shufflenet_v1_g2_x1_0": (4, 1 + 2 + 3 + 1),
    "shufflenet_v1_g1_x1_0": (4, 1 + 2 + 1 + 1),
    "effnet": (3, 12),
}
SIDE = 64
by_name = pytest.mark.parametrize("name", TINY)


def tiny(name: str, **args: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY[name], "num_classes": 5, **args})


def image(batch: int = 4, *, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))  # (B, C, H, W)


@by_name
def test_feature_maps_have_the_sizes_that_feature_info_gives(name: str) -> None:
    model = tiny(name, features_only=True).eval()
    info = model.feature_info
    expected = [(2, chs, SIDE // stride, SIDE // stride) for chs, stride in zip(info.channels(), info.reduction())]
    assert [tuple(each.shape) for each in model(image(2))] == expected


@by_name
def test_intermediate_maps_are_those_of_features_only(name: str) -> None:
    extracted = tiny(name, features_only=True).eval()(image())  # of the same seed
    model = tiny(name).eval()
    last, found = model.forward_intermediates(image())
    torch.testing.assert_close(found, extracted, rtol=0, atol=0)
    torch.testing.assert_close(last, model.forward_features(image()), rtol=0, atol=0)


@by_name
def test_a_model_pruned_to_a_stage_still_gives_its_map(name: str) -> None:
    model = tiny(name).eval()
    whole = model.forward_intermediates(image(), indices=[0, 1], intermediates_only=True)
    early = model.forward_intermediates(image(), indices=[0, 1], intermediates_only=True, stop_early=True)
    stages = len(model.stages)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) < stages
    pruned = model.forward_intermediates(image(), indices=[0, 1], intermediates_only=True)
    torch.testing.assert_close(early, whole, rtol=0, atol=0)
    torch.testing.assert_close(pruned, whole, rtol=0, atol=0)


@by_name
def test_stopping_early_leaves_the_later_stages_out(name: str) -> None:
    model, calls = tiny(name).eval(), []
    model.stages[-1].register_forward_hook(lambda *_: calls.append(1))
    model.forward_intermediates(image(), indices=[0], stop_early=True)
    assert not calls
    model.forward_intermediates(image(), indices=[0])
    assert calls == [1]


@by_name
def test_maps_in_another_format_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="NCHW"):
        tiny(name).forward_intermediates(image(), output_fmt="NLC")


@by_name
def test_the_head_averages_the_last_map_and_classifies_it(name: str) -> None:
    model = tiny(name).eval()
    features = model.forward_features(image())
    assert features.shape[1] == model.num_features == model.feature_info[-1]["num_chs"]
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(image()), model.get_classifier()(pooled))


@by_name
def test_a_reset_classifier_has_the_new_classes_or_none(name: str) -> None:
    model = tiny(name).eval()
    pooled = pooled_features(model, image())
    model.reset_classifier(7)
    assert model(image()).shape == (4, model.num_classes) == (4, 7)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image()), pooled, rtol=0, atol=0)
    model.reset_classifier(0, "catavgmax")
    assert model(image()).shape == (4, model.head_hidden_size) == (4, 2 * model.num_features)


@by_name
def test_drop_rate_drops_before_the_classifier(name: str) -> None:
    model = tiny(name, drop_rate=0.5)
    ones = torch.ones(32, model.num_features, 1, 1)
    assert model.forward_head(ones, pre_logits=True).unique().tolist() == [0.0, 2.0]  # 1 / (1 - 0.5)
    assert model.eval().forward_head(ones, pre_logits=True).unique().tolist() == [1.0]


@pytest.mark.parametrize("coarse", [True, False])
@by_name
def test_every_parameter_belongs_to_a_layer(name: str, coarse: bool) -> None:
    model = tiny(name, num_classes=0)
    layers = cast(dict[str, int], group_parameters(model, model.group_matcher(coarse=coarse), reverse=True))
    assert set(layers) == {parameter for parameter, _ in model.named_parameters()}
    assert sorted(set(layers.values())) == list(range(LAYERS[name][0 if coarse else 1]))
    first = next(iter(model.named_parameters()))[0]
    assert layers[first] == 0
    assert list(layers.values()) == sorted(layers.values())  # parameters are listed from the input to the output


@by_name
def test_checkpointing_computes_layers_twice_and_the_same_gradients(name: str) -> None:
    def gradients(*, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        model, calls = tiny(name), []
        model.set_grad_checkpointing(checkpointing)
        for module in model.stages.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *_: calls.append(1))
        model(image()).square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters()}, len(calls)

    (kept, once), (again, twice) = gradients(checkpointing=False), gradients(checkpointing=True)
    assert twice == 2 * once
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


@by_name
def test_intermediate_maps_have_the_same_gradients_with_checkpointing(name: str) -> None:
    def gradients(*, checkpointing: bool) -> dict[str, Tensor]:
        model = tiny(name, num_classes=0)
        model.set_grad_checkpointing(checkpointing)
        sum(found.square().mean() for found in model.forward_intermediates(image(), intermediates_only=True)).backward()
        return {key: p.grad for key, p in model.named_parameters()}

    torch.testing.assert_close(gradients(checkpointing=True), gradients(checkpointing=False), rtol=0, atol=0)


@by_name
def test_every_parameter_gets_a_gradient_in_bfloat16(name: str) -> None:
    model = tiny(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(image()), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@by_name
def test_names_are_timms_with_channels_and_classes_of_choice(name: str) -> None:
    assert name in {each for family in families.__all__ for each in getattr(families, family).__all__}
    model = tiny(name, in_chans=1, num_classes=3)
    assert model(image(channels=1)).shape == (4, 3)
    assert model.pretrained_cfg["architecture"] == name
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 3


@by_name
def test_a_backbone_is_rebuilt_from_the_json_of_its_description(name: str) -> None:
    torch.manual_seed(0)
    model, spec = build_backbone(name, image_size=(SIDE, SIDE), model_args=TINY[name])
    rebuilt = backbone_from_spec(BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))))
    rebuilt.load_state_dict(model.state_dict())
    x = image()
    torch.testing.assert_close(pooled_features(rebuilt.eval(), x), pooled_features(model.eval(), x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bn_inception", "effnet"])
def test_a_model_without_residual_blocks_refuses_drop_path(name: str) -> None:
    with pytest.raises(ValueError, match="takes no drop path"):
        build_backbone(name, image_size=(SIDE, SIDE), model_args=TINY[name], drop_path=0.1)


@by_name
def test_weights_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"[Nn]o pretrained"):
        tiny(name, pretrained=True)


@pytest.mark.parametrize("family", families.__all__)
def test_a_family_file_needs_torch_and_timm_alone(family: str) -> None:
    """Exports bring the file along, to where this package is not."""
    tree = ast.parse(Path(getattr(families, family).__file__).read_text())
    imported = {each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    imported |= {name.name for each in ast.walk(tree) if isinstance(each, ast.Import) for name in each.names}
    assert {str(module).split(".")[0] for module in imported} <= sys.stdlib_module_names | {"torch", "timm"}
