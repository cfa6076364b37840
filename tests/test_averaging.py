"""Averages of the weights: stochastic weight averaging, its BatchNorm statistics, and computing with an average."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ssl.averaging import (
    MovingAverage,
    StochasticWeightAverage,
    averaged_copy,
    fresh_statistics,
    renew_statistics,
    weights_of,
)
from ssl.checkpoint import load_backbone, steps_saved
from ssl.pretrain import run
from tests.test_pretrain import SHORT, TINY_DECODER, TINY_RESNET, TINY_VIT, composed


def a_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_stochastic_weight_average_is_torchs_of_the_same_steps():
    module = a_module()
    reference = AveragedModel(module, use_buffers=True)
    average = StochasticWeightAverage(averaged_copy(module), start_step=3, every_steps=2)
    generator = torch.Generator().manual_seed(1)
    for done in range(1, 10):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        average.update(module, done)
        if done in (3, 5, 7, 9):
            reference.update_parameters(module)
    for name, tensor in reference.module.named_parameters():
        torch.testing.assert_close(average.tensors[name], tensor)
    assert not average.ready(2)
    assert average.ready(3)


def test_a_module_computes_with_the_average_and_gets_its_own_weights_back():
    module = a_module().eval()
    own = averaged_copy(module)
    average = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    image = torch.randn(5, 3)
    other = a_module().eval()
    other.load_state_dict(average)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with weights_of(module, average):
        torch.testing.assert_close(module(image), other(image))
    assert all(tensor.equal(own[name]) for name, tensor in module.state_dict().items())
    module(image).sum().backward()
    optimizer.step()
    assert not module[0].weight.equal(own["0.weight"])  # the optimizer still holds the module's parameters


def test_fresh_statistics_are_the_plain_mean_over_the_batches():
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(8, 2) + 5)
    batches = [torch.randn(6, 2) for _ in range(3)]
    with torch.no_grad(), fresh_statistics(norm):
        for batch in batches:
            norm(batch)
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert norm.momentum == 0.1


def test_a_rest_that_fills_no_batch_does_not_count_as_one():
    norm = nn.BatchNorm1d(2)

    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, batch):
            return self.norm(batch["views"])

    method = Method()
    sizes = (6, 6, 2)
    batches = [{"index": torch.arange(n), "views": torch.randn(n, 2) + 100 * (n == 2)} for n in sizes]
    average = StochasticWeightAverage(averaged_copy(method), start_step=1, every_steps=1)
    renew_statistics(method, average, batches)
    expected = torch.stack([batch["views"].mean(0) for batch in batches[:2]]).mean(0)
    torch.testing.assert_close(average.tensors["norm.running_mean"], expected)


def test_a_run_saves_the_mean_of_its_weights_and_evaluations_take_it(tmp_path: Path):
    words = ["method=mae", *TINY_VIT, *TINY_DECODER, *SHORT, "trainer.checkpoint_every_steps=1", "trainer.keep_last=12"]
    swa = ["trainer.swa_start_epoch=1", "trainer.swa_every_epochs=1", "trainer.swa_lr_factor=0.5"]
    run(composed(*words, *swa), out=tmp_path)
    folders = dict(steps_saved(tmp_path))
    taken = [load_file(folders[step] / "model.safetensors") for step in (3, 6, 9, 12)]
    average = load_file(folders[12] / "ema.safetensors")
    for name in taken[0]:
        expected = torch.stack([weights[name] for weights in taken]).mean(0)
        torch.testing.assert_close(average[f"backbone.{name}"], expected, rtol=1e-5, atol=1e-6)
    assert not (folders[2] / "ema.safetensors").exists()
    assert load_backbone(tmp_path).weights == "ema"
    lr = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    peak = json.loads((tmp_path / "recipe.json").read_text())["groups"][0]["lr"]
    assert lr[3:] == pytest.approx([0.5 * peak] * 9)


def test_the_last_average_has_statistics_of_its_own(tmp_path: Path):
    words = ["method=simclr", *TINY_RESNET, *SHORT, "trainer.checkpoint_every_steps=1", "trainer.keep_last=12"]
    run(composed(*words, "trainer.swa_start_epoch=1", "trainer.epochs=3"), out=tmp_path)
    folders = dict(steps_saved(tmp_path))
    name = "backbone.bn1.running_mean"
    averaged = torch.stack([load_file(folders[step] / "model.safetensors")["bn1.running_mean"] for step in (3, 6, 9)])
    assert not torch.allclose(load_file(folders[9] / "ema.safetensors")[name], averaged.mean(0), atol=1e-4)
    two = averaged[:2].mean(0)  # before the end it is the plain mean of the statistics too
    torch.testing.assert_close(load_file(folders[8] / "ema.safetensors")[name], two, rtol=1e-5, atol=1e-6)


def test_a_run_with_weight_averaging_is_the_same_when_it_is_cut(tmp_path: Path):
    words = [
        "method=mae",
        *TINY_VIT,
        *TINY_DECODER,
        *SHORT,
        "trainer.swa_start_epoch=1",
        "trainer.swa_every_epochs=0.5",
    ]
    run(composed(*words), out=tmp_path / "whole")
    run(composed(*words, "trainer.steps=5"), out=tmp_path / "cut")
    run(composed(*words), out=tmp_path / "cut")
    whole, cut = (load_file(steps_saved(tmp_path / name)[-1][1] / "ema.safetensors") for name in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.ema_decay=0.9", "trainer.swa_start_epoch=1"], "two averages"),
        (["trainer.swa_lr_factor=0.5"], "no effect without trainer.swa_start_epoch"),
        (["trainer.swa_start_epoch=9"], "must lie within the run"),
    ],
)
def test_averages_that_do_not_go_together_are_refused(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        run(composed("method=mae", *TINY_VIT, *TINY_DECODER, *SHORT, *words), out=tmp_path)


def test_the_moving_average_is_ready_from_the_start():
    assert MovingAverage({}, 0.9).ready(1)
