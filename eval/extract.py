"""Features of every image once, in order, in fp32 on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.views import View
from ssl.models.backbones import is_token_model, pooled_features
from ssl.models.tokens import encode
from ssl.trainer import to_device

PIXEL_SIDE = 32
WHOLE_UP_TO = 96
POOLINGS = ("model", "patches")

Extract = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """Features (N, D) float32 and labels (N,) of a split, in its order without the images that could not be decoded."""

    features: Tensor
    labels: Tensor
    index: Tensor
    num_bad: int = 0


def centre_view(size: tuple[int, int]) -> View:
    """What an evaluation sees: the whole central box up to 96 pixels, above it 7/8 of it (256 to 224 pixels)."""
    return View(crop="center", fraction=1.0 if max(size) <= WHOLE_UP_TO else 0.875)


def backbone_features(model: nn.Module, *, device: torch.device, dtype: torch.dtype, pooling: str = "model") -> Extract:
    """The function from normalised images (B, C, H, W) to pooled features (B, D); the model is put in eval mode.

    `pooling` is `model`, what timm's classifier would read (a vision transformer's class token, a ResNet's average), or
    `patches`, the mean of a vision transformer's patch tokens. Raises ValueError for `patches` of another model.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if pooling == "patches" and not is_token_model(model):
        raise ValueError(f"pooling=patches needs a vision transformer, got {type(model).__name__}; leave it at model")
    model = model.to(device).eval()
    channels_last = not is_token_model(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def extract(image: Tensor) -> Tensor:
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if pooling == "model":
                return pooled_features(model, image)  # (B, D)
            tokens = encode(model, image, None)  # (B, prefix+N, D)
            return tokens[:, model.num_prefix_tokens :].mean(1)  # (B, D)

    return extract


def raw_pixels(image: Tensor) -> Tensor:
    """The baseline without a backbone: the pixels themselves, (B, C, H, W) to (B, C*H*W)."""
    return image.flatten(1)


@torch.no_grad()
def extract_features(
    extract: Extract,
    loader: Loader,
    augment: Augment,
    *,
    batch_size: int,
    device: torch.device,
    title: str = "features",
) -> Features:
    """Run `extract` over every image of `loader`, whose only view is the central one.

    Raises ValueError where a feature is not finite: a backbone that has diverged has no accuracy.
    """
    size = len(loader)
    features = torch.empty(0)
    labels, index = torch.empty(size, dtype=torch.int64), torch.empty(size, dtype=torch.int64)
    done = 0
    for batch in _shown(loader.sequential(batch_size=batch_size), title=title, total=-(-size // batch_size)):
        batch = augment(to_device(batch, device))
        found = extract(batch["views"][0]).float().cpu()  # (B, D)
        if not torch.isfinite(found).all():
            where = batch["index"].cpu()[~torch.isfinite(found).all(dim=1)][0].item()
            raise ValueError(
                f"the features of {loader.source.describe(int(where))} are not finite; the backbone has diverged. "
                "Judge an earlier checkpoint, or give precision=fp32"
            )
        if done == 0:
            features = torch.empty(size, found.shape[1])  # (N, D), once: what is kept does not grow
        rows = slice(done, done + len(found))
        features[rows], labels[rows], index[rows] = found, batch["label"].cpu(), batch["index"].cpu()
        done += len(found)
    # The loader shows another image in the place of one that it cannot decode; here that would count it twice.
    readable = torch.from_numpy(~np.isin(index.numpy(), list(loader.bad)))
    if not readable.all():
        features, labels, index = features[readable], labels[readable], index[readable]
    return Features(features, labels, index, num_bad=int((~readable).sum()))


def _shown(batches: Iterator, *, title: str, total: int) -> Iterable:
    """Batches with a progress bar on a terminal."""
    return tqdm(batches, desc=title, total=total, unit="batch", leave=False, disable=not sys.stderr.isatty())
