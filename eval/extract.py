"""Features of every image once, in order, in fp32 on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ssl.distributed as distributed
from eval.bank import FeatureStore, close_gaps
from eval.layers import GRID_DIM, ExtractSets, make_extract, parse_sets, resolve_sets
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.views import View
from ssl.trainer import to_device

PIXEL_SIDE = 32
WHOLE_UP_TO = 96

Extract = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """Features (N, D) float32 and labels of a split, in its order without the images that could not be decoded.

    Labels are (N,), or (N, C) multi-hot.
    """

    features: Tensor
    labels: Tensor
    index: Tensor
    num_bad: int = 0


def centre_view(size: tuple[int, int]) -> View:
    """What an evaluation sees: the whole central box up to 96 pixels, above it 7/8 of it (256 to 224 pixels)."""
    return View(crop="center", fraction=1.0 if max(size) <= WHOLE_UP_TO else 0.875)


def backbone_features(
    model: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype,
    pooling: str = "model",
    layer: str = "last",
    grid_dim: int = GRID_DIM,
) -> Extract:
    """The function from normalised images (B, C, H, W) to one vector per image (B, D), as `FeatureSet` names it.

    The model is put in eval mode. Raises ValueError for a layer or pooling that the model does not have.
    """
    sets = resolve_sets(model, parse_sets(layer, pooling, grid_dim=grid_dim))
    if len(sets) > 1:
        raise ValueError(f"layer={layer} names {len(sets)} layers where one is read; give a number or last")
    extract = make_extract(model, sets, device=device, dtype=dtype)
    return lambda image: extract(image)[0]  # (B, D)


def raw_pixels(image: Tensor) -> Tensor:
    """The baseline without a backbone: the pixels themselves, (B, C, H, W) to (B, C*H*W)."""
    return image.flatten(1)


def extract_features(
    extract: Extract,
    loader: Loader,
    augment: Augment,
    *,
    batch_size: int,
    device: torch.device,
    title: str = "features",
    store: FeatureStore | None = None,
) -> Features:
    """Run `extract` over every image of `loader`, whose only view is the central one; each rank over its share.

    Every rank gets the features of all, in memory or where `store` puts them. Raises ValueError where a feature is not
    finite: a backbone that has diverged has no accuracy.
    """
    return extract_all(
        lambda image: [extract(image)],
        loader,
        augment,
        batch_size=batch_size,
        device=device,
        title=title,
        store=store,
    )[0]


@torch.no_grad()
def extract_all(
    extract: ExtractSets,
    loader: Loader,
    augment: Augment,
    *,
    batch_size: int,
    device: torch.device,
    title: str = "features",
    limit_gib: float | None = None,
    store: FeatureStore | None = None,
) -> list[Features]:
    """`extract_features` for several vectors per image from one pass; labels and index are shared, not copied.

    Raises ValueError, after the first batch, where all features together take more than `limit_gib`.
    """
    ranks = min(distributed.world_size(), len(loader))  # that have images: any others read what the first ones do
    rank = distributed.rank() % ranks
    first = len(loader) * rank // ranks
    size = len(loader) * (rank + 1) // ranks - first  # of this rank
    kept: list[Tensor] = []
    shared: list[Tensor | None] = []
    labels = torch.empty(size, *np.asarray(loader.source.labels).shape[1:], dtype=torch.int64)  # (N,) or (N, C)
    index = torch.empty(size, dtype=torch.int64)
    done = 0
    batches = loader.sequential(batch_size=batch_size, rank=rank, world_size=ranks)
    for batch in _shown(batches, title=title, total=-(-size // batch_size)):
        batch = augment(to_device(batch, device))
        found = [features.float().cpu() for features in extract(batch["views"][0])]  # (B, D) each
        for features in found:
            _check_finite(features, batch["index"].cpu(), loader)
        if done == 0:
            dimensions = [features.shape[1] for features in found]
            _check_memory(dimensions, len(loader), limit_gib)
            shared = [store(len(loader), dim) if store else None for dim in dimensions]  # (N, D) each
            kept = [  # once: what is kept does not grow
                torch.empty(size, dim) if rows is None else rows[first : first + size]
                for rows, dim in zip(shared, dimensions)
            ]
        rows = slice(done, done + len(batch["index"]))
        labels[rows], index[rows] = batch["label"].cpu(), batch["index"].cpu()
        for features, into in zip(found, kept):
            into[rows] = features
        done = rows.stop
    # The loader shows another image in the place of one that it cannot decode; here that would count it twice.
    readable = torch.from_numpy(~np.isin(index.numpy(), list(loader.bad)))
    own = readable if distributed.rank() < ranks else torch.zeros_like(readable)
    labels, index = distributed.gather_rows(labels[own]), distributed.gather_rows(index[own])
    kept = [
        distributed.gather_rows(features if own.all() else features[own]) if rows is None else close_gaps(rows, index)
        for features, rows in zip(kept, shared)
    ]
    return [Features(features, labels, index, num_bad=len(loader) - len(index)) for features in kept]


def _check_finite(features: Tensor, index: Tensor, loader: Loader) -> None:
    finite = torch.isfinite(features).all(dim=1)  # (B,)
    if not finite.all():
        where = loader.source.describe(int(index[~finite][0]))
        raise ValueError(
            f"the features of {where} are not finite; the backbone has diverged. "
            "Judge an earlier checkpoint, or give precision=fp32"
        )


def _check_memory(dimensions: list[int], num: int, limit_gib: float | None) -> None:
    gib = num * sum(dimensions) * 4 / 2**30
    if limit_gib is not None and gib > limit_gib:
        raise ValueError(
            f"features of {num:,} images with {' + '.join(map(str, dimensions))} dimensions take {gib:.1f} GiB, more "
            f"than features_gib={limit_gib:g}; give fewer layers or poolings, a smaller grid_dim, data.limit, or more "
            "features_gib where the memory is there"
        )


def _shown(batches: Iterator, *, title: str, total: int) -> Iterable:
    """Batches with a progress bar on a terminal."""
    return tqdm(batches, desc=title, total=total, unit="batch", leave=False, disable=not sys.stderr.isatty())
