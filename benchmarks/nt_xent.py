"""NT-Xent in chunks beside cross entropy over the whole similarity matrix, forward and backward.

    python -m benchmarks.nt_xent --num-embeddings 8192 16384 --dim 128 --threads 2

Each way runs in processes of its own, in turns, so that its peak memory beyond the embeddings can be told. The peer is
lightly's NTXentLoss where the package `lightly`, which this project does not need, is installed, else the same loss
over the whole matrix as the peers write it. How it is measured stands in benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Part, Sample, Way, in_fresh_process, parser_of, run
from ssl.methods.nt_xent import nt_xent

LIGHTLY, WHOLE = "lightly's NTXentLoss", "whole matrix"
WANTED, WANTED_MEMORY = 3.0, 30.0


def whole_matrix(embeddings: Tensor, temperature: float) -> Tensor:
    """How the peers write it: four blocks of the matrix, the diagonals masked out, cross entropy over the rows."""
    first, second = F.normalize(embeddings, dim=-1).unbind(1)  # (N, Z), (N, Z)
    num_images = len(first)
    others = ~torch.eye(num_images, dtype=torch.bool, device=first.device)
    within_first = (first @ first.t() / temperature)[others].view(num_images, -1)  # (N, N-1)
    within_second = (second @ second.t() / temperature)[others].view(num_images, -1)
    across = first @ second.t() / temperature  # (N, N)
    upper = torch.cat([across, within_first], 1)  # (N, 2N-1)
    lower = torch.cat([across.t(), within_second], 1)
    logits = torch.cat([upper, lower])  # (2N, 2N-1)
    return F.cross_entropy(logits, torch.arange(num_images, device=first.device).repeat(2))


def lightly_loss(embeddings: Tensor, temperature: float) -> Tensor:
    """lightly's NTXentLoss, as installed."""
    from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]

    return NTXentLoss(temperature)(embeddings[:, 0], embeddings[:, 1])


def in_chunks(embeddings: Tensor, temperature: float) -> Tensor:
    """This project's."""
    return nt_xent(embeddings, temperature=temperature)


def measure(
    loss_function: Callable[[Tensor, float], Tensor],
    num_embeddings: int,
    dim: int,
    temperature: float,
    threads: int,
    device_name: str,
    repeats: int,
) -> Sample:
    """The fastest forward and backward, and the peak of memory above what the embeddings took."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    embeddings = made_embeddings(num_embeddings, dim).to(device).requires_grad_()
    loss_function(embeddings[:256], temperature).backward()  # loads what is loaded on first use, as large products do
    embeddings.grad = None
    before = _restart_peak(device)
    samples = []
    for _ in range(repeats):
        embeddings.grad = None
        _wait(device)
        began, cpu_began = time.perf_counter(), time.process_time()
        loss_function(embeddings, temperature).backward()
        _wait(device)
        samples.append((time.perf_counter() - began, time.process_time() - cpu_began))
    wall, cpu = (min(column) for column in zip(*samples))
    return Sample(wall, cpu, _peak(device) - before)


def made_embeddings(num_embeddings: int, dim: int) -> Tensor:
    """(N, V=2, Z) of noise."""
    return torch.randn(num_embeddings // 2, 2, dim, generator=torch.Generator().manual_seed(0))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _restart_peak(device: torch.device) -> float:
    """Count the peak from what is held now, in MiB. Outside Linux from the highest so far, which hides small peaks."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> float:
    """MiB held at most since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


QUICK = ["--num-embeddings", "2048", "--repeats", "1"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--num-embeddings", type=int, nargs="+", default=[8192, 16384], help="2N, over both views")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs in one process; the fastest counts")
    return parser


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """A part for each number of embeddings."""
    has_lightly = importlib.util.find_spec("lightly") is not None
    peer = LIGHTLY if has_lightly else WHOLE
    for num in given.num_embeddings:
        yield Part(
            f"NT-Xent forward and backward, 2N = {num:,}, dim {given.dim}, {given.device}",
            "embeddings",
            num,
            partial(ways, given, num, peer),
            {peer: WANTED},
            {peer: WANTED_MEMORY},
            warm_ups=0,  # every round is a fresh process
            note="" if has_lightly else f"lightly is not installed; the peer is its form of the loss, the {WHOLE}",
        )


def ways(given: argparse.Namespace, num: int, peer: str) -> dict[str, Way]:
    """The peer's and ours, each in fresh processes."""
    setting = (num, given.dim, given.temperature, given.threads, given.device, given.repeats)
    theirs = lightly_loss if peer == LIGHTLY else whole_matrix
    return {peer: in_fresh_process(measure, theirs, *setting), "ours": in_fresh_process(measure, in_chunks, *setting)}


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
