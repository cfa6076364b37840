"""NT-Xent in chunks beside cross entropy over the whole similarity matrix, forward and backward.

    python -m benchmarks.nt_xent --num-embeddings 8192 --dim 128 --threads 2

Each way runs in processes of its own, interleaved, so that its peak memory can be told; the ratios are of the medians.
lightly's NTXentLoss takes part where the package `lightly`, which this project does not need, is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl.methods.nt_xent import nt_xent


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
    loss_function: Callable[[Tensor, float], Tensor], options: argparse.Namespace
) -> tuple[float, float, float, float]:
    """Seconds per forward and backward, peak MiB above what the embeddings took, the loss, the gradient's norm."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(options.num_embeddings // 2, 2, options.dim, generator=generator).to(device)
    embeddings.requires_grad_()
    loss_function(embeddings[:8], options.temperature).backward()  # loads what is loaded on first use
    before = _peak(device)
    seconds, loss = [], torch.zeros(())
    for _ in range(options.repeats):
        embeddings.grad = None
        _wait(device)
        start = time.perf_counter()
        loss = loss_function(embeddings, options.temperature)
        loss.backward()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    assert embeddings.grad is not None
    return min(seconds), _peak(device) - before, loss.item(), embeddings.grad.norm().item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-embeddings", type=int, default=8192, help="2N, over both views")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs in one process; the fastest counts")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way, interleaved")
    options = parser.parse_args()
    ways = {"whole matrix": whole_matrix, "in chunks": in_chunks}
    if importlib.util.find_spec("lightly"):
        ways["lightly"] = lightly_loss
    rounds = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rounds[name].append(pool.apply(measure, (way, options)))
    print(" ".join(f"{name}={value}" for name, value in vars(options).items()))
    ours = [statistics.median(column) for column in zip(*rounds["in chunks"])]
    for name, rows in rounds.items():
        seconds, mib, loss, gradient = (statistics.median(column) for column in zip(*rows))
        print(
            f"{name:13} {seconds:7.3f} s ({seconds / ours[0]:5.2f} x ours)   peak {mib:7.1f} MiB "
            f"({mib / max(ours[1], 0.1):5.1f} x ours)   loss {loss:.6f}   gradient norm {gradient:.6e}"
        )


if __name__ == "__main__":
    main()
