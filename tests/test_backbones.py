from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from ssl.models.backbones import (
    BackboneSpec,
    backbone_from_spec,
    build_backbone,
    feature_dim,
    is_token_model,
    model_name,
    pooled_features,
)

PRESETS = sorted((Path(__file__).resolve().parents[1] / "conf" / "model").glob("*.yaml"))
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def preset(path: Path) -> dict:
    values = yaml.safe_load(path.read_text())
    if values["name"] == "???":
        values["name"] = "squeezenet1_1" if values.get("library") == "torchvision" else "convnext_atto"
    return {**values, "name": model_name(values)}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
@pytest.mark.parametrize("image_size", [(224, 224), (96, 128), (32, 48)])
def test_every_preset_is_rebuilt_from_its_json_or_says_which_size_it_fits(path, image_size):
    values = preset(path)
    assert set(values) - {"library"} == {"name", "patch_size", "stem", "drop_path", "args"}
    settings = {"patch_size": values["patch_size"], "stem": values["stem"], "drop_path": values["drop_path"]}
    with torch.device("meta"):
        try:
            model, spec = build_backbone(values["name"], image_size=image_size, model_args=values["args"], **settings)
        except ValueError as error:
            assert image_size == (32, 48)
            fitting = int(re.search(r"it fits data.image_size=(\d+)", str(error))[1])
            build_backbone(values["name"], image_size=(fitting, fitting), model_args=values["args"], **settings)
            return
        rebuilt = backbone_from_spec(BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in rebuilt.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_b", 85.80),
        ("vit_l", 303.30),
        ("vit_h", 630.76),
        ("resnet18", 11.18),
        ("resnet50", 23.51),
        ("resnet10", 1.25),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, millions):
    values = preset(next(path for path in PRESETS if path.stem == name))
    with torch.device("meta"):
        model, _ = build_backbone(values["name"], image_size=(224, 224), model_args=values["args"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("image_size", "patch"),
    [
        ((32, 32), 4),
        ((60, 200), 4),
        ((64, 64), 8),
        ((96, 128), 8),
        ((128, 128), 16),
        ((224, 224), 16),
        ((192, 320), 16),
    ],
)
def test_patch_size_follows_the_shorter_side(image_size, patch):
    model, spec = build_backbone("vit_tiny_patch16_224", image_size=image_size, model_args=TINY_VIT)
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.patch_embed.grid_size == (image_size[0] // patch, image_size[1] // patch)
    assert pooled_features(model, torch.zeros(1, 3, *image_size)).shape == (1, 32)
    assert spec.model_args["patch_size"] == patch


def test_patch_14_is_kept_where_it_divides_the_image_and_left_where_it_does_not():
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    at_224, _ = build_backbone("vit_huge_patch14_224", image_size=(224, 224), model_args=small)
    at_256, _ = build_backbone("vit_huge_patch14_224", image_size=(256, 256), model_args=small)
    assert (at_224.patch_embed.patch_size, at_256.patch_embed.patch_size) == ((14, 14), (16, 16))


def test_a_backbone_without_surgery_is_timm_s_own_model():
    torch.manual_seed(0)
    ours, _ = build_backbone("resnet18", image_size=(96, 96), in_chans=4)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=0, in_chans=4)
    x = torch.randn(2, 4, 96, 96)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(pooled_features(ours.eval(), x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "seresnext26t_32x4d"])
def test_the_small_stem_keeps_the_resolution_and_loads_strictly(name):
    model, spec = build_backbone(name, image_size=(32, 32))
    assert spec.stem == "small"
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    rebuilt = backbone_from_spec(spec).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(pooled_features(model, x), pooled_features(rebuilt, x))


def test_the_standard_stem_is_kept_above_64_pixels_and_where_asked_for():
    for image_size, stem in [((96, 96), "auto"), ((32, 32), "standard")]:
        model, spec = build_backbone("resnet18", image_size=image_size, stem=stem)
        assert spec.stem == "standard"
        assert model.conv1.kernel_size == (7, 7)


def test_drop_path_has_effect_in_training_only():
    torch.manual_seed(0)
    model, spec = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), drop_path=0.5, model_args=TINY_VIT)
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(pooled_features(model, x), pooled_features(model, x))
    model.eval()
    assert torch.equal(pooled_features(model, x), pooled_features(model, x))
    assert "drop_path_rate" not in spec.model_args


@pytest.mark.parametrize(
    ("name", "dim"), [("mobilenetv3_small_050", 1024), ("resnet10t", 512), ("convnext_atto", 320), ("test_vit", 64)]
)
def test_feature_dim_is_measured_and_leaves_the_model_as_it_was(name, dim):
    model, _ = build_backbone(name, image_size=(64, 64))
    model.bn_frozen = nn.BatchNorm1d(2).eval()
    modes = [module.training for module in model.modules()]
    assert feature_dim(model, image_size=(64, 64)) == dim
    assert pooled_features(model.train(), torch.randn(2, 3, 64, 64)).shape == (2, dim)
    model.train()
    model.bn_frozen.eval()
    assert [module.training for module in model.modules()] == modes


def test_the_check_of_the_fit_does_not_move_the_initial_weights():
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        return build_backbone("resnet10t", image_size=(64, 64))[0].conv1[0].weight

    torch.manual_seed(3)
    theirs = timm.create_model("resnet10t", num_classes=0)
    assert torch.equal(weights(), theirs.conv1[0].weight)


def test_token_models_are_plain_vision_transformers():
    names = {
        "test_vit": True,
        "deit_tiny_distilled_patch16_224": True,
        "resnet18": False,
        "swin_tiny_patch4_window7_224": False,
    }
    for name, expected in names.items():
        with torch.device("meta"):
            model, _ = build_backbone(name, image_size=(224, 224))
        assert is_token_model(model) is expected, name


def test_fixed_size_models_take_the_image_size():
    with torch.device("meta"):
        model, spec = build_backbone("swin_tiny_patch4_window7_224", image_size=(64, 96))
    assert model.patch_embed.img_size == (64, 96)
    assert spec.model_args["img_size"] == [64, 96]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet51", {}, "no model named 'resnet51'; close to it: .*resnet50"),
        (
            "vit_tiny_patch16_224",
            {"image_size": (30, 30)},
            "30 x 30 .* 4 x 4; set model.patch_size to one of 2, 3, 5, 6",
        ),
        ("vit_tiny_patch16_224", {"patch_size": 5}, "32 x 32 .* 5 x 5; set .*data.image_size to 30"),
        ("inception_v3", {}, "inception_v3 does not fit images of 32 x 32 .* fits data.image_size=96"),
        ("resnet18", {"patch_size": 4}, "resnet18 has no patch size"),
        ("vit_tiny_patch16_224", {"stem": "small"}, "stem=small is for timm's ResNets"),
        ("resnet18", {"stem": "tiny"}, "one of auto, standard, small"),
        ("vgg11", {"drop_path": 0.1}, "vgg11 takes no drop path"),
        ("vit_tiny_patch16_224", {"drop_path": 0.1, "model_args": {**TINY_VIT, "depth": 1}}, "has no effect"),
        ("resnet18", {"model_args": {"embed_dim": 3}}, "timm cannot build resnet18 .*embed_dim"),
        ("resnet18", {"model_args": {"in_chans": 3}}, "model.args.in_chans is set elsewhere"),
        ("resnet18", {"model_args": {"act_layer": nn.GELU}}, "numbers, strings, lists"),
    ],
)
def test_a_misfit_says_what_fits(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, **{"image_size": (32, 32), **settings})


def test_a_foreign_description_is_refused():
    with pytest.raises(ValueError, match="needs the keys"):
        BackboneSpec.from_dict({"architecture": "resnet18"})
