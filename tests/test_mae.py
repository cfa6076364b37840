from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import yaml

from ssl.methods.mae import MAE, num_visible, patchify, random_mask, unpatchify
from ssl.models.backbones import build_backbone
from ssl.models.positions import sincos_2d

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SIZE = (24, 40)


def tiny_mae(*, image_size=SIZE, in_chans=3, drop_path=0.0, model_args=None, **settings):
    torch.manual_seed(0)
    backbone, _ = build_backbone(
        "vit_tiny_patch16_224",
        image_size=image_size,
        in_chans=in_chans,
        drop_path=drop_path,
        model_args={**TINY, **(model_args or {})},
    )
    settings = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4, **settings}
    return MAE(backbone, image_size=image_size, in_chans=in_chans, **settings)


def make_batch(method, batch_size=3, seed=1, in_chans=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(batch_size, in_chans, *method.view_size, generator=generator)],
        "noise": torch.rand(batch_size, method.num_noise, generator=generator),
    }


def loss_by_loops(method: MAE, batch) -> float:
    """Section 3 of the paper, one image at a time: sort, drop, encode, append mask tokens, unsort, decode, compare."""
    backbone, (rows, columns) = method.backbone, method.patch_size
    height, width = method.view_size
    grid_w = width // columns
    errors = []
    for image, noise in zip(batch["views"][0], batch["noise"].tolist()):
        places = sorted(range(len(noise)), key=lambda place: noise[place])
        visible = places[: int(len(noise) * (1 - method.mask_ratio))]
        positions = sincos_2d(backbone.embed_dim, height // rows, grid_w)
        patches = []
        for place in range(len(noise)):
            top, left = place // grid_w * rows, place % grid_w * columns
            patches.append(image[:, top : top + rows, left : left + columns])
        embedded = [
            backbone.patch_embed.proj.weight.flatten(1) @ patches[place].flatten()
            + backbone.patch_embed.proj.bias
            + positions[place]
            for place in visible
        ]
        x = backbone.norm(backbone.blocks(torch.stack([backbone.cls_token[0, 0], *embedded])[None]))[0]
        x = method.decoder_embed(x)
        sequence = [x[0], *(method.mask_token[0, 0] for _ in noise)]
        decoder_positions = sincos_2d(x.shape[-1], height // rows, grid_w)
        for slot, place in enumerate(visible):
            sequence[1 + place] = x[1 + slot]
        sequence = [sequence[0], *(token + position for token, position in zip(sequence[1:], decoder_positions))]
        prediction = method.decoder_pred(method.decoder_norm(method.decoder_blocks(torch.stack(sequence)[None])))[0, 1:]
        for place in range(len(noise)):
            if place in visible:
                continue
            pixels = [
                float(patches[place][channel, row, column])
                for row in range(rows)
                for column in range(columns)
                for channel in range(len(image))
            ]
            mean = sum(pixels) / len(pixels)
            variance = sum((pixel - mean) ** 2 for pixel in pixels) / (len(pixels) - 1)
            for pixel, predicted in zip(pixels, prediction[place].tolist()):
                target = (pixel - mean) / math.sqrt(variance + 1e-6) if method.norm_pixel_targets else pixel
                errors.append((predicted - target) ** 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    "settings",
    [{}, {"mask_ratio": 0.4, "norm_pixel_targets": False}, {"in_chans": 1}, {"image_size": (12, 8), "in_chans": 5}],
    ids=str,
)
def test_loss_equals_the_paper_in_loops(settings):
    method = tiny_mae(**settings).eval()
    batch = make_batch(method, in_chans=settings.get("in_chans", 3))
    with torch.no_grad():
        assert float(method(batch)["loss"]) == pytest.approx(loss_by_loops(method, batch), rel=1e-5)


def test_pixels_are_normalised_by_default():
    assert tiny_mae().norm_pixel_targets
    recipe = yaml.safe_load((Path(__file__).resolve().parents[1] / "conf/method/mae.yaml").read_text())
    assert recipe["method"]["norm_pixel_targets"] is True


def test_a_patch_s_brightness_and_contrast_do_not_change_its_target():
    method = tiny_mae()
    image = make_batch(method)["views"][0]
    masked = torch.arange(9).expand(3, -1)
    target, _, _ = method.targets(image, masked)
    torch.testing.assert_close(method.targets(3 * image + 7, masked)[0], target, rtol=0, atol=1e-4)
    torch.testing.assert_close(target.std(dim=-1, correction=1), torch.ones(3, 9))


def test_loss_ignores_visible_patches():
    method = tiny_mae().eval()
    batch = make_batch(method)
    visible, masked = random_mask(batch["noise"], num_visible(method.num_noise, method.mask_ratio))
    predict = method.predict
    fixed = predict(batch["views"][0], visible, masked)
    method.predict = lambda *_: fixed  # the encoder does see them, so its output is held
    pictures = method.reconstruct(batch["views"][0], batch["noise"])
    only_masked = pictures["input"] - pictures["masked"]
    loss = method(batch)["loss"]
    assert torch.equal(method({**batch, "views": [only_masked]})["loss"], loss)
    assert not torch.equal(method({**batch, "views": [pictures["masked"]]})["loss"], loss)


def test_masked_patches_do_not_reach_the_prediction():
    method = tiny_mae().eval()
    batch = make_batch(method)
    visible, masked = random_mask(batch["noise"], 15)
    pictures = method.reconstruct(batch["views"][0], batch["noise"])
    assert torch.equal(
        method.predict(pictures["input"], visible, masked), method.predict(pictures["masked"], visible, masked)
    )


def test_an_image_s_mask_and_loss_are_a_function_of_its_noise_alone():
    method = tiny_mae().eval()
    batch = make_batch(method, batch_size=4)
    alone = [method({"views": [batch["views"][0][i : i + 1]], "noise": batch["noise"][i : i + 1]}) for i in range(4)]
    together = method(batch)["loss"]
    torch.testing.assert_close(torch.stack([one["loss"] for one in alone]).mean(), together)
    for i in range(4):
        assert torch.equal(random_mask(batch["noise"], 15)[0][i], random_mask(batch["noise"][i : i + 1], 15)[0][0])


def test_every_patch_is_either_visible_or_masked_and_ties_are_stable():
    noise = torch.tensor([[0.5, 0.1, 0.5, 0.1, 0.9]])
    visible, masked = random_mask(noise, 3)
    assert visible.tolist() == [[1, 3, 0]]
    assert masked.tolist() == [[2, 4]]


def test_each_patch_is_masked_equally_often():
    noise = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    counts = random_mask(noise, 4)[0].flatten().bincount(minlength=16)
    assert counts.sum() == 16000
    assert (counts - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(196, 0.75, 49), (64, 0.75, 16), (10, 0.9, 1), (49, 0.75, 12)]
)
def test_the_number_of_visible_patches_is_rounded_down(patches, ratio, visible):
    assert num_visible(patches, ratio) == visible


def test_patches_are_cut_row_by_row_and_put_back():
    image = torch.arange(2 * 3 * 6 * 8.0).reshape(2, 3, 6, 8)
    patches = patchify(image, (3, 4))
    assert patches.shape == (2, 4, 36)
    assert torch.equal(patches[1, 1].reshape(3, 4, 3), image[1, :, 0:3, 4:8].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (3, 4), (2, 2)), image)


@pytest.mark.parametrize(
    "model_args",
    [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}, {"init_values": 0.1}],
    ids=str,
)
def test_gradient_reaches_every_trainable_parameter(model_args):
    method = tiny_mae(model_args=model_args)
    method(make_batch(method))["loss"].backward()
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.pos_embed"}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_mae_vit_b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        backbone, _ = build_backbone("vit_base_patch16_224", image_size=(224, 224))
        method = MAE(backbone, image_size=(224, 224))
    parameters = sum(parameter.numel() for parameter in method.parameters())
    decoder_positions = 197 * 512  # ours leaves out the class token's, which is zero, and stores none
    assert method.decoder_pos_embed.numel() == 196 * 512
    assert parameters + decoder_positions == 111_907_840


def test_initial_weights_follow_the_reference():
    method = tiny_mae(model_args={"embed_dim": 192, "num_heads": 3, "reg_tokens": 1})
    backbone = method.backbone
    linear = backbone.blocks[0].attn.qkv.weight
    bound = math.sqrt(6 / (linear.shape[0] + linear.shape[1]))
    assert bound * 0.98 < linear.abs().max() <= bound
    patch_bound = math.sqrt(6 / (192 + 4 * 4 * 3))
    assert patch_bound * 0.98 < backbone.patch_embed.proj.weight.abs().max() <= patch_bound
    assert backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert backbone.blocks[0].mlp.fc1.bias.abs().max().item() == 0
    assert torch.equal(backbone.pos_embed[0, :2], torch.zeros(2, 192))
    assert torch.equal(backbone.pos_embed[0, 2:], sincos_2d(192, 6, 10))


def test_fixed_positions_are_exported_but_not_trained():
    method = tiny_mae()
    before = method.backbone.pos_embed.clone()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(make_batch(method))["loss"].backward()
    optimizer.step()
    assert torch.equal(method.backbone.pos_embed, before)
    assert "pos_embed" in method.backbone.state_dict()
    assert not any("decoder_pos" in name for name in method.state_dict())


def test_the_trained_backbone_keeps_timm_s_keys():
    plain, _ = build_backbone("vit_tiny_patch16_224", image_size=SIZE, model_args=TINY)
    plain.load_state_dict(tiny_mae().backbone.state_dict(), strict=True)


def test_drop_path_has_effect_in_the_encoder():
    method = tiny_mae(drop_path=0.5)
    batch = make_batch(method, batch_size=8)
    assert not torch.equal(method(batch)["loss"], method(batch)["loss"])
    method.eval()
    assert torch.equal(method(batch)["loss"], method(batch)["loss"])


def test_bf16_autocast_trains_with_a_float32_loss():
    method = tiny_mae()
    batch = make_batch(method)
    expected = method(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_a_few_steps_lower_the_loss():
    method = tiny_mae(image_size=(16, 16))
    ramp = torch.linspace(-1, 1, 16).expand(16, 16)
    ramps = torch.stack([ramp, ramp.flip(1), ramp.T, ramp.T.flip(0)])  # a visible patch tells which
    batch = {"views": [ramps.repeat(8, 1, 1)[:, None].expand(-1, 3, -1, -1)], "noise": make_batch(method, 32)["noise"]}
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(80):
        loss = method(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.3


def test_pictures_show_visible_patches_as_they_are_and_perfect_predictions_as_the_image():
    method = tiny_mae().eval()
    batch = make_batch(method)
    image, noise = batch["views"][0], batch["noise"]
    pictures = method.reconstruct(image, noise)
    masked_pixels = unpatchify(
        torch.zeros(3, 60, 48).scatter(1, random_mask(noise, 15)[1][..., None].expand(-1, -1, 48), 1.0), (4, 4), (6, 10)
    ).bool()
    assert torch.equal(pictures["input"], image)
    assert torch.equal(pictures["masked"], image.masked_fill(masked_pixels, 0.0))
    assert torch.equal(pictures["reconstruction"][~masked_pixels], image[~masked_pixels])
    assert not torch.allclose(pictures["reconstruction"][masked_pixels], image[masked_pixels])
    perfect = copy.copy(method)
    perfect.predict = lambda images, visible, masked: method.targets(images, masked)[0]
    torch.testing.assert_close(perfect.reconstruct(image, noise, mask_ratio=0.5)["reconstruction"], image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 leaves 60 of 60 patches visible; .* from 0.0167 to 0.9833"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 leaves 0 of 60 patches visible"),
        ({"mask_ratio": -1.0}, "mask_ratio=-1.0"),
        ({"decoder_dim": 18}, "decoder_dim=18 must be divisible by 4"),
        ({"decoder_heads": 3}, "decoder_heads=3"),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1"),
        ({"model_args": {"embed_dim": 34}}, "width 4 divides, got 34"),
        ({"model_args": {"global_pool": "map"}}, "model.args.global_pool=avg"),
        ({"model_args": {"pos_embed": "none"}}, "needs position embeddings"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_mae(**settings)


def test_a_convnet_is_refused():
    backbone, _ = build_backbone("resnet10t", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"method=mae needs .* tokens, .* got resnet10t; try model=vit_b"):
        MAE(backbone, image_size=(32, 32))


def test_a_backbone_built_for_another_size_is_refused():
    backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), model_args=TINY)
    with pytest.raises(ValueError, match=r"built for \(32, 32\) pixels"):
        MAE(backbone, image_size=(24, 40))
