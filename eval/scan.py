"""Scans of a bank for each query's closest rows, fast and nearly right: faiss, torch in fp32, torch in bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.largest import Largest
from eval.rows import PIECES, Rows
from ssl.products import has_onednn, product

INDEXES = ("auto", "faiss", "torch", "shortlist")
SHORTLIST = 4  # candidates per neighbour that the bfloat16 scan keeps
FAISS_GPU_NEIGHBOURS = 2048  # what faiss can select on a GPU
CHUNK = 1024
TILE = 4096
FP32, BF16 = 2.0**-24, 2.0**-9  # how far off, relatively, a number may be once rounded


@dataclass(frozen=True)
class Candidates:
    """The m rows that a scan found closest to each query: closeness (M, m), place (M, m); its largest error (M,)."""

    closeness: Tensor
    place: Tensor
    error: Tensor


Scan = Callable[[Rows, Tensor, int], Candidates]


def num_candidates(index: str, count: int) -> int:
    """How many rows a scan keeps for `count` neighbours: a few more, so that its error seldom leaves one open."""
    return max(SHORTLIST * count, 64) if index == "shortlist" else count + max(8, count // 8)


def make_scan(index: str, device: torch.device) -> tuple[Scan, str]:
    """The scan that `index` names, and its name in full. Raises ValueError where it is unknown or not installed.

    `auto` is torch on a CPU where oneDNN multiplies, else faiss where it can be imported. Faiss's wheel multiplies with
    256-bit registers: on an EPYC with AVX-512, 10,000 queries in 50,000 x 512 take it 1.4 times as long.
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
    return lambda rows, queries, keep: faiss_scan(faiss, rows, queries, keep), name


def fp32_scan(rows: Rows, queries: Tensor, keep: int) -> Candidates:
    """The `keep` closest by matrix products in fp32."""
    return matrix_scan(rows, queries, keep, dtype=torch.float32)


def bf16_scan(rows: Rows, queries: Tensor, keep: int) -> Candidates:
    """The `keep` closest by matrix products in bfloat16."""
    return matrix_scan(rows, queries, keep, dtype=torch.bfloat16)


def matrix_scan(rows: Rows, queries: Tensor, keep: int, *, dtype: torch.dtype) -> Candidates:
    """The `keep` rows with the largest products with `queries` (M, D), taken in `dtype`, and how far off they may be.

    A squared distance is |q|^2 - 2 (q b - |b|^2 / 2), of which the last part is added in fp32. A point near the rows'
    mean is subtracted first, since rounding costs less near zero: it moves no distance, and q b only by a constant.
    The error of q b is at most |q| |b - b'| + |q - q'| |b'| for the rounded q' and b' (Cauchy and Schwarz), and what
    the products and their sum are rounded by.
    """
    euclidean = rows.metric == "euclidean"
    shifts = euclidean or dtype == torch.bfloat16
    near = middle(rows) if shifts else queries.new_zeros(1, rows.dim)  # (1, D)
    moved = queries - near if euclidean else queries  # (M, D)
    rounded = moved.to(dtype)
    best = torch.full((len(queries), keep), -torch.inf, device=queries.device)  # (M, m)
    place = torch.zeros(best.shape, dtype=torch.int64, device=queries.device)
    longest = rest = queries.new_zeros(())
    with exact_products():
        for first, block in rows.blocks():
            in_dtype, norm, away = moved_into(dtype, block, near if shifts else None)  # (n, D), (n,), (n,)
            half = 0.5 * norm.square() if euclidean else None  # (n,)
            longest, rest = torch.maximum(longest, norm.max()), torch.maximum(rest, away.max())
            for start in range(0, len(queries), CHUNK):
                at = slice(start, start + CHUNK)
                largest = Largest(best[at], place[at])
                for tile, stop in tiles(len(block), keep if first == 0 else 0):
                    score = product(rounded[at], in_dtype[tile:stop])  # (B, n)
                    if half is not None:
                        score = score.float() - half[tile:stop]
                    largest.offer(score, first + tile)
                largest.sort()
    norm = moved.norm(dim=1)  # (M,)
    error = (rows.dim + 8) * FP32 * norm * longest  # (M,)
    if dtype == torch.bfloat16:
        size = norm * longest if euclidean else best[:, [0, -1]].abs().amax(1)  # (M,)
        error = error + norm * rest + (moved - rounded).norm(dim=1) * (longest + rest) + 2 * BF16 * size
    if not euclidean:
        return Candidates(best + queries @ near.T, place, error + 8 * FP32 * norm * near.norm() * rows.dim)
    error = 2 * error + (rows.dim + 8) * FP32 * (norm + longest).square()
    return Candidates(2 * best - norm[:, None].square(), place, error)


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


def tiles(num: int, keep: int) -> Iterator[tuple[int, int]]:
    """Bounds of the tiles that a block of `num` rows is scored in. The first holds several times what is kept, so that
    few of the later scores are larger than the least of those.
    """
    first = min(-(-16 * keep // TILE) * TILE or TILE, num)
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


def faiss_scan(faiss: Any, rows: Rows, queries: Tensor, keep: int) -> Candidates:
    """The `keep` closest by faiss's flat search, block by block, on the GPU where that is the rows' device."""
    if rows.device.type == "cuda" and keep > FAISS_GPU_NEIGHBOURS:
        return fp32_scan(rows, queries, keep)
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
    norm = moved.norm(dim=1)  # (M,)
    size = (norm + longest).square() if euclidean else norm * longest
    error = (2 * rows.dim + 8) * FP32 * size  # (M,)
    return Candidates(best.to(rows.device), place.to(rows.device), error)


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
