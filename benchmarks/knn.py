"""kNN of 10,000 queries in a bank of 50,000 x 512: scikit-learn, DINO's chunked loop, ours; interleaved.

    python -m benchmarks.knn [--bank 50000] [--queries 10000] [--dim 512] [--rounds 3]

The baselines follow sklearn.neighbors.KNeighborsClassifier(algorithm="brute", metric="cosine") and the loop of
facebookresearch/dino's eval_knn.py: a matrix product and a topk per chunk of a hundredth of the queries. Ours are
`eval.knn` as it is, the time in which it measures the shortlist's recall included.
"""

from __future__ import annotations

import ssl.openmp  # before torch  # noqa: F401

# isort: split
import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional

from eval.knn import knn

NUM_CLASSES, K, TEMPERATURE = 10, 20, 0.07


def made_features(num: int, dim: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Features (num, dim) around ten centres."""
    centres = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num,), generator=generator)
    return 0.1 * centres[labels] + torch.randn(num, dim, generator=generator), labels


def scikit_learn(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    def vote(distance: np.ndarray) -> np.ndarray:
        return np.exp((1.0 - distance) / TEMPERATURE)

    classifier = KNeighborsClassifier(K, weights=vote, algorithm="brute", metric="cosine")
    return float(classifier.fit(bank.numpy(), bank_labels.numpy()).score(queries.numpy(), query_labels.numpy()))


def dino(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    bank, queries = functional.normalize(bank, dim=1).T.contiguous(), functional.normalize(queries, dim=1)
    size, hits = max(len(queries) // 100, 1), 0
    for first in range(0, len(queries), size):
        similarity, neighbour = (queries[first : first + size] @ bank).topk(K, largest=True, sorted=True)  # (B, k)
        one_hot = functional.one_hot(bank_labels[neighbour], NUM_CLASSES)  # (B, k, C)
        votes = (one_hot * (similarity / TEMPERATURE).exp()[:, :, None]).sum(1)  # (B, C)
        hits += int((votes.argmax(1) == query_labels[first : first + size]).sum())
    return hits / len(queries)


def ours(index: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], float]:
    def way(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
        settings = {"k": [K], "temperature": [TEMPERATURE], "num_classes": NUM_CLASSES}
        return knn(bank, bank_labels, queries, query_labels, index=index, **settings).first()["top1"]

    return way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("bank", 50_000), ("queries", 10_000), ("dim", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    data = (*made_features(given.bank, given.dim, seed=1), *made_features(given.queries, given.dim, seed=2))
    ways = {
        "scikit-learn brute": scikit_learn,
        "DINO's loop": dino,
        "ours": ours("auto"),
        "ours, shortlist": ours("shortlist"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    top1 = {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            top1[name] = way(*data)
            seconds[name].append(time.perf_counter() - began)
    threads = torch.get_num_threads()
    print(f"{given.queries:,} queries in {given.bank:,} x {given.dim}, {threads} threads, best of {given.rounds}")
    slowest = min(seconds["scikit-learn brute"])
    for name, times in seconds.items():
        best = min(times)
        speed = f"{best:8.2f} s{given.queries / best:10,.0f}/s  ratio {slowest / best:5.2f}"
        print(f"{name:<20}{speed}  top-1 {top1[name]:.4f}")


if __name__ == "__main__":
    main()
