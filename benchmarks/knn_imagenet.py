"""kNN at ImageNet's size on made features: our bfloat16 shortlist over a bank on disk, faiss flat, DINO's chunked loop.

    python -m benchmarks.knn_imagenet [--bank 1281167] [--dim 768] [--queries 50000] [--k 20] [--slow 2000]
                                      [--folder DIR]

The shortlist searches all queries. faiss flat and DINO's loop, which are slower, search `--slow` of them, and their
time for all is projected: faiss's as a straight line through half and all of these, since each of its searches reads
the bank anew; DINO's in proportion. `--slow` equal to `--queries` projects nothing.

A feature is the centre of one of 1,000 classes, plus variation that all classes share along 64 directions whose
standard deviations fall as 1 / sqrt(rank), plus noise: as in a backbone's features, neighbours are mostly of the same
class and a few directions carry most of the variance. The bank is in random order of classes.
"""

from __future__ import annotations

import ssl.runtime  # before torch  # noqa: F401

# isort: split
import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eval.bank import map_file
from eval.knn import recall
from eval.neighbours import nearest
from eval.rows import Rows, unit_length

NUM_CLASSES, DIRECTIONS = 1000, 64
CPU = torch.device("cpu")


class Clusters:
    """Draws the features that the head of this file describes."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(NUM_CLASSES, dim, generator=generator)  # (C, D)
        spread = torch.arange(1, DIRECTIONS + 1).rsqrt()[:, None]  # (64, 1)
        self.directions = spread * torch.randn(DIRECTIONS, dim, generator=generator)  # (64, D)

    def fill(self, features: Tensor, *, seed: int, step: int = 65536) -> Tensor:
        """Write features (N, D) in place; returns them."""
        generator = torch.Generator().manual_seed(seed)
        for rows in features.split(step):
            label = torch.randint(NUM_CLASSES, (len(rows),), generator=generator)
            shared = torch.randn(len(rows), DIRECTIONS, generator=generator) @ self.directions  # (n, D)
            rows.copy_(self.centres[label] + shared + 0.7 * torch.randn(rows.shape, generator=generator))
        return features


def dino(bank: Tensor, queries: Tensor, count: int) -> float:
    """Seconds of the search in facebookresearch/dino's eval_knn.py, whose features are of length 1 beforehand."""
    bank, queries = unit_length(bank).T, unit_length(queries)
    began = time.perf_counter()
    for some in queries.split(500):  # a hundredth of ImageNet's validation images
        (some @ bank).topk(count, largest=True, sorted=True)
    return time.perf_counter() - began


def seconds(search: Callable[[], object]) -> float:
    began = time.perf_counter()
    search()
    return time.perf_counter() - began


class Memory(threading.Thread):
    """The most memory that this process took while it was watched: without file pages, and with them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.whole = 0.0
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.own = max(self.own, int(fields["RssAnon"].split()[0]) / 2**20)
            self.whole = max(self.whole, int(fields["VmRSS"].split()[0]) / 2**20)

    def stop(self) -> str:
        self.ended.set()
        self.join()
        return f"{self.own:.2f} GiB ({self.whole:.2f} with pages of the file)"


def show(name: str, taken: float, *, how: str) -> None:
    print(f"{name:<28}{taken:9.1f} s{taken / 60:8.2f} min   {how}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("bank", 1_281_167), ("dim", 768), ("queries", 50_000), ("k", 20), ("slow", 2000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    slow = min(given.slow, given.queries)

    clusters = Clusters(given.dim)
    bank = map_file(given.folder, given.bank, given.dim)  # (N, D)
    took = seconds(lambda: clusters.fill(bank, seed=1))
    queries = clusters.fill(torch.empty(given.queries, given.dim), seed=2)  # (M, D)
    gib = bank.numel() * 4 / 2**30
    print(f"bank {given.bank:,} x {given.dim}, {gib:.2f} GiB in {given.folder}, made in {took:.0f} s; ", end="")
    print(f"{given.queries:,} queries, k={given.k}, {torch.get_num_threads()} threads", flush=True)

    rows = Rows(bank, "cosine", CPU)
    memory = Memory()
    began = time.perf_counter()
    found = nearest(rows, queries, given.k, index="shortlist")
    show("bfloat16 shortlist", time.perf_counter() - began, how=f"all queries; peak memory {memory.stop()}")
    measured = recall(rows, queries, found, over_ranks=False)
    print(
        f"{'':<28}recall@{given.k} {measured['recall']:.6f} on {measured['recall_queries']} queries against the exact "
        f"search; {found.num_open:,} of all were looked for again by it",
        flush=True,
    )

    memory = Memory()
    half = seconds(lambda: nearest(rows, queries[: slow // 2], given.k, index="auto"))
    whole = seconds(lambda: nearest(rows, queries[:slow], given.k, index="auto"))
    slope = (whole - half) / (slow - slow // 2)
    how = "all queries" if slow == given.queries else f"projected from {whole:.1f} s for {slow:,}, {half:.1f} for half"
    name = nearest(rows, queries[:1], 1, index="auto").index
    show(name, whole + slope * (given.queries - slow), how=f"{how}; peak memory {memory.stop()}")

    memory = Memory()
    taken = dino(bank, queries[:slow], given.k)
    how = "all queries" if slow == given.queries else f"projected from {taken:.1f} s for {slow:,}"
    show("DINO's chunked loop, fp32", taken * given.queries / slow, how=f"{how}; peak memory {memory.stop()}")


if __name__ == "__main__":
    main()
