"""A backbone as a classifier: pooling, dropout, drop path, freezing and layer decay do what they claim to do."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from ssl.models.backbones import build_backbone
from ssl.models.classifier import freeze, head_names, make_classifier, put_weights, set_mode
from ssl.optim import make_optimizer, parameter_groups, set_lr

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def a_backbone(name: str = "vit_tiny_patch16_224", **args):
    torch.manual_seed(0)
    return build_backbone(name, image_size=(32, 32), model_args=args or VIT)


def a_classifier(name: str = "vit_tiny_patch16_224", args=None, **settings):
    _, spec = a_backbone(name, **(args or VIT))
    return make_classifier(spec, num_classes=5, **settings)[0]


def test_its_logits_are_those_of_timms_model_with_the_same_weights():
    backbone, spec = a_backbone()
    model, _ = make_classifier(spec, num_classes=5, head_std=0.1)
    put_weights(model, backbone.state_dict())
    image = torch.randn(3, 3, 32, 32)
    head = model.get_classifier()
    features = backbone.eval()(image)
    torch.testing.assert_close(model.eval()(image), features @ head.weight.T + head.bias)


def test_averaged_patches_are_timms_with_a_norm_of_their_own():
    backbone, spec = a_backbone()
    model, described = make_classifier(spec, num_classes=5, pooling="avg")
    notes = put_weights(model, backbone.state_dict())
    assert described.model_args["global_pool"] == "avg"
    assert any("fc_norm" in note for note in notes)
    assert any("norm.bias, norm.weight" in note for note in notes)
    image = torch.randn(2, 3, 32, 32)
    backbone.eval()
    backbone.norm = nn.Identity()  # the tokens before the norm that the class token passes
    tokens = backbone.forward_features(image)[:, 1:].mean(1)
    torch.testing.assert_close(model.eval().forward_head(model.forward_features(image), pre_logits=True),
                               nn.functional.layer_norm(tokens, (32,), eps=model.fc_norm.eps))  # fmt: skip


def test_weights_that_do_not_belong_are_listed():
    backbone, spec = a_backbone()
    model, _ = make_classifier(spec, num_classes=5)
    tensors = dict(backbone.state_dict())
    tensors["extra"] = tensors.pop("cls_token")
    with pytest.raises(ValueError, match="missing: cls_token; left over: extra"):
        put_weights(model, tensors)


@pytest.mark.parametrize(("name", "args"), [("vit_tiny_patch16_224", VIT), ("resnet18", RESNET)])
@pytest.mark.parametrize("setting", ["dropout", "drop_path"])
def test_dropout_and_drop_path_act_in_training_alone(name: str, args: dict, setting: str):
    model = a_classifier(name, args, **{setting: 0.5}, head_std=0.1)
    image = torch.randn(4, 3, 32, 32)
    for part in model.modules():
        if hasattr(part, "bn2"):
            nn.init.ones_(part.bn2.weight)  # timm starts a residual branch at zero, where dropping it changes nothing
    model.train()
    set_norms_eval(model)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))
    plain = a_classifier(name, args, head_std=0.1).train()
    set_norms_eval(plain)
    assert torch.equal(plain(image), plain(image))


def set_norms_eval(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="pooling=avg is for vision transformers"):
        a_classifier("resnet18", RESNET, pooling="avg")
    with pytest.raises(ValueError, match="dropout is a probability"):
        a_classifier(dropout=1.5)


@pytest.mark.parametrize(
    ("name", "args", "train", "trained"),
    [
        ("vit_tiny_patch16_224", VIT, "head", {"head"}),
        ("vit_tiny_patch16_224", VIT, 1, {"blocks.3", "norm", "head"}),
        ("vit_tiny_patch16_224", VIT, 2, {"blocks.2", "blocks.3", "norm", "head"}),
        ("resnet18", RESNET, "head", {"fc"}),
        ("resnet18", RESNET, 1, {"layer4", "fc"}),
        ("resnet18", RESNET, 3, {"layer2", "layer3", "layer4", "fc"}),
    ],
)
def test_freezing_leaves_the_last_stages_to_be_trained(name: str, args: dict, train, trained: set[str]):
    model = a_classifier(name, args)
    freeze(model, train)
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moving == {n for n, _ in model.named_parameters() if n.startswith(tuple(f"{part}." for part in trained))}


def test_all_frozen_stages_keep_weights_and_statistics_through_a_step():
    model = a_classifier("resnet18", RESNET, drop_path=0.5)
    freeze(model, 1)
    set_mode(model, True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8) % 5).backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed
    assert all(name.startswith(("layer4.", "fc.")) for name in changed)
    assert any("running_mean" in name for name in changed)


def test_a_number_of_stages_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="a number of last stages from 1 to"):
        freeze(a_classifier(), 40)


@pytest.mark.parametrize("pooling", ["avg", "token"])
def test_layer_decay_is_that_of_mae(pooling: str):
    """main_finetune.py, get_layer_id_for_vit: embeddings 0, block i is i + 1, all else depth + 1, at the full rate."""
    module = nn.Module()
    module.backbone = a_classifier(pooling=pooling)
    groups = parameter_groups(module, weight_decay=0.05, layer_decay=0.65)
    optimizer = make_optimizer(groups, name="adamw", lr=1e-3)
    set_lr(optimizer, 2e-3)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    depth = 4
    for name, rate in rates.items():
        part = name.removeprefix("backbone.")
        layer = depth + 1
        if part.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif part.startswith("blocks"):
            layer = int(part.split(".")[1]) + 1
        assert rate == pytest.approx(2e-3 * 0.65 ** (depth + 1 - layer)), name


def test_the_head_starts_as_asked():
    model = a_classifier(head_std=2e-5)
    names = head_names(model)
    assert names == {"head.weight", "head.bias"}
    assert model.head.weight.abs().max() <= 4e-5 + 1e-9
    assert model.head.weight.std().item() == pytest.approx(2e-5 * 0.88, rel=0.15)  # of a normal cut at two deviations
    assert not model.head.bias.any()
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=4, **VIT)
    assert set(model.state_dict()) == set(reference.state_dict())
