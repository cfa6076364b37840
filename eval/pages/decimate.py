"""Curves of any length as few points: what is left out lies between the lowest and the highest of its neighbours."""

from __future__ import annotations

import numpy as np

MOST_POINTS = 2000


def decimated(x: np.ndarray, y: np.ndarray, *, most: int = MOST_POINTS) -> np.ndarray:
    """Indices (K,) with K <= `most` of the points (N,) of a curve, in order of `x`: the first, the last and, of each of
    equally wide parts of the x axis, the lowest and the highest. A point whose y is not finite is never chosen.

    Raises ValueError where `most` is under 8.
    """
    if most < 8:
        raise ValueError(f"most={most}: a curve needs 8 points at least")
    finite = np.flatnonzero(np.isfinite(y) & np.isfinite(x))
    order = finite[np.argsort(x[finite], kind="stable")]  # (M,)
    if len(order) <= most:
        return order
    xs, ys = x[order].astype(np.float64), y[order].astype(np.float64)
    num_parts = (most - 2) // 2
    width = (xs[-1] - xs[0]) or 1.0
    part = np.minimum(((xs - xs[0]) / width * num_parts).astype(np.int64), num_parts - 1)  # (M,)
    by_height = np.lexsort((ys, part))  # within each part from low to high
    ends = np.flatnonzero(np.diff(part[by_height], append=num_parts))
    starts = np.concatenate([[0], ends[:-1] + 1])
    kept = np.unique(np.concatenate([[0, len(order) - 1], by_height[starts], by_height[ends]]))
    return order[kept]
