from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

import ssl.distributed as distributed
from ssl.checkpoint import load_backbone
from ssl.data.embedded import render
from ssl.methods.base import build_method
from ssl.methods.mae import MAE
from ssl.methods.simmim import SimMIM, default_mask_patch
from ssl.models.backbones import build_backbone, pooled_features
from ssl.models.token_maps import find_token_map
from ssl.pretrain import run
from tests.test_pretrain import SHORT, composed

SIZE = (32, 64)
KINDS = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 3], "window_size": 4},
    ),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20], "output_stride": 16}),
}


def tiny(kind="swin", *, image_size=SIZE, in_chans=3, seed=0, **settings) -> SimMIM:
    torch.manual_seed(seed)
    name, args = KINDS[kind]
    backbone, _ = build_backbone(name, image_size=image_size, in_chans=in_chans, model_args=args)
    return SimMIM(backbone, image_size=image_size, in_chans=in_chans, **{"mask_patch_size": 8, **settings})


def make_batch(method, batch_size=3, seed=1, in_chans=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(batch_size, in_chans, *method.view_size, generator=generator)],
        "noise": torch.rand(batch_size, method.num_noise, generator=generator),
    }


def rest_of(backbone, tokens):
    """What timm's models do behind their first layer: of maps (1, h, w, D) for Swin, (1, D, h, w) for ConvNeXt."""
    if hasattr(backbone, "patch_embed"):
        return backbone.norm(backbone.layers(tokens)).permute(0, 3, 1, 2)  # (1, D, h, w)
    return backbone.head.norm(backbone.norm_pre(backbone.stages(tokens)))  # (1, D, h, w)


def loss_by_loops(method: SimMIM, batch) -> float:
    """Section 3 of the paper, one image and one pixel at a time, with the layers of the backbone called by name."""
    backbone, patch = method.backbone, method.mask_patch[0]
    height, width = method.view_size
    columns = width // patch
    errors = []
    for image, noise in zip(batch["views"][0], batch["noise"].tolist()):
        places = sorted(range(len(noise)), key=lambda place: noise[place])
        masked = set(places[len(noise) - math.ceil(len(noise) * method.mask_ratio) :])
        is_swin = hasattr(backbone, "patch_embed")
        tokens = backbone.patch_embed(image[None]) if is_swin else backbone.stem(image[None]).permute(0, 2, 3, 1)
        tokens = tokens.clone()
        for row in range(height // 4):
            for column in range(width // 4):
                if row * 4 // patch * columns + column * 4 // patch in masked:
                    tokens[0, row, column] = method.mask_token
        features = rest_of(backbone, tokens if is_swin else tokens.permute(0, 3, 1, 2))[0]  # (D, h, w)
        cell = height // features.shape[1]
        for row in range(height):
            for column in range(width):
                if row // patch * columns + column // patch not in masked:
                    continue
                vector = features[:, row // cell, column // cell]
                first = (row % cell * cell + column % cell) * len(image)
                weight = method.pixels.weight[first : first + len(image)]
                predicted = weight @ vector + method.pixels.bias[first : first + len(image)]
                top, left = row // patch * patch, column // patch * patch
                square = image[:, top : top + patch, left : left + patch]
                target = image[:, row, column]
                if method.norm_pixel_targets:
                    target = (target - square.mean()) / (square.var() + 1e-6).sqrt()
                errors += (predicted - target).abs().tolist()
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("swin", {}),
        ("convnext", {}),
        ("swin", {"mask_ratio": 0.75, "norm_pixel_targets": True}),
        ("convnext", {"mask_patch_size": 16, "in_chans": 1}),
    ],
    ids=str,
)
def test_loss_equals_the_paper_in_loops(kind, settings):
    method = tiny(kind, **settings).eval()
    batch = make_batch(method, 2, in_chans=settings.get("in_chans", 3))
    with torch.no_grad():
        assert float(method(batch)["loss"]) == pytest.approx(loss_by_loops(method, batch), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_stands_in_exactly_the_masked_places_of_the_first_layer(kind):
    method = tiny(kind)
    batch = make_batch(method)
    name, seen = method.token_map.first_layer, []
    layer = getattr(method.backbone, name)
    plain = layer(batch["views"][0]).movedim(method.token_map.token_axis, -1)  # (B, 8, 16, D)
    following = method.backbone.layers if kind == "swin" else method.backbone.stages
    following.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    method(batch)
    tokens = seen[0].movedim(method.token_map.token_axis, -1)
    replaced = (tokens == method.mask_token).all(-1)  # (B, 8, 16)
    for image, noise in enumerate(batch["noise"]):
        largest = set(noise.argsort()[-math.ceil(32 * 0.6) :].tolist())
        for row in range(8):
            for column in range(16):
                assert replaced[image, row, column] == (row // 2 * 8 + column // 2 in largest)
    assert torch.equal(tokens[~replaced], plain[~replaced])


@pytest.mark.parametrize("kind", KINDS)
def test_masked_pixels_do_not_reach_the_prediction(kind):
    method = tiny(kind).eval()
    batch = make_batch(method)
    masked = method.mask(batch["noise"])
    other = torch.where(method.on_pixels(masked), torch.randn(3, 3, *SIZE), batch["views"][0])
    assert torch.equal(method.predict(batch["views"][0], masked), method.predict(other, masked))
    assert not torch.equal(method.predict(batch["views"][0], ~masked), method.predict(other, ~masked))


def test_only_masked_pixels_count():
    method = tiny().eval()
    batch = make_batch(method)
    image, where = batch["views"][0], method.on_pixels(method.mask(batch["noise"]))
    held = method.predict(image, method.mask(batch["noise"])).detach()
    method.predict = lambda *_: held  # the backbone does see visible pixels, so its output is held
    loss = method(batch)["loss"]
    assert torch.equal(method({**batch, "views": [torch.where(where, image, 5.0)]})["loss"], loss)
    assert not torch.equal(method({**batch, "views": [torch.where(where, 5.0, image)]})["loss"], loss)


def test_an_image_s_mask_and_loss_are_a_function_of_its_noise_alone():
    method = tiny("convnext").eval()
    batch = make_batch(method, 4)
    alone = [method({"views": [batch["views"][0][i : i + 1]], "noise": batch["noise"][i : i + 1]}) for i in range(4)]
    torch.testing.assert_close(torch.stack([one["loss"] for one in alone]).mean(), method(batch)["loss"])
    for i in range(4):
        assert torch.equal(method.mask(batch["noise"])[i], method.mask(batch["noise"][i : i + 1])[0])


@pytest.mark.parametrize(("ratio", "masked"), [(0.6, 20), (0.5, 16), (0.75, 24), (0.01, 1)])
def test_the_number_of_masked_squares_is_rounded_up(ratio, masked):
    method = tiny(mask_ratio=ratio)
    assert method.mask(make_batch(method)["noise"]).sum(1).tolist() == [masked] * 3


@pytest.mark.parametrize(
    ("image_size", "token", "square"),
    [
        ((192, 192), 4, 32),
        ((224, 224), 4, 32),
        ((384, 384), 4, 32),
        ((96, 96), 4, 16),
        ((32, 32), 4, 4),
        ((32, 32), 2, 4),
    ],
)
def test_squares_are_the_paper_s_where_the_paper_has_them_and_in_proportion_below(image_size, token, square):
    assert default_mask_patch(image_size, (token, token)) == (square, square)


@pytest.mark.parametrize(
    "name", ["swinv2_cr_tiny_ns_224", "convnextv2_atto", "focalnet_tiny_srf", "nest_tiny", "rdnet_tiny"]
)
def test_one_rule_finds_the_map_of_other_families(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    found = find_token_map(model, image_size=(224, 224), in_chans=3)
    assert found is not None
    assert found.token_size == (4, 4)
    assert found.cell_size == (int(model.feature_info[-1]["reduction"]),) * 2


@pytest.mark.parametrize(
    "name", ["resnet18", "resnetv2_50", "vgg11", "maxvit_nano_rw_256", "vit_tiny_patch16_224", "beit_base_patch16_224"]
)
def test_no_map_is_found_where_patches_overlap_or_tokens_have_lost_their_rows(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    size = model.default_cfg["input_size"]
    assert find_token_map(model, image_size=size[1:], in_chans=3) is None


def test_finding_the_map_leaves_weights_modes_and_random_numbers_alone():
    backbone, _ = build_backbone(KINDS["swin"][0], image_size=SIZE, model_args={**KINDS["swin"][1], "drop_rate": 0.5})
    backbone.layers[0].eval()
    before, modes = copy.deepcopy(backbone.state_dict()), [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    find_token_map(backbone, image_size=SIZE, in_chans=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    method = tiny(kind)
    method(make_batch(method))["loss"].backward()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_what_stands_behind_the_last_map_is_frozen_and_named():
    torch.manual_seed(0)
    args = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
    backbone, _ = build_backbone("inception_next_atto", image_size=(64, 64), model_args=args)
    method = SimMIM(backbone, image_size=(64, 64))
    method(make_batch(method))["loss"].backward()
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"backbone.head.{part}" for part in ("fc1.weight", "fc1.bias", "norm.weight", "norm.bias")}
    assert {name for name, parameter in method.named_parameters() if parameter.grad is None} == frozen
    assert all(name.removeprefix("backbone.") in method.notes[-1] for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_backbone_keeps_timm_s_keys_and_forward(kind):
    method = tiny(kind).eval()
    plain, _ = build_backbone(KINDS[kind][0], image_size=SIZE, model_args=KINDS[kind][1])
    plain.load_state_dict(method.backbone.state_dict(), strict=True)
    batch = make_batch(method)
    method(batch)
    image = batch["views"][0]
    assert torch.equal(pooled_features(plain.eval(), image), pooled_features(method.backbone, image))


@pytest.mark.parametrize("kind", KINDS)
def test_no_drop_path_acts_that_was_not_set(kind):
    method = tiny(kind).train()
    batch = make_batch(method)
    assert torch.equal(method(batch)["loss"], method(batch)["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_trains_with_a_float32_loss(kind):
    method = tiny(kind)
    batch = make_batch(method)
    expected = method(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_compiled_it_masks_anew_in_every_step():
    method = tiny("convnext").eval()
    compiled = torch.compile(method, backend="eager")
    with torch.no_grad():
        for batch in (make_batch(method), make_batch(method, seed=2)):
            torch.testing.assert_close(compiled(batch)["loss"], method(batch)["loss"])


def _gradients(kind: str) -> dict[str, torch.Tensor]:
    """Of a rank's half of four images, averaged by DistributedDataParallel."""
    method = tiny(kind)
    batch, rank = make_batch(method, 4), distributed.rank()
    mine = slice(2 * rank, 2 * rank + 2)
    parallel = DistributedDataParallel(method)  # held: it averages in the backward pass
    parallel({"views": [batch["views"][0][mine]], "noise": batch["noise"][mine]})["loss"].backward()
    return {name: parameter.grad for name, parameter in method.named_parameters()}


def test_two_ranks_have_the_gradient_of_one(two_ranks):
    for kind in KINDS:
        method = tiny(kind)
        method(make_batch(method, 4))["loss"].backward()
        for gradients in two_ranks.run(_gradients, kind):
            for name, parameter in method.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_pictures_show_visible_squares_as_they_are_and_perfect_predictions_as_the_image():
    method = tiny(norm_pixel_targets=True).eval()
    batch = make_batch(method)
    image, noise = batch["views"][0], batch["noise"]
    where = method.on_pixels(method.mask(noise)).expand_as(image)
    pictures = method.reconstruct(image, noise)
    assert torch.equal(pictures["input"], image)
    assert torch.equal(pictures["masked"], image.masked_fill(where, 0.0))
    assert torch.equal(pictures["reconstruction"][~where], image[~where])
    assert not torch.allclose(pictures["reconstruction"][where], image[where])
    method.predict = lambda images, masked: method.targets(images)[0]
    torch.testing.assert_close(method.reconstruct(image, noise, mask_ratio=0.4)["reconstruction"], image)


def normalised(count: int, split: str) -> torch.Tensor:
    """Embedded images, (B, 3, 32, 32)."""
    return torch.from_numpy(render(np.arange(count), split=split, size=32, seed=0)).permute(0, 3, 1, 2) / 64 - 2


def test_a_few_steps_predict_new_images_well_below_the_best_constant():
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    backbone, _ = build_backbone(KINDS["swin"][0], image_size=(32, 32), model_args=args)
    method = SimMIM(backbone, image_size=(32, 32))
    train, test = normalised(256, "train"), normalised(64, "test")
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        chosen = torch.randint(len(train), (32,), generator=generator)
        loss = method({"views": [train[chosen]], "noise": torch.rand(32, 64, generator=generator)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.rand(64, 64, generator=generator)
    where = method.on_pixels(method.mask(noise)).expand_as(test)
    constant = (test - train.median(0).values).abs()[where].mean()  # the minimum of L1 is the median
    with torch.no_grad():
        assert method.eval()({"views": [test], "noise": noise})["loss"] < 0.75 * constant


WORDS = [
    "+model.args.embed_dim=12",
    "+model.args.depths=[1,1]",
    "+model.args.num_heads=[1,2]",
    "+model.args.window_size=4",
]


def test_a_run_of_mae_on_swin_says_so_and_timm_loads_what_it_learned(tmp_path: Path, capsys):
    words = ["method=mae", "model=swin_t", *WORDS, *SHORT, "trainer.epochs=1", "trainer.ema_decay=0.9", "online=none"]
    run(composed(*words, "trainer.device_batch_size=8", "trainer.precision=bf16"), out=tmp_path)
    said = capsys.readouterr().out
    notes = json.loads((tmp_path / "recipe.json").read_text())["notes"]
    assert notes[0].startswith("method=mae is SimMIM here, without a decoder, as swin_tiny_patch4_window7_224 cannot")
    assert "masked in place by a learned token, not dropped, as in SimMIM" in notes[1]
    assert "48 of 64 squares of 4 x 4 pixels" in notes[1]  # method=mae's ratio of 0.75
    assert all(note in said for note in notes)
    assert list(tmp_path.rglob("*reconstructions*.png"))
    loaded = load_backbone(tmp_path)
    assert loaded.weights == "ema"
    model, args = loaded.model, {key: _tuple(value) for key, value in loaded.spec.model_args.items()}
    plain = timm.create_model(loaded.spec.architecture, num_classes=0, **args)
    plain.load_state_dict(model.state_dict(), strict=True)
    image = normalised(2, "test")
    with torch.no_grad():
        assert torch.equal(pooled_features(plain.eval(), image), pooled_features(model.eval(), image))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def test_the_recipe_of_simmim_is_its_code_s():
    config = composed("method=simmim", "model=swin_t", "data.image_size=192")
    assert (config.method.mask_ratio, config.method.norm_pixel_targets) == (0.6, False)
    assert config.optim.base_lr * 2048 / 256 == pytest.approx(2e-4 * 2048 / 512)  # its rule is for 512 images
    assert (config.optim.weight_decay, list(config.optim.options.betas)) == (0.05, [0.9, 0.999])
    assert config.schedule.min_factor == pytest.approx(1e-5 / 2e-4)
    assert config.trainer.clip_grad_norm == 5
    assert list(config.augment.views[0].scale) == [0.67, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 leaves 32 of 32 squares of 8 x 8 pixels visible; .* at most 0.9688"),
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 leaves 0 of 32 squares"),
        ({"mask_patch_size": 6}, "mask_patch_size=6 must hold whole tokens of 4 x 4 .* set it to 4, 8, 16, 32"),
        ({"mask_patch_size": 0}, "mask_patch_size=0 must"),
        ({"image_size": (40, 40), "mask_patch_size": None}, "data.image_size to a multiple of"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny("convnext" if "image_size" in settings else "swin", **settings)


@pytest.mark.parametrize("target", ["mae.MAE", "simmim.SimMIM"])
def test_a_convnet_is_told_what_fits(target):
    backbone, _ = build_backbone("resnet10t", image_size=(32, 32))
    with pytest.raises(ValueError, match=r"got resnet10t; try model=.*swin_t.*convnext_t"):
        build_method({"_target_": f"ssl.methods.{target}"}, backbone=backbone, image_size=(32, 32), in_chans=3)


def test_a_plain_vision_transformer_stays_with_mae():
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), model_args=args)
    values = {"backbone": backbone, "image_size": (32, 32), "in_chans": 3}
    assert type(build_method({"_target_": "ssl.methods.mae.MAE"}, **values)) is MAE
    with pytest.raises(ValueError, match=r"got vit_tiny_patch16_224; .* plain vision transformers take method=mae"):
        build_method({"_target_": "ssl.methods.simmim.SimMIM"}, **values)


def test_a_decoder_that_was_set_is_refused_where_there_is_none():
    backbone, _ = build_backbone(KINDS["swin"][0], image_size=SIZE, model_args=KINDS["swin"][1])
    config = {"_target_": "ssl.methods.mae.MAE", "decoder_depth": 2, "decoder_dim": 512}
    with pytest.raises(ValueError, match=r"method.decoder_depth=2 would have no effect .* leave decoder_depth out"):
        build_method(config, backbone=backbone, image_size=SIZE, in_chans=3)
