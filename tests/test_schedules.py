from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler

from ssl.pretrain import run
from ssl.schedules import NAMES, Schedule, make_schedule
from tests.test_pretrain import METHODS, SHORT, composed


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


def test_multi_step_is_step_with_milestones():
    given = {"steps_per_epoch": 5, "total_steps": 50, "milestones": [3, 6.2], "gamma": 0.2}
    assert factors(make_schedule("multi_step", **given)) == factors(make_schedule("step", **given))


def test_step_every_epochs_equals_torchs():
    schedule = make_schedule("step", steps_per_epoch=5, total_steps=53, warmup_epochs=0, every_epochs=2.4, gamma=0.97)
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=12, gamma=0.97), 53)
    np.testing.assert_allclose(factors(schedule), expected)


@pytest.mark.parametrize("power", [0.9, 1, 2])
def test_polynomial_equals_torchs(power):
    schedule = make_schedule("polynomial", steps_per_epoch=5, total_steps=31, warmup_epochs=0, power=power)
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=31, power=power), 31)
    np.testing.assert_allclose(factors(schedule), expected, atol=1e-12)


def test_polynomial_after_warmup_equals_timms():
    schedule = make_schedule(
        "polynomial", steps_per_epoch=5, total_steps=40, warmup_epochs=2, power=1.5, min_factor=0.1
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = PolyLRScheduler(
        optimizer, t_initial=30, power=1.5, lr_min=0.1, warmup_t=10, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(10, 40):
        theirs.step_update(step)
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)


def test_inverse_is_one_over_one_plus_gamma_times_epochs_since_warmup():
    schedule = make_schedule("inverse", steps_per_epoch=4, total_steps=40, warmup_epochs=2, gamma=0.5)
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + 0.5 * t / 4)), 32)
    np.testing.assert_allclose(factors(schedule)[8:], expected)
    np.testing.assert_allclose(factors(schedule)[:8], np.arange(1, 9) / 9)


@pytest.mark.parametrize("restart_factor", [1, 2, 3])
def test_cosine_with_restarts_equals_torchs(restart_factor):
    schedule = make_schedule(
        "cosine_restarts",
        steps_per_epoch=3,
        total_steps=70,
        warmup_epochs=0,
        restart_epochs=3,
        restart_factor=restart_factor,
        min_factor=0.05,
    )
    expected = torch_factors(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=9, T_mult=restart_factor, eta_min=0.05),
        70,
    )
    np.testing.assert_allclose(factors(schedule), expected, atol=1e-12)
    assert [step for step in range(1, 70) if expected[step] == 1.0] == schedule.restarts()


def test_cosine_restarts_after_warmup_follow_equation_5_of_sgdr():
    schedule = make_schedule(
        "cosine_restarts", steps_per_epoch=4, total_steps=40, warmup_epochs=1, restart_epochs=2, restart_factor=2
    )
    expected = [(1 + math.cos(math.pi * current / cycle)) / 2 for cycle in (8, 16, 32) for current in range(cycle)]
    np.testing.assert_allclose(factors(schedule), [*(np.arange(1, 5) / 5), *expected[:36]], atol=1e-12)
    assert schedule.restarts() == [12, 28]


OPTIONS = {
    "exponential": {"min_factor": 0.01},
    "step": {"every_epochs": 2},
    "multi_step": {"milestones": [3]},
    "cosine_restarts": {"restart_epochs": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_cut_goes_on_at_the_rates_of_its_schedule(name, tmp_path):
    shape = [f"schedule.{key}={value}" for key, value in {"name": name, **OPTIONS.get(name, {})}.items()]
    words = [*METHODS["simclr"], *SHORT, *shape, "trainer.pictures=false", "online=none", "optim.scaling=none"]
    run(composed(*words, "trainer.steps=7"), out=tmp_path)
    run(composed(*words), out=tmp_path)
    schedule = make_schedule(name, steps_per_epoch=3, total_steps=12, **OPTIONS.get(name, {}))
    assert rates(tmp_path) == {step + 1: pytest.approx(0.075 * schedule.factor(step)) for step in range(12)}


def rates(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_factor_stays_in_zero_to_one_and_after_the_end(name):
    options = {
        "exponential": {"min_factor": 0.01},
        "step": {"every_epochs": 4},
        "multi_step": {"milestones": [0.5]},
        "cosine_restarts": {"restart_epochs": 2, "restart_factor": 2},
    }.get(name, {})
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
        ({"name": "linear"}, "cosine, cosine_restarts, step, .*constant; got 'linear'"),
        ({"warmup_epochs": 10}, "shorter than the run of 10 epochs"),
        ({"warmup_epochs": -1}, "at least 0"),
        ({"milestones": [3]}, "has no effect with schedule.name=cosine"),
        ({"name": "constant", "min_factor": 0.1}, "no effect with schedule.name=constant"),
        ({"name": "exponential"}, "never reaches 0"),
        ({"name": "step"}, "needs schedule.every_epochs, or else schedule.milestones"),
        ({"name": "step", "every_epochs": 2, "milestones": [3]}, "or else schedule.milestones"),
        ({"name": "step", "every_epochs": 10}, "shorter than the 10 epochs"),
        ({"name": "step", "every_epochs": 0.01}, "at least one step"),
        ({"name": "multi_step"}, "multi_step needs schedule.milestones"),
        ({"name": "multi_step", "every_epochs": 2}, "every_epochs=2 has no effect with schedule.name=multi_step"),
        ({"gamma": 0.5}, "gamma=0.5 has no effect with schedule.name=cosine; set it to 0.1"),
        ({"name": "inverse", "gamma": 0}, "gamma must be above 0"),
        ({"name": "inverse", "min_factor": 0.1}, "min_factor=0.1 has no effect with schedule.name=inverse"),
        ({"power": 2}, "power=2 has no effect with schedule.name=cosine"),
        ({"name": "polynomial", "power": -1}, "power must be above 0"),
        ({"restart_epochs": 2}, "restart_epochs=2 has no effect with schedule.name=cosine; set it to null"),
        ({"restart_factor": 2}, "restart_factor=2 has no effect"),
        ({"name": "cosine_restarts"}, "needs schedule.restart_epochs"),
        ({"name": "cosine_restarts", "restart_epochs": 9.5}, "shorter than the 9 epochs"),
        ({"name": "cosine_restarts", "restart_epochs": 2, "restart_factor": 0}, "at least 1, got 0"),
        ({"name": "step", "milestones": [5, 30]}, "30 does not lie within the run of 10 epochs"),
        (
            {"name": "multi_step", "milestones": [0.001]},
            "0.001 is step 0 of a run of 50 steps, where it changes nothing",
        ),
        ({"name": "multi_step", "milestones": [0.5, 0.999]}, "0.999 is step 50 of a run of 50 steps"),
        ({"name": "multi_step", "milestones": [5, 0.5]}, r"come to steps \[25, 25\], some twice"),
        ({"name": "step", "milestones": [3, 3.01]}, r"come to steps \[15, 15\], some twice"),
        ({"name": "step", "every_epochs": 2, "gamma": 1}, "above 0 and below 1; got 1"),
        ({"name": "multi_step", "milestones": [3], "gamma": 10}, "above 0 and below 1; got 10"),
        ({"name": "multi_step", "milestones": [3], "gamma": 0}, "above 0 and below 1; got 0"),
        ({"min_factor": 1.0}, "keeps schedule.name=cosine at its peak; .*schedule.name=constant"),
        ({"name": "cosine_restarts", "restart_epochs": 2, "min_factor": 1}, "keeps schedule.name=cosine_restarts"),
        ({"name": "exponential", "min_factor": 1}, "keeps schedule.name=exponential at its peak"),
        ({"name": "polynomial", "min_factor": 1}, "keeps schedule.name=polynomial at its peak"),
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
