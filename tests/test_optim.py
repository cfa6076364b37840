from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import load, save
from timm.optim import Lamb, Lars, param_groups_layer_decay
from torch import nn

from ssl.optim import (
    make_optimizer,
    parameter_groups,
    scaled_lr,
    set_lr,
    state_to_tensors,
    tensors_to_state,
)
from tests import test_sharding
from tests.pool import Pool

OPTIMIZERS = {
    "adamw": {"betas": [0.9, 0.95]},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "lars": {"momentum": 0.9, "trust_coeff": 0.001},
    "adam": {"betas": [0.8, 0.99]},
    "rmsprop": {"alpha": 0.9, "momentum": 0.9, "centered": True},
    "lamb": {"betas": [0.9, 0.98]},
}


class Pretraining(nn.Module):
    """A backbone with a head, and the parameters that ought not to be decayed in a decoder."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, 10)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4, 8), requires_grad=False)


def vit(**kwargs) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, reg_tokens=2, **kwargs
    )


def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=0, channels=(4, 8, 8, 8))


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("backbone", [lambda: vit(num_classes=0), resnet], ids=["vit", "resnet"])
def test_every_trained_parameter_is_in_exactly_one_group(backbone, layer_decay):
    method = Pretraining(backbone())
    groups = parameter_groups(method, weight_decay=0.05, layer_decay=layer_decay)
    expected = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(expected)
    for group in groups:
        assert all(parameter is expected[name] for name, parameter in zip(group["names"], group["params"], strict=True))
    if layer_decay is None:
        assert len(groups) == 2


def test_class_token_and_position_are_trained_and_not_decayed():
    groups = parameter_groups(Pretraining(vit(num_classes=0)), weight_decay=0.05)
    plain = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    tokens = {"backbone.cls_token", "backbone.pos_embed", "backbone.reg_token", "mask_token"}
    assert tokens <= plain


def test_only_matrices_and_kernels_are_decayed():
    for backbone in (vit(num_classes=0), resnet()):
        groups = parameter_groups(Pretraining(backbone), weight_decay=0.05)
        decayed = [name for group in groups if group["weight_decay"] for name in group["names"]]
        assert decayed
        for name in decayed:
            assert name.endswith("weight")
            assert "norm" not in name
            assert ".bn" not in name


def test_frozen_parameters_are_in_no_group():
    method = Pretraining(resnet())
    method.backbone.requires_grad_(False)
    names = [name for group in parameter_groups(method, weight_decay=0.1) for name in group["names"]]
    assert sorted(names) == ["head.bias", "head.weight", "mask_token"]


def test_names_of_no_weight_decay_and_extra_patterns_are_honoured():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, embed_dim=12, depths=(1, 1), num_heads=(2, 2)
    )
    groups = parameter_groups(Pretraining(swin), weight_decay=0.1, no_decay_extra=("head.*",))
    decayed = [name for group in groups if group["weight_decay"] for name in group["names"]]
    assert not [name for name in decayed if "relative_position_bias_table" in name or name.startswith("head")]


def test_a_norm_with_more_than_one_dimension_is_not_decayed():
    groups = parameter_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 2))), weight_decay=0.1)
    assert [group["names"] for group in groups] == [["0.weight"], ["0.bias", "1.weight", "1.bias"]]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1)


def test_layer_decay_equals_that_of_timms_classifier_but_for_the_last_norm():
    """timm counts the norm behind the last block with that block, MAE's main_finetune.py with the head."""
    theirs = vit(num_classes=10)
    expected = {}
    for group in param_groups_layer_decay(
        theirs, weight_decay=0.05, layer_decay=0.65, no_weight_decay_list=theirs.no_weight_decay()
    ):
        expected |= {id(parameter): (group["lr_scale"], group["weight_decay"]) for parameter in group["params"]}
    expected = {name: expected[id(parameter)] for name, parameter in theirs.named_parameters()}

    ours = {}
    for group in parameter_groups(Pretraining(vit(num_classes=0)), weight_decay=0.05, layer_decay=0.65):
        ours |= {name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"]) for name in group["names"]}
    ours.pop("mask_token")
    assert ours.keys() == expected.keys()
    for name, (scale, decay) in expected.items():
        scale = 1.0 if name.startswith("norm.") else scale
        assert ours[name] == (pytest.approx(scale), decay), name


def test_set_lr_applies_layer_decay():
    groups = parameter_groups(Pretraining(vit(num_classes=0)), weight_decay=0.05, layer_decay=0.5)
    optimizer = make_optimizer(groups, name="adamw", lr=1.0)
    set_lr(optimizer, 0.8)
    rate = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rate["head.weight"] == pytest.approx(0.8)
    assert rate["backbone.blocks.2.mlp.fc1.weight"] == pytest.approx(0.4)
    assert rate["backbone.blocks.0.mlp.fc1.weight"] == pytest.approx(0.1)
    assert rate["backbone.pos_embed"] == pytest.approx(0.05)


def test_layer_decay_without_layers_is_an_error():
    with pytest.raises(ValueError, match="layer_decay=null"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.1, layer_decay=0.5)


def test_scaled_lr_follows_the_papers():
    assert scaled_lr(1.5e-4, global_batch_size=4096, scaling="linear") == pytest.approx(2.4e-3)
    assert scaled_lr(0.075, global_batch_size=4096, scaling="sqrt") == pytest.approx(4.8)
    assert scaled_lr(0.075, global_batch_size=4096, scaling="sqrt") == pytest.approx(0.3 * 4096 / 256)
    assert scaled_lr(0.5, global_batch_size=7, scaling="none") == 0.5
    with pytest.raises(ValueError, match="linear, sqrt or none"):
        scaled_lr(0.5, global_batch_size=7, scaling="cubic")


def test_options_of_another_optimizer_are_refused():
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    with pytest.raises(ValueError, match="betas, eps, fused; got momentum"):
        make_optimizer(groups, name="adamw", lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="adamw, adam, rmsprop, sgd, lars, lamb; got 'lion'"):
        make_optimizer(groups, name="lion", lr=0.1)


@pytest.mark.parametrize(
    ("name", "kind", "lr_at_4096"),
    [
        ("adamw", torch.optim.AdamW, 2.4e-3),
        ("lars", Lars, 4.8),
        ("sgd", torch.optim.SGD, 1.6),
        ("rmsprop", torch.optim.RMSprop, 0.256),
        ("adam", torch.optim.Adam, 1e-3),
        ("lamb", Lamb, 5e-3 * math.sqrt(2)),  # 5e-3 at 2048
    ],
)
def test_recipes_of_conf_build_their_optimizer_at_the_papers_rate(name, kind, lr_at_4096):
    recipe = OmegaConf.load(Path(__file__).resolve().parents[1] / "conf" / "optim" / f"{name}.yaml")
    lr = scaled_lr(recipe.base_lr, global_batch_size=4096, scaling=recipe.scaling)
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    optimizer = make_optimizer(groups, name=recipe.name, lr=lr, **OmegaConf.to_container(recipe.options))
    assert recipe.name == name
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr_at_4096, rel=1e-3)


def lars_of_the_paper(weight, gradients, *, lr, decay, momentum, eta, adapt):
    """Algorithm 1 of arXiv:1708.03888 for one layer."""
    velocity = np.zeros_like(weight)
    for gradient in gradients:
        local = 1.0
        if adapt:
            local = eta * np.linalg.norm(weight) / (np.linalg.norm(gradient) + decay * np.linalg.norm(weight))
        velocity = momentum * velocity + lr * local * (gradient + decay * weight)
        weight = weight - velocity
    return weight


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_lars_equals_the_papers_algorithm_and_leaves_biases_to_sgd(decay):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    start = {name: parameter.detach().numpy().copy() for name, parameter in layer.named_parameters()}
    gradients = {name: np.random.default_rng(1).normal(size=(4, *value.shape)) for name, value in start.items()}
    groups = parameter_groups(layer, weight_decay=decay)
    optimizer = make_optimizer(groups, name="lars", lr=2.0, momentum=0.9, trust_coeff=0.02)
    for step in range(4):
        for name, parameter in layer.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][step])
        optimizer.step()
    settings = {"lr": 2.0, "momentum": 0.9, "eta": 0.02}
    weight = lars_of_the_paper(start["weight"], gradients["weight"], decay=decay, adapt=True, **settings)
    bias = lars_of_the_paper(start["bias"], gradients["bias"], decay=0.0, adapt=False, **settings)
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-6)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-6)


def sgd_of_the_paper(weight, gradients, *, lr, decay, momentum, nesterov):
    """Sutskever et al. 2013 as torch writes it, with the rate outside the buffer."""
    velocity = np.zeros_like(weight)
    for gradient in gradients:
        gradient = gradient + decay * weight
        velocity = momentum * velocity + gradient
        weight = weight - lr * (gradient + momentum * velocity if nesterov else velocity)
    return weight


def adam_of_the_paper(weight, gradients, *, lr, decay, betas, eps, decoupled):
    """Algorithm 1 of arXiv:1412.6980; with `decoupled` algorithm 2 of arXiv:1711.05101."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient if decoupled else gradient + decay * weight
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        step = first / (1 - betas[0] ** t) / (np.sqrt(second / (1 - betas[1] ** t)) + eps)
        weight = weight - lr * (step + decay * weight if decoupled else step)
    return weight


def rmsprop_of_the_lecture(weight, gradients, *, lr, decay, alpha, eps, momentum, centered):
    """Hinton's lecture 6e with momentum; `centered` is Graves 2013 (arXiv:1308.0850, eq. 38 to 41)."""
    mean, square, velocity = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for gradient in gradients:
        gradient = gradient + decay * weight
        square = alpha * square + (1 - alpha) * gradient**2
        mean = alpha * mean + (1 - alpha) * gradient
        deviation = np.sqrt(square - mean**2 if centered else square)
        velocity = momentum * velocity + gradient / (deviation + eps)
        weight = weight - lr * velocity
    return weight


def lamb_of_the_paper(weight, gradients, *, lr, decay, betas, eps, adapt, trust_clip):
    """Algorithm 2 of arXiv:1904.00962 for one layer."""
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        ratio = first / (1 - betas[0] ** t) / (np.sqrt(second / (1 - betas[1] ** t)) + eps)
        update = ratio + decay * weight
        trust = np.linalg.norm(weight) / np.linalg.norm(update) if adapt else 1.0
        weight = weight - lr * (min(trust, 1.0) if trust_clip else trust) * update
    return weight


BETAS = {"betas": (0.8, 0.95), "eps": 1e-3}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "options", "paper", "settings"),
    [
        ("sgd", {"momentum": 0.9}, sgd_of_the_paper, {"nesterov": False}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, sgd_of_the_paper, {}),
        ("adam", BETAS, adam_of_the_paper, {"decoupled": False}),
        ("adamw", BETAS, adam_of_the_paper, {"decoupled": True}),
        ("rmsprop", {"alpha": 0.8, "eps": 0.03, "momentum": 0.9}, rmsprop_of_the_lecture, {"centered": False}),
        ("rmsprop", {"alpha": 0.8, "eps": 1e-4, "centered": True}, rmsprop_of_the_lecture, {"momentum": 0.0}),
        ("lamb", BETAS, lamb_of_the_paper, {"trust_clip": False}),
        ("lamb", {**BETAS, "trust_clip": True}, lamb_of_the_paper, {}),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "rmsprop", "centered", "lamb", "lamb_clipped"],
)
def test_weights_and_biases_move_as_the_paper_says(name, options, paper, settings, decay):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    start = {key: parameter.detach().numpy().copy() for key, parameter in layer.named_parameters()}
    gradients = {key: 3 * np.random.default_rng(1).normal(size=(6, *value.shape)) for key, value in start.items()}
    optimizer = make_optimizer(parameter_groups(layer, weight_decay=decay), name=name, lr=0.05, **options)
    for step in range(6):
        for key, parameter in layer.named_parameters():
            parameter.grad = torch.from_numpy(gradients[key][step])
        optimizer.step()
    for key, parameter in layer.named_parameters():
        adapt = {"adapt": key == "weight"} if name == "lamb" else {}
        own_decay = decay if key == "weight" else 0.0
        expected = paper(start[key], gradients[key], lr=0.05, decay=own_decay, **options, **settings, **adapt)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9)
        assert np.abs(expected - start[key]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {"betas": [0.9, 1.0]}, r"betas of adam must be two numbers in \[0, 1\)"),
        ("lamb", {"betas": [0.9]}, "betas of lamb must be two numbers"),
        ("rmsprop", {"alpha": 1.5}, r"alpha of rmsprop must lie in \[0, 1\), got 1.5"),
        ("sgd", {"momentum": -0.1}, "momentum of sgd must lie in"),
        ("lars", {"nesterov": True}, "nesterov=True has no effect without optim.options.momentum"),
        ("adamw", {"eps": -1.0}, "eps of adamw must be at least 0"),
        ("lamb", {"momentum": 0.9}, "lamb may be betas, eps, trust_clip; got momentum"),
    ],
)
def test_options_outside_their_definition_are_refused(name, options, message):
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    with pytest.raises(ValueError, match=message):
        make_optimizer(groups, name=name, lr=0.1, **options)


def test_the_steps_of_lamb_survive_in_groups_that_have_had_no_gradient():
    def fresh():
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)])
        model[0].weight.requires_grad_(False)
        return model, make_optimizer(parameter_groups(model, weight_decay=0.05), name="lamb", lr=0.01)

    def step(model, optimizer, part):
        optimizer.zero_grad()
        model[part](torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    whole, optimizer = fresh()
    step(whole, optimizer, 0)  # leaves the group of decayed weights without state, but counted
    file, weights = save(state_to_tensors(optimizer)), {k: v.clone() for k, v in whole.state_dict().items()}
    step(whole, optimizer, 1)
    again, optimizer = fresh()
    again.load_state_dict(weights)
    tensors_to_state(optimizer, load(file))
    step(again, optimizer, 1)
    assert whole[1].weight.equal(again[1].weight)


def test_adamw_is_fused_on_the_cpu():
    optimizer = make_optimizer(parameter_groups(nn.Linear(2, 2), weight_decay=0.1), name="adamw", lr=0.1)
    assert optimizer.defaults["fused"]


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def train(model, optimizer, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(8, 3, 5, 5, generator=generator).contiguous(memory_format=torch.channels_last)
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_and_five_steps_equal_ten_bit_for_bit(name):
    def fresh():
        model = network()
        return model, make_optimizer(parameter_groups(model, weight_decay=0.05), name=name, lr=0.01, **OPTIMIZERS[name])

    whole, optimizer = fresh()
    train(whole, optimizer, range(10))

    first, optimizer = fresh()
    train(first, optimizer, range(5))
    file, weights = save(state_to_tensors(optimizer)), first.state_dict()
    second, optimizer = fresh()
    second.load_state_dict(weights)
    tensors_to_state(optimizer, load(file))
    train(second, optimizer, range(5, 10))

    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_an_optimizer_that_has_not_stepped_survives(name):
    model = network()
    optimizer = make_optimizer(parameter_groups(model, weight_decay=0.05), name=name, lr=0.01, **OPTIMIZERS[name])
    tensors_to_state(optimizer, load(save(state_to_tensors(optimizer))))
    assert not optimizer.state


def test_parameter_without_gradient_keeps_no_state():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = make_optimizer(parameter_groups(model, weight_decay=0.05), name="adamw", lr=0.01)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = state_to_tensors(optimizer)
    tensors_to_state(optimizer, tensors)
    assert len(optimizer.state) == 2
    assert "1.weight/untouched" in tensors


def test_missing_left_over_and_misshapen_state_is_named():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(parameter_groups(model, weight_decay=0.05), name="adamw", lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = state_to_tensors(optimizer)
    before = tensors["weight/exp_avg"].clone()
    for broken, message in [
        ({key: value for key, value in tensors.items() if key != "bias/exp_avg"}, "bias/exp_avg is missing"),
        ({**tensors, "head.weight/step": torch.tensor(1.0)}, "head.weight/step is left over"),
        ({**tensors, "weight/momentum_buffer": before}, "weight/momentum_buffer is left over"),
        ({**tensors, "weight/exp_avg": torch.zeros(5)}, r"weight/exp_avg has shape \(5,\), the parameter \(2, 3\)"),
        ({}, "weight/step is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            tensors_to_state(optimizer, broken)
    assert torch.equal(state_to_tensors(optimizer)["weight/exp_avg"], before)
    assert math.isfinite(float(before.sum()))


CUT = {
    "adam": {"lr": 1e-3, "eps": 1e-2},  # eps as in tests/test_sharding.py: rounding errors make no whole steps
    "rmsprop": {"lr": 1e-3, "alpha": 0.9, "momentum": 0.9, "eps": 1e-2},
}


@pytest.mark.parametrize("name", CUT)
def test_cut_over_two_ranks_it_moves_as_uncut(two_ranks: Pool, name: str):
    for cut, plain in two_ranks.run(_steps_cut_and_not, name):
        test_sharding.assert_close(cut, plain)


def _steps_cut_and_not(name: str):
    test_sharding.OPTIONS[name] = CUT[name]  # in this rank's process
    found = []
    for cut in (True, False):
        trainer = test_sharding.assembled("mae", cut=cut, optimizer=name)
        test_sharding.steps(trainer, 3)
        found.append(test_sharding.everything(trainer))
    return found


def test_lamb_over_cut_parameters_is_refused_with_what_to_set(two_ranks: Pool):
    for said in two_ranks.run(_lamb_cut):
        assert "trainer.shard=none, or optim=lars" in said


def _lamb_cut() -> str:
    test_sharding.OPTIONS["lamb"] = {"lr": 1e-3}
    try:
        test_sharding.assembled("mae", cut=True, optimizer="lamb")
    except ValueError as error:
        return str(error)
    return "taken"
