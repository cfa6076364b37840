"""Where a step's time goes, and what share of the chip's peak a run uses."""

from __future__ import annotations

import gzip
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ssl.chips import device_peak, peak_tflops
from ssl.plan import Utilization, flops_per_image, utilization
from ssl.pretrain import run
from ssl.profile_report import DataFacts, advice, summary
from ssl.profiling import (
    OUTSIDE,
    PARTS,
    WARMUP,
    Profile,
    StepProfiler,
    exposed_all_reduce,
    length,
    step_shares,
    steps_needed,
    without,
)
from ssl.tracking import Progress
from tests.test_pretrain import EXTRA, METHODS, SHORT, assert_equal_runs, composed
from tests.test_trainer import AsGiven, make_batch, make_method, make_trainer

CPU = torch.device("cpu")
PROFILE = Profile(
    device="a chip",
    steps=3,
    seconds=0.05,
    images_per_second=5120.0,
    shares={"waiting for data": 0.02, "forward": 0.4, "backward": 0.5, "other": 0.08},
    operators=[("aten::mm", 0.6), ("aten::add", 0.1)],
    busy=0.9,
)
FACTS = DataFacts(threads=8, cores=8, in_memory=False, short_side=375, view_side=224)


# ---- a profiled run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_profiled_run_is_the_unprofiled_one_bit_for_bit(method: str, tmp_path: Path):
    words = [*METHODS[method], *SHORT, *EXTRA]
    run(composed(*words), out=tmp_path / "plain")
    run(composed(*words, "trainer.profile_steps=2"), out=tmp_path / "profiled")
    assert_equal_runs(tmp_path / "plain", tmp_path / "profiled")
    lines = (tmp_path / "profiled" / "profile" / "summary.txt").read_text().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("profile of 2 steps on cpu: ")
    percent = {line[:19].strip(): float(line[19:].rstrip("%")) for line in lines[1:8]}
    assert list(percent) == [*PARTS, "other"]
    assert sum(percent.values()) == pytest.approx(100, abs=0.5)
    assert min(percent["forward"], percent["backward"], percent["optimizer"]) > 0
    assert lines[8].startswith("most expensive: aten::") or "::" in lines[8]
    assert lines[9].startswith("advice: ")


def test_the_trace_holds_each_part_of_each_traced_step(tmp_path: Path, capsys):
    run(composed(*METHODS["mae"], *SHORT, "trainer.steps=11", "trainer.profile_steps=3"), out=tmp_path)
    assert (tmp_path / "profile" / "summary.txt").read_text() in capsys.readouterr().out
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    for part in PARTS:
        assert sum(event.get("name") == part and event.get("ph") == "X" for event in events) == 3, part
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_a_run_too_short_for_the_profile_is_refused_and_the_rest_of_one_goes_on_without(tmp_path: Path, caplog):
    words = [*METHODS["simclr"], *SHORT, "trainer.steps=6"]
    with pytest.raises(ValueError, match=r"trainer.profile_steps=2 needs 9 steps .* and the run has 6; lower it"):
        run(composed(*words, "trainer.profile_steps=2"), out=tmp_path)
    run(composed(*words), out=tmp_path)
    run(composed(*words[:-1], "trainer.steps=8", "trainer.profile_steps=2"), out=tmp_path)  # the same recipe
    assert "only 2 are left; no profile is written" in caplog.text
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [0, 101])
def test_an_impossible_number_of_steps_is_refused(steps: int, tmp_path: Path):
    with pytest.raises(ValueError, match=f"trainer.profile_steps must be 1 to 100.* got {steps}"):
        run(composed(*METHODS["simclr"], *SHORT, f"trainer.profile_steps={steps}"), out=tmp_path)


# ---- the parts -------------------------------------------------------------------------------------------------------


def spend(seconds: float) -> None:
    """Compute for so long, or longer."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_time_goes_to_the_part_that_spends_it_and_evaluation_to_none(tmp_path: Path):
    found: list[Profile] = []
    profiler = StepProfiler(2, folder=tmp_path, device=CPU, global_batch_size=10, report=found.append)
    spent = {"waiting for data": 0.004, "forward": 0.002, OUTSIDE: 0.05}
    began = 0.0
    for step in range(steps_needed(2)):
        if step == WARMUP:
            began = time.perf_counter()
        if step == WARMUP + 2:
            elapsed = time.perf_counter() - began
        for name, seconds in spent.items():
            with profiler.part(name):
                spend(seconds)
        profiler.step_done()
    (profile,) = found
    assert profile.seconds * 2 <= elapsed - 2 * spent[OUTSIDE]
    assert profile.seconds * profile.shares["waiting for data"] >= 0.004
    assert profile.seconds * profile.shares["forward"] >= 0.002
    assert profile.shares["backward"] == 0
    assert sum(profile.shares.values()) == pytest.approx(1)
    assert profile.images_per_second == pytest.approx(10 / profile.seconds)


def test_a_run_that_stops_while_it_is_traced_leaves_the_profiler_ready_for_the_next(tmp_path: Path):
    for _ in range(2):
        profiler = StepProfiler(1, folder=tmp_path, device=CPU, global_batch_size=1, report=lambda profile: None)
        for _ in range(WARMUP + 1):
            profiler.step_done()
        profiler.close()
    assert not list(tmp_path.iterdir())


def test_the_shares_take_what_is_exposed_of_all_reduce_out_of_backward():
    parts = {"forward": 2.0, "backward": 5.0}
    assert step_shares(parts, total=10.0, all_reduce=0.1) == pytest.approx(
        dict.fromkeys(PARTS, 0.0) | {"forward": 0.2, "backward": 0.4, "all-reduce": 0.1, "other": 0.3}
    )
    assert step_shares(parts, total=10.0, all_reduce=0.9)["backward"] == 0
    assert "all-reduce" not in step_shares(parts, total=10.0, all_reduce=0.0)


def test_intervals_are_those_of_a_grid():
    generator = random.Random(0)
    for _ in range(50):
        ours, theirs = (
            [(start, start + generator.randrange(1, 9)) for start in generator.choices(range(60), k=6)] for _ in "ab"
        )
        inside = [any(start <= x < end for start, end in ours) for x in range(80)]
        beside = [any(start <= x < end for start, end in theirs) for x in range(80)]
        assert length(ours) == sum(inside)
        assert length(without(ours, theirs)) == sum(a and not b for a, b in zip(inside, beside))


@dataclass
class Event:
    """A kernel on the device, as the profiler gives it."""

    name: str
    start: float
    end: float
    device_type: DeviceType = DeviceType.CUDA

    @property
    def time_range(self) -> Event:
        return self


def test_on_a_gpu_only_all_reduce_that_no_kernel_hides_counts():
    events = [
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 10, 40),
        Event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 50, 60),
        Event("sm90_xmma_gemm_bf16", 0, 25),
        Event("Memcpy HtoD (Pinned -> Device)", 38, 55),
        Event("backward", 0, 60),  # our own range, drawn on the device's timeline
        Event("aten::mm", 26, 30, DeviceType.CPU),
    ]
    assert exposed_all_reduce(events) == 13


def test_two_ranks_wait_for_all_reduce_and_one_does_not(two_ranks):
    assert all(0 < exposed < total for exposed, total in two_ranks.run(_all_reduce_of_a_step))
    assert _all_reduce_of_a_step()[0] == 0


def _all_reduce_of_a_step() -> tuple[float, float]:
    """Microseconds of all-reduce that are seen in a step, and those that the step takes."""
    method = make_method("mae", norm=False).train()
    trainer, batch = make_trainer(method), make_batch(method)
    trainer.step(batch, step=0)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        trainer.step(batch, step=1)
        took = time.perf_counter() - began
    return exposed_all_reduce(profiler.events()), took * 1e6


# ---- advice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "busy", "changed", "expected"),
    [
        (0.02, 0.9, {}, "none"),
        (0.02, None, {}, "none"),
        (0.3, 0.5, {"threads": 2}, "30% of the step: loader.threads=2 leaves cores free, try loader.threads=8"),
        (0.3, None, {}, "python -m ssl.prepare short_side=256"),
        (0.3, None, {"view_side": 448, "short_side": 1000}, "short_side=512"),
        (0.3, None, {"short_side": 256}, "decode images that are small already"),
        (0.3, None, {"short_side": None, "in_memory": True}, "in memory already"),
        (0.02, 0.4, {}, "idles for 60% of the traced time"),
    ],
)
def test_advice_names_what_to_change_first(waiting, busy, changed, expected):
    profile = replace(PROFILE, shares=PROFILE.shares | {"waiting for data": waiting}, busy=busy)
    assert expected in advice(profile, replace(FACTS, **changed))


def test_the_summary_tells_speed_shares_operators_and_advice():
    assert summary(PROFILE, FACTS, trace=Path("run/trace.json.gz")).splitlines() == [
        "profile of 3 steps on a chip: 50.0 ms per step, 5,120 images/s; trace of 3 more in run/trace.json.gz",
        "  waiting for data   2.0%",
        "  forward           40.0%",
        "  backward          50.0%",
        "  other              8.0%",
        "most expensive: aten::mm 60%, aten::add 10%",
        "advice: none, data keeps up with the step",
    ]


# ---- the share of the peak -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("A chip of tomorrow", "bf16", None),
    ],
)
def test_the_peak_is_that_of_exactly_this_chip(name: str, precision: str, expected: float | None):
    assert peak_tflops(name, precision) == expected


def test_mfu_is_operations_per_second_over_the_peak_of_all_chips(capsys):
    use = Utilization("NVIDIA H100 80GB HBM3", "bf16", flops_per_image=58.7e9, num_devices=2, peak_tflops=1000.0)
    assert use.mfu(10_000) == pytest.approx(58.7e9 * 10_000 / 2e15)
    assert str(use.describe()).startswith("NVIDIA H100 80GB HBM3: 1000 TFLOP/s at most in bf16")
    Progress(10).update(1, {"images_per_second": 10_000, "mfu": 0.294})
    assert capsys.readouterr().out == "step 1/10  10,000 images/s  29% of the chip's peak\n"


def test_an_unknown_chip_is_told_as_unknown_and_a_cpu_left_out():
    unknown = Utilization("A chip of tomorrow", "bf16", flops_per_image=1e9, num_devices=1, peak_tflops=None)
    assert unknown.mfu(100) is None
    assert "A chip of tomorrow: its peak in bf16 is not known" in str(unknown.describe())
    assert device_peak(CPU, torch.bfloat16, convolutional=False) == ("cpu", "bf16", None)
    cpu = utilization(1e9, device=CPU, dtype=torch.float32, convolutional=True, num_devices=1)
    assert (cpu.mfu(100), cpu.describe()) == (None, None)


def test_the_operations_of_mae_are_those_of_its_matrices():
    """Two for each weight and token that it meets, four for each pair of tokens and channel; three times forward."""
    patches, kept, dim, patch = 36, 9, 32, 48  # 24 pixels in patches of 4x4x3

    def block(tokens: int) -> int:
        return 2 * tokens * 12 * dim * dim + 4 * tokens * tokens * dim

    embedding = 2 * patches * patch * dim
    encoder = 2 * block(kept + 1)
    decoder = 2 * (kept + 1) * dim * dim + block(patches + 1) + 2 * (patches - kept) * dim * patch
    method = make_method("mae", norm=False)
    found = flops_per_image(method, AsGiven(), make_batch(method))
    assert found == 3 * (embedding + encoder + decoder)
