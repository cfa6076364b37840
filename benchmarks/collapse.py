"""What label-free health measures of runs that learn and of runs that are made to collapse, step by step.

    python -m benchmarks.collapse --steps 100

The bounds of `eval.collapse` stand between the two. Each run is AdamW on the embedded images, in fp32, one seed, up to
a minute on a core; its features are those of 512 images. Made to collapse: a loss that only draws the two views of an
image together, behind SimCLR's projector or on the features themselves; and SimCLR at a learning rate five hundred
times too high.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eval.collapse import signs_of_collapse
from eval.extract import centre_view
from eval.layers import FeatureSet, make_extract
from eval.sample import USUAL_VIEW, Sample
from eval.spectra import health, lidar
from ssl.data.augment import Augment
from ssl.data.embedded import Embedded
from ssl.data.loader import Loader
from ssl.data.subset import limit
from ssl.data.views import View
from ssl.methods.base import Batch, Method
from ssl.methods.mae import MAE
from ssl.methods.simclr import SimCLR
from ssl.models.backbones import build_backbone, pooled_features

SIZE, MEAN, STD = (32, 32), [0.5, 0.5, 0.5], [0.26, 0.23, 0.27]
COLOURED = View(
    scale=(0.25, 1.0), flip=0.5, jitter=0.9, brightness=0.4, contrast=0.6, saturation=0.8, hue=0.5, grayscale=0.3
)
RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
VIT = {"embed_dim": 64, "depth": 4, "num_heads": 2}

Loss = Callable[[Method, Batch], Tensor]


def own_loss(method: Method, batch: Batch) -> Tensor:
    return method(batch)["loss"]


def invariance_of_projections(method: Method, batch: Batch) -> Tensor:
    """Minus the cosine similarity of an image's two projections; nothing keeps images apart."""
    first, second = method(batch, embed_only=True).unbind(1)  # (B, Z), (B, Z)
    return -functional.cosine_similarity(first, second).mean()


def invariance_of_features(method: Method, batch: Batch) -> Tensor:
    first, second = (pooled_features(method.backbone, view) for view in batch["views"])  # (B, D), (B, D)
    return -functional.cosine_similarity(first, second).mean()


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    is_vit: bool
    lr: float
    loss: Loss = own_loss


CASES = [
    Case("SimCLR, ResNet-10", "simclr", False, 2e-3),
    Case("SimCLR, ViT", "simclr", True, 1e-3),
    Case("MAE, ViT", "mae", True, 1e-3),
    Case("invariance of projections, ResNet-10", "simclr", False, 2e-3, invariance_of_projections),
    Case("invariance of projections, ViT", "simclr", True, 1e-3, invariance_of_projections),
    Case("invariance of features, ResNet-10", "simclr", False, 2e-3, invariance_of_features),
    Case("invariance of features, ViT", "simclr", True, 1e-3, invariance_of_features),
    Case("SimCLR at lr 1, ResNet-10", "simclr", False, 1.0),
]


def build(case: Case) -> tuple[Method, list[View]]:
    torch.manual_seed(0)
    if case.is_vit:
        backbone, _ = build_backbone("vit_tiny_patch16_224", image_size=SIZE, patch_size=4, model_args=VIT)
    else:
        backbone, _ = build_backbone("resnet18", image_size=SIZE, stem="standard", model_args=RESNET)
    if case.kind == "mae":
        method = MAE(backbone, image_size=SIZE, in_chans=3, decoder_dim=64, decoder_depth=1, decoder_heads=2)
        return method, [USUAL_VIEW]
    return SimCLR(backbone, temperature=0.2, image_size=SIZE), [COLOURED] * 2


def train(case: Case, method: Method, views: list[View], source: Embedded, *, steps: int) -> Iterator[float]:
    """The loss of each step, once it is taken."""
    augment = Augment(views, mean=MEAN, std=STD)
    optimizer = torch.optim.AdamW(method.parameters(), lr=case.lr)
    with Loader(source, views, size=SIZE, channels=3, seed=0, num_noise=method.num_noise) as loader:
        for batch in loader.batches(start_step=0, stop_step=steps, global_batch_size=128):
            method.train()
            loss = case.loss(method, augment(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def measure(method: Method, central: Sample, in_views: Sample) -> tuple[dict[str, float], int]:
    """What health and LiDAR find, and the number of dimensions."""
    extract = make_extract(method.backbone, [FeatureSet()], device=torch.device("cpu"), dtype=torch.float32)
    features = central.read(extract, batch_size=256).features[:, 0]  # (N, D)
    return {**health(features), "lidar": lidar(in_views.read(extract, batch_size=256).features)}, features.shape[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = Embedded("train", num_train=1500)
    settings = {"image_size": SIZE, "channels": 3, "mean": MEAN, "std": STD, "device": torch.device("cpu")}
    central = Sample(limit(source, 512), [centre_view(SIZE)], **settings)
    in_views = Sample(limit(source, 200), [USUAL_VIEW] * 10, **settings)
    print("| run | step | loss | spread | mean cosine | RankMe | of the start | alpha-ReQ | LiDAR | dead | collapse? |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if not case.name.startswith(arguments.only):
            continue
        method, views = build(case)
        found, dimensions = measure(method, central, in_views)
        start = {"step": 0, **found}
        show(case.name, 0, float("nan"), found, start, dimensions)
        for step, loss in enumerate(train(case, method, views, source, steps=arguments.steps), 1):
            if step % arguments.every == 0:
                found, _ = measure(method, central, in_views)
                show(case.name, step, loss, found, start, dimensions)


def show(name: str, step: int, loss: float, found: dict[str, float], start: dict[str, float], dimensions: int) -> None:
    signs = signs_of_collapse(found, dimensions=dimensions, start=start)
    print(
        f"| {name} | {step} | {loss:.3f} | {found['feature_std'] * dimensions**0.5:.3f} | {found['mean_cosine']:.4f} "
        f"| {found['rankme']:.1f} of {dimensions} | {found['rankme'] / start['rankme']:.2f} "
        f"| {found.get('alpha_req', float('nan')):.2f} | {found['lidar']:.1f} | {found['dead_dimensions']:.0%} "
        f"| {len(signs)} signs |",
        flush=True,
    )


if __name__ == "__main__":
    main()
