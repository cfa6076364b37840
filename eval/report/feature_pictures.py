"""Pictures of a run's features while it trains: the neighbours of some images, and a map of all of a small sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from eval.extract import centre_view
from eval.layers import parse_sets
from eval.look.components import principal_plane
from eval.look.drawing import captioned, figure_pixels, plot
from eval.look.groups import grouped, legend, scatter
from eval.look.labels import agree, class_name, labelled
from eval.online import extractor, take_sample, untouched
from eval.rows import unit_length
from ssl.data.sources import Source
from ssl.data.subset import limit
from ssl.online import OnlineSubject
from ssl.pictures import to_uint8
from ssl.trainer import to_device

BATCH = 64
THUMBNAIL = 64
NUM_QUERIES, NUM_NEIGHBOURS = 6, 7


@dataclass(frozen=True)
class Seen:
    """A sample of the run's images and what the backbone makes of them."""

    features: Tensor
    """(N, D) float32 on the CPU."""
    pixels: np.ndarray
    """uint8 (N, h, w, 3), the central view, at most THUMBNAIL pixels a side."""
    labels: np.ndarray
    """(N,), -1 where there is none, or multi-hot (N, C)."""
    classes: list[str] | None
    step: int


class FeatureSample:
    """`num_images` of a run's images, drawn once by its seed and kept, to be looked at again and again.

    It runs on one rank alone: no other one is waited for.
    """

    def __init__(self, source: Source, subject: OnlineSubject, *, num_images: int) -> None:
        few = limit(source, min(num_images, len(source)), seed=subject.seed)
        self.classes = source.classes
        self._sample = take_sample(few, [centre_view(subject.image_size)], subject, subject.seed)
        self._sets = parse_sets("last", "model")

    @torch.no_grad()
    def read(self, subject: OnlineSubject) -> Seen:
        """Features and thumbnails of those images that can be read. The training finds everything as it was."""
        features, pixels, labels = [], [], []
        sample = self._sample
        with untouched(subject), sample.loader:
            subject.method.eval()
            extract = extractor(subject, self._sets)
            for batch in sample.loader.sequential(batch_size=BATCH):
                views = sample.augment(to_device(batch, subject.device))["views"][0]  # (B, C, h, w)
                readable = ~np.isin(batch["index"].numpy(), list(sample.loader.bad))  # (B,)
                kept = torch.from_numpy(readable)
                features.append(extract(views)[0].float().cpu()[kept])  # (B, D)
                pixels.append(to_uint8(_small(views), subject.mean, subject.std)[readable])
                labels.append(batch["label"].cpu().numpy()[readable])
        return Seen(
            torch.cat(features), np.concatenate(pixels), np.concatenate(labels), self.classes, step=subject.step
        )


def neighbours_picture(seen: Seen) -> np.ndarray:
    """A row for each of a few images: itself, then the images of the sample whose features are nearest (cosine)."""
    unit = unit_length(seen.features)
    queries = _spread_queries(seen.labels, NUM_QUERIES)
    similarity = unit[queries] @ unit.T  # (Q, N)
    similarity[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf
    value, place = similarity.topk(min(NUM_NEIGHBOURS, len(unit) - 1), dim=1)  # (Q, K)
    rows, captions = [], []
    for query, values, places in zip(queries, value.tolist(), place.tolist(), strict=True):
        rows.append([seen.pixels[query], *(seen.pixels[other] for other in places)])
        name = class_name(seen.labels[query], seen.classes) or "image"
        captions.append([name, *(f"{v:.2f}{_verdict(seen, query, o)}" for v, o in zip(values, places))])
    title = f"Nearest of {len(unit):,} training images at step {seen.step:,}, by cosine similarity"
    said = "; = a class in common, \u00d7 none" if labelled(seen.labels).any() else ""
    return captioned(rows, captions=captions, title=title + said)


def map_picture(seen: Seen) -> np.ndarray:
    """The sample on the first two principal components of its features, scaled to length 1; colours and signs are
    classes.
    """
    place, explained = principal_plane(unit_length(seen.features))
    groups = grouped(seen.labels, seen.classes)
    figure = plot(8, 5.4)
    axes = figure.subplots()
    scatter(axes, place, groups, size=18)
    axes.set_xlabel(f"first principal component ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({explained[1]:.0%})")
    axes.set_title(f"PCA of the features of {len(place):,} training images at step {seen.step:,}", loc="left")
    if len(groups.names) > 1:
        figure.legend(*legend(axes, groups), loc="outside right upper", frameon=False, fontsize=9)
    return figure_pixels(figure)


def _spread_queries(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of a few images, of as many classes as there are."""
    _, first = np.unique(labels, axis=0, return_index=True)
    rest = np.setdiff1d(np.arange(len(labels)), first)
    return np.concatenate([np.sort(first), rest])[: min(count, len(labels) - 1)]


def _small(views: Tensor) -> Tensor:
    height, width = views.shape[-2:]
    if max(height, width) <= THUMBNAIL:
        return views
    scale = THUMBNAIL / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return interpolate(views.float(), size=size, mode="bilinear", antialias=True)


def _verdict(seen: Seen, query: int, other: int) -> str:
    two = seen.labels[[query, other]]
    if not labelled(two).all():
        return ""
    return " =" if agree(two[:1], two[1:][None])[0, 0] else " \u00d7"
