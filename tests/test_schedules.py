from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from ssl.schedules import NAMES, Schedule, make_schedule


def factors(schedule: Schedule, count: int | None = None) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.total_steps if count is None else count)]


def torch_factors(make, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_warmup_is_a_line_that_reaches_one_and_is_never_zero():
    found = factors(make_schedule("constant", steps_per_epoch=10, total_steps=50, warmup_epochs=1.5))
    np.testing.assert_allclose(found[:16], np.arange(1, 17) / 16)
    assert found[15:] == [1.0] * 35


def test_warmup_may_start_above_zero():
    schedule = make_schedule("constant", steps_per_epoch=4, total_steps=40, warmup_epochs=1, warmup_start_factor=0.1)
    np.testing.assert_allclose(factors(schedule)[:5], 0.1 + 0.9 * np.arange(1, 6) / 5)


def test_cosine_without_warmup_equals_torchs():
    found = factors(make_schedule("cosine", steps_per_epoch=7, total_steps=35, warmup_epochs=0, min_factor=0.1))
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=35, eta_min=0.1), 35)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_cosine_after_warmup_equals_timms_and_mae():
    total, warmup = 40, 8
    found = factors(make_schedule("cosine", steps_per_epoch=4, total_steps=total, warmup_epochs=2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=total - warmup, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False, lr_min=0
    )
    for step in range(warmup, total):
        theirs.step_update(step)
        assert found[step] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        epoch = step / 4  # mae's util/lr_sched.py, in fractional epochs
        assert found[step] == pytest.approx(0.5 * (1 + math.cos(math.pi * (epoch - 2) / (10 - 2))))


def test_step_equals_torchs_multi_step():
    schedule = make_schedule("step", steps_per_epoch=5, total_steps=50, warmup_epochs=0, milestones=[3, 6.2], gamma=0.2)
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[15, 31], gamma=0.2), 50)
    np.testing.assert_allclose(factors(schedule), expected)


def test_milestones_below_one_are_fractions_of_the_run():
    schedule = make_schedule("step", steps_per_epoch=5, total_steps=70, milestones=[3 / 7, 5 / 7])
    assert schedule.milestones == (30, 50)


def test_exponential_equals_torchs():
    schedule = make_schedule("exponential", steps_per_epoch=5, total_steps=30, warmup_epochs=0, min_factor=0.01)
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.01 ** (1 / 30)), 30)
    np.testing.assert_allclose(factors(schedule), expected)


@pytest.mark.parametrize("name", NAMES)
def test_factor_stays_in_zero_to_one_and_after_the_end(name):
    options = {"exponential": {"min_factor": 0.01}, "step": {"milestones": [0.5]}}.get(name, {})
    schedule = make_schedule(name, steps_per_epoch=3, total_steps=31, **options)
    assert schedule.warmup_steps == 3
    assert all(0 < factor <= 1 for factor in factors(schedule))
    assert schedule.factor(31) == schedule.factor(1000)
    assert "31 steps" in schedule.describe()


def test_a_run_of_one_step_takes_it_at_the_peak():
    assert make_schedule("cosine", steps_per_epoch=9, total_steps=1).factor(0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "linear"}, "cosine, step, exponential, constant; got 'linear'"),
        ({"warmup_epochs": 10}, "shorter than the run of 10 epochs"),
        ({"warmup_epochs": -1}, "at least 0"),
        ({"milestones": [3]}, "no effect with schedule.name=cosine"),
        ({"name": "constant", "min_factor": 0.1}, "no effect with schedule.name=constant"),
        ({"name": "exponential"}, "never reaches 0"),
        ({"name": "step"}, "needs schedule.milestones"),
        ({"name": "step", "milestones": [5, 30]}, "30 does not lie within the run of 10 epochs"),
        ({"min_factor": 2.0}, "from 0 to 1"),
        ({"total_steps": 0}, "at least one step"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    arguments = {"name": "cosine", "steps_per_epoch": 5, "total_steps": 50, **options}
    with pytest.raises(ValueError, match=message):
        make_schedule(arguments.pop("name"), **arguments)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="count from 0"):
        Schedule("constant", 10).factor(-1)
