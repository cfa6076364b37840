"""`what=filters` and `what=activations`: which layer reads the image, what a unit sees, and what excites it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from eval.look import activations, command, filters
from eval.look.activations import choose_units, cut, most_exciting
from eval.look.first_layer import filter_tiles, first_layer, position_embedding, position_similarity
from eval.look.layer_places import Places, choose_layer, find_places
from eval.look.result import DoesNotApply
from ssl.methods.mae import MAE
from ssl.models.backbones import build_backbone, pooled_features
from ssl.models.layer_table import layer_table
from ssl.models.positions import sincos_2d
from ssl.models.receptive_field import Field
from tests.scenes import EMBEDDED, TINY_RESNET, TINY_VIT, look_config, pretrained
from tests.scenes import scene as make_scene
from tests.test_families import FAMILIES

FIRST = ("AlexNet", "DenseNet", "GoogLeNet", "ResNet", "ResNet-D", "EfficientNet", "Swin", "ConvNeXt", "ViT")
# Without gates that look at the whole image, which a field passes over.
FIELDS = ("VGG", "GoogLeNet", "Inception v2", "ResNet", "ResNet-D", "DenseNet", "MobileNet v1", "ShuffleNet v2")
FIELDS += ("EffNet", "ConvNeXt", "ResNeXt")


def built(family: str, side: int | None = None) -> tuple[nn.Module, int]:
    name, args, own_side, _ = FAMILIES[family]
    torch.manual_seed(0)
    model, _ = build_backbone(name, image_size=(side or own_side,) * 2, model_args=args)
    return model.eval().requires_grad_(False), side or own_side


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# ---- filters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIRST)
@torch.no_grad()
def test_nothing_of_the_image_passes_when_the_layer_that_was_found_is_zero(family):
    model, side = built(family)
    image = images(2, side)
    assert not torch.equal(*pooled_features(model, image))
    layer = first_layer(model, image)
    conv = model.get_submodule(layer.name)
    assert torch.equal(layer.weight, conv.weight)
    cast(Any, conv).weight.zero_()
    first, second = pooled_features(model, image)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("family", "activation"), [("ResNet", "relu"), ("EfficientNet", "silu"), ("ViT", None)])
def test_answers_are_read_behind_the_activation_function_where_one_follows(family, activation):
    model, side = built(family)
    layer = first_layer(model, images(2, side))
    assert layer.activation == activation
    assert bool((layer.low >= 0).all()) == (activation == "relu")


@torch.no_grad()
def test_planted_dead_filters_are_found_one_of_zeros_and_one_that_never_answers():
    model, side = built("ResNet")
    model = cast(Any, model)
    model.conv1.weight[3] = 0.0
    model.bn1.bias[5] = -100.0  # behind it the ReLU gives 0 to every image
    assert first_layer(model, images(4, side)).is_dead.nonzero()[:, 0].tolist() == [3, 5]
    vit, side = built("ViT")
    cast(Any, vit).patch_embed.proj.weight[7] *= 1e-4  # next to 0, though it answers
    assert first_layer(vit, images(4, side)).is_dead.nonzero()[:, 0].tolist() == [7]


def test_a_model_without_a_convolution_on_the_image_is_refused():
    class Linear(nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return x

        def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(DoesNotApply, match="needs a convolution that reads the image"):
        first_layer(Linear(), images(1, 8))


def test_a_weight_of_zero_is_gray_and_each_filter_has_its_own_scale():
    weight = torch.zeros(2, 3, 1, 3)
    weight[0, 0, 0] = torch.tensor([-4.0, 0.0, 2.0])
    weight[1, 1, 0] = torch.tensor([0.0, 0.0, 0.001])
    tiles = filter_tiles(weight)
    torch.testing.assert_close(tiles[0, 0, 0], torch.tensor([0.0, 0.5, 0.75]))
    torch.testing.assert_close(tiles[1, 1, 0], torch.tensor([0.5, 0.5, 1.0]))
    assert (tiles[1, [0, 2]] == 0.5).all()
    assert [filter_tiles(torch.randn(2, channels, 3, 3)).shape[1] for channels in (1, 2, 3, 5)] == [3] * 4


def test_a_filter_that_is_only_longer_has_not_turned_and_one_at_a_right_angle_has():
    before = torch.zeros(2, 1, 1, 2)
    before[:, 0, 0] = torch.tensor([1.0, 0.0])
    after = torch.zeros(2, 1, 1, 2)
    after[0, 0, 0], after[1, 0, 0] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(filters.filter_change(after, before), torch.tensor([0.0, 1.0]))


def test_positions_of_mae_are_told_from_learned_ones():
    backbone, spec = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), model_args=FAMILIES["ViT"][1])
    learned = position_embedding(backbone, (32, 32))
    assert learned is not None
    assert learned[2] is False
    MAE(backbone, image_size=spec.image_size, in_chans=3, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    fixed = position_embedding(backbone, (32, 32))
    assert fixed is not None
    assert fixed[2] is True
    similarity = position_similarity(fixed[0]).view(8, 8, 8, 8)
    expected = torch.cosine_similarity(sincos_2d(32, 8, 8)[10], sincos_2d(32, 8, 8)).view(8, 8)
    torch.testing.assert_close(similarity[1, 2], expected)
    assert position_embedding(built("ResNet")[0], (32, 32)) is None


# ---- where units are, and what they see ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIELDS)
def test_the_gradient_of_a_unit_lies_within_its_box(family):
    model, side = built(family, 128)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # no branch starts at 0
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    places = [each for each in find_places(model, image_size=(side, side), in_chans=3).values() if each.field]
    partial = [each for each in places if max(cast(Field, each.field).size) < side]
    assert partial
    image = images(1, side).requires_grad_()
    outputs: dict[str, Tensor] = {}
    for each in partial[:: max(1, len(partial) // 4)]:
        model.get_submodule(each.layer).register_forward_hook(
            lambda _part, _inputs, output, name=each.layer: outputs.update({name: output.clone()})
        )
    pooled_features(model, image)
    reached: list[bool] = []
    for name, output in outputs.items():
        each = next(one for one in partial if one.layer == name)
        values = each.values(output)  # (1, C, P)
        for place in (0, values.shape[2] // 2, values.shape[2] - 1):
            score = values[0, :, place] @ torch.randn(
                values.shape[1], generator=generator
            )  # a norm's sum has no gradient
            gradient = torch.autograd.grad(score, image, retain_graph=True)[0][0].abs().sum(0)  # (H, W)
            top, left, height, width = each.box(place, (side, side))
            inside = gradient[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
            reached.append(bool(inside.any()))
            assert inside.count_nonzero() == gradient.count_nonzero(), (name, place)
    assert sum(reached) > len(reached) / 2  # a ReLU may stop some


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *[("resnet18", layer) for layer in ("conv1", "maxpool", "layer1", "layer2.0.conv1", "layer3")],
        *[("resnetblur18", layer) for layer in ("maxpool", "layer2")],  # which pads by reflection
    ],
)
def test_the_gradient_of_a_unit_fills_its_box_to_the_edges(name, layer):
    args = FAMILIES["ResNet"][1]
    torch.manual_seed(0)
    side = 160
    model, _ = build_backbone(name, image_size=(side, side), model_args=args, stem="standard")
    model.eval()
    for parameter in model.parameters():  # so that no ReLU stops a gradient, and none cancel
        parameter.data.abs_().add_(0.01)
    places = find_places(model, image_size=(side, side), in_chans=3)[layer]
    image = images(16, side).abs().requires_grad_()
    kept: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda _part, _inputs, output: kept.append(output))
    pooled_features(model, image)
    place = places.grid_size[1] * (places.grid_size[0] // 2) + places.grid_size[1] // 2
    gradient = torch.autograd.grad(places.values(kept[0])[:, :, place].sum(), image)[0].abs().sum((0, 1))  # (H, W)
    rows, columns = gradient.sum(1).nonzero()[:, 0], gradient.sum(0).nonzero()[:, 0]
    box = (int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    assert box == places.box(place, (side, side))


def test_a_field_begins_where_padding_of_one_side_and_branches_put_it():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifted = nn.Sequential(nn.ZeroPad2d((-1, 1, 2, 0)), nn.Conv2d(3, 2, 1, stride=2))
            self.wide = nn.Sequential(nn.ZeroPad2d((0, 0, 1, 0)), nn.Conv2d(3, 2, (3, 1), stride=2))
            self.pool = nn.AvgPool2d(2, stride=1, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.shifted(x)[:, :, :5] + self.wide(x)[:, :, :5])

    rows = {row.name: row.field for row in layer_table(Branches(), image_size=(12, 12), logits=True)}
    assert rows["shifted.1"] == Field((1, 1), (2, 2), (-2, 1))
    assert rows["wide.1"] == Field((3, 1), (2, 2), (-1, 0))
    # Together they see rows -2 to 1 and columns 0 to 1; the pool one value before that and itself.
    assert rows["pool"] == Field((4 + 2, 2 + 2), (2, 2), (-4, -2))


def test_padding_with_the_images_own_edge_moves_a_field_as_that_with_zeros_does():
    for pad in (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d):
        network = nn.Sequential(nn.Conv2d(3, 2, 2, stride=2), pad((1, 2, 3, 0)), nn.Conv2d(2, 2, 3))
        rows = {row.name: row.field for row in layer_table(network, image_size=(16, 16), logits=True)}
        assert rows["2"] == Field((6, 6), (2, 2), (-6, -2))


def test_a_patch_of_a_transformer_is_its_place_behind_attention_and_its_field_before():
    model, side = built("ViT")
    found = find_places(model, image_size=(side, side), in_chans=3)
    before, behind = found["patch_embed.proj"], found["blocks.1.mlp.act"]
    assert before.field == Field((4, 4), (4, 4), (0, 0))
    assert behind.field is None
    assert behind.num_prefix == 1
    assert before.box(11, (side, side)) == behind.box(11, (side, side)) == (4, 12, 4, 4)
    assert behind.num_units == 128


def test_a_wrong_layer_is_refused_with_the_names_there_are():
    model, side = built("ResNet")
    found = find_places(model, image_size=(side, side), in_chans=3)
    assert choose_layer(found, None, model=model, key="k").layer == "layer4"
    with pytest.raises(ValueError, match=r"k=layer5 is no layer of ResNet; allowed: conv1,.*layer4"):
        choose_layer(found, "layer5", model=model, key="k")
    with pytest.raises(ValueError, match=r"k=global_pool has no values with places"):
        choose_layer(found, "global_pool", model=model, key="k")
    with pytest.raises(ValueError, match=r"inside them.*layer1\.0\.conv1"):
        choose_layer(found, "layer1.0.conv3", model=model, key="k")


# ---- what excites them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layer"),
    [("ResNet", "bn1"), ("ResNet", "layer2"), ("ViT", "blocks.0.mlp.act"), ("ViT", "blocks.1"), ("Swin", "layers.1")],
)
@torch.no_grad()
def test_the_best_places_are_those_of_a_loop_over_images_units_and_places(family, layer):
    model, side = built(family)
    places = find_places(model, image_size=(side, side), in_chans=3)[layer]
    batch = images(7, side)
    numbers = torch.arange(7) * 10
    found = most_exciting(model, places, [(numbers[:4], batch[:4]), (numbers[4:], batch[4:])], num_images=3)
    kept: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda _part, _inputs, output: kept.append(output.clone()))
    pooled_features(model, batch)
    output = kept[0]
    rows, columns = places.grid_size
    assert len(found.value) == places.num_units
    for unit in (0, 3, places.num_units - 1):
        best, every = [], []
        for image in range(7):
            values = []
            for row in range(rows):
                for column in range(columns):
                    if family == "ViT":
                        value = output[image, 1 + row * columns + column, unit]
                    elif family == "Swin":
                        value = output[image, row, column, unit]
                    else:
                        value = output[image, unit, row, column]
                    values.append(float(value))
            best.append((max(values), 10 * image, int(np.argmax(values))))
            every += values
        best = sorted(best, key=lambda each: -each[0])[:3]
        np.testing.assert_allclose(found.value[unit], [each[0] for each in best], rtol=1e-4, atol=1e-6)
        assert found.image[unit].tolist() == [each[1] for each in best]
        assert found.place[unit].tolist() == [each[2] for each in best]
        assert float(found.mean[unit]) == pytest.approx(np.mean(every), rel=1e-3, abs=1e-5)
        assert float(found.variance[unit]) == pytest.approx(np.var(every), rel=1e-3, abs=1e-5)
        assert float(found.low[unit]) == pytest.approx(min(every), rel=1e-4, abs=1e-6)
        assert float(found.high[unit]) == pytest.approx(max(every), rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_the_only_bright_spot_of_many_images_is_the_patch_that_excites_a_unit_of_brightness():
    model, side = built("ResNet")
    cast(Any, model).conv1.weight[2] = 1.0
    places = find_places(model, image_size=(side, side), in_chans=3)["conv1"]
    batch = 0.1 * images(6, side)
    batch[4, :, 20:23, 9:12] = 5.0
    found = most_exciting(model, places, [(torch.arange(6), batch)], num_images=2)
    assert int(found.image[2, 0]) == 4
    assert places.box(int(found.place[2, 0]), (side, side)) == (20, 9, 3, 3)


@torch.no_grad()
def test_a_planted_dead_unit_is_counted_and_never_chosen():
    model, side = built("ResNet")
    cast(Any, model).bn1.weight[4] = 0.0
    places = find_places(model, image_size=(side, side), in_chans=3)["act1"]
    found = most_exciting(model, places, [(torch.arange(4), images(4, side))], num_images=2)
    assert found.dead.nonzero()[:, 0].tolist() == [4]
    everyone = [unit for unit in range(64) if unit != 4]
    assert sorted(choose_units(found, units=None, choose="variance", num=64, seed=0)) == everyone
    assert choose_units(found, units=None, choose="random", num=64, seed=0) == everyone
    first = choose_units(found, units=None, choose="variance", num=1, seed=0)
    assert float(found.variance[first[0]]) == float(found.variance.max())
    draws = {tuple(choose_units(found, units=None, choose="random", num=3, seed=seed)) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def test_a_patch_is_cut_where_its_box_is_and_gray_beyond_the_image():
    pixels = np.arange(6 * 6 * 3, dtype=np.uint8).reshape(6, 6, 3)
    assert (cut(pixels, (1, 2, 3, 2)) == pixels[1:4, 2:4]).all()
    corner = cut(pixels, (-1, 4, 3, 3))
    assert (corner[1:, :2] == pixels[:2, 4:]).all()
    assert (corner[0] == 225).all()
    assert (corner[:, 2] == 225).all()
    large = cut(pixels, (2, -3, 9, 20))  # all columns, and the rows from 2 on
    assert (large[2:] == pixels[2:]).all()
    assert (large[:2] == 225).all()
    assert large.shape == pixels.shape


# ---- the looks -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mae", "simclr", "relative_location"])
def trained(request, tmp_path_factory) -> Path:
    words = ["data.image_size=96", "data.source.size=96"] if request.param == "relative_location" else []
    return pretrained(tmp_path_factory.mktemp(request.param) / "run", request.param, *words)


def folder_of(root: Path, num_good: int) -> list[str]:
    """The words for a folder of four files, of which the first can be decoded."""
    for number in range(4):
        pixels = np.full((32, 32, 3), 60 * number, np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        if number >= num_good:
            (root / f"{number}.png").write_bytes(b"broken")
    return [*TINY_RESNET, "data=folder", f"data.root={root}", "split=train"]


def test_images_that_cannot_be_decoded_are_noted_and_not_counted(tmp_path):
    scene = make_scene("random", "activations", *folder_of(tmp_path, 3))
    found = activations.look(scene)
    assert found.data["num_sampled"] == 3
    assert any("over 3 images" in line for line in found.lines)
    assert any("3.png" in note for note in scene.notes)
    assert {Path(each["name"]).name for unit in found.data["units"] for each in unit["patches"]} <= {
        f"{number}.png" for number in range(3)
    }


def test_a_folder_of_broken_images_excites_nothing_and_that_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 4 images of .* can be decoded"):
        activations.look(make_scene("random", "activations", *folder_of(tmp_path, 0)))


def test_both_looks_work_on_the_checkpoints_of_every_method(trained, tmp_path):
    result = command.run(look_config(trained, "[filters,activations]", f"out={tmp_path}"))
    found = json.loads((tmp_path / "activations.json").read_text())
    units = found["data"]["units"]
    assert len(units) == 8
    for unit in units:
        values = [each["value"] for each in unit["patches"]]
        assert values == sorted(values, reverse=True)
        assert len({each["image"] for each in unit["patches"]}) == 8
    scene = make_scene(trained)
    layer = first_layer(scene.backbone, scene.shown().image)
    with np.load(tmp_path / "filters.npz") as arrays:
        np.testing.assert_array_equal(arrays["weight"], layer.weight)
    change = filters.filter_change(layer.weight, first_layer(scene.untrained(), scene.shown().image).weight)
    assert result["metrics"]["filters.mean_change"] == pytest.approx(float(change.mean()))
    assert result["metrics"]["filters.mean_change"] > 0
    for name in ("filters", "activations", "activations_images"):
        assert (tmp_path / f"{name}.png").exists()
    assert (tmp_path / "filters_components.png").exists() == layer.is_embedding


def test_units_of_a_last_map_of_one_place_give_way_to_the_last_of_four_by_four_and_that_is_said():
    words = [*TINY_RESNET, *EMBEDDED, "model.stem=standard"]
    found = activations.look(make_scene("random", "activations", *words))
    assert (found.data["layer"], found.data["grid_size"]) == ("layer2", (4, 4))
    assert "activations.layer=layer4 shows that one" in found.lines[-1]
    asked = activations.look(make_scene("random", "activations", *words, "activations.layer=layer4"))
    assert asked.data["grid_size"] == (1, 1)


def test_the_value_of_a_unit_is_found_again_on_the_image_that_is_named(tmp_path):
    words = ["model=vit_micro", *TINY_VIT[1:], *EMBEDDED]
    command.run(
        look_config(
            "random", "activations", *words, "activations.layer=blocks.0", "activations.units=[5]", f"out={tmp_path}"
        )
    )
    patch = json.loads((tmp_path / "activations.json").read_text())["data"]["units"][0]["patches"][2]
    scene = make_scene("random", "views", *words, f"indices=[{patch['image']}]")
    kept: list[Tensor] = []
    handle = scene.backbone.get_submodule("blocks.0").register_forward_hook(lambda _p, _i, output: kept.append(output))
    pooled_features(scene.backbone, scene.shown().image)
    handle.remove()
    row, column = patch["cell"]
    assert float(kept[0][0, 1 + row * 8 + column, 5]) == pytest.approx(patch["value"], rel=1e-4)
    assert float(kept[0][0, 1:, 5].max()) == pytest.approx(patch["value"], rel=1e-4)


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        ("activations", ["activations.units=[16]"], r"some of the 16 units of layer4, 0\.\.15"),
        ("activations", ["activations.choose=best"], "must be one of variance, random"),
        ("activations", ["activations.num_patches=0"], "num_patches must be at least 1"),
        ("activations", ["activations.units=[1]", "activations.num_units=3"], "num_units has no effect"),
        ("filters", ["filters.order=size"], "must be one of norm, index"),
        ("filters", ["filters.num_components=5"], "conv1 is no patch embedding"),
        ("filters", ["filters.num=0"], "filters.num must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(what, words, message):
    scene = make_scene("random", what, *TINY_RESNET, *EMBEDDED, *words)
    with pytest.raises(ValueError, match=message):
        {"activations": activations, "filters": filters}[what].look(scene)


def test_what_the_image_shows_is_not_moved_by_places_without_units():
    assert Places("l", "Conv2d", 4, (3, 5), 0, 1, False, None).cell(7, (9, 20)) == (3, 8, 3, 4)
