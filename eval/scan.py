"""Scans of a bank for each query's closest rows, fast and nearly right: faiss, torch in fp32, torch in bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from eval.largest import Largest
from eval.rows import PIECES, Rows
from ssl.products import has_onednn, product

INDEXES = ("auto", "faiss", "torch", "shortlist")
SHORTLIST = 4  # candidates per neighbour that a scan by matrix products keeps at most
MARGIN = 1.5  # times the error, see `Bound.margin`
FAISS_GPU_NEIGHBOURS = 2048  # what faiss can select on a GPU
CHUNK = 2048
TILE = 2048
FP32, BF16 = 2.0**-24, 2.0**-8  # how far off, relatively, a number may be once rounded
TINY = 2.0**-126  # and absolutely: what is smaller may have become zero


@dataclass(frozen=True)
class Candidates:
    """Up to m rows that a scan found closest to each query: closeness (M, m), -inf where there is none, place (M, m).

    Closeness is off by `error` (M,) at most. The true closeness of all other rows is `limit` (M,) at most.
    """

    closeness: Tensor
    place: Tensor
    error: Tensor
    limit: Tensor


Scan = Callable[[Rows, Tensor, int], Candidates]


def make_scan(index: str, device: torch.device) -> tuple[Scan, str]:
    """The scan that `index` names, and its name in full. Raises ValueError where it is unknown or not installed.

    `auto` is the fastest in fp32: torch on a CPU where oneDNN multiplies, else faiss where it can be imported. Whether
    it is the shortlist instead, `eval.neighbours.nearest` decides. Faiss's wheel multiplies with 256-bit registers: on
    an EPYC with AVX-512 it takes 1.7 times as long for 10,000 in 50,000 x 512.
    """
    if index not in INDEXES:
        raise ValueError(f"index={index} is not known; allowed: {', '.join(INDEXES)}")
    if index == "shortlist":
        return bf16_scan, f"bfloat16 shortlist on {device.type}, measured again in float64"
    if index == "torch" or (index == "auto" and device.type == "cpu" and has_onednn()):
        return fp32_scan, f"torch on {device.type}"
    faiss = import_faiss()
    if faiss is None and index == "faiss":
        raise ValueError("index=faiss, but faiss cannot be imported; install it or use index=torch (the same result)")
    if faiss is None:
        return fp32_scan, f"torch on {device.type} (faiss cannot be imported)"
    on_gpu = device.type == "cuda" and getattr(faiss, "get_num_gpus", int)() > 0
    if device.type == "cuda" and not on_gpu:
        return fp32_scan, f"torch on {device.type} (this faiss cannot use the GPU)"
    name = f"faiss {faiss.__version__} flat on {device.type}"
    return partial(faiss_scan, faiss), name


def fp32_scan(rows: Rows, queries: Tensor, count: int) -> Candidates:
    """Candidates for the `count` closest by matrix products in fp32."""
    return matrix_scan(rows, queries, count, dtype=torch.float32)


def bf16_scan(rows: Rows, queries: Tensor, count: int) -> Candidates:
    """Candidates for the `count` closest by matrix products in bfloat16."""
    return matrix_scan(rows, queries, count, dtype=torch.bfloat16)


def matrix_scan(rows: Rows, queries: Tensor, count: int, *, dtype: torch.dtype) -> Candidates:
    """The rows whose products with `queries` (M, D), taken in `dtype`, let them be among the `count` closest.

    A squared distance is |q|^2 - 2 (q b - |b|^2 / 2), of which the last part is added in fp32. A point near the rows'
    mean is subtracted first, since rounding costs less near zero: it moves no distance, and q b only by a constant.
    """
    euclidean = rows.metric == "euclidean"
    shifts = euclidean or dtype == torch.bfloat16
    near = middle(rows) if shifts else queries.new_zeros(1, rows.dim)  # (1, D)
    moved = queries - near if euclidean else queries  # (M, D)
    rounded = moved.to(dtype)
    norm, lost = moved.norm(dim=1), (moved - rounded).norm(dim=1)  # (M,), (M,)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(queries), CHUNK)]
    most = max(SHORTLIST * count, 64)
    found = [Largest(len(norm[at]), count, most, queries.device) for at in chunks]
    floor = shortest(rows.dim)
    bound = Bound(rows, norm + floor, lost + floor, near.norm() + floor, dtype)
    with exact_products():
        for first, block in rows.blocks():
            in_dtype, length, away = moved_into(dtype, block, near if shifts else None)  # (n, D), (n,), (n,)
            half = 0.5 * length.square() if euclidean else None  # (n,)
            bound = bound.grown(length.max() + floor, away.max() + floor)
            for at, largest in zip(chunks, found):
                margin = partial(bound.margin, at)
                for tile, stop in tiles(len(block), count if first == 0 else 0):
                    score = product(rounded[at], in_dtype[tile:stop])  # (B, n)
                    if half is not None:
                        score = score.float() - half[tile:stop]
                    largest.offer(score, first + tile, margin)
                largest.settle(margin)
    best, place = side_by_side(found, count)  # (M, m), (M, m)
    bar = torch.cat([largest.bar for largest in found])  # (M,)
    size = bar.abs().masked_fill(bar.isinf(), 0.0)  # (M,)
    error = bound.error(slice(None), best.abs().masked_fill(best.isinf(), 0.0).amax(1).maximum(size))  # (M,)
    # Of a score s below the bar the share BF16 |s| may be larger than the bar's own; s + BF16 |s| never is.
    limit = bar + bound.error(slice(None), size)  # (M,)
    if not euclidean:
        by_near = queries @ near.T  # (M, 1)
        return Candidates(best + by_near, place, error, limit + by_near[:, 0])
    return Candidates(2 * best - norm[:, None].square(), place, 2 * error, 2 * limit - norm.square())


@dataclass(frozen=True)
class Bound:
    """How far off the scores of `matrix_scan` may be, and with them closeness.

    `norm` (M,) are the lengths of the queries, `lost` (M,) those of what rounding took away from them; `longest` and
    `rest` () are the largest lengths of rows and of what rounding took away from rows. The error of q b is at most
    |q| |b - b'| + |q - q'| |b'| for the rounded q' and b' (Cauchy and Schwarz), and what the products and their sum are
    rounded by: relatively, and below the smallest normal number absolutely. The lengths are `shortest` too long.
    """

    rows: Rows
    norm: Tensor
    lost: Tensor
    near: Tensor
    dtype: torch.dtype
    longest: Tensor | float = 0.0
    rest: Tensor | float = 0.0

    def grown(self, longest: Tensor, rest: Tensor) -> Bound:
        """The bound with more rows: the largest length of theirs, and of what rounding took away from them."""
        return replace(self, longest=longest.clamp_min(self.longest), rest=rest.clamp_min(self.rest))

    def error(self, at: slice, size: Tensor) -> Tensor:
        """How far off scores of the queries `at` may be (B,) that are at most `size` (B,) in absolute value.

        `size` counts for the cosine in bfloat16 alone, where the scores themselves were rounded to it. Of the euclidean
        ones q b was, before the rest was added.
        """
        norm, dim, euclidean = self.norm[at], self.rows.dim, self.rows.metric == "euclidean"
        whole = (norm + self.lost[at]) * (self.longest + self.rest)  # (B,): |q'| |b'| at most
        error = (dim + 8) * FP32 * whole + 4 * (dim + 8) * TINY  # (B,)
        if self.dtype == torch.bfloat16:
            size = whole if euclidean else size
            error = error + norm * self.rest + self.lost[at] * (self.longest + self.rest) + BF16 * size
        if euclidean:
            return error + 0.5 * (dim + 8) * FP32 * (norm + self.longest).square()
        return error + 8 * FP32 * norm * self.near * dim

    def margin(self, at: slice, least: Tensor) -> Tensor:
        """How far below the count-th largest score (B,) a row of the `count` closest may well lie.

        Twice the error is how far it could: the count-th and the row may err towards each other. Errors are seldom near
        their bound, so MARGIN times the error leaves few queries open: of 10,000 with Gaussian features none, where
        1.25 leaves 251 and 1.35 none.
        """
        return MARGIN * self.error(at, least.abs())


def shortest(dim: int) -> float:
    """How much too short a length in fp32 may be found where the squares of `dim` numbers are not normal ones."""
    return (dim * TINY) ** 0.5


def side_by_side(found: list[Largest], count: int) -> tuple[Tensor, Tensor]:
    """Values and places (M, m) of all chunks, m at least `count`, those with fewer filled up with -inf."""
    width = max(count, *(largest.value.shape[1] for largest in found))
    values = [pad(largest.value, (0, width - largest.value.shape[1]), value=-torch.inf) for largest in found]
    places = [pad(largest.place, (0, width - largest.place.shape[1])) for largest in found]
    return torch.cat(values), torch.cat(places)


def moved_into(dtype: torch.dtype, block: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`block` (n, D) less `near` (1, D) in `dtype`; the length of each row before, and of what rounding took away (n,).

    Piece by piece, because what is made on the way takes longer to write to memory than to compute.
    """
    if near is None and dtype == block.dtype:
        return block, block.norm(dim=1), block.new_zeros(len(block))
    result, size = torch.empty_like(block, dtype=dtype), PIECES[block.device.type]
    norm, away = block.new_zeros(len(block)), block.new_zeros(len(block))
    for start in range(0, len(block), size):
        part = slice(start, start + size)
        moved = block[part] if near is None else block[part] - near  # (B, D)
        norm[part] = moved.norm(dim=1)
        result[part] = moved
        if dtype != block.dtype:
            away[part] = (moved - result[part]).norm(dim=1)
    return result, norm, away


def tiles(num: int, count: int) -> Iterator[tuple[int, int]]:
    """Bounds of the tiles that a block of `num` rows is scored in. The first holds several times what is looked for, so
    that few of the later scores are larger than the least of that.
    """
    first = min(-(-16 * count // TILE) * TILE or TILE, num)
    yield 0, first
    for start in range(first, num, TILE):
        yield start, min(start + TILE, num)


def middle(rows: Rows, sample: int = 4096) -> Tensor:
    """A point (1, D) near the mean of the rows: that of a sample of them, evenly spaced."""
    step = -(-len(rows) // sample)
    return rows.prepare(rows.bank[::step]).mean(0, keepdim=True)


@contextmanager
def exact_products() -> Iterator[None]:
    """Without TF32 for fp32, and without sums in bfloat16, on GPUs: the error bound knows neither."""
    before, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reduced


def faiss_scan(faiss: Any, rows: Rows, queries: Tensor, count: int) -> Candidates:
    """The closest by faiss's flat search, block by block, on the GPU where that is the rows' device.

    A few more than `count` are kept, so that the error seldom leaves one open.
    """
    keep = min(count + max(8, count // 8), len(rows))
    if rows.device.type == "cuda" and keep > FAISS_GPU_NEIGHBOURS:
        return fp32_scan(rows, queries, count)
    euclidean = rows.metric == "euclidean"
    near = middle(rows) if euclidean else queries.new_zeros(1, rows.dim)  # (1, D)
    moved = queries - near if euclidean else queries  # (M, D)
    best = torch.full((len(queries), keep), -torch.inf)  # (M, m)
    place = torch.zeros(best.shape, dtype=torch.int64)
    longest = queries.new_zeros(())
    for first, block in rows.blocks():
        block = block - near if euclidean else block
        longest = torch.maximum(longest, block.norm(dim=1).max())
        flat = (faiss.IndexFlatL2 if euclidean else faiss.IndexFlatIP)(rows.dim)
        if rows.device.type == "cuda":
            flat = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.cuda.current_device(), flat)
        flat.add(as_numpy(block))
        score, column = (torch.from_numpy(x) for x in flat.search(as_numpy(moved), min(keep, len(block))))  # (M, m)
        score = -score if euclidean else score
        best, order = torch.cat([best, score], 1).topk(keep, dim=1)  # (M, m)
        place = torch.cat([place, column + first], 1).gather(1, order)
    norm, longest = moved.norm(dim=1) + shortest(rows.dim), longest + shortest(rows.dim)  # (M,), ()
    size = (norm + longest).square() if euclidean else norm * longest
    error = (2 * rows.dim + 8) * (FP32 * size + 4 * TINY)  # (M,)
    best, place = best.to(rows.device), place.to(rows.device)
    border = best.topk(count, dim=1).values[:, -1:] - 2 * error[:, None]  # (M, 1)
    passed_over = best.masked_fill(best >= border, -torch.inf).amax(1)  # (M,)
    if keep < len(rows):
        passed_over = passed_over.maximum(best.amin(1))
    return Candidates(best.masked_fill(best < border, -torch.inf), place, error, passed_over + error)


def as_numpy(features: Tensor) -> np.ndarray:
    """The C-contiguous fp32 numpy view that faiss reads."""
    return np.ascontiguousarray(features.detach().cpu().numpy(), dtype=np.float32)


def import_faiss() -> Any:
    """faiss, or None where it cannot be imported. Late and after torch, because its wheel is built for another CUDA."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # else it tells which variants it has tried
    try:
        import faiss
    except (ImportError, OSError):  # OSError: a shared library of the GPU wheel is missing
        return None
    return faiss
