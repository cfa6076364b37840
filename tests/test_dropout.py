"""Dropout acts where it is asked for, and nowhere else, whatever the library's model has by default."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from ssl.config import suggest
from ssl.models.backbones import build_backbone, pooled_features
from ssl.models.classifier import make_classifier
from tests.test_pretrain import composed

DROPPING = [  # name, the library's own rate, its argument
    ("ghostnet_100", 0.2, "drop_rate"),
    ("torchvision/squeezenet1_1", 0.5, "dropout"),
    ("torchvision/alexnet", 0.5, "dropout"),
    ("torchvision/googlenet", 0.2, "dropout"),
]


def in_training(model: nn.Module) -> nn.Module:
    """In training mode but for the norms, whose statistics would differ from pass to pass."""
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return model


def two_passes(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return pooled_features(model, images), pooled_features(model, images)


@pytest.mark.parametrize(("name", "rate", "argument"), DROPPING)
def test_a_backbone_drops_nothing_unasked(name: str, rate: float, argument: str):
    model, _ = build_backbone(name, image_size=(64, 64))
    first, second = two_passes(in_training(model))
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "rate", "argument"), DROPPING)
def test_a_backbone_drops_where_it_is_asked_at_the_librarys_own_rate_too(name: str, rate: float, argument: str):
    for asked in (rate, 0.3):
        model, spec = build_backbone(name, image_size=(64, 64), model_args={argument: asked})
        assert spec.model_args[argument] == asked
        assert not torch.equal(*two_passes(in_training(model)))


@pytest.mark.parametrize(("name", "rate", "argument"), DROPPING)
def test_no_dropout_in_fine_tuning_is_none_whatever_pretraining_had(name: str, rate: float, argument: str):
    for args in ({}, {argument: rate}):
        _, spec = build_backbone(name, image_size=(64, 64), model_args=args)
        model, _ = make_classifier(spec, num_classes=3, head_std=1.0)
        in_training(model)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(("name", "rate", "argument"), DROPPING)
def test_dropout_of_fine_tuning_acts_before_the_classifier(name: str, rate: float, argument: str):
    _, spec = build_backbone(name, image_size=(64, 64))
    model, _ = make_classifier(spec, num_classes=3, dropout=0.4, head_std=1.0)
    in_training(model)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(images), model(images))


def test_the_rate_that_one_place_is_given_is_not_that_of_another():
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "attn_drop_rate": 0.25}
    model, _ = build_backbone("vit_tiny_patch16_224", image_size=(32, 32), model_args=args)
    rates = {name.rpartition(".")[2]: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    assert rates["attn_drop"] == 0.25
    assert set(rates.values()) == {0.0, 0.25}


@pytest.mark.parametrize(
    ("model", "had"),
    [(["model=torchvision", "model.name=alexnet"], "none yet"), (["model=vit_micro"], ".*embed_dim.*")],
)
def test_an_argument_without_its_plus_is_answered_with_how_to_write_it(model: list[str], had: str):
    hint = suggest(composed("method=simclr", *model), ["model.args.dropout=0.5"])
    assert hint is not None
    assert re.search(rf"needs a plus: model.args has {had}; write \+model\.args\.dropout=$", hint)
    assert composed("method=simclr", *model, "+model.args.dropout=0.5").model.args.dropout == 0.5
