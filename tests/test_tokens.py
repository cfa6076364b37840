from __future__ import annotations

import math

import pytest
import torch

from ssl.models.backbones import build_backbone
from ssl.models.positions import sincos_2d
from ssl.models.tokens import encode

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "registers, patches' positions only": {"reg_tokens": 2, "no_embed_class": True},
    "norm before the blocks": {"pre_norm": True, "init_values": 0.1},
}


def tiny_vit(image_size=(24, 40), **model_args):
    torch.manual_seed(0)
    model, _ = build_backbone("vit_tiny_patch16_224", image_size=image_size, model_args={**TINY, **model_args})
    torch.nn.init.normal_(model.pos_embed)
    return model.eval()


def encode_by_hand(model, image, keep):
    """One image at a time, from the weights: patches by slicing, positions by adding, then timm's blocks."""
    rows, columns = model.patch_embed.patch_size
    columns_of_patches = image.shape[-1] // columns
    outputs = []
    for picture, kept in zip(image, keep.tolist()):
        tokens = []
        offset = model.pos_embed.shape[1] - (image.shape[-2] // rows) * columns_of_patches
        for index in kept:
            top, left = index // columns_of_patches * rows, index % columns_of_patches * columns
            patch = picture[:, top : top + rows, left : left + columns].flatten()
            token = model.patch_embed.proj.weight.flatten(1) @ patch
            if model.patch_embed.proj.bias is not None:
                token = token + model.patch_embed.proj.bias
            tokens.append(token + model.pos_embed[0, offset + index])
        prefix = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
        if prefix:
            prefix = torch.cat(prefix)
            tokens = [*(prefix + model.pos_embed[0, :offset] if offset else prefix), *tokens]
        x = model.norm_pre(torch.stack(tokens)[None])
        for block in model.blocks:
            x = block(x)
        outputs.append(model.norm(x)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize("model_args", VARIANTS.values(), ids=VARIANTS.keys())
def test_all_tokens_equal_timm_s_own_forward_bit_for_bit(model_args):
    model = tiny_vit(**model_args)
    image = torch.randn(2, 3, 24, 40)
    in_order = torch.arange(60).expand(2, -1)
    expected = model.forward_features(image)
    assert torch.equal(encode(model, image), expected)
    assert torch.equal(encode(model, image, in_order), expected)


@pytest.mark.parametrize("model_args", VARIANTS.values(), ids=VARIANTS.keys())
def test_kept_tokens_equal_an_encoder_that_only_ever_sees_them(model_args):
    model = tiny_vit(**model_args)
    image = torch.randn(3, 3, 24, 40)
    keep = torch.stack([torch.randperm(60)[:7] for _ in range(3)])
    output = encode(model, image, keep)
    assert output.shape == (3, model.num_prefix_tokens + 7, 32)
    torch.testing.assert_close(output, encode_by_hand(model, image, keep), rtol=1e-4, atol=1e-5)


def test_dropped_patches_have_no_influence():
    model = tiny_vit()
    image = torch.randn(1, 3, 24, 40)
    changed = image.clone()
    changed[:, :, 4:] = 9.0  # every row of patches but the first
    keep = torch.arange(10)[None]
    assert torch.equal(encode(model, image, keep), encode(model, changed, keep))


def test_another_image_size_takes_timm_s_resampled_positions():
    model = tiny_vit()
    image = torch.randn(2, 3, 32, 24)
    in_order = torch.arange(48).expand(2, -1)
    assert torch.equal(encode(model, image, in_order), model.forward_features(image))


def test_gradient_checkpointing_changes_nothing():
    model = tiny_vit()
    image, keep = torch.randn(2, 3, 24, 40), torch.arange(5).expand(2, -1)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        encode(model, image, keep).square().sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit_relpos", "swin_tiny_patch4_window7_224", "vit_base_mci_224"])
def test_a_backbone_whose_tokens_cannot_be_chosen_is_refused(name):
    with torch.device("meta"):
        model, _ = build_backbone(name, image_size=(224, 224))
    with pytest.raises(ValueError, match=f"splits the image into tokens, each of one patch, got {name}"):
        encode(model, torch.zeros(1, 3, 224, 224, device="meta"), None)


def test_timm_s_own_patch_drop_is_refused():
    with pytest.raises(ValueError, match="patch_drop_rate"):
        encode(tiny_vit(patch_drop_rate=0.5), torch.zeros(1, 3, 24, 40))


@pytest.mark.parametrize(("embed_dim", "grid_h", "grid_w"), [(4, 1, 1), (16, 3, 5), (192, 14, 14)])
def test_positions_equal_the_formula_of_vaswani_along_each_axis(embed_dim, grid_h, grid_w):
    def along_axis(position: int) -> list[float]:
        width = embed_dim // 2
        angles = [position / 10000 ** (2 * i / width) for i in range(width // 2)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    expected = [along_axis(column) + along_axis(row) for row in range(grid_h) for column in range(grid_w)]
    torch.testing.assert_close(sincos_2d(embed_dim, grid_h, grid_w), torch.tensor(expected), rtol=0, atol=1e-6)


def test_positions_of_an_odd_quarter_are_refused():
    with pytest.raises(ValueError, match="4 divides, got 30"):
        sincos_2d(30, 2, 2)
