"""`what=attention`: that the maps are those of the model's own layers, what they come to together, what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from eval.look import attention, command
from eval.look.attention_maps import (
    attention_maps,
    check_attention,
    head_distance,
    head_entropy,
    rollout,
    seen_by,
)
from eval.look.result import DoesNotApply
from ssl.models.backbones import build_backbone, pooled_features
from tests.scenes import EMBEDDED, TINY_VIT, look_config, pretrained
from tests.scenes import scene as make_scene

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", SMALL),
    "ViT with normalised queries and registers": (
        "vit_tiny_patch16_224",
        SMALL | {"qk_norm": True, "reg_tokens": 3, "class_token": True},
    ),
    "ViT without a class token": ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
    "BEiT, with a bias per distance": ("beit_base_patch16_224", SMALL),
    "EVA, with rotary positions": ("eva02_tiny_patch14_224", SMALL),
    "relative positions": ("vit_relpos_small_patch16_224", SMALL),
}


def built(name: str, args: dict[str, Any], side: int = 32) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=side, patch_size=8, **args).eval()
    for parameter in model.parameters():  # biases too: one that is left out must show
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def images(count: int = 2, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def values_of(layer: Any, x: Tensor) -> Tensor:
    """The values (B, heads, T, d) of a layer that reads x (B, T, D), from its weights."""
    if getattr(layer, "v_proj", None) is not None:
        v = layer.v_proj(x)
    else:
        bias = layer.qkv.bias[-x.shape[-1] :] if layer.qkv.bias is not None else getattr(layer, "v_bias", None)
        v = functional.linear(x, layer.qkv.weight[-x.shape[-1] :], bias)
    return v.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_maps_applied_to_the_values_are_what_each_layer_of_the_fused_model_gives(kind):
    model = built(*MODELS[kind])
    seen: list[tuple[Tensor, Tensor]] = []
    layers = check_attention(model, (32, 32))
    for layer in layers.values():
        layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    pooled_features(model, images())
    expected = list(seen)
    maps = attention_maps(model, images())
    assert len(maps) == len(layers) == 2
    for layer, each, (x, output) in zip(layers.values(), maps, expected):
        mixed = (each @ values_of(layer, x)).transpose(1, 2).flatten(2)  # (B, T, D)
        normed = getattr(layer, "norm", nn.Identity())(mixed)
        torch.testing.assert_close(cast(Any, layer).proj(normed), output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))


@torch.no_grad()
def test_torchvisions_maps_applied_to_the_values_are_what_its_layers_give():
    args = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "patch_size": 8}
    torch.manual_seed(0)

    class Features(VisionTransformer):
        def forward_features(self, x: Tensor) -> Tensor:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), self._process_input(x)], dim=1)
            return self.encoder(x)

        def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
            return x[:, 0]

    model = Features(image_size=32, **args).eval()
    seen: list[tuple[Tensor, Tensor]] = []
    layers = check_attention(model, (32, 32))
    handles = [
        layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output[0])))
        for layer in layers.values()
    ]
    pooled_features(model, images())
    for handle in handles:
        handle.remove()
    for layer, each, (x, output) in zip(layers.values(), attention_maps(model, images()), seen):
        own = cast(nn.MultiheadAttention, layer)
        v = functional.linear(x, own.in_proj_weight[64:], own.in_proj_bias[64:]).unflatten(-1, (2, 16)).transpose(1, 2)
        mixed = (each @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(own.out_proj(mixed), output, atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was():
    model = built(*MODELS["ViT"])
    fused = [layer.fused_attn for layer in check_attention(model, (32, 32)).values()]
    before = copy.deepcopy(model.state_dict())
    attention_maps(model, images())
    assert [layer.fused_attn for layer in check_attention(model, (32, 32)).values()] == fused
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_class_token_made_to_look_for_brightness_looks_at_the_bright_patch():
    model = cast(Any, built("vit_tiny_patch16_224", {"embed_dim": 8, "depth": 1, "num_heads": 1}))
    for parameter in model.parameters():
        parameter.zero_()
    model.blocks[0].norm1 = nn.Identity()
    model.patch_embed.proj.weight[0] = 1 / (3 * 8 * 8)  # a token's first value is its mean
    model.cls_token[..., 1] = 1.0
    model.blocks[0].attn.qkv.weight[0, 1] = 10.0  # the class token asks
    model.blocks[0].attn.qkv.weight[8, 0] = 10.0  # a patch's key is its brightness
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:16, 16:24] = 1.0  # row 1, column 2 of 4 x 4
    seen = seen_by(attention_maps(model, image)[0], 1, query="class")[0, 0]  # (16,)
    assert int(seen.argmax()) == 1 * 4 + 2
    assert seen.max() > 0.9


# ---- what is made of the maps --------------------------------------------------------------------------------------


def test_the_rollout_of_two_layers_is_the_one_worked_out_by_hand():
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    # With half of the residual: [[.75, .25], [0, 1]] and [[1, 0], [.25, .75]]; the second times the first.
    expected = torch.tensor([[[0.75, 0.25], [0.1875, 0.8125]]])
    torch.testing.assert_close(rollout([first[None, None], second[None, None]]), expected)


def test_heads_are_fused_and_the_least_weights_left_out_as_worked_out_by_hand():
    heads = torch.tensor([[[0.2, 0.3, 0.5]] * 3, [[0.6, 0.1, 0.3]] * 3])[None]  # (1, 2, 3, 3)

    def row(**settings: Any) -> Tensor:
        joint = rollout([heads], **settings)[0]
        return (2 * joint - torch.eye(3))[0]  # what is left of one layer without its residual

    torch.testing.assert_close(row(), torch.tensor([0.4, 0.2, 0.4]))
    torch.testing.assert_close(row(fusion="min"), torch.tensor([0.2, 0.1, 0.3]) / 0.6)
    torch.testing.assert_close(row(fusion="max"), torch.tensor([0.6, 0.3, 0.5]) / 1.4)
    torch.testing.assert_close(row(discard=0.4), torch.tensor([0.5, 0.0, 0.5]))


def test_of_heads_that_look_at_different_tokens_the_least_leaves_the_residual():
    heads = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])[None]  # (1, 2, 2, 2)
    torch.testing.assert_close(rollout([heads], fusion="min"), torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]))


@pytest.mark.parametrize("settings", [{}, {"fusion": "min"}, {"fusion": "max", "discard": 0.5}])
def test_rows_of_a_rollout_sum_to_one(settings):
    joint = rollout(attention_maps(built(*MODELS["ViT"]), images()), **settings)
    torch.testing.assert_close(joint.sum(-1), torch.ones(joint.shape[:-1]))


def test_what_a_query_sees_is_its_row_without_the_tokens_in_front():
    maps = torch.arange(16.0).view(1, 1, 4, 4)  # a class token, a register and two patches
    assert seen_by(maps, 2, query="class").tolist() == [[[2.0, 3.0]]]
    assert seen_by(maps, 2, query="mean").tolist() == [[[12.0, 13.0]]]


def test_distance_and_entropy_are_those_of_the_papers_loop():
    grid_size, image_size, prefix = (3, 4), (24, 16), 2
    maps = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    maps = maps / maps.sum(-1, keepdim=True)
    distances, entropies = np.zeros((2, 3, 12)), np.zeros((2, 3, 14))
    for image in range(2):
        for head in range(3):
            for query in range(14):
                row = maps[image, head, query].tolist()
                entropies[image, head, query] = -sum(p * math.log(p) for p in row) / math.log(14)
                if query < prefix:
                    continue
                place = (query - prefix) // 4 * 8, (query - prefix) % 4 * 4
                far = [math.dist(place, (key // 4 * 8, key % 4 * 4)) for key in range(12)]
                distances[image, head, query - prefix] = np.average(far, weights=row[prefix:])
    np.testing.assert_allclose(head_distance(maps, grid_size, image_size), distances.mean((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(head_entropy(maps), entropies.mean((0, 2)), rtol=1e-5)


def test_entropy_is_one_where_a_head_looks_everywhere_and_zero_where_it_looks_at_one_token():
    both = torch.stack([torch.full((5, 5), 0.2), torch.eye(5)])[None]
    torch.testing.assert_close(head_entropy(both), torch.tensor([1.0, 0.0]))


# ---- the look ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("mae") / "run", "mae")


def test_the_written_maps_are_those_of_the_chosen_layer_and_image(mae, tmp_path):
    command.run(look_config(mae, "attention", "attention.layer=0", "indices=[3,9]", f"out={tmp_path}"))
    scene = make_scene(mae, "attention", "indices=[3,9]")
    with np.load(tmp_path / "attention.npz") as found:
        heads, rolled = found["heads"], found["rollout"]
    maps = attention_maps(scene.backbone, scene.shown().image)
    np.testing.assert_allclose(heads.reshape(2, 2, 64), maps[0][:, :, 0, 1:], atol=1e-6)
    np.testing.assert_allclose(rolled.reshape(2, 64), rollout(maps)[:, 0, 1:], atol=1e-6)
    about = json.loads((tmp_path / "attention.json").read_text())
    assert about["data"]["layer"] == "blocks.0.attn"
    for of_layer, each in zip(about["data"]["distance_pixels"], maps):
        assert of_layer == pytest.approx(head_distance(each, (8, 8), (32, 32)).tolist(), rel=1e-4)
    assert (tmp_path / "attention.png").exists()
    assert (tmp_path / "attention_heads.png").exists()


def test_without_a_class_token_the_mean_of_the_patches_rows_is_shown_and_said():
    words = [*TINY_VIT, "+model.args.class_token=false", "+model.args.global_pool=avg", *EMBEDDED, "num_images=1"]
    scene = make_scene("random", "attention", *words)
    look = attention.look(scene)
    last = attention_maps(scene.backbone, scene.shown().image)[-1]  # (1, heads, N, N)
    np.testing.assert_allclose(look.arrays["heads"][0].reshape(last.shape[1], -1), last[0].mean(1), atol=1e-6)
    assert any("no class token" in line for line in look.lines)
    with pytest.raises(ValueError, match=r"query=class needs a class token.*give attention\.query=mean"):
        attention.look(make_scene("random", "attention", *words, "attention.query=class"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention.layer=2"], r"there are 2 blocks, 0\.\.1"),
        (["attention.query=cls"], "must be one of class, mean"),
        (["attention.fusion=median"], "must be one of mean, min, max"),
        (["attention.discard=1.0"], "from 0 to below 1"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(mae, words, message):
    with pytest.raises(ValueError, match=message):
        attention.look(make_scene(mae, "attention", "num_images=1", *words))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}, "within windows"),
        ("torchvision/swin_t", {}, "within windows"),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "has no attention"),
        ("vit_tiny_patch16_224", SMALL | {"attn_layer": "diff"}, "cannot read DiffAttention"),
    ],
)
def test_a_backbone_without_a_map_of_attention_is_pointed_to_other_looks(name, args, message):
    model, _ = build_backbone(name, image_size=(64, 64), model_args=args)
    with pytest.raises(DoesNotApply, match=f"{message}.*what=gradcam"):
        attention_maps(model, images(side=64))
