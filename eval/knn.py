"""How good a backbone is by its nearest neighbours: `python -m eval.knn ckpt=runs/<run>`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from eval.accuracy import rank_of_label
from eval.command import judge, start
from eval.config import EvalConfig
from eval.neighbours import make_search, unit_length
from eval.subject import Judged


@dataclass
class KnnConfig(EvalConfig):
    """What `python -m eval.knn` takes."""

    k: list[int] = field(default_factory=lambda: [20])
    temperature: list[float] = field(default_factory=lambda: [0.07])
    metric: str = "cosine"
    center: bool | None = None
    index: str = "auto"


@dataclass(frozen=True)
class Scores:
    """Accuracies of every (k, temperature) as fractions, and how the neighbours were found."""

    rows: list[dict[str, Any]]
    index: str
    notes: list[str] = field(default_factory=list)

    def first(self) -> dict[str, Any]:
        """The row of the first k and the first temperature: no choice is ever made on the reported split."""
        return self.rows[0]


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: Sequence[int] = (20,),
    temperature: Sequence[float] = (0.07,),
    num_classes: int,
    metric: str = "cosine",
    center: bool = False,
    index: str = "auto",
    device: torch.device | str = "cpu",
    chunk: int = 1024,
) -> Scores:
    """Classify `queries` (M, D) by a weighted vote of their k nearest neighbours in `bank` (N, D).

    A neighbour votes for its class with exp(similarity / temperature) (Wu et al. 2018, section 3.4; as DINO's
    `eval_knn.py`). Sums are taken in log space in float64, so no temperature overflows or loses a vote. Ties have
    a rule: of equally similar images the one that stands earlier in the bank is nearer; of classes with equal votes
    the lower number wins; a class without a vote is never a hit. `center` subtracts the bank's mean first, as raw
    pixels need. A k beyond the bank is cut to the bank's size, with a note. `index`: "auto" (faiss where it can be
    imported), "faiss" or "torch".
    """
    check(bank, bank_labels, queries, query_labels, num_classes=num_classes)
    if metric != "cosine":
        raise ValueError(f"metric={metric} is not known; allowed: cosine")
    if not k or any(value < 1 for value in k):
        raise ValueError(f"k must name one or more numbers of neighbours, each 1 or more; got {list(k)}")
    if not temperature or any(not value > 0 for value in temperature):
        raise ValueError(f"temperature must name one or more numbers above 0; got {list(temperature)}")
    if center:
        mean = bank.mean(dim=0, keepdim=True)  # (1, D)
        bank, queries = bank - mean, queries - mean

    used = list(dict.fromkeys(min(value, len(bank)) for value in k))
    notes = [f"k={value} is more than the bank's {len(bank)} images; all were used" for value in k if value > len(bank)]
    search, name = make_search(unit_length(bank), index=index, device=torch.device(device))
    hits = torch.zeros(len(used), len(temperature), 2, dtype=torch.int64)
    for first in range(0, len(queries), chunk):
        rows = slice(first, first + chunk)
        similarity, neighbour = search(unit_length(queries[rows]), max(used))  # (B, k), (B, k)
        votes_for = bank_labels[neighbour]  # (B, k)
        for i, count in enumerate(used):
            for j, value in enumerate(temperature):
                votes = log_votes(similarity[:, :count], votes_for[:, :count], value, num_classes)  # (B, C)
                rank = rank_of_label(votes, query_labels[rows])  # (B,)
                hits[i, j] += torch.stack([(rank < 1).sum(), (rank < 5).sum()])

    table = []
    for i, count in enumerate(used):
        for j, value in enumerate(temperature):
            row = {"k": count, "temperature": float(value), "top1": hits[i, j, 0].item() / len(queries)}
            if num_classes > 5:
                row["top5"] = hits[i, j, 1].item() / len(queries)
            table.append(row)
    return Scores(table, name, notes)


def check(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, num_classes: int) -> None:
    """Refuse features and labels that no vote can be taken over."""
    for what, features, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(
                f"the {what} must be features (images, dimensions), at least one; got {tuple(features.shape)}"
            )
        if len(labels) != len(features):
            raise ValueError(f"the {what} has {len(features)} features but {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"labels of the {what} must lie in 0..{num_classes - 1}; got {int(labels.min())}..{int(labels.max())}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"the {what} holds features that are not finite; the backbone has diverged")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank's features have {bank.shape[1]} dimensions, the queries' {queries.shape[1]}")


def log_votes(similarity: Tensor, label: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Log of each class's summed exp(similarity / temperature): (B, k), (B, k) -> (B, C) float64; no vote: -inf."""
    weight = similarity.double() / temperature  # (B, k)
    largest = torch.full((len(weight), num_classes), -torch.inf, dtype=torch.float64)  # (B, C)
    largest = largest.scatter_reduce(1, label, weight, "amax")
    total = torch.zeros_like(largest).scatter_add(1, label, (weight - largest.gather(1, label)).exp())  # (B, C)
    return torch.where(total > 0, largest + total.log(), -torch.inf)


def score(config: DictConfig, judged: Judged) -> tuple[dict[str, float], dict[str, Any], str]:
    """kNN of the test features in the train features, as `config` says."""
    center = config.ckpt == "pixels" if config.center is None else config.center
    found = knn(
        judged.train.features,
        judged.train.labels,
        judged.test.features,
        judged.test.labels,
        k=list(config.k),
        temperature=list(config.temperature),
        num_classes=len(judged.splits.classes),
        metric=config.metric,
        center=center,
        index=config.index,
        device=judged.device,
    )
    first = found.first()
    metrics = {name: first[name] for name in ("top1", "top5") if name in first}
    if len(found.rows) > 1:
        for row in found.rows:
            metrics |= {f"{name}_k{row['k']}_T{row['temperature']:g}": row[name] for name in row if name[:3] == "top"}
    settings = {
        "k": list(config.k),
        "temperature": list(config.temperature),
        "metric": config.metric,
        "centered": center,
        "vote": "exp(similarity / temperature), summed per class",
        "reported": f"top1 and top5 are those of the first of both: k={first['k']}, T={first['temperature']:g}",
        "index": found.index,
        "notes": found.notes,
    }
    return metrics, settings, f"kNN (k={first['k']}, T={first['temperature']:g}, {config.metric})"


def run(config: DictConfig) -> dict[str, Any]:
    """Judge what `config.ckpt` names by its nearest neighbours; returns the metrics and the protocol."""
    return judge(config, score, command="eval.knn", next_command="python -m eval.linear_probe")


if __name__ == "__main__":
    start(run, KnnConfig, command="eval.knn")
