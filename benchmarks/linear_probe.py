"""A grid of 50 linear heads on 50,000 x 512 features: one head at a time, and all at once; interleaved.

    python -m benchmarks.linear_probe [--images 50000] [--dim 512] [--classes 10] [--steps 40] [--rounds 2]

Features are given: running the backbone again for each epoch, as the peers' probes do, would dwarf both.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from torch.nn import functional

from eval.heads import train_heads

LR = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
WEIGHT_DECAY = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


def one_at_a_time(features, labels, grid, *, num_classes: int, steps: int, batch_size: int) -> list[torch.Tensor]:
    """Each head as torch trains it: a Linear, cross-entropy, autograd, SGD."""
    weights = []
    for lr, weight_decay in grid:
        head = torch.nn.Linear(features.shape[1], num_classes)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        groups = [{"params": [head.weight], "weight_decay": weight_decay}, {"params": [head.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        for chosen in order.split(batch_size)[:steps]:
            optimizer.zero_grad()
            functional.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        weights.append(head.weight.detach())
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = (("images", 50_000), ("dim", 512), ("classes", 10), ("steps", 40), ("batch-size", 512), ("rounds", 2))
    for name, default in settings:
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(given.images, given.dim, generator=generator)
    labels = torch.randint(given.classes, (given.images,), generator=generator)
    grid = list(itertools.product(LR, WEIGHT_DECAY))
    setting = {"num_classes": given.classes, "steps": given.steps, "batch_size": given.batch_size}
    alone, together = [], []
    for _ in range(given.rounds):
        began = time.perf_counter()
        weights = one_at_a_time(features, labels, grid, **setting)
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        heads = train_heads(
            features, labels, lr=[a for a, _ in grid], weight_decay=[b for _, b in grid], seed=0, **setting
        )  # fmt: skip
        together.append(time.perf_counter() - began)
    apart = max((heads.only(i).weight.T - weight).abs().max().item() for i, weight in enumerate(weights))
    size = f"{given.steps} steps of {given.batch_size}, {given.images:,} x {given.dim}, {given.classes} classes"
    print(f"{len(grid)} heads, {size}, {torch.get_num_threads()} threads")
    print(f"one at a time {min(alone):8.2f} s")
    ratio = min(alone) / min(together)
    print(f"all at once   {min(together):8.2f} s  ratio {ratio:.2f}; weights differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
