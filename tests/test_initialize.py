"""Backbones initialised by a named rule, against the rules' variances and torch's own functions."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from scipy.stats import truncnorm
from torch import nn

from eval.finetune_start import make_model
from eval.splits import data_settings, make_splits
from ssl.config import plain
from ssl.foreign import read_foreign
from ssl.models.initialize import RULES, initialize
from ssl.pretrain import make_method
from tests.test_finetune import config_of
from tests.test_pretrain import METHODS, TINY_RESNET, composed

TORCHS = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "trunc_normal": lambda weight: nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Conv2d(6, 10, 3), nn.MultiheadAttention(8, 2)])
def test_weights_are_torchs_of_the_same_seed(rule: str, layer: nn.Module):
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    torch.manual_seed(3)
    expected = torch.empty_like(weight)
    TORCHS[rule](expected)
    torch.manual_seed(3)
    initialize(layer, rule)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("layer", "fan_in", "fan_out"),
    [
        (nn.Linear(300, 700), 300, 700),
        (nn.Conv2d(64, 96, 3), 64 * 9, 96 * 9),
        (nn.Conv2d(64, 128, 3, groups=4), 16 * 9, 32 * 9),
        (nn.Conv2d(4000, 4000, 5, groups=4000), 25, 25),
    ],
    ids=["linear", "convolution", "grouped", "depthwise"],
)
def test_the_variance_is_the_rules(rule: str, layer: nn.Module, fan_in: int, fan_out: int):
    torch.manual_seed(0)
    initialize(layer, rule)
    variance = {
        "xavier": 2 / (fan_in + fan_out),
        "kaiming": 2 / fan_in,
        "trunc": 0.02**2 * float(truncnorm(-2, 2).var()),
    }[rule.split("_")[0]]
    weight = layer.weight.detach()
    assert weight.var().item() == pytest.approx(variance, rel=0.03)  # of 55,000 and more numbers
    assert abs(weight.mean().item()) < 0.02 * math.sqrt(variance)
    if rule.endswith("uniform"):
        assert weight.abs().max().item() <= math.sqrt(3 * variance)
        assert weight.abs().max().item() > 0.99 * math.sqrt(3 * variance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_biases_of_layers_are_zero_and_norms_and_positions_stay(name: str, rule: str):
    args = {"embed_dim": 24, "depth": 2, "num_heads": 2} if name.startswith("vit") else {"channels": (4, 8, 8, 8)}
    model = timm.create_model(name, num_classes=0, **args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize(model, rule)
    layers = {key for key, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    for key, value in model.state_dict().items():
        owner, _, kind = key.rpartition(".")
        if owner not in layers:
            assert value.equal(before[key]), key
        elif kind == "bias":
            assert not value.any(), key
        else:
            assert not value.equal(before[key]), key


def test_the_layer_to_leave_is_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = model[1].weight.detach().clone()
    initialize(model, "kaiming_normal", leave={"1.weight"})
    assert model[1].weight.equal(before)
    assert not model[0].bias.any()


def test_what_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        initialize(nn.BatchNorm2d(3), "kaiming_normal")
    with pytest.raises(ValueError, match="null or one of xavier_uniform"):
        initialize(nn.Linear(2, 2), "orthogonal")


def weights(*words: str) -> dict[str, torch.Tensor]:
    config = composed("method=simclr", *TINY_RESNET, *words)
    torch.manual_seed(config.seed)
    return {key: value.clone() for key, value in make_method(config, (32, 32))[0].backbone.state_dict().items()}


def test_a_run_starts_from_the_rule_and_its_seed():
    own, first, again = weights(), weights("model.init=xavier_uniform"), weights("model.init=xavier_uniform")
    other = weights("model.init=xavier_uniform", "seed=1")
    kernel = "layer2.0.conv1.weight"
    assert all(value.equal(again[key]) for key, value in first.items())
    assert not first[kernel].equal(other[kernel])
    assert not first[kernel].equal(own[kernel])
    fan = first[kernel][0].numel() + first[kernel].shape[0] * 9
    assert first[kernel].abs().max().item() <= math.sqrt(6 / fan)


def test_a_method_that_initialises_the_backbone_itself_refuses_a_rule():
    with pytest.raises(ValueError, match=r"MAE gives the backbone weights of its own.*model\.init=null"):
        make_method(composed(*METHODS["mae"], "model.init=xavier_uniform"), (32, 32))


def test_fine_tuning_from_random_weights_takes_the_rule_for_all_but_the_classifier():
    words = ["ckpt=random", "model=resnet10", "recipe=scratch_resnet", "data=embedded", "model.init=kaiming_uniform"]
    config = config_of(*words, "data.source.num_train=24", "data.source.num_test=12", "head_std=0.01")
    settings = data_settings(plain(config.data), None, subject="random")
    splits = make_splits(settings, own=False, seed=0, command="test")
    model, *_ = make_model(config, None, splits.train, settings, splits)
    weight = model.layer2[0].conv1.weight
    bound = math.sqrt(6 / weight[0].numel())
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert model.fc.weight.abs().max().item() <= 0.02  # two deviations of head_std


def test_the_rule_is_refused_for_trained_weights(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="init=xavier_normal has no effect on trained weights"):
        read_foreign(tmp_path / "weights.pth", model={"name": "resnet10t", "init": "xavier_normal"})
