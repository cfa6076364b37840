"""A training step of SimCLR as the peers write it beside ours: two forwards, loss, backward and LARS.

    python -m benchmarks.simclr_step --model resnet50 --batch-size 16 --threads 2
    python -m benchmarks.simclr_step --device cuda --batch-size 256 --steps 20
    python -m benchmarks.simclr_step --device cuda --model resnet18 --image-size 32 --batch-size 512 --steps 50

The peers send one view after the other through the network and compare all pairs in one matrix. Ours sends both at
once, which changes BatchNorm's statistics: with --two-forwards ours does as they do, and computes the same loss. How it
is measured stands in benchmarks/compare.py, what a step is in benchmarks/step.py. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.compare import Part, Way, parser_of, run
from benchmarks.nt_xent import whole_matrix
from benchmarks.step import Step, add_options, made_batch, our_step, peers_step, steps_in_a_round
from ssl.methods.base import Batch, Method
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone
from ssl.optim import make_optimizer, parameter_groups

PEERS = "two forwards, NCHW"
LARS = {"momentum": 0.9, "trust_coeff": 0.001}


def build(name: str, image_size: int, *, one_forward: bool) -> SimCLR:
    torch.manual_seed(0)
    size = (image_size, image_size)
    backbone, _ = build_backbone(name, image_size=size)
    return SimCLR(backbone, temperature=0.1, image_size=size, one_forward=one_forward)


def peers_loss(method: Method, batch: Batch) -> Tensor:
    """Embed both views, then the loss over the whole similarity matrix in fp32."""
    embeddings = method(batch, embed_only=True)
    with torch.autocast(embeddings.device.type, enabled=False):
        return whole_matrix(embeddings.float(), 0.1)


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    add_options(parser, model="resnet50", batch_size=16)
    parser.add_argument("--two-forwards", action="store_true", help="ours, too, sends one view after the other")
    return parser


QUICK = ["--model", "resnet18", "--batch-size", "8", "--image-size", "64"]


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """The one step, of the model that was given."""
    size = f"{given.image_size} px, batch {given.batch_size}, {given.device}"
    amount = given.batch_size * given.steps
    yield Part(f"SimCLR step, {given.model}, {size}", "images", amount, partial(ways, given), {PEERS: 2})


def ways(given: argparse.Namespace) -> dict[str, Way]:
    """Both start from equal weights and see the same images."""
    size = (given.image_size, given.image_size)
    batch = made_batch(given.batch_size, size, views=2, num_noise=0, device=given.device)
    return {
        name: steps_in_a_round(step, batch, num=given.steps, device=given.device)
        for name, step in peers_and_ours(given, torch.bfloat16).items()
    }


def peers_and_ours(given: argparse.Namespace, dtype: torch.dtype) -> dict[str, Step]:
    """Each way's step, of a model of its own; LARS is the same for both."""
    theirs = build(given.model, given.image_size, one_forward=False)
    lars = make_optimizer(parameter_groups(theirs, weight_decay=0.05), name="lars", lr=1e-4, **LARS)
    mine = build(given.model, given.image_size, one_forward=not given.two_forwards)
    return {
        PEERS: peers_step(theirs, peers_loss, lars, given.device),
        "ours": our_step(mine, optimizer="lars", options=LARS, device=given.device, dtype=dtype),
    }


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
