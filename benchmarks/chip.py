"""Everything that a GPU is for, in one table: the methods' steps beside the peers', and whole runs from JPEG.

    python -m benchmarks.chip --images /data/photos --out chip.md

The steps work on images that lie on the device, beside the peers' mixed precision (benchmarks/step.py). A whole run
reads photos that `python -m ssl.prepare` stored, each again and again, with the threads that this process may use; told
is the median of its logged rates, without the first ones, and how long it waited for data. It has not been run on a GPU
yet. With --device cpu and --quick it shows that the commands work, and nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.compare import ROOT, Entry, Fact, Part, Study, parser_of, run
from benchmarks.loader import make_photos, prepare_photos
from benchmarks.start import environment

QUICK = ["--quick", "--device", "cpu", "--rounds", "1"]
EPOCH = "an epoch of CIFAR-10 is 50,000 images"

STEPS = (
    ("mae_step", ["--batch-size", "256", "--steps", "20"], ""),
    ("mae_step", ["--model", "vit_large_patch16_224", "--batch-size", "128", "--steps", "20"], ""),
    ("simclr_step", ["--batch-size", "256", "--steps", "20"], ""),
    ("simclr_step", ["--model", "resnet18", "--image-size", "32", "--batch-size", "512", "--steps", "50"], EPOCH),
    ("relative_location_step", ["--batch-size", "64", "--steps", "20"], ""),
)
"""A benchmark, its options, and a note."""


@dataclass(frozen=True)
class WholeRun:
    """A pretraining run, its images in a step, and the rate that is wanted of one H100, in images per second."""

    method: str
    model: str
    batch_size: int
    wanted: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} {self.model}, a whole run from prepared JPEG"


RUNS = (
    WholeRun("mae", "vit_b", 256, "5,000 images/s on an H100"),
    WholeRun("mae", "vit_l", 128, "2,500 images/s on an H100"),
    WholeRun("simclr", "resnet50", 256, "1,600 images/s on an H100"),
    WholeRun("relative_location", "resnet50", 256),
)
NUM_STEPS, LOGGED_EVERY = 200, 20
SMALL = {"vit_b": "vit_micro", "vit_l": "vit_micro", "resnet50": "resnet10"}


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--images", type=Path, help="a folder of JPEG photos; default: some are made")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it works")
    return parser


def parts(given: argparse.Namespace) -> Iterator[Entry]:
    """Every step, then every whole run."""
    for name, words, note in STEPS:
        module = importlib.import_module(f"benchmarks.{name}")
        words = [*(module.QUICK if given.quick else words), "--device", given.device, "--threads", str(given.threads)]
        for part in module.parts(module.options().parse_args(words)):
            assert isinstance(part, Part)
            yield replace(part, note=note, wanted={})  # what is wanted there is a CPU's
    with tempfile.TemporaryDirectory() as made:
        for whole in RUNS:
            yield Study(whole.name, partial(study, whole, given, Path(made)))


def study(whole: WholeRun, given: argparse.Namespace, made: Path) -> list[Fact]:
    """The rate of one run."""
    num_steps, every, batch_size = (4, 1, 8) if given.quick else (NUM_STEPS, LOGGED_EVERY, whole.batch_size)
    prepared = prepare(given.images, made, num=4 * batch_size)
    out = made / f"{whole.method}-{whole.model}"
    model = SMALL[whole.model] if given.quick else whole.model
    settings = [
        f"method={whole.method}", f"model={model}", "data=parquet", f"data.root={prepared}", "data.image_size=224",
        "data.in_memory_gib=0", f"loader.threads={given.threads}", f"trainer.device={given.device}",
        "trainer.devices=1", f"trainer.global_batch_size={batch_size}", f"trainer.steps={num_steps}",
        f"trainer.log_every_steps={every}", "schedule.warmup_epochs=0", "trainer.pictures=false",
        "wandb.mode=disabled", "report=none",
    ]  # fmt: skip
    python("ssl.pretrain", *settings, f"out={out}", threads=given.threads)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    steady = lines[len(lines) // 4 :]  # the first ones hold the start: choice of kernels, first batches
    rate, wait = (statistics.median(line[name] for line in steady) for name in ("images_per_second", "data_wait"))
    utilisation = f", {100 * lines[-1]['mfu']:.0f} % of the chip's peak" if "mfu" in lines[-1] else ""
    found = f"{rate:,.0f} images/s, {100 * wait:.0f} % of the time waiting for data{utilisation}"
    return [Fact(whole.name, found, whole.wanted, (f"settings: {' '.join(settings)}",))]


def prepare(images: Path | None, made: Path, *, num: int) -> Path:
    """A folder with at least `num` photos as `python -m ssl.prepare` stores them, some of them more than once."""
    shards, repeated = made / "prepared", made / f"repeated-{num}"
    if images is None:
        images = made / "photos"
        if not images.exists():
            images.mkdir()
            make_photos(images)
    num_stored = len(prepare_photos(images, shards))  # which goes on where it was complete
    repeated.mkdir(exist_ok=True)
    for number in range(-(-num // num_stored)):
        for shard in shards.glob("train-*.parquet"):
            link = repeated / f"train-{number:04d}-{shard.name.removeprefix('train-')}"
            if not link.exists():
                link.symlink_to(shard)
    return repeated


def python(module: str, *words: str, threads: int) -> None:
    """Run a command of the project's. Raises RuntimeError with what it said where it fails."""
    command: Sequence[str] = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def main() -> None:
    given = options().parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here; --quick --device cpu shows that the commands work")
    if given.images is not None:
        given.images = given.images.resolve()
    run(parts(given), given)


if __name__ == "__main__":
    main()
