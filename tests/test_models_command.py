"""`python -m ssl.models`: what it counts against closed forms and published numbers, what it lists, and its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

from ssl.config import CONF
from ssl.models.__main__ import main
from ssl.models.backbones import build_backbone
from ssl.models.layer_table import Layer, folded, layer_table
from ssl.models.presets import accepted, built, find, presets, row
from ssl.models.torchvision_models import model_names
from ssl.tables import shown

SLOW = ("densenet", "inception_", "nasnet", "vit_b", "vit_h", "vit_l", "vit_s", "vit_t", "resnet101", "ecaresnet")
PARTS = [name for name in presets() if not name.startswith(SLOW)]  # vit_micro stands for all ViTs
PARTS += ["torchvision/swin_t", "torchvision/vit_b_16", "beit_base_patch16_224", "coatnet_0_224"]
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "backbones.md").read_text()


def on_meta(name: str, side: int, *, num_classes: int = 0) -> nn.Module:
    with torch.device("meta"):
        backbone, _ = build_backbone(name, image_size=(side, side))
        if num_classes:
            backbone.reset_classifier(num_classes)  # pyright: ignore[reportCallIssue]
    return backbone


def table(name: str, side: int) -> dict[str, Layer]:
    return {layer.name: layer for layer in layer_table(on_meta(name, side), image_size=(side, side))}


def last_map(layers: dict[str, Layer]) -> tuple[int, int]:
    """The largest field of all layers before the pooling."""
    fields = [layer.field.size for layer in layers.values() if layer.field is not None]
    return max(size[0] for size in fields), max(size[1] for size in fields)


def test_three_convolutions_of_vgg_see_seven_pixels() -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    layers = layer_table(model, image_size=(20, 20), logits=True)
    assert [layer.field.size for layer in layers if layer.field] == [(3, 3), (5, 5), (7, 7)]
    of_vgg = table("vgg16", 224)
    assert of_vgg["features.10"].field is not None
    before = of_vgg["features.9"].field
    after = of_vgg["features.14"].field
    assert before is not None
    assert after is not None
    assert (after.size[0] - before.size[0]) // before.jump[0] + 1 == 7  # three 3 x 3 convolutions, on the same map


def test_vgg16_has_its_published_parameters_and_multiply_adds() -> None:
    model = on_meta("vgg16", 224, num_classes=1000)
    layers = layer_table(model, image_size=(224, 224), logits=True)
    # Simonyan and Zisserman 2014, Table 2: 138 M; one multiply-add per weight and position, 15.5 G.
    channels = [(3, 64, 224), (64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), *[(256, 256, 56)] * 2]
    channels += [(256, 512, 28), *[(512, 512, 28)] * 2, *[(512, 512, 14)] * 3, (512 * 49, 4096, 1 / 3)]
    products = sum(9 * inside * outside * side * side for inside, outside, side in channels)
    products += 4096 * 4096 + 4096 * 1000
    assert sum(layer.multiply_adds for layer in layers) == pytest.approx(products)
    assert products / 1e9 == pytest.approx(15.5, abs=0.05)
    assert sum(layer.parameters for layer in layers) == 138_357_544


def test_activations_of_vgg_are_its_maps() -> None:
    layers = table("vgg16", 224)
    first, activation, pool = (layers[f"features.{number}"] for number in (2, 3, 4))
    assert (first.made, activation.made) == (64 * 224 * 224 * 4, 0)  # ReLU works in place
    assert activation.kept == 64 * 224 * 224 * 4
    assert pool.made == 64 * 112 * 112 * (4 + 8)  # values, and where they come from
    assert layers["features.0"].kept == 3 * 224 * 224 * 4  # the image


@pytest.mark.parametrize(
    ("name", "side", "pixels"),
    [
        ("torchvision/alexnet", 224, 195),
        ("torchvision/vgg16", 224, 212),
        ("mobilenetv1_100", 224, 315),
        ("inception_v3", 299, 1311),
    ],
)
def test_receptive_fields_are_the_published_ones(name: str, side: int, pixels: int) -> None:
    # Araujo et al. 2019, Computing Receptive Fields of Convolutional Neural Networks, the table of networks.
    assert last_map(table(name, side)) == (pixels, pixels)


def test_dilation_widens_the_field_and_the_largest_branch_counts() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Conv2d(3, 4, 3, padding=4, dilation=4)
            self.narrow = nn.Conv2d(3, 4, (1, 5), padding=(0, 2))
            self.last = nn.Conv2d(4, 4, 2, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.wide(x) + self.narrow(x))

    fields = {layer.name: layer.field for layer in layer_table(Branches(), image_size=(16, 16), logits=True)}
    sizes = {name: None if field is None else (field.size, field.jump) for name, field in fields.items()}
    assert sizes["wide"] == ((9, 9), (1, 1))
    assert sizes["narrow"] == ((1, 5), (1, 1))
    assert sizes["last"] == ((10, 10), (2, 2))


def test_no_field_is_told_behind_attention_and_that_of_patches_is_before_it() -> None:
    layers = table("vit_tiny_patch16_224", 224)
    embedding = layers["patch_embed.proj"].field
    assert embedding is not None
    assert embedding.size == (16, 16)
    assert layers["blocks.0.attn.proj"].field is None
    assert layers["blocks.11.mlp.fc2"].field is None


def test_folding_keeps_the_sums_and_the_model_is_left_as_it_was() -> None:
    backbone, _ = build_backbone("resnet18", image_size=(64, 64), model_args={"layers": [1] * 4, "channels": [8] * 4})
    backbone.eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    layers = layer_table(backbone, image_size=(64, 64))
    rows = folded(layers, 1)
    by_name = {each.name: each for each in rows}
    assert by_name["layer4"].shape == (8, 8, 8)
    stages = [f"layer{number}" for number in (1, 2, 3, 4)]
    assert [each.name for each in rows] == ["conv1", "bn1", "act1", *stages, "global_pool"]
    for share in ("parameters", "multiply_adds", "made", "kept"):
        assert sum(getattr(each, share) for each in rows) == sum(getattr(each, share) for each in layers)
    assert sum(each.parameters for each in rows) == sum(parameter.numel() for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", PARTS)
def test_rows_together_have_the_parameters_of_the_model(name: str) -> None:
    backbone, spec = built(find(name), 224)
    layers = layer_table(backbone, image_size=spec.image_size)
    assert sum(layer.parameters for layer in layers) == sum(parameter.numel() for parameter in backbone.parameters())


def test_counting_with_the_classifier_leaves_the_models_own_tensors() -> None:
    model = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3)
    before = list(model.parameters())
    layer_table(model, image_size=(32, 32), logits=True)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert type(model(torch.zeros(2, 3, 32, 32))) is torch.Tensor


def test_a_folded_row_has_the_output_of_its_module() -> None:
    rows = {
        each.name: each
        for each in folded(layer_table(on_meta("swin_tiny_patch4_window7_224", 64), image_size=(64, 64)), 1)
    }
    assert rows["layers"].shape == (2, 2, 768)
    assert rows["patch_embed"].shape == (16, 16, 96)


def test_a_wrong_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no preset.*near it: .*shufflenet_v2_x1_0"):
        find("shufflenet_v2_x10")
    with pytest.raises(ValueError, match="image_sizes=3 is not taken; it may be image_size=NUMBER"):
        main(["resnet18", "image_sizes=3"])


def test_the_command_prints_layers_sums_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["resnet10", "depth=1", "image_size=96"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet10: resnet18, timm; image 3 x 96 x 96"
    same = timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), num_classes=0)
    parameters = sum(parameter.numel() for parameter in same.parameters())
    assert next(line for line in lines if line.startswith("together")).split()[1] == f"{parameters:,}"
    assert "method=simclr: yes, at 96 pixels" in lines
    assert any(line.startswith("method=mae: no: method=mae needs a backbone") for line in lines)


def test_methods_take_what_they_can_at_the_size_at_which_they_can() -> None:
    of_inception, of_vit = accepted(find("inception_v3")), accepted(find("vit_micro"))
    assert (of_inception["simclr"].side, of_inception["relative_location"].side) == (224, 288)
    assert (of_vit["mae"].side, of_vit["relative_location"].side) == (224, 224)


@pytest.mark.parametrize("name", ["swin_t", "convnext_t"])
def test_mae_takes_maps_of_tokens_in_place(name: str) -> None:
    answers = accepted(find(name))
    assert (answers["mae"].side, answers["mae"].in_place) == (224, True)
    assert (answers["simmim"].side, answers["simmim"].in_place) == (224, False)


def test_methods_are_asked_at_the_size_and_channels_given(capsys: pytest.CaptureFixture[str]) -> None:
    main(["vit_micro", "image_size=32", "in_chans=1", "depth=1"])
    lines = capsys.readouterr().out.splitlines()
    assert "method=simclr: yes, at 32 pixels" in lines
    assert "method=mae: yes, at 32 pixels" in lines
    answer = accepted(find("inception_v3"), side=96)["relative_location"]
    assert answer.side == 288
    assert answer.refusal


@pytest.mark.parametrize("option", ["image_size=0", "in_chans=0"])
def test_an_image_of_nothing_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is not taken"):
        main(["resnet10", option])


def test_help_tells_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "image_size=160 num_classes=1000 in_chans=1 depth=1" in capsys.readouterr().out


def rows_of_the_page(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_preset() -> None:
    assert [cells[0] for cells in rows_of_the_page("Presets")[2:]] == list(presets())


@pytest.mark.parametrize("name", presets())
def test_the_page_and_the_preset_say_what_is_counted(name: str) -> None:
    header, _, *rows = rows_of_the_page("Presets")
    preset = presets()[name]
    counted = row(preset)
    expected = {column: shown(column, value) for column, value in counted.items()}
    assert dict(zip(header, next(cells for cells in rows if cells[0] == name), strict=True)) == expected
    first = Path(CONF, "model", f"{name}.yaml").read_text().split("\n")[0]
    millions = float(re.search(r"([\d.]+) M parameters", first)[1])  # pyright: ignore[reportOptionalSubscript]
    if name != "vit_micro":  # counted at patches of four pixels there
        assert counted["M parameters"] == pytest.approx(millions, abs=0.051)


def test_every_name_on_the_page_is_one() -> None:
    known = {*presets(), *timm.list_models(), *model_names()}
    rows = rows_of_the_page("Families")[2:]
    listed, rest = (set(re.findall(r"`(.+?)`", " ".join(cells[column] for cells in rows))) for column in (1, 2))
    assert (listed | rest) - known == set()
    assert set(presets()) - listed == {"resnet10", "vit_micro"}  # for CPUs and tests


def test_a_preset_of_torchvision_says_so_and_others_do_not() -> None:
    for path in Path(CONF, "model").glob("*.yaml"):
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        if values["name"] != "???":
            known = model_names() if values.get("library") == "torchvision" else timm.list_models()
            assert values["name"] in known
