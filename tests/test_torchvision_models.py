"""torchvision's models behind timm's interface, against torchvision's own forward pass and keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

from eval.layers import FeatureSet, make_extract, resolve_sets
from ssl.models.backbones import BackboneSpec, build_backbone, feature_dim, model_name, pooled_features
from ssl.models.classifier import freeze, make_classifier
from ssl.models.image_size import at_image_size
from ssl.models.torchvision_models import TorchvisionModel, create_torchvision

MODELS: dict[str, tuple[str, int]] = {
    # name: the module that reads the features, and the side of the image
    "alexnet": ("classifier.6", 64),
    "googlenet": ("fc", 64),
    "shufflenet_v2_x0_5": ("fc", 32),
    "densenet121": ("classifier", 64),
    "mobilenet_v3_small": ("classifier.3", 64),
    "mnasnet0_5": ("classifier.1", 64),
    "regnet_y_400mf": ("fc", 64),
    "convnext_tiny": ("classifier.2", 64),
    "swin_t": ("head", 64),
    "vit_b_16": ("heads.head", 32),
}


def image(side: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def theirs(name: str, tensors: dict[str, Tensor], **args: Any) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None, **args)
    own = model.state_dict()
    assert own.keys() == tensors.keys()
    own.update(tensors)  # which keeps the version that MNASNet asks for
    model.load_state_dict(own)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keys_logits_and_what_the_last_layer_reads_are_torchvisions(name: str) -> None:
    last, side = MODELS[name]
    sizes = {"image_size": (side, side)} if name == "vit_b_16" else {}
    ours = create_torchvision(name, num_classes=5, **sizes).eval()
    args: dict[str, Any] = {"num_classes": 5}
    if name == "googlenet":
        args |= {"aux_logits": False, "init_weights": True}
    if name == "vit_b_16":
        args["image_size"] = side
    model = theirs(name, ours.state_dict(), **args)
    read: list[Tensor] = []
    model.get_submodule(last).register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    torch.testing.assert_close(ours(image(side)), model(image(side)))
    features = pooled_features(ours, image(side))
    torch.testing.assert_close(features, read[0])
    assert features.shape == (2, ours.head_hidden_size)
    ours.reset_classifier(0)
    torch.testing.assert_close(ours(image(side)), features)
    assert set(model.state_dict()) - set(ours.state_dict()) == {
        key for key in model.state_dict() if key.startswith(f"{last}.")
    }


@torch.no_grad()
def test_a_convolution_that_classifies_leaves_the_average_of_what_it_reads() -> None:
    ours = create_torchvision("squeezenet1_1", num_classes=5).eval()
    model = theirs("squeezenet1_1", ours.state_dict(), num_classes=5)
    read: list[Tensor] = []
    model.get_submodule("classifier.1").register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    torch.testing.assert_close(ours(image(64)), model(image(64)))
    torch.testing.assert_close(pooled_features(ours, image(64)), read[0].mean((2, 3)))
    ours.reset_classifier(7)
    assert ours(image(64)).shape == (2, 7)


def test_another_number_of_channels_keeps_the_first_layers_variance() -> None:
    torch.manual_seed(0)
    three = create_torchvision("squeezenet1_1", num_classes=0)
    twelve = create_torchvision("squeezenet1_1", num_classes=0, in_chans=12)
    first, other = three.get_submodule("features.0"), twelve.get_submodule("features.0")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(other, nn.Conv2d)
    assert (other.in_channels, other.out_channels, other.stride, other.padding) == (12, 64, (2, 2), (0, 0))
    noise = [torch.randn(4, channels, 16, 16) for channels in (3, 12)]
    with torch.no_grad():
        spread = [float(layer(x).std()) for layer, x in zip((first, other), noise)]
    assert spread[1] == pytest.approx(spread[0], rel=0.1)


def test_drop_path_reaches_its_rate_at_the_deepest_block_and_is_timms() -> None:
    model, _ = build_backbone("torchvision/efficientnet_b0", image_size=(64, 64), drop_path=0.3)
    found = [float(module.drop_prob) for module in model.modules() if isinstance(module, DropPath)]
    shares = [module.p for module in torchvision.models.efficientnet_b0().modules() if hasattr(module, "p")]
    shares = [share for share in shares if isinstance(share, float)][: len(found)]
    assert max(found) == pytest.approx(0.3)
    assert found == pytest.approx([0.3 * share / max(shares) for share in shares])
    plain, _ = build_backbone("torchvision/efficientnet_b0", image_size=(64, 64))
    assert {module.drop_prob for module in plain.modules() if isinstance(module, DropPath)} == {0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "torchvision/alexnett"}, r"no model named 'alexnett'; close to it: alexnet"),
        ({"name": "alexnet"}, r"model=torchvision model.name=alexnet"),
        ({"name": "torchvision/alexnet", "image_size": (32, 32)}, r"it fits data.image_size=64"),
        ({"name": "torchvision/alexnet", "drop_path": 0.1}, r"takes no drop path"),
        ({"name": "torchvision/alexnet", "patch_size": 8}, r"set it to null"),
        ({"name": "torchvision/resnet18", "stem": "small"}, r"set model.stem=auto"),
        ({"name": "torchvision/googlenet", "model_args": {"aux_logits": True}}, r"auxiliary heads are off"),
        ({"name": "torchvision/googlenet", "model_args": {"widths": 3}}, r"unexpected keyword argument 'widths'"),
        ({"name": "torchvision/vit_b_16", "image_size": (64, 96)}, r"takes square images"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(settings: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_backbone(**{"image_size": (64, 64), **settings})


@pytest.mark.parametrize("architecture", ["torchvision/../alexnet", "torchvision/nothing", "torchvision/"])
def test_a_checkpoint_names_torchvisions_models_alone(architecture: str) -> None:
    values = {"architecture": architecture, "image_size": [64, 64], "in_chans": 3, "model_args": {}, "stem": "standard"}
    with pytest.raises(ValueError, match="nor torchvision/"):
        BackboneSpec.from_dict(values)
    with pytest.raises(ValueError, match="'weights', which is refused"):
        BackboneSpec.from_dict(
            {**values, "architecture": "torchvision/alexnet", "model_args": {"weights": "IMAGENET1K_V1"}}
        )


def test_a_setting_of_the_library_chooses_between_two_models_of_one_name() -> None:
    assert model_name({"name": "resnet50", "library": "torchvision"}) == "torchvision/resnet50"
    assert model_name({"name": "resnet50", "library": "timm"}) == model_name({"name": "resnet50"}) == "resnet50"


def test_the_same_weights_at_another_size() -> None:
    model, spec = build_backbone("torchvision/googlenet", image_size=(64, 64))
    other, other_spec, _ = at_image_size(model.eval(), spec, (96, 64))
    assert other_spec.image_size == (96, 64)
    assert feature_dim(other, image_size=(96, 64)) == 1024
    torch.testing.assert_close(pooled_features(other, image(64)), pooled_features(model, image(64)))


def test_a_classifier_and_its_last_stage_alone_are_trained() -> None:
    with torch.device("meta"):
        _, spec = build_backbone("torchvision/alexnet", image_size=(64, 64))
        model, _ = make_classifier(spec, num_classes=4, dropout=0.25)
    frozen = freeze(model, 1)
    trained = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.1", "classifier.4", "classifier.6"}
    assert len(frozen) == 10
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.25, 0.25]


@pytest.mark.parametrize("coarse", [True, False])
def test_layers_are_grouped_in_the_order_in_which_they_run(coarse: bool) -> None:
    with torch.device("meta"):
        model = create_torchvision("googlenet", num_classes=3)
    groups: Any = group_parameters(model, model.group_matcher(coarse), reverse=True)
    names = ["conv1.conv.weight", "inception3a.branch1.conv.weight", "inception5b.branch1.conv.weight", "fc.weight"]
    places = [groups[name] for name in names]
    assert places == sorted(set(places))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert max(groups.values()) == (5 if coarse else 12)


def test_only_the_last_layer_is_there_where_a_model_keeps_no_map() -> None:
    with torch.device("meta"):
        model, _ = build_backbone("torchvision/vit_b_16", image_size=(32, 32))
    with pytest.raises(ValueError, match="cannot take TorchvisionModel apart"):
        resolve_sets(model, [FeatureSet("0")])
    assert isinstance(model, TorchvisionModel)
    with pytest.raises(ValueError, match="no stages of feature maps"):
        model.forward_intermediates(torch.empty(1, 3, 32, 32, device="meta"))


@torch.no_grad()
def test_swins_channels_last_maps_are_stages_with_channels_first() -> None:
    model = create_torchvision("swin_t", num_classes=0).eval()
    seen: list[Tensor] = []
    for name in ("1.1", "3.1", "5.5"):
        model.get_submodule(f"features.{name}").register_forward_hook(lambda _m, _i, output: seen.append(output))
    final, maps = model.forward_intermediates(image(64))
    shapes = [(2, 96, 16, 16), (2, 192, 8, 8), (2, 384, 4, 4), (2, 768, 2, 2)]
    assert [each.shape for each in maps] == shapes
    assert [(each["num_chs"], each["reduction"]) for each in model.feature_info] == [
        (96, 4),
        (192, 8),
        (384, 16),
        (768, 32),
    ]
    for given, read in zip(seen, maps):
        torch.testing.assert_close(read, given.permute(0, 3, 1, 2))
    torch.testing.assert_close(maps[-1], final)


def test_no_random_number_is_spent_on_taking_a_model_apart() -> None:
    torch.manual_seed(0)
    create_torchvision("shufflenet_v2_x1_5", num_classes=0)  # taken apart here
    first = torch.rand(1)
    torch.manual_seed(0)
    create_torchvision("shufflenet_v2_x1_5", num_classes=0)  # known by now
    assert torch.equal(torch.rand(1), first)


@torch.no_grad()
def test_extracting_runs_the_model_once_for_all_stages() -> None:
    model, _ = build_backbone("torchvision/squeezenet1_1", image_size=(64, 64))
    runs: list[int] = []
    model.get_submodule("features.0").register_forward_hook(lambda *_: runs.append(1))
    sets = resolve_sets(model, [FeatureSet("0"), FeatureSet("1", "grid", 128), FeatureSet()])
    found = make_extract(model, sets, device=torch.device("cpu"), dtype=torch.float32)(image(64))
    assert [each.shape for each in found] == [(2, 64), (2, 128), (2, 512)]
    assert len(runs) == 1
