"""Features that memory does not hold: a memory-mapped file in a folder that the user knows."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ssl.distributed as distributed

FREE_SHARE = 0.5  # of the free memory: the search, the queries and joining the ranks' shares need the rest
BLOCK_BYTES = 2**28


class FeatureStore:
    """Gives the tensors that features are written into: in memory up to `limit_gib`, beyond it mapped from `folder`.

    `limit_gib` None stands for half of the memory that is free, shared by the ranks of this machine. A file has no name
    from the moment that every rank has opened it, so that it is gone when the command ends, however it ends. `notes`
    tells of each.
    """

    def __init__(self, folder: Path, *, limit_gib: float | None = None) -> None:
        if limit_gib is not None and limit_gib < 0:
            raise ValueError(f"bank_gib must be 0 or more, or null for half of the free memory; got {limit_gib:g}")
        self.folder = folder
        self.limit_gib = limit_gib
        self.notes: list[str] = []

    def __call__(self, num: int, dim: int) -> Tensor | None:
        """A float32 tensor (num, dim), the same memory on every rank; None where each rank's own memory will do.

        Raises OSError where the disk has no room for it.
        """
        num_bytes = 4 * num * dim
        limit = free_bytes() * FREE_SHARE if self.limit_gib is None else self.limit_gib * 2**30
        if num_bytes <= float(distributed.gather_rows(torch.tensor([limit], dtype=torch.float64)).min()):
            return None
        self.notes.append(
            f"features of {num:,} images, {num_bytes / 2**30:.2f} GiB, lay in a memory-mapped file in {self.folder}"
        )
        return map_file(self.folder, num, dim)


def map_file(folder: Path, num: int, dim: int) -> Tensor:
    """A float32 tensor (num, dim) of zeros in a nameless file in `folder`, shared by the ranks of this machine.

    Raises OSError where the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first_pid = int(distributed.gather_rows(torch.tensor([os.getpid()]))[0])
    path = folder / f".features_{first_pid}_{num}x{dim}"
    if distributed.is_main():
        _make(path, 4 * num * dim)
    distributed.barrier()
    try:
        with path.open("r+b") as file:
            rows = np.frombuffer(mmap.mmap(file.fileno(), 4 * num * dim), np.float32).reshape(num, dim)
        distributed.barrier()
    finally:
        if distributed.is_main():
            path.unlink()
    return torch.from_numpy(rows)


def _make(path: Path, num_bytes: int) -> None:
    try:
        with path.open("xb") as file:
            file.truncate(num_bytes)
            if hasattr(os, "posix_fallocate"):  # Linux: a full disk is met here and not as a bus error later
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"the features need {num_bytes / 2**30:.1f} GiB on disk and {path.parent} has no room for them: "
            f"{error.strerror}; give out= on a larger disk, a larger bank_gib=, or data.limit="
        ) from error


def free_bytes(root: Path = Path("/")) -> float:
    """Memory that this rank may take: what the system, and the container, call free, shared by this machine's ranks.

    Infinite where the system does not tell.
    """
    meminfo, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if not meminfo.is_file():
        return float("inf")
    available = 1024 * _field(meminfo, "MemAvailable:")
    if (group / "memory.max").is_file() and (group / "memory.max").read_text().strip() != "max":
        used = int((group / "memory.current").read_text()) - _field(group / "memory.stat", "file")  # less its cache
        available = min(available, int((group / "memory.max").read_text()) - used)
    return max(available, 0) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _field(path: Path, name: str) -> int:
    words = (line.split() for line in path.read_text().splitlines())
    return next(int(found[1]) for found in words if found[0] == name)


def close_gaps(features: Tensor, kept: Tensor) -> Tensor:
    """The rows `kept` (K,), which rise, of features (N, D) that all ranks share, moved together in place: (K, D)."""
    distributed.barrier()  # every rank has written its rows
    if len(kept) < len(features) and distributed.is_main():
        step = max(BLOCK_BYTES // (4 * features.shape[1]), 1)
        for first in range(0, len(kept), step):
            rows = kept[first : first + step]
            features[first : first + len(rows)] = features[rows]  # the right side is a copy; rows only move up
    distributed.barrier()
    return features[: len(kept)]
