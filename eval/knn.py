"""How good a backbone is by its nearest neighbours: `python -m eval.knn ckpt=runs/<run>`."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from eval import low_shot
from eval.accuracy import rank_of_label
from eval.command import judge, start
from eval.config import EvalConfig
from eval.neighbours import Found, merge, nearest
from eval.rows import METRICS, Rows
from eval.subject import Judged
from ssl.distributed import gather_rows, rank, world_size

VOTES = ("weighted", "majority")
TEMPERATURE = 0.07
DRAWS = 5
RECALL_QUERIES = 200
LONGEST = 2.0**61  # length of a feature, of which four times as much can be squared and doubled in fp32


@dataclass
class KnnConfig(EvalConfig):
    """What `python -m eval.knn` takes."""

    k: list[int] = field(default_factory=lambda: [20])
    temperature: list[float] | None = None
    metric: str = "cosine"
    vote: str = "weighted"
    center: bool | None = None
    train_amount: Any = None  # 1%, 10%, or a number of images per class; null: all
    draws: int | None = None
    index: str = "auto"
    bank_gib: float | None = None


@dataclass(frozen=True)
class Scores:
    """Accuracies of every (k, temperature) as fractions, and how the neighbours were found.

    `search` tells how many queries the scan left open, which were looked for again. Where the shortlist was asked for
    by name it has its recall at the largest k as well, and on how many queries that was measured.
    """

    rows: list[dict[str, Any]]
    index: str
    notes: list[str] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)

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
    temperature: Sequence[float] | None = None,
    num_classes: int,
    metric: str = "cosine",
    vote: str = "weighted",
    center: bool = False,
    index: str = "auto",
    device: torch.device | str = "cpu",
    chunk: int = 1024,
    over_ranks: bool = False,
) -> Scores:
    """Classify `queries` (M, D) by a vote of their k nearest neighbours in `bank` (N, D), in memory or memory-mapped.

    `vote` is `weighted` or `majority`, one for each neighbour. With `metric` cosine the weight is
    exp(similarity / temperature) (Wu et al. 2018, section 3.4; as DINO's `eval_knn.py`), temperature 0.07 unless given.
    With `metric` euclidean, over features of whatever length, it is 1 / distance (Dudani's idea, in the form that
    scikit-learn's `weights="distance"` and solo-learn have); neighbours at distance zero then vote alone.

    Sums are taken in log space in float64, so no temperature overflows or loses a vote. Ties have a rule: of equally
    close images the one that stands earlier in the bank is nearer; of classes with equal votes the lower number wins; a
    class without a vote is never a hit. `center` subtracts the bank's mean first, as raw pixels need. A k beyond the
    bank is cut to the bank's size, with a note. `index`: `faiss`, `torch`, `shortlist` or `auto` (the
    fastest of them for these features); all find the same. With `over_ranks` each process searches a slice of the bank:
    all must call it, with the same features. Raises ValueError for settings without meaning and features that no vote
    can be taken over.
    """
    check(bank, bank_labels, queries, query_labels, num_classes=num_classes, metric=metric)
    temperatures = check_settings(k, temperature, metric=metric, vote=vote)
    mean = gather_rows(bank.mean(dim=0, keepdim=True))[:1] if center and over_ranks else None  # (1, D)
    if center and mean is None:
        mean = bank.mean(dim=0, keepdim=True)
    rows = Rows(bank, metric, torch.device(device), mean)
    used = list(dict.fromkeys(min(value, len(bank)) for value in k))
    notes = [f"k={value} is more than the bank's {len(bank)} images; all were used" for value in k if value > len(bank)]
    found = find(rows, queries, max(used), index=index, over_ranks=over_ranks)

    hits = torch.zeros(len(used), len(temperatures), 2, dtype=torch.int64)
    for first in range(0, len(queries), chunk):
        at = slice(first, first + chunk)
        votes_for = bank_labels[found.place[at]]  # (B, k)
        for i, count in enumerate(used):
            for j, value in enumerate(temperatures):
                weight = log_weight(found.closeness[at, :count], metric=metric, vote=vote, temperature=value)  # (B, k)
                votes = log_votes(weight, votes_for[:, :count], num_classes)  # (B, C)
                place = rank_of_label(votes, query_labels[at])  # (B,)
                hits[i, j] += torch.stack([(place < 1).sum(), (place < 5).sum()])

    table = []
    for i, count in enumerate(used):
        for j, value in enumerate(temperatures):
            row: dict[str, Any] = {"k": count} | ({} if value is None else {"temperature": float(value)})
            row["top1"] = hits[i, j, 0].item() / len(queries)
            if num_classes > 5:
                row["top5"] = hits[i, j, 1].item() / len(queries)
            table.append(row)
    search: dict[str, Any] = {"looked_for_again": found.num_open}
    if index == "shortlist":
        search |= recall(rows, queries, found, over_ranks=over_ranks)
    return Scores(table, found.index, notes, search)


def find(rows: Rows, queries: Tensor, count: int, *, index: str, over_ranks: bool) -> Found:
    """The `count` rows nearest to each query; over ranks, the nearest of those that each finds in its slice."""
    if not over_ranks or world_size() == 1:
        return nearest(rows, queries, count, index=index)
    first, last = len(rows) * rank() // world_size(), len(rows) * (rank() + 1) // world_size()
    own = nearest(
        replace(rows, bank=rows.bank[first:last]), queries, count, index=index
    )  # (M, k'), fewer in a few rows
    closeness = gather_rows(own.closeness.T.contiguous()).T  # (M, W*k)
    place = gather_rows((own.place + first).T.contiguous()).T
    num_open = int(gather_rows(torch.tensor([own.num_open])).sum())
    name = f"{own.index}, the bank in {world_size()} slices"
    return Found(*merge(closeness, place, count), name, num_open)


def recall(rows: Rows, queries: Tensor, found: Found, *, over_ranks: bool) -> dict[str, Any]:
    """Which share of the nearest that the exact search finds is `found`, on an evenly spaced sample of the queries."""
    some = slice(None, None, -(-len(queries) // RECALL_QUERIES))
    exact = find(rows, queries[some], found.place.shape[1], index="torch", over_ranks=over_ranks)
    same = (found.place[some, :, None] == exact.place[:, None, :]).any(2)  # (S, k)
    return {"recall": same.double().mean().item(), "recall_queries": len(same)}


def check_settings(
    k: Sequence[int], temperature: Sequence[float] | None, *, metric: str, vote: str
) -> list[float] | list[None]:
    """The temperatures to vote with, [None] where the vote has none. Raises ValueError for what makes no sense."""
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is not known; allowed: {', '.join(METRICS)}")
    if vote not in VOTES:
        raise ValueError(f"vote={vote} is not known; allowed: {', '.join(VOTES)}")
    if not k or any(value < 1 for value in k):
        raise ValueError(f"k must name one or more numbers of neighbours, each 1 or more; got {list(k)}")
    if vote == "majority" or metric == "euclidean":
        if temperature is not None:
            why = "vote=majority" if vote == "majority" else "metric=euclidean, whose weights are 1 / distance"
            raise ValueError(f"temperature={list(temperature)} has no effect with {why}; leave it out")
        return [None]
    if temperature is None:
        return [TEMPERATURE]
    if not temperature or any(not value > 0 for value in temperature):
        raise ValueError(f"temperature must name one or more numbers above 0; got {list(temperature)}")
    return list(temperature)


def check(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, num_classes: int, metric: str
) -> None:
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
        largest = torch.stack(features.aminmax()).abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"the {what} holds features that are not finite; the backbone has diverged")
        if metric == "euclidean" and not largest * math.sqrt(features.shape[1]) < LONGEST:
            allowed = LONGEST / math.sqrt(features.shape[1])
            raise ValueError(
                f"metric=euclidean needs squared distances that fp32 can hold, so numbers below {allowed:.1e}; "
                f"the {what} holds {largest:.1e}; divide all features by one number, or use metric=cosine"
            )
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank's features have {bank.shape[1]} dimensions, the queries' {queries.shape[1]}")


def log_weight(closeness: Tensor, *, metric: str, vote: str, temperature: float | None) -> Tensor:
    """Log of each neighbour's weight in the vote: closeness (B, k) -> (B, k) float64."""
    if vote == "majority":
        return torch.zeros_like(closeness, dtype=torch.float64)
    if metric == "cosine":
        assert temperature is not None
        return closeness.double() / temperature
    squared = -closeness.double()  # (B, k)
    same = squared == 0
    alone = torch.where(same, 0.0, -torch.inf)  # (B, k)
    return torch.where(same.any(1, keepdim=True), alone, -0.5 * squared.log())


def log_votes(weight: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Log of each class's summed exp(weight): (B, k), (B, k) -> (B, C) float64; no vote: -inf."""
    largest = torch.full((len(weight), num_classes), -torch.inf, dtype=torch.float64)  # (B, C)
    largest = largest.scatter_reduce(1, label, weight, "amax")
    above = torch.where(weight == -torch.inf, -torch.inf, weight - largest.gather(1, label))  # (B, k)
    total = torch.zeros_like(largest).scatter_add(1, label, above.exp())  # (B, C)
    return torch.where(total > 0, largest + total.log(), -torch.inf)


def score(config: DictConfig, judged: Judged) -> tuple[dict[str, float], dict[str, Any], str]:
    """kNN of the test features in the train features, or in a few drawn of each class, as `config` says."""
    temperature = None if config.temperature is None else list(config.temperature)
    check_settings(list(config.k), temperature, metric=config.metric, vote=config.vote)  # before images are read
    center = config.ckpt == "pixels" if config.center is None else config.center
    draws = draw(config, judged)
    scores = []
    for chosen in draws:
        scores.append(
            knn(
                judged.train.features if chosen is None else judged.train.features[chosen],
                judged.train.labels if chosen is None else judged.train.labels[chosen],
                judged.test.features,
                judged.test.labels,
                k=list(config.k),
                temperature=temperature,
                num_classes=len(judged.splits.classes),
                metric=config.metric,
                vote=config.vote,
                center=center,
                index=config.index,
                device=judged.device,
                over_ranks=True,
            )
        )
    metrics = mean_and_spread(scores)
    found, first = scores[0], scores[0].first()
    shown = f"k={first['k']}" + (f", T={first['temperature']:g}" if "temperature" in first else "")
    settings = {
        "k": list(config.k),
        "temperature": [row["temperature"] for row in found.rows if row["k"] == first["k"] and "temperature" in row],
        "metric": config.metric,
        "vote": config.vote,
        "weight": weight_of(config.metric, config.vote),
        "centered": center,
        "reported": f"top1 and top5 are those of the first of each list: {shown}",
        "index": found.index,
        "recall": None,
        **found.search,
        "notes": list(dict.fromkeys(note for each in scores for note in each.notes)),
    }
    how = f"kNN ({shown}, {config.metric}, {config.vote})"
    if config.train_amount is not None:
        settings |= {
            "train_amount": config.train_amount,
            "draws": len(draws),
            "bank": [len(chosen) for chosen in draws if chosen is not None],
        }
        how += f", {config.train_amount} of each class, mean of {len(draws)} draws"
    return metrics, settings, how


def draw(config: DictConfig, judged: Judged) -> list[Tensor] | list[None]:
    """Which rows of train are the bank: those of each draw, or [None] for all."""
    if config.train_amount is None:
        if config.draws is not None:
            raise ValueError(f"draws={config.draws} has no effect on the whole bank; give train_amount=, such as 1%")
        return [None]
    num = DRAWS if config.draws is None else config.draws
    if num < 1:
        raise ValueError(f"draws must be 1 or more, got {num}")
    labels = judged.train.labels.numpy()
    seeds = range(config.seed, config.seed + num)
    return [torch.from_numpy(low_shot.draw(labels, config.train_amount, seed=seed)) for seed in seeds]


def mean_and_spread(scores: Sequence[Scores]) -> dict[str, float]:
    """Metrics of the first k and temperature, then of each pair by name; over draws the mean and `_std`, n - 1."""
    rows = [[score.rows[number] for score in scores] for number in range(len(scores[0].rows))]
    named = [("", rows[0])]
    if len(rows) > 1:
        for row in rows:
            temperature = f"_T{row[0]['temperature']:g}" if "temperature" in row[0] else ""
            named.append((f"_k{row[0]['k']}{temperature}", row))
    metrics = {}
    for suffix, draws in named:
        for name in ("top1", "top5"):
            if name in draws[0]:
                values = [each[name] for each in draws]
                metrics[name + suffix] = statistics.fmean(values)
                if len(values) > 1:
                    metrics[f"{name}_std{suffix}"] = statistics.stdev(values)
    return metrics


def weight_of(metric: str, vote: str) -> str:
    """A neighbour's vote, in words."""
    if vote == "majority":
        return "1 for each neighbour"
    return "exp(similarity / temperature)" if metric == "cosine" else "1 / distance; at distance 0 these alone"


def run(config: DictConfig) -> dict[str, Any]:
    """Judge what `config.ckpt` names by its nearest neighbours; returns the metrics and the protocol."""
    return judge(config, score, command="eval.knn", next_command="python -m eval.linear_probe")


def in_brackets(words: Sequence[str]) -> list[str]:
    """A command line's words with single numbers as lists of one: `k=20` is `k=[20]`, in a sweep each of `k=5,20`."""
    found = []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("k", "temperature") and value not in ("", "null") and "[" not in value:
            word = f"{key}=" + ",".join(f"[{each}]" for each in value.split(","))
        found.append(word)
    return found


if __name__ == "__main__":
    sys.argv[1:] = in_brackets(sys.argv[1:])
    start(run, KnnConfig, command="eval.knn")
