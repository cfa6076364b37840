"""The exact nearest neighbours of features, in an order that does not depend on what finds them.

A scan names candidates by approximate closeness and says how far off it may be. The candidates are measured again in
float64, rounded to fp32 and put in order: the closer first, of equally close ones the one that stands earlier in the
bank. Where the scan's error leaves open whether one that it passed over belongs in, the query is measured against the
whole bank. So faiss and torch, a CPU and a GPU, one process and many, a bank in memory and one on disk agree in every
neighbour, duplicates included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.largest import in_order
from eval.rows import Rows
from eval.scan import bf16_scan, make_scan
from ssl.products import multiplies_bfloat16

TILE = 4096
SAMPLE = 128  # queries, at most, that a shortlist is tried on
PAIR_VALUES = {"cpu": 2**19, "cuda": 2**25}  # of a step of `measure`; more than 2**20 take a CPU five times as long


@dataclass(frozen=True)
class Found:
    """The k rows closest to each query, in order: closeness (M, k), place (M, k), both on the CPU; how they were found.

    Closeness is the cosine similarity, or minus the squared distance. `num_open` queries were looked for twice.
    """

    closeness: Tensor
    place: Tensor
    index: str
    num_open: int


def nearest(rows: Rows, queries: Tensor, count: int, *, index: str) -> Found:
    """The `count` rows closest to each of `queries` (M, D); all rows where there are fewer.

    `index` is `auto`, `faiss`, `torch` or `shortlist`, see `make_scan`; `auto` is the shortlist where that is faster.
    All squared distances must be finite in fp32, as `eval.knn.check` sees to. Raises ValueError for another `index`.
    """
    name = make_scan(index, rows.device)[1]
    count = min(count, len(rows))
    if count == 0 or len(queries) == 0:
        return Found(torch.empty(len(queries), count), torch.empty(len(queries), count, dtype=torch.int64), name, 0)
    queries = rows.prepare(queries)  # (M, D)
    if index == "auto" and shortlist_pays(rows, queries, count):
        index, name = "shortlist", make_scan("shortlist", rows.device)[1]
    closeness, place, num_open = _nearest(rows, queries, count, index=index)
    return Found(closeness.cpu(), place.cpu(), name, num_open)


def shortlist_pays(rows: Rows, queries: Tensor, count: int) -> bool:
    """Whether a scan in bfloat16 is the faster one: on a processor made for it, where it leaves few queries open.

    It does not in features so alike that bfloat16 cannot tell them apart. A sample of the queries shows that in the
    first block of the rows, for a price that only many queries are worth.
    """
    if rows.device.type != "cpu" or not multiplies_bfloat16() or len(queries) < 32 * SAMPLE:
        return False
    some = rows.first_block()
    count = min(count, len(some))
    found = bf16_scan(some, queries[:: -(-len(queries) // SAMPLE)], count)
    least = found.closeness.topk(count, dim=1).values[:, -1]  # (S,)
    return bool((found.limit < least).double().mean() > 7 / 8)


def _nearest(rows: Rows, queries: Tensor, count: int, *, index: str) -> tuple[Tensor, Tensor, int]:
    scan, _ = make_scan(index, rows.device)
    found = scan(rows, queries, count)
    closeness = measure(rows, queries, found.place, found.closeness > -torch.inf)  # (M, m)
    closeness, place = merge(closeness, found.place, count)  # (M, k), (M, k)
    still_open = (~(found.limit < closeness[:, -1])).nonzero()[:, 0]  # (O,), a limit of nan among them
    if len(still_open) and index == "shortlist":
        again = _nearest(rows, queries[still_open], count, index="auto")
        closeness[still_open], place[still_open] = again[:2]
    elif len(still_open):
        again = exhaustive(rows, queries[still_open], count)  # (O, k)
        every = torch.ones_like(again, dtype=torch.bool)
        value = measure(rows, queries[still_open], again, every)  # (O, k)
        closeness[still_open], place[still_open] = merge(value, again, count)
    return closeness, place, len(still_open)


def measure(rows: Rows, queries: Tensor, place: Tensor, wanted: Tensor) -> Tensor:
    """Closeness (M, m) of prepared queries (M, D) to the rows at `place` where `wanted`, -inf elsewhere.

    Taken in float64 and rounded to fp32, so that equal rows are equally close wherever they stand.
    """
    pair = wanted.flatten().nonzero()[:, 0]  # (W,)
    places = place.flatten().index_select(0, pair)  # (W,)
    order = places.argsort()  # the bank is read from its front to its end
    pair, places = pair.index_select(0, order), places.index_select(0, order)
    value = torch.empty(len(pair), dtype=torch.float64, device=rows.device)  # (W,)
    step = max(PAIR_VALUES[rows.device.type] // rows.dim, 1)
    for first, block in rows.blocks():
        start, stop = torch.searchsorted(places, places.new_tensor([first, first + len(block)])).tolist()
        for some in range(start, stop, step):
            chosen = slice(some, min(some + step, stop))
            row = block.index_select(0, places[chosen] - first)  # (w, D)
            pairs = queries.index_select(0, pair[chosen] // place.shape[1]).double()  # (w, D)
            if rows.metric == "cosine":
                torch.sum(pairs.mul_(row), 1, out=value[chosen])
            else:
                torch.sum(pairs.sub_(row).square_().neg_(), 1, out=value[chosen])
    closeness = torch.full(place.shape, -torch.inf, device=rows.device)  # (M, m)
    closeness.view(-1).index_copy_(0, pair, value.float())
    return closeness


def merge(closeness: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of neighbours (M, m) the `count` closest in order, equally close ones by their place: (M, k), (M, k)."""
    key = (-in_order(closeness) << 32) + place  # (M, m)
    order = key.topk(count, dim=1, largest=False).indices  # (M, k)
    return closeness.gather(1, order), place.gather(1, order)


def exhaustive(rows: Rows, queries: Tensor, count: int, *, chunk: int = 256) -> Tensor:
    """The places (M, k) of the `count` rows closest to each prepared query (M, D), each measured in float64."""
    best = torch.full((len(queries), count), -torch.inf, device=rows.device)  # (M, k)
    place = torch.zeros(best.shape, dtype=torch.int64, device=rows.device)
    for first, block in rows.blocks():
        for tile in range(0, len(block), TILE):
            some = block[tile : tile + TILE].double()  # (n, D)
            number = torch.arange(first + tile, first + tile + len(some), device=rows.device)  # (n,)
            for start in range(0, len(queries), chunk):
                at = slice(start, start + chunk)
                closeness = closeness_in_double(queries[at].double(), some, rows.metric)  # (B, n)
                if not (closeness > best[at, -1:]).any():
                    continue  # what comes later and is equally close stands behind
                joined = torch.cat([best[at], closeness], 1)  # (B, k+n)
                places = torch.cat([place[at], number.expand(len(closeness), -1)], 1)
                best[at], place[at] = merge(joined, places, count)  # (B, k), (B, k)
    return place


def closeness_in_double(queries: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Closeness of all pairs of (B, D) and (n, D), float64 rounded to fp32: (B, n)."""
    if metric == "cosine":
        return (queries @ rows.T).float()
    # By differences: the expanded square would leave a rest where the distance is zero.
    return -torch.cdist(queries, rows, compute_mode="donot_use_mm_for_euclid_dist").square().float()
