"""A training step of MAE as the reference writes it beside ours: forward, backward and AdamW, on the CPU.

    python -m benchmarks.mae_step --model vit_base_patch16_224 --batch-size 8 --repeats 3 --threads 2

The reference decodes in fp32 in the image's order and predicts every patch, with torch's default AdamW. Ours runs under
bf16 autocast with fused AdamW and plain matmul attention. Steps are interleaved; the ratios are of the medians and of
the fastest steps, which other load on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssl.methods.base import Batch
from ssl.methods.mae import MAE, num_visible, patchify
from ssl.models.backbones import build_backbone
from ssl.models.tokens import encode


def build(name: str, *, is_fused: bool) -> MAE:
    torch.manual_seed(0)
    backbone, _ = build_backbone(name, image_size=(224, 224))
    method = MAE(backbone, image_size=(224, 224))
    for module in method.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = is_fused  # pyright: ignore
    return method


def reference_loss(method: MAE, batch: Batch) -> Tensor:
    """Append mask tokens, gather all tokens into the image's order, predict every patch, average over the masked."""
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


def reference_step(method: MAE) -> Callable[[Batch], float]:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        loss = reference_loss(method, batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(method: MAE, precision: str) -> Callable[[Batch], float]:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(batch: Batch) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--all", action="store_true", help="also each choice of ours alone; 1.8 GB more for each at ViT-B"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = {
        "reference, fp32": reference_step(build(options.model, is_fused=True)),
        "ours, bf16": our_step(build(options.model, is_fused=False), "bf16"),
    }
    if options.all:
        steps["ours, fp32"] = our_step(build(options.model, is_fused=True), "fp32")
        steps["ours, bf16, fused attention"] = our_step(build(options.model, is_fused=True), "bf16")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "views": [torch.randn(options.batch_size, 3, 224, 224, generator=generator)],
        "noise": torch.rand(options.batch_size, 196, generator=generator),
    }
    first = {name: step(batch) for name, step in steps.items()}  # warms up, from equal weights
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - start)
    reference = seconds["reference, fp32"]
    print(f"{options.model}, batch {options.batch_size}, {options.threads} threads, torch {torch.__version__}")
    print(
        f"{'':28} {'median s':>9} {'fastest s':>9} {'images/s':>9} {'ratio':>6} {'of fastest':>10} {'first loss':>10}"
    )
    for name, times in seconds.items():
        median, fastest = statistics.median(times), min(times)
        ratio, of_fastest = statistics.median(reference) / median, min(reference) / fastest
        rate = options.batch_size / median
        print(f"{name:28} {median:9.2f} {fastest:9.2f} {rate:9.2f} {ratio:6.2f} {of_fastest:10.2f} {first[name]:10.5f}")


if __name__ == "__main__":
    main()
