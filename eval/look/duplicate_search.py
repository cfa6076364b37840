"""Candidates for duplicates: images whose features are as close as copies of one image are."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from eval.images import Views
from eval.look.neighbours import nearest_others
from eval.look.samples import sample_index
from eval.look.scene import Scene
from eval.neighbours import nearest
from eval.rows import Rows

COPIES, REACHED = 256, 0.01
"""Images of which copies are made, and the share of copies that may lie below the similarity that is derived."""


def candidates(splits: Sequence[Tensor], count: int, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (first, second, similarity), each (P,), of rows of `splits` with a cosine similarity of at least `least`.

    Each row's `count` nearest of each split are looked at, so that all copies of a row in another split find it. Rows
    are numbered through all splits (N_s, D); each pair stands once, the smaller number first.
    """
    starts = np.cumsum([0, *(len(each) for each in splits)])
    total = int(starts[-1])
    keys, values = [], []
    for number, bank in enumerate(splits):
        for other, queries in enumerate(splits):
            if other == number and len(bank) < 2:
                continue
            if other == number:
                found = nearest_others(bank, queries, np.arange(len(bank)), count)
                similarity, place = found.similarity, found.place
            else:
                flat = nearest(Rows(bank, "cosine", torch.device("cpu")), queries, count, index="auto")
                similarity, place = flat.closeness, flat.place.numpy()
            close = similarity.numpy() >= least  # (M, k)
            query, _ = np.nonzero(close)
            one, two = query + starts[other], place[close] + starts[number]
            keys.append(np.minimum(one, two) * total + np.maximum(one, two))
            values.append(similarity.numpy()[close])
    key, which = np.unique(np.concatenate(keys), return_index=True)
    return key // total, key % total, np.concatenate(values)[which]


def similarity_of_copies(scene: Scene, *, flip: bool) -> float:
    """The cosine similarity that 99 % of copies reach, of some images of train and with `flip` of their mirror images.

    A copy lacks a sixteenth of the image at each side, is a fifth darker and was saved as JPEG of quality 75. What
    another set calls similar depends on the backbone; what is no copy of anything lies lower than its copies do.
    """
    source = scene.source("train")
    views = scene.views_of(source, sample_index(source, COPIES, scene.seed))
    extract = scene.extract()

    def features(crops: Tensor) -> Tensor:
        made = [Views(np.arange(len(part)), part, {}) for part in crops.split(scene.config.batch_size)]
        return torch.cat([extract(scene.normalised(each)).float().cpu() for each in made])  # (B, D)

    copies = worn(views.crops)
    own = functional.normalize(features(views.crops))
    seen = [copies, copies.flip(-1)] if flip else [copies]
    similar = torch.cat([(own * functional.normalize(features(each))).sum(1) for each in seen])
    return float(similar.quantile(REACHED))


def worn(crops: Tensor) -> Tensor:
    """Copies of uint8 images (B, C, h, w): cropped by a sixteenth per side, a fifth darker, JPEG of quality 75."""
    height, width = crops.shape[-2:]
    top, left = max(height // 16, 1), max(width // 16, 1)
    inner = crops[..., top : height - top, left : width - left].float()
    grown = functional.interpolate(inner, (height, width), mode="bicubic", antialias=True)
    dark = (0.8 * grown).round().clamp(0, 255).byte()
    if dark.shape[1] not in (1, 3):
        return dark  # JPEG knows no other number of channels
    return torch.stack([_as_jpeg(each) for each in dark])


def _as_jpeg(image: Tensor) -> Tensor:
    pixels = image.permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(stream, "JPEG", quality=75)
    decoded = np.array(Image.open(stream)).reshape(pixels.shape)
    return torch.from_numpy(decoded).permute(2, 0, 1)
