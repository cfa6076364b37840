"""Gradient ascent, DeepDream and inversion: each does what it says, on convnets and vision transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.look import command, deepdream, gradient_ascent, inversion, regularisers
from eval.look.gradient_ascent import Regularisers
from eval.look.layer_places import find_places
from eval.look.layer_values import read_layer
from ssl.models.backbones import build_backbone, pooled_features
from tests.scenes import look_config, pretrained
from tests.scenes import scene as make_scene

SIZE = (32, 32)
TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
TINY_VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = build_backbone("resnet18", image_size=SIZE, model_args=TINY_RESNET)[0]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm's last one of a block starts at 0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval().requires_grad_(False)


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = build_backbone("vit_tiny_patch16_224", image_size=SIZE, patch_size=8, model_args=TINY_VIT)[0]
    return model.eval().requires_grad_(False)


NETWORKS = {"resnet": (resnet, "layer3"), "vit": (vit, "blocks.1")}


@pytest.fixture(params=list(NETWORKS))
def reader(request):
    """What gives the values of a layer in the middle of a network as (B, units, places), with their gradient."""
    make, layer = NETWORKS[request.param]
    network = make()
    places = find_places(network, image_size=SIZE, in_chans=3)[layer]
    return lambda image: places.values(read_layer(network, lambda image: pooled_features(network, image), layer, image))


def images(num: int = 2, seed: int = 1) -> Tensor:
    """Smooth images, whose pixels are ones that an image can have."""
    noise = torch.randn(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    return regularisers.clip_to_range(2 * regularisers.blur(noise, 2.0), MEAN, STD)


def in_range(image: Tensor) -> bool:
    """Whether every pixel lies in 0..1."""
    pixels = image * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)
    return bool(pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6)


# ---- reading a layer -----------------------------------------------------------------------------------------------


def test_a_layer_is_read_without_running_what_follows():
    network, ran = resnet(), []
    network.layer3.register_forward_hook(lambda *_: ran.append("layer3"))
    found = read_layer(network, lambda image: pooled_features(network, image), "layer2", images())
    torch.testing.assert_close(found, network.forward_intermediates(images())[1][2])
    assert not network.layer2._forward_hooks
    ran.clear()
    read_layer(network, lambda image: pooled_features(network, image), "layer2", images())
    assert not ran


# ---- regularisers --------------------------------------------------------------------------------------------------


def test_decay_shrinks_the_norm_by_its_rate():
    norms = [torch.linalg.vector_norm(each) for each in (regularisers.l2_decay(images(), 0.25), images())]
    torch.testing.assert_close(norms[0], 0.75 * norms[1])


def test_blur_keeps_the_mean_and_lowers_the_total_variation():
    flat = torch.full((1, 3, 9, 7), 1.5)
    torch.testing.assert_close(regularisers.blur(flat, 1.0), flat)
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    spread = regularisers.blur(point, 2.0)
    offsets = torch.arange(-10, 11.0)
    variance = (spread[0, 0].sum(0) * offsets**2).sum()
    assert float(spread.sum()) == pytest.approx(1)
    assert float(variance) == pytest.approx(4, rel=0.05)
    noise = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    before, after = (regularisers.total_variation(each) for each in (noise, regularisers.blur(noise, 1.0)))
    assert (after < 0.2 * before).all()


def test_clipping_by_norm_silences_the_faintest_pixels_alone():
    found = regularisers.clip_small_norms(images(), 0.25)
    norms = images().norm(dim=1)
    gone = (found == 0).all(1)
    assert gone.flatten(1).sum(1).tolist() == [256, 256]
    for row in range(2):
        assert norms[row][gone[row]].max() <= norms[row][~gone[row]].min()
    kept = ~gone[:, None].expand_as(found)
    assert torch.equal(found[kept], images()[kept])


def test_clipping_by_contribution_moves_a_linear_activation_least():
    weight = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(5))
    found = regularisers.clip_small_contributions(images(), weight.expand(2, -1, -1, -1), 0.5)
    lost = ((images() - found) * weight).sum(1).abs().flatten(1)  # (B, H*W): what each pixel's loss costs
    cost = (images() * weight).sum(1).abs().flatten(1).sort(dim=1).values
    torch.testing.assert_close(lost.sort(dim=1, descending=True).values[:, :512].flip(1), cost[:, :512])


def test_jitter_is_undone_by_its_opposite():
    moved = regularisers.jitter(images(), (3, -5))
    assert torch.equal(moved[:, :, 3, 0], images()[:, :, 0, 5])
    assert torch.equal(regularisers.jitter(moved, (-3, 5)), images())


def test_total_variation_is_the_papers_sum():
    small = images()[:1, :, :5, :4]
    for beta in (1.0, 2.0, 3.0):
        wanted = 0.0
        for channel in range(3):
            for row in range(5):
                for column in range(4):
                    here = small[0, channel, row, column]
                    down = small[0, channel, row + 1, column] - here if row < 4 else 0.0
                    right = small[0, channel, row, column + 1] - here if column < 3 else 0.0
                    wanted += float(down**2 + right**2) ** (beta / 2)
        assert float(regularisers.total_variation(small, beta=beta)) == pytest.approx(wanted / 20, rel=1e-4)


def test_steps_down_total_variation_and_alpha_norm_lower_them():
    for prior in (regularisers.total_variation, regularisers.alpha_norm):
        image = images().requires_grad_()
        (gradient,) = torch.autograd.grad(prior(image).sum(), image)
        assert (prior(image - 0.1 * gradient) < prior(image)).all()
    assert float(regularisers.alpha_norm(torch.full((1, 3, 4, 4), 2.0))) == 3 * 2**6


def test_clipping_to_the_range_leaves_pixels_of_0_to_1():
    wild = 9 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    assert in_range(regularisers.clip_to_range(wild, MEAN, STD))
    torch.testing.assert_close(regularisers.clip_to_range(images(), MEAN, STD), images())


# ---- gradient ascent -----------------------------------------------------------------------------------------------


def ascend(activations, units, *, steps: int = 40, seed: int = 0, **by) -> gradient_ascent.Ascent:
    return gradient_ascent.ascend(
        activations,
        units,
        image_size=SIZE,
        mean=MEAN,
        std=STD,
        steps=steps,
        step_size=0.1,
        regularisers=Regularisers(**by),
        seed=seed,
    )


def test_made_images_activate_their_units_more_than_the_start_and_than_any_noise(reader):
    def activations(image: Tensor) -> Tensor:
        return reader(image).mean(2)

    units = [1, 4, 6]
    found = ascend(activations, units, jitter=2, l2_decay=0.001)
    noise = torch.randn(64, 3, *SIZE, generator=torch.Generator().manual_seed(9))
    best = activations(regularisers.clip_to_range(noise, MEAN, STD))[:, units].amax(0)
    assert (found.trace[:, -1] > found.trace[:, 0]).all()
    assert (found.trace[:, -1] > best).all()
    assert in_range(found.image)
    assert found.trace.shape == (3, 41)
    torch.testing.assert_close(found.trace[:, -1], activations(found.image)[range(3), units])


def test_a_unit_whose_best_image_is_known_finds_it():
    """A linear unit is highest where each pixel has the limit that its weight points to."""
    weight = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(4))
    found = ascend(lambda image: (image * weight).sum((1, 2, 3))[:, None], [0], steps=500)
    low, high = (regularisers.clip_to_range(torch.full((1, 3, *SIZE), limit), MEAN, STD) for limit in (-99.0, 99.0))
    best = torch.where(weight > 0, high, low)
    assert float(((found.image - best).abs() < 1e-5).float().mean()) > 0.9


def test_units_climb_as_if_they_were_alone(reader):
    def activations(image: Tensor) -> Tensor:
        return reader(image).mean(2)

    together = ascend(activations, [4, 2], steps=5)
    alone = ascend(activations, [4], steps=5)
    torch.testing.assert_close(together.image[:1], alone.image, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("by", "measure"),
    [
        ({"l2_decay": 0.1}, lambda image: image.square().mean()),
        ({"blur_every": 2, "blur_sigma": 1.0}, lambda image: regularisers.total_variation(image).mean()),
        ({"clip_norm": 0.5}, lambda image: (image.norm(dim=1) > 0.3).float().mean()),
        ({"clip_contribution": 0.5}, lambda image: (image.norm(dim=1) > 0.3).float().mean()),
    ],
)
def test_each_regulariser_leaves_its_mark_on_what_is_made(by, measure):
    network = resnet()

    def activations(image: Tensor) -> Tensor:
        return pooled_features(network, image)

    with_it, without = ascend(activations, [3], steps=20, **by), ascend(activations, [3], steps=20)
    assert float(measure(with_it.image)) < 0.9 * float(measure(without.image))


def test_what_was_made_of_a_moved_image_is_moved_back():
    """A unit that reads one pixel brightens that pixel and those that jitter brings to its place, and no other."""
    noise = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    start = regularisers.clip_to_range(gradient_ascent.STARTS[0] * noise, MEAN, STD)
    found = ascend(lambda image: image[:, :1, 16, 16], [0], steps=40, jitter=3).image
    changed = (found != start)[0, 0].nonzero() - 16
    assert len(changed) > 10
    assert changed.abs().max() <= 3


def test_a_unit_that_faint_noise_leaves_silent_climbs_from_louder_noise():
    def activations(image: Tensor) -> Tensor:
        loudness = image.std((1, 2, 3))
        return torch.stack([loudness, functional.relu(loudness - 0.5)], dim=1)

    found = ascend(activations, [0, 1], steps=10)
    assert found.trace[0, 0] < 0.2  # from the faintest
    assert 0 < found.trace[1, 0] < found.trace[1, -1]


def test_the_same_seed_makes_the_same_images(reader):
    made = [ascend(lambda image: reader(image).mean(2), [2], steps=4, seed=seed, jitter=2).image for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_units_are_drawn_by_the_seed_and_named_where_they_are_classes():
    drawn = gradient_ascent.numbers_of_units(None, 4, 100, names=None, seed=3, layer="layer2")
    assert drawn == gradient_ascent.numbers_of_units(None, 4, 100, names=None, seed=3, layer="layer2")
    assert len(set(drawn)) == 4
    assert gradient_ascent.numbers_of_units(["cat", 0], 4, 2, names=["ant", "cat"], seed=0, layer="logits") == [1, 0]
    digits = ["0", "1", "10", "2"]  # as folders of digits are sorted: a number is the class of that name, if any
    assert gradient_ascent.numbers_of_units([2, "10", 3], 4, 4, names=digits, seed=0, layer="logits") == [3, 2, 3]
    with pytest.raises(ValueError, match=r"units of layer2 are numbers 0 to 7; got \[8\]"):
        gradient_ascent.numbers_of_units([8], 4, 8, names=None, seed=0, layer="layer2")


# ---- deepdream -----------------------------------------------------------------------------------------------------


def dream(values, image: Tensor, **changed) -> deepdream.Dream:
    settings = {"sizes": [(16, 16), (24, 24), SIZE], "steps": 5, "step_size": 0.05, "reach": 2, "seed": 0} | changed
    return deepdream.dream(values, image, mean=MEAN, std=STD, **settings)


def test_a_dream_raises_the_norm_of_its_layer_and_keeps_pixels_in_range(reader):
    found = dream(reader, images())
    assert (found.end > 1.1 * found.start).all()
    assert in_range(found.image)
    torch.testing.assert_close(
        found.start, reader(images()).flatten(1).norm(dim=1) / math.sqrt(reader(images())[0].numel())
    )
    torch.testing.assert_close(found.end, deepdream.norms(reader(found.image)))


def test_a_dream_keeps_the_image_that_it_started_from(reader):
    found = dream(reader, images()).image
    matched = inversion.correlation(found, images())
    other = inversion.correlation(found, images().flip(0))
    assert (matched > 0.5).all()
    assert (matched > other).all()


def test_the_same_seed_dreams_the_same(reader):
    made = [dream(reader, images(), steps=2, seed=seed).image for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_octaves_are_multiples_of_the_patch_and_end_with_the_image():
    assert deepdream.octave_sizes((224, 112), 3, 2.0) == [(56, 28), (112, 56), (224, 112)]
    assert deepdream.octave_sizes((64, 64), 4, 1.4, multiple=(16, 16)) == [(16, 16), (32, 32), (48, 48), (64, 64)]
    assert deepdream.octave_sizes((32, 32), 4, 1.01, multiple=(16, 16)) == [(32, 32)]
    with pytest.raises(ValueError, match="octave_scale above 1"):
        deepdream.octave_sizes((32, 32), 3, 1.0)


def test_what_was_dreamt_at_one_size_is_added_at_the_next():
    gray = torch.full((1, 3, *SIZE), 0.1)
    found = dream(lambda image: image.mean((1, 2, 3))[:, None], gray, sizes=[(16, 16), (24, 24), SIZE], steps=4)
    torch.testing.assert_close(found.image, gray + 3 * 4 * 0.05)  # every step adds its size to every pixel


def test_what_was_dreamt_at_a_small_size_is_coarse():
    """Of one octave at half size, what is added cannot have the finest stripes."""
    network = resnet()

    def values(image: Tensor) -> Tensor:
        return read_layer(network, lambda image: pooled_features(network, image), "layer1", image)

    small = dream(values, images(), sizes=[(16, 16), SIZE], steps=3, step_size=0.2, reach=0)
    fine = dream(values, images(), sizes=[SIZE], steps=6, step_size=0.2, reach=0)

    def share_of_fine(image: Tensor) -> float:
        added = image - images()
        return float(
            (added - functional.avg_pool2d(added, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)).norm()
            / added.norm()
        )

    assert share_of_fine(small.image) < share_of_fine(fine.image)


def test_a_network_for_one_size_is_refused_more_octaves():
    torch.manual_seed(0)
    network = build_backbone("torchvision/vit_b_16", image_size=SIZE)[0].eval().requires_grad_(False)
    with pytest.raises(ValueError, match=r"cannot read images of 16 x 16 pixels.*deepdream.octaves=1"):
        dream(lambda image: pooled_features(network, image), images(1), sizes=[(16, 16), SIZE])


# ---- inversion -----------------------------------------------------------------------------------------------------


def invert(values, image: Tensor, **changed) -> inversion.Inversion:
    settings = {"steps": 40, "step_size": 0.1, "tv_weight": 0.01, "alpha_weight": 0.001, "seed": 0} | changed
    return inversion.invert(values, image, mean=MEAN, std=STD, **settings)


def test_the_values_of_what_is_made_come_closer_than_those_of_the_start(reader):
    found = invert(reader, images())
    wanted, made = reader(images()).flatten(1), reader(found.image).flatten(1)
    torch.testing.assert_close(found.end, (made - wanted).square().sum(1) / wanted.square().sum(1))
    assert (found.end < 0.5 * found.start).all()
    assert in_range(found.image)


def test_the_pixels_of_an_image_are_made_again_from_themselves():
    found = invert(lambda image: image, images(), steps=150, tv_weight=0.0, alpha_weight=0.0)
    assert (inversion.correlation(found.image, images()) > 0.99).all()


def test_pixels_stay_in_range_however_large_the_steps():
    white = regularisers.clip_to_range(torch.full((1, 3, *SIZE), 9.0), MEAN, STD)
    assert in_range(invert(lambda image: image, white, steps=3, step_size=2.0).image)


def test_early_layers_keep_more_of_the_image_than_the_features():
    network = resnet()

    def run(image: Tensor) -> Tensor:
        return pooled_features(network, image)

    early = invert(lambda image: read_layer(network, run, "layer1", image), images())
    late = invert(run, images())
    kept = [inversion.correlation(each.image, images()) for each in (early, late)]
    assert (kept[0] > kept[1] + 0.2).all()


def test_weights_of_the_priors_lower_what_they_weigh(reader):
    plain = invert(reader, images(), tv_weight=0.0, alpha_weight=0.0).image
    smooth = invert(reader, images(), tv_weight=1.0, alpha_weight=0.0).image
    faint = invert(reader, images(), tv_weight=0.0, alpha_weight=100.0).image
    assert (regularisers.total_variation(smooth) < 0.5 * regularisers.total_variation(plain)).all()
    assert (regularisers.alpha_norm(faint) < 0.5 * regularisers.alpha_norm(plain)).all()


def test_images_are_made_again_as_if_they_were_alone_and_by_the_seed(reader):
    together = invert(reader, images(), steps=3)
    alone = invert(reader, images()[:1], steps=3)
    torch.testing.assert_close(together.image[:1], alone.image, rtol=1e-3, atol=1e-3)
    assert not torch.equal(invert(reader, images(), steps=3, seed=1).image, together.image)


def test_correlation_is_numpys():
    found = inversion.correlation(images(), images(seed=3))
    wanted = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(images().numpy(), images(seed=3).numpy())]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


# ---- the looks -----------------------------------------------------------------------------------------------------

METHODS = ("mae", "simclr", "relative_location")
FEW = ["gradient_ascent.steps=30", "gradient_ascent.num_units=3", "deepdream.steps=2", "inversion.steps=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    return {method: pretrained(tmp_path_factory.mktemp(method) / "run", method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_backbone_makes_images(runs, method, tmp_path, capsys):
    config = look_config(runs[method], "[gradient_ascent,deepdream,inversion]", f"out={tmp_path}", "num_images=2", *FEW)
    command.run(config)
    said = capsys.readouterr().out
    found = {
        what: json.loads((tmp_path / f"{what}.json").read_text())
        for what in ("gradient_ascent", "deepdream", "inversion")
    }
    for what in found:
        assert (tmp_path / f"{what}.png").is_file()
        assert f"{what}: " in said
    assert [each["end"] > each["start"] for each in found["gradient_ascent"]["data"]["units"]] == [True] * 3
    assert all(each["end"] > each["start"] for each in found["deepdream"]["data"]["images"])
    depths = found["inversion"]["data"]["depths"]
    assert depths[-1]["layer"] == "features"
    assert len(depths) == 5
    assert all(np.mean(each["error"]) < np.mean(each["start_error"]) for each in depths)
    arrays = np.load(tmp_path / "inversion.npz")
    assert {arrays[name].shape for name in arrays.files} == {(2, 3, *make_scene(runs[method]).image_size)}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gradient_ascent", ["gradient_ascent.num_units=3", "gradient_ascent.units=[0]"]),
        ("gradient_ascent", ["gradient_ascent.blur_sigma=2", "gradient_ascent.blur_every=0"]),
        ("deepdream", ["deepdream.octave_scale=2", "deepdream.octaves=1"]),
    ],
)
def test_a_setting_that_another_leaves_without_effect_is_refused(runs, what, words, tmp_path):
    with pytest.raises(ValueError, match=f"{words[0].partition('=')[0]} has no effect with {words[1].split('=')[0]}"):
        command.run(look_config(runs["simclr"], what, *words, f"out={tmp_path}"))


@pytest.mark.parametrize(
    ("what", "word", "message"),
    [
        ("gradient_ascent", "gradient_ascent.layer=layer9", "gradient_ascent.layer=layer9 .*layer1.*layer4"),
        ("gradient_ascent", "gradient_ascent.layer=logits", "needs a classifier.*linear_probe"),
        ("gradient_ascent", "gradient_ascent.place=corner", "one of mean, centre"),
        ("gradient_ascent", "gradient_ascent.place=centre", "has no effect"),
        ("gradient_ascent", "gradient_ascent.clip_norm=1", "shares, 0 or more and below 1"),
        ("gradient_ascent", "gradient_ascent.units=[16]", "numbers 0 to 15"),
        ("deepdream", "deepdream.steps=0", "1 step or more"),
        ("inversion", "inversion.layers=[layer9]", "inversion.layers=layer9 .*layer1.*layer4"),
        ("inversion", "inversion.total_variation=-1", "weights of 0 or more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(runs, what, word, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command.run(look_config(runs["simclr"], what, word, f"out={tmp_path}"))


def test_the_centre_of_a_map_is_one_place_of_it(runs):
    scene = make_scene(runs["simclr"], "gradient_ascent")
    image = scene.shown().image
    for place, pool in (("mean", lambda x: x.mean((2, 3))), ("centre", lambda x: x[:, :, 4, 4])):
        found, layer, names = gradient_ascent.unit_activations(scene, "layer3", place)
        wanted = read_layer(scene.backbone, scene.extract(), "layer3", image)  # (B, 16, 8, 8)
        assert wanted.shape[2:] == (8, 8)
        torch.testing.assert_close(found(image), pool(wanted))
        assert (layer, names) == ("layer3", None)
