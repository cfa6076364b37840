"""`what=pca_tokens`: components against scikit-learn's, colours of planted regions, and the layers of every family."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from eval.look import command, pca_tokens
from eval.look.components import principal_components
from eval.look.pca_tokens import place_share, token_colours, token_map
from eval.look.result import DoesNotApply
from ssl.models.backbones import build_backbone, pooled_features
from tests.scenes import EMBEDDED, TINY_RESNET, TINY_VIT, look_config, pretrained
from tests.scenes import scene as make_scene
from tests.test_families import FAMILIES


def built(name: str, args: dict[str, Any], side: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(name, image_size=(side, side), model_args=args)[0].eval().requires_grad_(False)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    scale = torch.linspace(2, 0.2, shape[1]).view(-1, *[1] * (len(shape) - 2))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + 3


def test_components_are_those_of_scikit_learn():
    given = tokens(60, 12)
    found = principal_components(given)
    expected = PCA(3, svd_solver="full").fit(given.double().numpy())
    np.testing.assert_allclose(found.explained, expected.explained_variance_ratio_, rtol=1e-9)
    sign = np.sign((found.direction.numpy() * expected.components_).sum(1))[:, None]
    np.testing.assert_allclose(found.direction.numpy() * sign, expected.components_, atol=1e-9)
    np.testing.assert_allclose(found.score.numpy() * sign[:, 0], expected.transform(given.double().numpy()), atol=1e-7)


def test_the_largest_entry_of_each_component_is_positive_in_whatever_order_tokens_come():
    given = tokens(60, 12)
    found = principal_components(given)
    assert (found.direction.gather(1, found.direction.abs().argmax(1, keepdim=True)) > 0).all()
    turned = principal_components(given.flip(0))
    torch.testing.assert_close(turned.score.flip(0), found.score)
    torch.testing.assert_close(principal_components(-given).direction, found.direction)


def test_fewer_tokens_than_components_give_fewer_and_tokens_all_alike_none():
    assert principal_components(tokens(2, 5)).explained.shape == (2,)
    colours, found, _ = token_colours(torch.ones(2, 5, 2, 2))
    assert (found.explained == 0).all()
    assert (colours == 0.5).all()


@pytest.mark.parametrize(
    ("name", "args", "layer"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}, None),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, 1),
        ("convnext_atto", FAMILIES["ConvNeXt"][1], 1),
    ],
)
def test_two_planted_regions_have_two_colours(name, args, layer):
    model = built(name, args, 128)
    if hasattr(model, "pos_embed"):
        cast(Any, model).pos_embed.zero_()  # else an untrained transformer's tokens tell places apart
    image = torch.zeros(2, 3, 128, 128)
    image[0, 0, :, :64] = image[1, 0, 64:] = 2.0  # red: the left of one, the bottom of the other
    image[0, 2, :, 64:] = image[1, 2, :64] = 2.0  # blue: the rest
    found, components, _ = token_colours(token_map(model, image, layer))
    side = found.shape[1]
    half, edge = side // 2, max(side // 8, 1)  # what lies at the border sees both
    red = [found[0, :, : half - edge], found[1, half + edge :]]
    blue = [found[0, :, half + edge :], found[1, : half - edge]]
    red_tokens, blue_tokens = (np.concatenate([each.reshape(-1, 3) for each in part]) for part in (red, blue))
    between = np.linalg.norm(np.median(red_tokens, 0) - np.median(blue_tokens, 0))
    within = max(np.median(np.linalg.norm(each - np.median(each, 0), axis=1)) for each in (red_tokens, blue_tokens))
    assert between > 0.5
    assert between > 3 * within, (between, within, components.explained)
    assert components.explained[0] > 0.3


def test_only_the_foreground_is_coloured_and_by_components_of_its_own():
    given = tokens(2, 8, 4, 4, seed=3)
    given[:, 0, :, :2] += 40.0  # the left half is the foreground: its first value is far above
    colours, found, is_shown = token_colours(given, foreground="positive")
    assert is_shown[:, :, :2].all()
    assert not is_shown[:, :, 2:].any()
    assert (colours[:, :, 2:] == 0).all()
    left = given[:, :, :, :2].movedim(1, -1).reshape(-1, 8)
    torch.testing.assert_close(found.explained, principal_components(left).explained)
    other = token_colours(given, foreground="negative")[2]
    assert (other == ~is_shown).all()


def test_the_share_of_places_is_all_where_images_do_not_matter_half_where_half_does_and_nothing_of_noise():
    generator = torch.Generator().manual_seed(0)
    of_places = torch.randn(1, 64, 8, 8, generator=generator).expand(6, -1, -1, -1)
    assert place_share(of_places) == pytest.approx(1.0)
    noise = torch.randn(6, 64, 8, 8, generator=generator)
    of_images = torch.randn(6, 64, 1, 1, generator=generator).expand(-1, -1, 8, 8)
    assert place_share(noise) == pytest.approx(0.0, abs=0.02)
    assert place_share(of_images + 0.5 * noise) == pytest.approx(0.0, abs=0.02)
    assert place_share(of_places + noise) == pytest.approx(0.5, abs=0.05)
    assert math.isnan(place_share(noise[:1]))


@pytest.mark.parametrize("family", ["ResNet", "Swin", "ViT", "ConvNeXt", "AlexNet", "DenseNet", "EfficientNet"])
def test_the_mean_of_the_map_is_what_a_global_average_of_the_last_layer_gives(family):
    name, args, side, _ = FAMILIES[family]
    model = built(name, args, side)
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = token_map(model, image)
    features = cast(Any, model).forward_features(image)
    if family == "ViT":
        expected = features[:, 1:].mean(1)
    elif family == "Swin":
        expected = features.mean((1, 2))
        torch.testing.assert_close(expected, pooled_features(model, image), atol=1e-5, rtol=1e-5)
    else:
        expected = features.mean((2, 3))
    torch.testing.assert_close(found.mean((2, 3)), expected, atol=1e-5, rtol=1e-5)


def test_the_place_of_a_patch_is_its_place_on_the_map():
    model = cast(Any, built("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2}, 32))
    model.blocks[0].attn.proj.weight.zero_()  # no token sees another
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 8:12, 20:24] += 1  # row 2, column 5 of 8 x 8
    moved = (token_map(model, image) - token_map(model, changed)).abs().sum((0, 1))
    assert moved.nonzero().tolist() == [[2, 5]]


def test_a_stage_of_torchvisions_swin_and_tokens_of_its_transformer_lie_on_the_map():
    with torch.device("meta"):
        swin = build_backbone("torchvision/swin_t", image_size=(64, 64))[0].eval()
        vit = build_backbone("torchvision/vit_b_16", image_size=(64, 64))[0].eval()
        assert token_map(swin, torch.empty(1, 3, 64, 64), 1).shape == (1, 192, 8, 8)
        assert token_map(vit, torch.empty(1, 3, 64, 64)).shape == (1, 768, 4, 4)


@pytest.mark.parametrize("method", ["mae", "simclr"])
def test_the_written_colours_are_those_of_all_shown_images_together(method, tmp_path):
    run = pretrained(tmp_path / "run", method)
    layer = [] if method == "mae" else ["pca_tokens.layer=1"]
    command.run(look_config(run, "pca_tokens", *layer, f"out={tmp_path / 'out'}"))
    scene = make_scene(run)
    given = token_map(scene.backbone, scene.shown().image, None if method == "mae" else 1)
    flat = given.movedim(1, -1).flatten(0, 2).double().numpy()
    expected = PCA(3, svd_solver="full").fit(flat)
    found = json.loads((tmp_path / "out" / "pca_tokens.json").read_text())
    assert found["data"]["explained_variance"] == pytest.approx(expected.explained_variance_ratio_, abs=1e-4)
    assert found["metrics"]["place_share"] == pytest.approx(place_share(given))
    with np.load(tmp_path / "out" / "pca_tokens.npz") as arrays:
        np.testing.assert_allclose(arrays["colours"], token_colours(given)[0], atol=1e-5)
    assert (tmp_path / "out" / "pca_tokens.png").exists()


def test_where_the_last_map_is_one_token_the_last_stage_of_four_by_four_is_shown_and_said():
    scene = make_scene("random", "pca_tokens", *TINY_RESNET, *EMBEDDED, "model.stem=standard")
    assert token_map(scene.backbone, scene.shown().image).shape[-2:] == (1, 1)
    found = pca_tokens.look(scene)
    assert (found.data["layer"], found.data["grid_size"]) == (2, (4, 4))
    assert "pca_tokens.layer=-1" in found.lines[-1]


def test_without_places_the_tokens_of_each_place_have_mean_zero(monkeypatch):
    seen: list[Tensor] = []
    original = pca_tokens.token_colours
    monkeypatch.setattr(
        pca_tokens, "token_colours", lambda each, **settings: seen.append(each) or original(each, **settings)
    )
    pca_tokens.look(make_scene("random", "pca_tokens", *TINY_VIT, *EMBEDDED, "pca_tokens.without_place=true"))
    torch.testing.assert_close(seen[0].mean(0), torch.zeros_like(seen[0][0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([*TINY_VIT, "pca_tokens.layer=2"], ValueError, r"has 2 blocks, 0\.\.1"),
        ([*TINY_RESNET, "pca_tokens.layer=5"], ValueError, r"has 5 stages, 0\.\.4"),
        ([*TINY_VIT, "pca_tokens.foreground=left"], ValueError, "must be positive, negative or null"),
        ([*TINY_VIT, "pca_tokens.without_place=true", "num_images=1"], ValueError, "needs two images"),
        (
            [*TINY_RESNET, "model.stem=standard", "pca_tokens.layer=-1"],
            DoesNotApply,
            r"map of 1 x 1; give an earlier pca_tokens\.layer",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_words(words, error, message):
    with pytest.raises(error, match=message):
        pca_tokens.look(make_scene("random", "pca_tokens", *EMBEDDED, *words))
