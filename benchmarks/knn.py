"""kNN of 10,000 queries in a bank of 50,000 x 512: scikit-learn, DINO's chunked loop, ours; in turns.

    python -m benchmarks.knn [--bank 50000] [--queries 10000] [--dim 512] [--rounds 3]

The baselines follow sklearn.neighbors.KNeighborsClassifier(algorithm="brute", metric="cosine") and the loop of
facebookresearch/dino's eval_knn.py: a matrix product and a topk per chunk of a hundredth of the queries. Ours are
`eval.knn` as it is, the time in which it measures the shortlist's recall included. How it is measured stands in
benchmarks/compare.py.
"""

from __future__ import annotations

import ssl.runtime  # before torch  # noqa: F401

# isort: split
import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional

from benchmarks.compare import Part, Way, parser_of, run, timed
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


SCIKIT_LEARN, DINO = "scikit-learn brute", "DINO's loop"
WANTED = {SCIKIT_LEARN: 4.5, DINO: 1.7}
QUICK = ["--bank", "5000", "--queries", "1000"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    for name, default in (("bank", 50_000), ("queries", 10_000), ("dim", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """Our default index, the search in fp32, and the bfloat16 shortlist with its recall measured."""
    size = f"{given.queries:,} queries, {given.bank:,} x {given.dim}"
    for index, name in (("auto", "kNN"), ("torch", "kNN in fp32"), ("shortlist", "kNN by shortlist")):
        wanted = {} if index == "torch" else WANTED
        yield Part(f"{name}, {size}", "queries", given.queries, partial(ways, given, index), wanted)


def ways(given: argparse.Namespace, index: str) -> dict[str, Way]:
    """All search the same features."""
    data = (*made_features(given.bank, given.dim, seed=1), *made_features(given.queries, given.dim, seed=2))
    all_ways = {SCIKIT_LEARN: scikit_learn, DINO: dino, "ours": ours(index)}
    return {name: timed(partial(way, *data)) for name, way in all_ways.items()}


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
