"""A grid of 50 linear heads on 50,000 x 512 features: one head at a time, and all at once; in turns.

    python -m benchmarks.linear_probe [--images 50000] [--dim 512] [--classes 10] [--steps 40] [--rounds 2]

The second part is the whole probe, projected from a batch through the backbone and from `--steps` steps of the grid:
the peers run the backbone again in each epoch, for one head; we run it once and then train all heads for as many
epochs. Without their augmentation that is another protocol, and is labelled so. How it is measured stands in
benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from benchmarks.compare import Part, Sample, Way, parser_of, run, timed
from eval.heads import Heads, train_heads
from ssl.models.backbones import build_backbone, pooled_features

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


def all_at_once(features, labels, grid, *, num_classes: int, steps: int, batch_size: int) -> Heads:
    """The same heads as one batched problem."""
    return train_heads(
        features,
        labels,
        lr=[lr for lr, _ in grid],
        weight_decay=[weight_decay for _, weight_decay in grid],
        num_classes=num_classes,
        steps=steps,
        batch_size=batch_size,
        seed=0,
    )


ALONE, AGAIN = "one head at a time", "backbone in each epoch"
QUICK = ["--images", "4096", "--dim", "128", "--steps", "4", "--backbone", "resnet18", "--image-size", "64"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=2)
    settings = (("images", 50_000), ("dim", 512), ("classes", 10), ("steps", 40), ("batch-size", 512), ("epochs", 100))
    for name, default in settings:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backbone", default="resnet18", help="a name of timm's")
    parser.add_argument("--image-size", type=int, default=224)
    return parser


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """The grid, and the whole probe."""
    num_heads, size = len(LR) * len(WEIGHT_DECAY), f"{given.images:,} x {given.dim}"
    name = f"linear probe, {num_heads} heads, {size}"
    yield Part(name, "heads", num_heads, partial(grid_ways, given), {ALONE: 10})
    name = f"linear probe, {given.epochs} epochs, {given.backbone} at {given.image_size} px"
    note = "projected; the peers train one head on augmented images, ours all heads on fixed features"
    yield Part(name, "probes", 1, partial(probe_ways, given), {AGAIN: 90}, note=note)


def made_features(given: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, D) with labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(given.images, given.dim, generator=generator)
    return features, torch.randint(given.classes, (given.images,), generator=generator)


def setting(given: argparse.Namespace) -> dict[str, int]:
    return {"num_classes": given.classes, "steps": given.steps, "batch_size": given.batch_size}


def grid_ways(given: argparse.Namespace) -> dict[str, Way]:
    """Both train every head of the grid on the same batches."""
    data, grid = made_features(given), list(itertools.product(LR, WEIGHT_DECAY))
    return {
        ALONE: timed(lambda: one_at_a_time(*data, grid, **setting(given))),
        "ours": timed(lambda: all_at_once(*data, grid, **setting(given))),
    }


def probe_ways(given: argparse.Namespace) -> dict[str, Way]:
    """The same forward is measured for both, `epochs` times what an epoch takes for one and once for the other."""
    size = (given.image_size, given.image_size)
    backbone, _ = build_backbone(given.backbone, image_size=size)
    backbone.eval()
    images = torch.randn(16, 3, *size)
    grid_steps = given.epochs * (given.images // given.batch_size)

    @torch.no_grad()
    def forward() -> None:
        pooled_features(backbone, images)

    def once() -> Sample:
        return scaled(timed(forward)(), given.images / len(images))

    def ours() -> Sample:
        features, heads = once(), scaled(grid_ways(given)["ours"](), grid_steps / given.steps)
        return Sample(features.wall + heads.wall, features.cpu + heads.cpu)

    return {AGAIN: lambda: scaled(once(), given.epochs), "ours": ours}


def scaled(sample: Sample, times: float) -> Sample:
    """What doing it so many times would take."""
    return Sample(sample.wall * times, sample.cpu * times)


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
