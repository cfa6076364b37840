"""A training step of MAE as the reference writes it beside ours: forward, backward and AdamW.

    python -m benchmarks.mae_step --model vit_base_patch16_224 --batch-size 8 --threads 2
    python -m benchmarks.mae_step --device cuda --batch-size 256 --steps 20
    python -m benchmarks.mae_step --device cuda --model vit_large_patch16_224 --batch-size 128 --steps 20

The reference decodes in the image's order and predicts every patch, with torch's default AdamW. Ours runs in bf16, with
fused AdamW, and on a CPU with plain matmul attention. --all sets each choice of ours alone beside it. How it is
measured stands in benchmarks/compare.py, what a step is in benchmarks/step.py. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.compare import Part, Way, parser_of, run
from benchmarks.step import (
    LR,
    Step,
    add_options,
    made_batch,
    our_step,
    peers_step,
    steps_in_a_round,
)
from ssl.methods.base import Batch, Method
from ssl.methods.mae import MAE, num_visible, patchify
from ssl.models.attention import attend_by_matmul
from ssl.models.backbones import build_backbone
from ssl.models.tokens import encode

REFERENCE = "the reference"


def build(name: str, image_size: int) -> MAE:
    torch.manual_seed(0)
    size = (image_size, image_size)
    backbone, _ = build_backbone(name, image_size=size)
    return MAE(backbone, image_size=size)


def reference_loss(method: Method, batch: Batch) -> Tensor:
    """Append mask tokens, gather all tokens into the image's order, predict every patch, average over the masked."""
    assert isinstance(method, MAE)
    image, noise = batch["views"][0], batch["noise"]
    visible = num_visible(method.num_noise, method.mask_ratio)
    shuffle = noise.argsort(dim=1)  # (B, N)
    restore = shuffle.argsort(dim=1)  # (B, N)
    mask = torch.ones_like(noise)
    mask[:, :visible] = 0
    mask = mask.gather(1, restore)  # (B, N), 1 is masked
    x = method.decoder_embed(encode(method.backbone, image, shuffle[:, :visible]))  # (B, 1+K, decoder_dim)
    mask_tokens = method.mask_token.expand(len(image), method.num_noise - visible, -1)
    patches = torch.cat([x[:, 1:], mask_tokens], dim=1)
    patches = patches.gather(1, restore.unsqueeze(-1).expand(-1, -1, patches.shape[-1])) + method.decoder_pos_embed
    x = method.decoder_norm(method.decoder_blocks(torch.cat([x[:, :1], patches], dim=1)))
    prediction = method.decoder_pred(x)[:, 1:]  # (B, N, P*P*C)
    target = patchify(image, method.patch_size)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = (prediction - target).square().mean(-1)  # (B, N)
    return (loss * mask).sum() / mask.sum()


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, rounds=3)
    add_options(parser, model="vit_base_patch16_224", batch_size=8)
    parser.add_argument("--all", action="store_true", help="also each choice alone; 1.8 GB more for each at ViT-B")
    return parser


QUICK = ["--model", "vit_tiny_patch16_224", "--batch-size", "4", "--image-size", "64"]


def parts(given: argparse.Namespace) -> Iterator[Part]:
    """The one step, of the model that was given."""
    size = f"{given.image_size} px, batch {given.batch_size}, {given.device}"
    amount = given.batch_size * given.steps
    yield Part(f"MAE step, {given.model}, {size}", "images", amount, partial(ways, given), {REFERENCE: 2})


def ways(given: argparse.Namespace) -> dict[str, Way]:
    """All start from equal weights and see the same images."""
    steps = reference_and_ours(given)
    method = build(given.model, given.image_size)
    size = (given.image_size, given.image_size)
    batch = made_batch(given.batch_size, size, views=1, num_noise=method.num_noise, device=given.device)
    return {name: steps_in_a_round(step, batch, num=given.steps, device=given.device) for name, step in steps.items()}


def reference_and_ours(given: argparse.Namespace) -> dict[str, Step]:
    """Each way's step, of a model of its own."""
    new = partial(build, given.model, given.image_size)
    theirs = new()
    adamw = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=LR, weight_decay=0.05)
    ours = partial(our_step, optimizer="adamw", options={}, device=given.device)
    steps = {REFERENCE: peers_step(theirs, reference_loss, adamw, given.device)}
    if given.all:
        steps["ours in fp32"] = ours(new(), dtype=torch.float32)
        if given.device == "cpu":
            steps["ours, fused attention"] = ours(new(), dtype=torch.bfloat16)
    last = attend_by_matmul(new()) if given.device == "cpu" else new()
    return steps | {"ours": ours(last, dtype=torch.bfloat16)}


def main() -> None:
    given = options().parse_args()
    run(parts(given), given)


if __name__ == "__main__":
    main()
