"""A training step of relative location in fp32 and channel by channel, as the peers run it, beside ours.

    python -m benchmarks.relative_location_step --model resnet50 --batch-size 4 --threads 2
    python -m benchmarks.relative_location_step --device cuda --batch-size 64 --steps 20

Both encode the nine patches of an image's grid, classify eight pairs, and take SGD. How it is measured stands in
benchmarks/compare.py, what a step is in benchmarks/step.py. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.compare import Part, Way, parser_of, run
from benchmarks.step import LR, Step, add_options, made_batch, our_step, peers_step, steps_in_a_round
from ssl.methods.base import Batch, Method
from ssl.methods.relative_location import RelativeLocation
from ssl.models.backbones import build_backbone

PEERS = "NCHW"


def build(name: str, image_size: int) -> RelativeLocation:
    torch.manual_seed(0)
    size = (image_size, image_size)
    backbone, _ = build_backbone(name, image_size=size, stem="standard")
    return RelativeLocation(backbone, image_size=size, dropout=0.0)


def peers_loss(method: Method, batch: Batch) -> Tensor:
    return method(batch)["loss"]


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    add_options(parser, model="resnet50", batch_size=4)
    return parser


QUICK = ["--model", "resnet18", "--batch-size", "2", "--image-size", "128"]


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """The one step, of the model that was given."""
    size = f"{given.image_size} px, batch {given.batch_size}, {given.device}"
    amount = given.batch_size * given.steps
    yield Part(f"relative location step, {given.model}, {size}", "images", amount, partial(ways, given))


def ways(given: argparse.Namespace) -> dict[str, Way]:
    """Both start from equal weights and see the same images."""
    method = build(given.model, given.image_size)
    batch = made_batch(
        given.batch_size, method.view_size, views=1, num_noise=method.num_noise, device=given.device
    )  # fmt: skip
    return {
        name: steps_in_a_round(step, batch, num=given.steps, device=given.device)
        for name, step in peers_and_ours(given, torch.bfloat16).items()
    }


def peers_and_ours(given: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Each way's step, of a model of its own."""
    theirs, mine = (build(given.model, given.image_size) for _ in range(2))
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    return {
        PEERS: peers_step(theirs, peers_loss, sgd, given.device),
        "ours": our_step(mine, optimizer="sgd", options={"momentum": 0.9}, device=given.device, dtype=dtype),
    }


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
