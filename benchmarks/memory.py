"""How much memory a run takes beside its model, optimizer and batches alone, and whether it grows.

    python -m benchmarks.memory [--model vit_s] [--steps 2000]

The first part is the peak of the resident set of a pretraining run over that of a bare loop in a process of its own:
the same model, optimizer, precision and batch size, the same steps, on one batch that lies in memory. The second
follows a tiny run over `--steps` steps. Both read /proc, which only Linux has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.compare import ROOT, Fact, Study, parser_of, run
from benchmarks.start import SMALL_DECODER, environment

BATCH_SIZE, SIDE = 16, 32
BARE_STEPS = 5
TINY = ("model=vit_micro", *SMALL_DECODER)
QUICK = ["--model", "vit_micro", "--steps", "60"]

Point = tuple[int, float]
"""A step, and MiB in the resident set when it was the last one logged."""


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--model", default="vit_s", help="a file of conf/model/, of a vision transformer")
    parser.add_argument("--steps", type=int, default=2000, help="of the tiny run")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser


def parts(given: argparse.Namespace) -> Iterator[Study]:
    yield Study("memory: peak of a run", partial(peak, given))
    yield Study("memory: growth of a run", partial(growth, given))


def peak(given: argparse.Namespace) -> list[Fact]:
    """A run's peak over that of its bare loop."""
    name = f"memory: peak of a run, {given.model}, {BATCH_SIZE} images of {SIDE} px"
    bare_command = [sys.executable, "-m", "benchmarks.memory", "--bare", "--model", given.model]
    bare_command += ["--threads", str(given.threads)]
    result = subprocess.run(
        bare_command, cwd=ROOT, env=environment(given.threads), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(bare_command)} failed:\n{result.stderr[-2000:]}")
    bare = float(result.stdout)
    _, whole = follow([f"model={given.model}"], steps=BARE_STEPS, threads=given.threads)
    found = f"{whole / bare:.2f} times its model, optimizer and batches: {whole:,.0f} MiB against {bare:,.0f} MiB"
    return [Fact(name, found, "under 1.5")]


def growth(given: argparse.Namespace) -> list[Fact]:
    """How far the resident set of the end lies above that of the beginning."""
    points, highest = follow(TINY, steps=given.steps, threads=given.threads)
    early, late = early_and_late(points, given.steps)
    found = f"{late - early:+,.0f} MiB from {early:,.0f} MiB; peak {highest:,.0f} MiB"
    return [Fact(f"memory: growth over {given.steps:,} steps, vit_micro", found, "flat")]


def early_and_late(points: list[Point], steps: int) -> tuple[float, float]:
    """The medians over the second and over the last tenth of the steps."""
    early = [mib for step, mib in points if 0.1 * steps <= step <= 0.2 * steps]
    late = [mib for step, mib in points if step >= 0.9 * steps]
    if not early or not late:
        raise ValueError(f"{steps} steps were over before their memory could be looked at; give more --steps")
    return statistics.median(early), statistics.median(late)


def follow(chosen: Sequence[str], *, steps: int, threads: int) -> tuple[list[Point], float]:
    """The resident set of a run of `steps` steps as it went on, and its peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "run", Path(folder) / "said"
        settings = ["method=mae", *chosen, "data=embedded", "data.source.num_train=512", f"out={out}"]
        settings += [f"trainer.global_batch_size={BATCH_SIZE}", f"trainer.steps={steps}", "trainer.precision=fp32"]
        settings += ["schedule.warmup_epochs=0", "trainer.log_every_steps=5", f"trainer.epochs={1 + steps // 32}"]
        settings += ["wandb.mode=offline", "online=none", f"loader.threads={threads}"]
        settings += [f"trainer.checkpoint_every_steps={max(steps // 20, 1)}"]  # the first brings its imports early
        command = [sys.executable, "-m", "ssl.pretrain", *settings]
        points: list[Point] = []
        highest = 0.0
        with said.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(threads), stdout=stream, stderr=stream)
            try:
                while process.poll() is None:
                    now, most = resident(process.pid)
                    highest = max(highest, most)
                    if step := last_step(out / "metrics.jsonl"):
                        points.append((step, now))
                    time.sleep(0.05)
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read_text()[-2000:]}")
    return points, highest


def resident(process: int | str) -> tuple[float, float]:
    """MiB in the resident set of a process now and at most, zeros where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    found = {name: int(rest.split()[0]) / 2**10 for name, _, rest in (line.partition(":") for line in lines)
             if name in ("VmRSS", "VmHWM")}  # fmt: skip
    return found.get("VmRSS", 0.0), found.get("VmHWM", 0.0)


def last_step(metrics: Path) -> int:
    """The last step that a run has logged whole, 0 before the first."""
    text = metrics.read_text() if metrics.exists() else ""
    lines = text.rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def bare_loop(model: str, threads: int) -> None:
    """The run's model, optimizer and batches, and nothing else; prints its peak in MiB."""
    import torch
    from omegaconf import OmegaConf

    from benchmarks.step import made_batch, our_step
    from ssl.config import CONF
    from ssl.methods.mae import MAE
    from ssl.models.backbones import build_backbone

    torch.set_num_threads(threads)
    settings = OmegaConf.load(f"{CONF}/model/{model}.yaml")
    size = (SIDE, SIDE)
    backbone, _ = build_backbone(settings.name, image_size=size, model_args=dict(settings.args))
    method = MAE(backbone, image_size=size)
    step = our_step(method, optimizer="adamw", options={}, device="cpu", dtype=torch.float32)
    batch = made_batch(BATCH_SIZE, size, views=1, num_noise=method.num_noise, device="cpu")
    for _ in range(BARE_STEPS):
        step(batch)
    print(resident("self")[1])


def main() -> None:
    given = options().parse_args()
    if given.bare:
        bare_loop(given.model, given.threads)
    else:
        run(parts(given), given)


if __name__ == "__main__":
    main()
