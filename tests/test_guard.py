"""Steps that must not move the weights: skipped on all ranks alike, before optimizer and averages move."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl import distributed
from ssl.averaging import MovingAverage, averaged_copy
from ssl.guard import MEMORY, StepGuard
from ssl.methods.base import Batch, Method
from ssl.optim import make_optimizer, parameter_groups, set_lr
from ssl.stopping import Stopped
from ssl.trainer import NotFinite, Trainer

CPU = torch.device("cpu")


class Poisoned(Method):
    """A layer with BatchNorm whose loss is multiplied by what the batch brings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.backbone(batch["views"][0]).square().mean() * batch["factor"][0]}


def batch_of(factor: float, seed: int) -> Batch:
    views = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
    return {"views": [views], "index": torch.arange(6), "factor": torch.full((6,), factor)}


def make_trainer(method: Method, *, name: str = "adamw", on_device: bool = False, **settings) -> Trainer:
    optimizer = make_optimizer(parameter_groups(method, weight_decay=0.1), name=name, lr=0.1)
    average = MovingAverage(averaged_copy(method), 0.5)
    trainer = Trainer(
        method,
        nn.Identity(),
        optimizer,
        lr=lambda step: 0.1,
        set_lr=set_lr,
        device=CPU,
        dtype=torch.float32,
        seed=0,
        average=average,
        **settings,
    )
    trainer.decides_on_device = on_device
    return trainer


def trained(factors: list[float], **settings) -> tuple[Trainer, list[tuple[int, dict[str, float]]]]:
    lines: list[tuple[int, dict[str, float]]] = []
    trainer = make_trainer(Poisoned(), log=lambda step, metrics: lines.append((step, metrics)), **settings)
    batches = [batch_of(factor, seed) for seed, factor in enumerate(factors)]
    trainer.fit(iter(batches), start_step=0, stop_step=len(batches), global_batch_size=6)
    return trainer, lines


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    state = {**trainer.method.state_dict()}
    assert trainer.average is not None
    state |= {f"average {name}": tensor for name, tensor in trainer.average.tensors.items()}
    for number, each in enumerate(trainer.optimizer.state.values()):
        state |= {f"optimizer {number} {name}": torch.as_tensor(value) for name, value in each.items()}
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "on_device"), [("adamw", False), ("adamw", True), ("sgd", False), ("lars", False)])
def test_a_bad_step_leaves_weights_averages_statistics_and_optimizer_as_they_were(bad, name, on_device):
    before, _ = trained([1.0, 1.0], name=name, on_device=on_device)
    after, lines = trained([1.0, 1.0, bad], name=name, on_device=on_device)
    expected, got = state_of(before), state_of(after)
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        # An average of the weights that did not move is left as it is, too: it does not go nearer to them.
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=0)
    assert lines[-1][1]["skipped_steps"] == 1


def test_deciding_on_the_device_takes_the_steps_that_deciding_on_the_host_takes():
    factors = [1.0, math.nan, 2.0, 1.0, math.inf, 0.5]
    host, _ = trained(factors, on_device=False)
    device, _ = trained(factors, on_device=True)
    expected, got = state_of(host), state_of(device)
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=0)


def test_the_first_step_of_all_may_be_the_bad_one():
    for on_device in (False, True):
        trainer, _ = trained([math.nan, 1.0], on_device=on_device)
        assert all(tensor.isfinite().all() for tensor in state_of(trainer).values())


def test_metrics_leave_out_skipped_steps_and_count_them():
    _, with_bad = trained([1.0, 3.0, math.nan, 5.0], log_every_steps=4)
    assert [step for step, _ in with_bad] == [1, 4]
    assert math.isfinite(with_bad[-1][1]["loss"])
    assert with_bad[-1][1]["skipped_steps"] == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_too_many_bad_steps_in_a_row_end_the_run_with_the_first_of_them_kept(on_device):
    kept: list[tuple[int, str]] = []

    def keep(step: int, why: str) -> str:
        kept.append((step, why))
        return "failed/step_4"

    settings = {"max_bad_steps": 2, "save_failed": keep, "last_saved": lambda: "step_9"}
    # What a device decides is looked at when a line is logged.
    with pytest.raises(NotFinite, match=r"3 steps in a row .*max_bad_steps=2.*nan.*at step 4.*step_9.*failed/step_4"):
        trained([1.0, math.nan, 1.0, *[math.nan] * 3], on_device=on_device, log_every_steps=6, **settings)
    assert [step for step, _ in kept] == [4]


def test_rows_that_are_broken_by_good_steps_do_not_add_up():
    trained([1.0, math.nan, math.nan, 1.0, math.nan, math.nan, 1.0], max_bad_steps=2)


def losses(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(5.0, 0.2, count)


def test_a_spike_is_a_loss_so_many_deviations_above_the_mean_of_the_recent_ones():
    guard = StepGuard(CPU, spike_deviations=6.0)
    recent = losses(0, MEMORY)
    norm = torch.tensor(1.0)
    for step, loss in enumerate(recent):
        assert not guard.judge(torch.tensor(loss), norm, step)
    mean, deviation = recent.mean(), recent.std()
    state = guard.state()
    for excess, expected in [(6.01, True), (5.99, False), (-50.0, False)]:
        guard.load(state)
        assert bool(guard.judge(torch.tensor(mean + excess * deviation), norm, MEMORY)) is expected
    guard.load(state)
    guard.judge(torch.tensor(mean + 9 * deviation), norm, MEMORY)
    assert guard.read().deviations == pytest.approx(9.0, rel=1e-6)
    assert "9.0 deviations" in guard.read().why()


def test_no_spike_is_called_before_there_is_something_to_compare_with():
    guard = StepGuard(CPU, spike_deviations=3.0)
    for step, loss in enumerate([1.0, 1.001, 50.0]):
        assert not guard.judge(torch.tensor(loss), torch.tensor(1.0), step)


def test_recent_losses_are_weighted_by_their_age_once_there_are_enough():
    guard = StepGuard(CPU, spike_deviations=100.0)
    mean = variance = 0.0
    for step, loss in enumerate(losses(1, 3 * MEMORY)):
        guard.judge(torch.tensor(loss), torch.tensor(1.0), step)
        weight = max(1 / (step + 1), 1 / MEMORY)
        variance = (1 - weight) * (variance + weight * (loss - mean) ** 2)
        mean += weight * (loss - mean)
    assert [float(number) for number in guard.state()[:2]] == pytest.approx([mean, variance], rel=1e-9)


def test_what_a_guard_knows_passes_through_json_exactly():
    guard = StepGuard(CPU, spike_deviations=6.0)
    for step, loss in enumerate([*losses(2, 20), math.nan]):
        guard.judge(torch.tensor(loss), torch.tensor(1.0), step)
    again = StepGuard(CPU, spike_deviations=6.0)
    again.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert again.state() == guard.state()
    assert again.read().first == 21


def test_a_loss_scaler_that_looks_for_its_scale_does_not_end_the_run():
    guard = StepGuard(CPU)
    for step in range(50):
        assert guard.judge(torch.tensor(1.0), torch.tensor(math.inf), step, tolerant=True)
    assert guard.read().in_a_row == guard.read().counted == 0  # nor is it worth a word
    assert guard.read().total == 50
    guard.judge(torch.tensor(math.nan), torch.tensor(math.inf), 50, tolerant=True)
    assert guard.read().in_a_row == 1


def _nan_on_one_rank(name: str) -> list:
    bad = math.nan if distributed.rank() == 1 else 1.0
    trainer, lines = trained([1.0, bad, 1.0], name=name)
    return [
        lines[-1][1]["skipped_steps"],
        [parameter.detach().tolist() for parameter in trainer.method.parameters()],
    ]


def test_nan_on_one_rank_is_skipped_on_both(two_ranks):
    first, second = two_ranks.run(_nan_on_one_rank, "adamw")
    assert first[0] == second[0] == 1
    assert first[1] == second[1]
    assert all(math.isfinite(x) for row in first[1] for x in torch.tensor(row).flatten().tolist())


def _stop_of_one_rank() -> int:
    import os
    import signal

    class Asked(Poisoned):
        count = 0

        def forward(self, batch: Batch) -> dict[str, Tensor]:
            self.count += 1
            if self.count == 3 and distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            return super().forward(batch)

    trainer = make_trainer(Asked(), log_every_steps=100)
    batches = [batch_of(1.0, seed) for seed in range(20)]
    try:
        trainer.fit(iter(batches), start_step=0, stop_step=20, global_batch_size=6)
    except Stopped as stopped:
        return stopped.exit_code * 1000 + stopped.step
    return 0


def test_all_ranks_stop_at_the_same_step_where_one_was_asked_to(two_ranks):
    assert two_ranks.run(_stop_of_one_rank) == [140004, 140004]
