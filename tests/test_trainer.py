"""The loop: accumulation, ranks, random numbers, moving average, stopping."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from torch import Tensor, nn

import ssl.distributed as distributed
from ssl.averaging import MovingAverage, averaged_copy
from ssl.methods.base import Batch, Method
from ssl.methods.mae import MAE
from ssl.methods.relative_location import RelativeLocation
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone
from ssl.optim import make_optimizer, parameter_groups, set_lr
from ssl.stopping import Stopped
from ssl.trainer import NotFinite, Trainer, choose_dtype, total_steps

SIZE = (24, 24)
GLOBAL_BATCH = 8


class AsGiven(nn.Module):
    """Stands where Augment does: the batch's views are ready."""

    def forward(self, batch: Batch) -> Batch:
        return dict(batch)


def make_method(kind: str, *, norm: bool) -> Method:
    """A small method on a ViT, or with `norm` on a ResNet, the same for a given kind everywhere."""
    torch.manual_seed(0)
    if norm:
        args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
        backbone, _ = build_backbone("resnet18", image_size=SIZE, model_args=args)
    else:
        args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
        backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=SIZE, patch_size=4, model_args=args)
    if kind == "mae":
        sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
        return MAE(backbone, image_size=SIZE, in_chans=3, **sizes)
    if kind == "simclr":
        return SimCLR(backbone, temperature=0.2, projection_dim=16, image_size=SIZE)
    return RelativeLocation(backbone, image_size=SIZE, in_chans=3, hidden_dim=32, dropout=0.0)


def without_batchnorm(module: nn.Module) -> nn.Module:
    """BatchNorm couples the images of a part; without it a part is exactly its images."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batchnorm(child)
    return module


def make_batch(method: Method, *, rows: slice = slice(None), num_views: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(GLOBAL_BATCH, 3, *method.view_size, generator=generator)[rows] for _ in range(num_views)]
    noise = torch.rand(GLOBAL_BATCH, method.num_noise, generator=generator)[rows]
    index = torch.arange(GLOBAL_BATCH)[rows]
    return {"views": views, "noise": noise, "index": index, "label": torch.full_like(index, -1)}


def make_trainer(method: Method, **settings) -> Trainer:
    optimizer = make_optimizer(parameter_groups(method, weight_decay=0.0), name="sgd", lr=1.0)
    defaults = {
        "lr": lambda step: 1.0,
        "set_lr": set_lr,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "seed": 0,
    }
    return Trainer(method, AsGiven(), optimizer, **{**defaults, **settings})


def step_of(kind: str, *, norm: bool, joined: bool = False, accumulation: int = 1, strip: bool = False):
    """One SGD step at rate 1, of one process or of this rank's half: the loss and how far each weight went."""
    method = make_method(kind, norm=norm)
    if strip:
        without_batchnorm(method)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    rows = slice(None)
    if joined:
        share = GLOBAL_BATCH // distributed.world_size()
        rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        distributed.sync_batchnorm(method)
    batch = make_batch(method, rows=rows, num_views=2 if kind == "simclr" else 1)
    method.train()
    metrics = make_trainer(method, accumulation=accumulation).step(batch, step=0)
    moved = {name: method.state_dict()[name] - before[name] for name in before}
    return distributed.mean_over_ranks(metrics["loss"]).item(), moved


def assert_same_step(got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    largest = max(tensor.abs().max().item() for tensor in expected[1].values() if tensor.is_floating_point())
    for name, tensor in expected[1].items():
        torch.testing.assert_close(
            got[1][name], tensor, rtol=1e-3, atol=1e-4 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


KINDS = [("mae", False), ("simclr", False), ("simclr", True), ("relative_location", False), ("relative_location", True)]


@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_two_ranks_take_the_step_of_one(two_ranks, kind: str, norm: bool):
    ours = two_ranks.run(_step_on_rank, kind, norm)
    alone = step_of(kind, norm=norm)
    for got in ours:
        assert_same_step(got, alone)


def _step_on_rank(kind: str, norm: bool):
    return step_of(kind, norm=norm, joined=True)


@pytest.mark.parametrize("kind", ["mae", "simclr", "relative_location"])
def test_accumulation_takes_the_step_of_the_whole_batch(kind: str):
    whole = step_of(kind, norm=False, strip=True)
    assert_same_step(step_of(kind, norm=False, strip=True, accumulation=4), whole)


class NotesPrecision(AsGiven):
    """Notes what matrices are multiplied in where the views are made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, batch: Batch) -> Batch:
        self.dtypes.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return super().forward(batch)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_views_are_made_in_full_precision_however_the_batch_is_cut(accumulation: int):
    method = make_method("simclr", norm=False).train()
    trainer = make_trainer(method, accumulation=accumulation, dtype=torch.bfloat16)
    trainer.augment = NotesPrecision()
    trainer.step(make_batch(method, num_views=2), step=0)
    assert set(trainer.augment.dtypes) == {torch.float32}


def test_two_ranks_with_accumulation_keep_all_negatives(two_ranks):
    alone = step_of("simclr", norm=False, strip=True)
    for got in two_ranks.run(_accumulate_on_rank):
        assert_same_step(got, alone)


def _accumulate_on_rank():
    return step_of("simclr", norm=False, strip=True, joined=True, accumulation=2)


def test_embedding_twice_updates_running_statistics_once():
    method = make_method("simclr", norm=True)
    batch = make_batch(method, num_views=2)
    method.train()
    make_trainer(method, accumulation=2, lr=lambda step: 0.0).step(batch, step=0)
    norm = next(module for module in method.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked.item() == 2
    assert norm.momentum == 0.1
    reference = make_method("simclr", norm=True).train()
    with torch.no_grad():
        for part in (slice(0, 4), slice(4, 8)):
            reference({**batch, "views": [view[part] for view in batch["views"]]})
    other = next(module for module in reference.modules() if isinstance(module, nn.BatchNorm2d))
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)


class Coin(Method):
    """A loss that is one random number: shows which random numbers a step sees."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.seen: list[float] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.seen.append(torch.rand(()).item())
        return {"loss": self.backbone(batch["views"][0][:, :1]).mean()}


def test_random_numbers_are_a_function_of_seed_step_and_part():
    def numbers(seed: int, steps: range) -> list[float]:
        method = Coin()
        trainer = make_trainer(method, seed=seed, accumulation=2)
        for step in steps:
            trainer.step({"views": [torch.ones(4, 1)], "index": torch.arange(4)}, step)
        return method.seen

    whole = numbers(0, range(4))
    assert len(set(whole)) == 8
    assert numbers(0, range(2, 4)) == whole[4:]
    assert not set(numbers(1, range(4))) & set(whole)


def test_moving_average_follows_its_formula_and_copies_counters():
    method = make_method("simclr", norm=True)
    ema = averaged_copy(method)
    name = "projector.0.weight"
    start = ema[name].clone()
    trainer = make_trainer(method, average=MovingAverage(ema, 0.9))
    method.train()
    trainer.step(make_batch(method, num_views=2), 0)
    torch.testing.assert_close(ema[name], 0.9 * start + 0.1 * method.state_dict()[name])
    assert ema["projector.1.num_batches_tracked"].item() == 1


def test_clipping_bounds_the_step():
    method = make_method("mae", norm=False)
    before = nn.utils.parameters_to_vector(p.detach().clone() for p in method.parameters())
    metrics = make_trainer(method, clip_grad_norm=1e-3).step(make_batch(method), 0)
    after = nn.utils.parameters_to_vector(method.parameters())
    assert metrics["grad_norm"] > 1e-3
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def fit(trainer: Trainer, batch: Batch, steps: int) -> None:
    trainer.fit(iter([batch] * steps), start_step=0, stop_step=steps, global_batch_size=len(batch["index"]))


def test_weights_that_an_update_spoiled_are_not_saved():
    saved: list[int] = []
    trainer = make_trainer(
        Coin(), save=lambda step, final: saved.append(step), checkpoint_every_steps=1, log_every_steps=3
    )
    trainer.lr = lambda step: math.inf if step == 2 else 1.0
    with pytest.raises(NotFinite, match="weights are not finite after step 3"):
        fit(trainer, {"views": [torch.ones(4, 1)], "index": torch.arange(4)}, 3)
    assert saved == [1, 2]


def test_a_signal_stops_after_the_step_and_saves_it():
    class Interrupts(Coin):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            outputs = super().forward(batch)
            if len(self.seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return outputs

    saved: list[int] = []
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(Interrupts(), save=lambda step, final: saved.append(step))
    with pytest.raises(Stopped, match="SIGTERM after step 3"):
        fit(trainer, {"views": [torch.ones(4, 1)], "index": torch.arange(4)}, 8)
    assert saved == [3]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_metrics_are_means_over_the_steps_since_the_last_line():
    lines: list[tuple[int, dict[str, float]]] = []
    method = Coin()
    nn.init.zeros_(method.backbone.weight)
    nn.init.zeros_(method.backbone.bias)
    trainer = make_trainer(method, log=lambda step, metrics: lines.append((step, metrics)), log_every_steps=2)
    fit(trainer, {"views": [torch.ones(4, 1)], "index": torch.arange(4)}, 5)
    assert [step for step, _ in lines] == [1, 2, 4, 5]
    # The bias and the weight each fall by the rate 1 at each step, so the loss is 0, -2, -4...
    assert [metrics["loss"] for _, metrics in lines] == [0.0, -2.0, -5.0, -8.0]
    assert all(metrics["lr"] == 1.0 and 0 <= metrics["data_wait"] <= 1 for _, metrics in lines)


def test_steps_cut_a_run_of_epochs_and_stand_alone_without_them():
    assert total_steps(epochs=2.5, steps=None, steps_per_epoch=10) == (25, 25)
    assert total_steps(epochs=2, steps=5, steps_per_epoch=10) == (20, 5)
    assert total_steps(epochs=2, steps=50, steps_per_epoch=10) == (20, 20)
    assert total_steps(epochs=None, steps=50, steps_per_epoch=10) == (50, 50)
    with pytest.raises(ValueError, match=r"trainer\.epochs or trainer\.steps"):
        total_steps(epochs=None, steps=None, steps_per_epoch=10)
    with pytest.raises(ValueError, match="must be positive"):
        total_steps(epochs=0, steps=None, steps_per_epoch=10)


def test_fp16_is_refused_on_the_cpu():
    with pytest.raises(ValueError, match="bf16 or fp32"):
        choose_dtype("fp16", torch.device("cpu"))
    assert choose_dtype("fp32", torch.device("cpu")) is torch.float32
