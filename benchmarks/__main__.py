"""Every part beside the peers' way of it, in one table: the project's claims of speed, on your machine.

    python -m benchmarks --quick
    python -m benchmarks --images /data/photos --out table.md
    python -m benchmarks --parts MAE kNN

Without --quick the sizes are those that the goals are named for, which takes about half an hour on 2 cores. Each part
has a command of its own with more options, as `python -m benchmarks.loader`; how they are measured stands in
benchmarks/compare.py. A part that fails is told, the others go on, and the command ends with an error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "loader",
    "nt_xent",
    "knn",
    "linear_probe",
    "mae_step",
    "simclr_step",
    "relative_location_step",
    "start",
    "memory",
)
QUICK_ROUNDS = 3


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a few minutes, and ratios of small things")
    parser.add_argument("--parts", nargs="+", default=[], help="only parts whose name holds one of these words")
    parser.add_argument("--rounds", type=int, help="how often every way has its turn; default: each part's own")
    parser.add_argument("--threads", type=int, help="default: the cores that this process may use")
    parser.add_argument("--images", type=Path, help="a folder of JPEG photos; default: some are made")
    parser.add_argument("--out", type=Path, help="also write the table (.md) or its numbers (.json) here")
    return parser


def main(words: list[str] | None = None) -> int:
    given = options().parse_args(words)
    if given.threads is not None:  # before torch, scikit-learn and faiss are imported, which read it once
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(given.threads)
    import ssl.runtime  # before torch  # noqa: F401

    # isort: split
    import torch

    from benchmarks.compare import Printer, Result, about, chosen, measure, write
    from ssl.data.threads import available_cores

    given.threads = given.threads or available_cores()
    torch.set_num_threads(given.threads)
    where = about(given)
    print("\n".join(f"{name}: {value}" for name, value in where.items()), flush=True)
    show, results, failed = Printer(), list[Result](), []
    for part, rounds in chosen(all_parts(given), given.parts, name=lambda pair: pair[0].name):
        try:
            for result in measure(part, rounds=rounds):
                results.append(result)
                show(result)
        except (OSError, RuntimeError, ValueError) as error:
            failed.append(part.name)
            print(f"{part.name}: could not be measured: {error}", file=sys.stderr, flush=True)
    if given.out:
        write(given.out, results, where)
        print(f"written: {given.out}")
    return 1 if failed else 0


def all_parts(given: argparse.Namespace) -> Iterator[tuple]:
    """The parts of every benchmark in turn, each with how many rounds it takes."""
    import importlib

    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        parser = module.options()
        words = [*(module.QUICK if given.quick else []), "--threads", str(given.threads)]
        if name == "loader" and given.images:
            words += ["--images", str(given.images)]
        own = parser.parse_args(words)
        default = min(own.rounds, QUICK_ROUNDS) if given.quick else own.rounds
        own.rounds = given.rounds or default
        for part in module.parts(own):
            yield part, own.rounds


if __name__ == "__main__":
    sys.exit(main())
