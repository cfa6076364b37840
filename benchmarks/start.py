"""How long a run takes from the command to its first step, and what of that goes into imports.

    python -m benchmarks.start

A small model on the embedded images, the files in the cache: one start warms it up, `--rounds` are timed, and one more
runs under Python's `-X importtime`, which tells how long each module took by itself; that costs a little, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.compare import ROOT, Fact, Study, parser_of, run

SMALL_DECODER = ("method.decoder_dim=64", "method.decoder_depth=1", "method.decoder_heads=2")
RUN = ("method=mae", "model=vit_micro", *SMALL_DECODER, "data=embedded", "data.source.num_train=512")
SETTINGS = (*RUN, "trainer.global_batch_size=64", "trainer.steps=1", "schedule.warmup_epochs=0", "wandb.mode=offline")
NUM_LISTED = 8
PATIENCE = 120  # seconds
QUICK = ["--rounds", "1"]


def options() -> argparse.ArgumentParser:
    return parser_of(__doc__, rounds=3)


def parts(given: argparse.Namespace) -> Iterator[Study]:
    name = "start of a run: command to first step"
    yield Study(name, partial(study, name, rounds=given.rounds, threads=given.threads))


def study(name: str, *, rounds: int, threads: int) -> list[Fact]:
    """Seconds to the first step, and the imports' share."""
    start(threads=threads)
    times = [start(threads=threads) for _ in range(rounds)]
    first = statistics.median(seconds for seconds, _, _ in times)
    end = statistics.median(seconds for _, seconds, _ in times)
    spread = f"{min(seconds for seconds, _, _ in times):.1f} to {max(seconds for seconds, _, _ in times):.1f}"
    _, traced, words = start("-X", "importtime", threads=threads)
    packages = import_seconds(words.splitlines())
    total = sum(packages.values())
    listed = ", ".join(f"{package} {seconds:.2f}" for package, seconds in packages.most_common(NUM_LISTED))
    return [
        Fact(
            name,
            f"{first:.1f} s ({spread}); it ended after {end:.1f} s",
            "under 12 s",
            (f"settings: {' '.join(SETTINGS)}",),
        ),
        Fact(
            "start of a run: imports",
            f"{total:.1f} s of the whole run's {traced:.1f} s under -X importtime, in {len(packages):,} packages",
            "under 8 s",
            (f"seconds by package: {listed}",),
        ),
    ]


def start(*flags: str, threads: int) -> tuple[float, float, str]:
    """Run the command; seconds to its first logged step, seconds to its end, and what it wrote to stderr.

    Raises RuntimeError with what it said where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "run", Path(folder) / "said"
        command = [sys.executable, *flags, "-m", "ssl.pretrain", *SETTINGS, f"loader.threads={threads}", f"out={out}"]
        began = time.perf_counter()
        with said.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=environment(threads))
            try:
                first = _wait_for_line(out / "metrics.jsonl", process, began)
                process.wait(PATIENCE)
            finally:
                process.kill()
        end, words = time.perf_counter() - began, said.read_text()
    if first is None or process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{words[-2000:]}")
    return first, end, words


def environment(threads: int) -> dict[str, str]:
    """For a process that finds the project and takes so many threads."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def _wait_for_line(path: Path, process: subprocess.Popen, began: float) -> float | None:
    """Seconds until the file has a line; None where the process ended without one."""
    while time.perf_counter() - began < PATIENCE:
        ended = process.poll() is not None
        if path.exists() and path.stat().st_size:
            return time.perf_counter() - began
        if ended:
            return None
        time.sleep(0.01)
    return None


def import_seconds(lines: Iterable[str]) -> Counter[str]:
    """Seconds that each package's modules took by themselves, from what `-X importtime` wrote."""
    seconds: Counter[str] = Counter()
    for line in lines:
        fields: Sequence[str] = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(fields) == 3 and fields[0].strip().isdigit():
            seconds[fields[2].strip().partition(".")[0]] += int(fields[0]) / 1e6
    return seconds


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
