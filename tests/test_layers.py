"""Each layer and pooling against hooks on timm's own modules, and what a backbone does not have."""

from __future__ import annotations

import pytest
import timm
import torch

from eval.layers import FeatureSet, grid_cells, make_extract, parse_sets, resolve_sets
from ssl.models.backbones import build_backbone, pooled_features

TINY_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def vit(**args):
    torch.manual_seed(0)
    return build_backbone("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=TINY_VIT | args)[0]


def resnet():
    torch.manual_seed(0)
    return build_backbone("resnet18", image_size=(32, 32), model_args=TINY_RESNET)[0]


def read(model, layers, poolings, **options) -> dict[str, torch.Tensor]:
    sets = resolve_sets(model, parse_sets(layers, poolings, **options))
    with torch.no_grad():
        found = make_extract(model, sets, device=torch.device("cpu"), dtype=torch.float32)(IMAGE)
    return {f"{each.layer} {each.pooling}": features for each, features in zip(sets, found)}


def outputs(model, modules) -> list[torch.Tensor]:
    """What the given modules of the model compute, caught by hooks."""
    caught = []
    hooks = [module.register_forward_hook(lambda *passed: caught.append(passed[2])) for module in modules]
    with torch.no_grad():
        model.eval()(IMAGE)
    for hook in hooks:
        hook.remove()
    return caught


def test_blocks_of_a_vision_transformer_are_its_normed_tokens():
    model = vit()
    blocks = [model.norm(tokens) for tokens in outputs(model, model.blocks)]
    found = read(model, [0, 1, "last"], ["token", "patches", "token_patches"])
    for name, tokens in (("0", blocks[0]), ("1", blocks[1]), ("last", blocks[2])):
        token, patches = tokens[:, 0], tokens[:, 1:].mean(1)
        torch.testing.assert_close(found[f"{name} token"], token)
        torch.testing.assert_close(found[f"{name} patches"], patches)
        torch.testing.assert_close(found[f"{name} token_patches"], torch.cat([token, patches], 1))


def test_the_last_blocks_are_concatenated_as_dinov2_does():
    model = vit()
    blocks = [model.norm(tokens) for tokens in outputs(model, model.blocks)]
    found = read(model, "last_2", ["token", "token_patches"])
    tokens = torch.cat([blocks[1][:, 0], blocks[2][:, 0]], 1)
    torch.testing.assert_close(found["last_2 token"], tokens)
    torch.testing.assert_close(found["last_2 token_patches"], torch.cat([tokens, blocks[2][:, 1:].mean(1)], 1))


@pytest.mark.parametrize(
    "args", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"global_pool": "avg", "class_token": False}]
)
def test_the_models_own_pooling_of_the_last_block_is_that_of_its_classifier(args):
    model = vit(**args)
    found = read(model, ["last", 0], "model")
    with torch.no_grad():
        torch.testing.assert_close(found["last model"], pooled_features(model, IMAGE))
    assert not torch.allclose(found["last model"], found["0 model"])


def test_stages_of_a_resnet_are_averaged_over_all_or_over_a_grid():
    model = resnet()
    stages = outputs(model, [model.act1, model.layer1, model.layer2, model.layer3, model.layer4])
    found = read(model, ["all", "last"], ["model", "grid"], grid_dim=128)
    for number, stage in enumerate(stages):
        torch.testing.assert_close(found[f"{number} model"], stage.mean((2, 3)))
    for number, side in ((1, 4), (3, 3), (4, 3)):  # 8 channels want 4 x 4 cells, 16 channels 3 x 3
        stage = stages[number]
        height = stage.shape[-1]
        rows = [slice(height * i // side, -(-height * (i + 1) // side)) for i in range(side)]
        cells = [[stage[:, :, r, c].mean((2, 3)) for c in rows] for r in rows]
        expected = torch.stack([torch.stack(row, -1) for row in cells], 2).flatten(1)
        torch.testing.assert_close(found[f"{number} grid"], expected)
    with torch.no_grad():
        torch.testing.assert_close(found["last model"], pooled_features(model, IMAGE))
    assert "last grid" not in found  # it is stage 4's


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto"])
def test_layers_behind_the_last_stage_belong_to_the_last_layer(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    found = read(model, ["last", -1], "model")
    with torch.no_grad():
        torch.testing.assert_close(found["last model"], pooled_features(model, IMAGE), rtol=1e-3, atol=1e-4)
    assert len(found) == 2


def test_the_grid_of_resnet50_is_that_of_the_layer_wise_protocol():
    shapes = [(1, 64, 112, 112), (1, 256, 56, 56), (1, 512, 28, 28), (1, 1024, 14, 14), (1, 2048, 7, 7)]
    assert [grid_cells(shape, 9216)[0] for shape in shapes] == [12, 6, 4, 3, 2]
    assert grid_cells((1, 64, 8, 4), 9216) == (8, 4)


def test_one_pass_of_the_backbone_serves_all_sets():
    model = vit()
    passes = []
    model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    read(model, "all", ["token", "patches"])
    assert len(passes) == 1


def test_all_and_numbers_from_the_end_name_each_layer_once():
    names = [f"{each.layer} {each.pooling}" for each in resolve_sets(vit(), parse_sets(["all", -1, "last"], "token"))]
    assert names == ["0 token", "1 token", "2 token"]


def test_a_set_is_read_again_from_its_json():
    for each in parse_sets([3, "last_4"], ["token", "grid"], grid_dim=64):
        assert FeatureSet(**each.to_dict()) == each


@pytest.mark.parametrize(
    ("make", "layers", "poolings", "message"),
    [
        (vit, 3, "token", r"layers=3: VisionTransformer has 3 blocks, 0\.\.2"),
        (vit, "last_4", "token", "of that many blocks; VisionTransformer has 3"),
        (vit, "last", "grid", "needs the feature maps of a convnet"),
        (lambda: vit(class_token=False, global_pool="avg"), "last", "token", "needs a class token"),
        (resnet, 5, "model", "has 5 stages"),
        (resnet, "last_2", "model", "needs a vision transformer"),
        (resnet, "last", "token", "pooling=token needs a vision transformer, got ResNet"),
        (resnet, "first", "model", "layers=first is not known"),
        (resnet, "last", "max", "pooling must be one of"),
        (resnet, [], "model", "must name one value or more"),
    ],
)
def test_what_the_backbone_does_not_have_is_refused(make, layers, poolings, message):
    with pytest.raises(ValueError, match=message):
        resolve_sets(make(), parse_sets(layers, poolings))


def test_a_grid_size_without_a_grid_is_refused():
    with pytest.raises(ValueError, match="grid_dim=64 has no effect"):
        parse_sets("last", "model", grid_dim=64)
