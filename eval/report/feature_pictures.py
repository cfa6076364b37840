"""Pictures of a run's features while it trains: the neighbours of some images, and a map of all of a small sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from eval.extract import centre_view
from eval.layers import parse_sets
from eval.look.drawing import captioned, figure_pixels, plot
from eval.online import extractor, take_sample, untouched
from ssl.data.sources import UNLABELLED, Source
from ssl.data.subset import limit
from ssl.online import OnlineSubject
from ssl.pictures import to_uint8
from ssl.trainer import to_device

BATCH = 64
THUMBNAIL = 64
NUM_QUERIES, NUM_NEIGHBOURS = 6, 7
MOST_CLASSES = 10
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#444444", "#7b4bb8", "#a0a000")
SIGNS = "os^Dv<>Ph*"


@dataclass(frozen=True)
class Seen:
    """A sample of the run's images and what the backbone makes of them."""

    features: Tensor
    """(N, D) float32 on the CPU."""
    pixels: np.ndarray
    """uint8 (N, h, w, 3), the central view, at most THUMBNAIL pixels a side."""
    labels: np.ndarray
    """(N,), -1 where there is none."""
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
                labels.append(_one_label(batch["label"].cpu().numpy())[readable])
        return Seen(
            torch.cat(features), np.concatenate(pixels), np.concatenate(labels), self.classes, step=subject.step
        )


def neighbours_picture(seen: Seen) -> np.ndarray:
    """A row for each of a few images: itself, then the images of the sample whose features are nearest (cosine)."""
    unit = normalize(seen.features)
    queries = _spread_queries(seen.labels, NUM_QUERIES)
    similarity = unit[queries] @ unit.T  # (Q, N)
    similarity[torch.arange(len(queries)), torch.from_numpy(queries)] = -torch.inf
    value, place = similarity.topk(min(NUM_NEIGHBOURS, len(unit) - 1), dim=1)  # (Q, K)
    rows, captions = [], []
    for query, values, places in zip(queries, value.tolist(), place.tolist(), strict=True):
        rows.append([seen.pixels[query], *(seen.pixels[other] for other in places)])
        captions.append([_name(seen, query), *(f"{v:.2f}{_verdict(seen, query, o)}" for v, o in zip(values, places))])
    title = f"Nearest of {len(unit):,} training images at step {seen.step:,}, by cosine similarity"
    said = "; = the same class, x another" if (seen.labels != UNLABELLED).any() else ""
    return captioned(rows, captions=captions, title=title + said)


def map_picture(seen: Seen) -> np.ndarray:
    """The sample on the first two principal components of its features; colours and signs are classes."""
    points, explained = principal_plane(seen.features)
    figure = plot(8, 5.4)
    axes = figure.subplots()
    labelled = seen.labels[seen.labels != UNLABELLED]
    common = np.unique(labelled)[np.argsort(-np.unique(labelled, return_counts=True)[1])][:MOST_CLASSES]
    rest = ~np.isin(seen.labels, common)
    if rest.any():
        said = "other classes" if len(common) else "images (no labels)"
        axes.scatter(*points[rest].T, s=14, c="#9aa0a6", label=said, linewidths=0)
    for number, label in enumerate(common):
        own = seen.labels == label
        name = seen.classes[label] if seen.classes is not None and label < len(seen.classes) else str(label)
        name = name.replace("$", r"\$")  # else matplotlib reads formulas
        axes.scatter(*points[own].T, s=18, c=COLOURS[number], marker=SIGNS[number], label=name[:28], linewidths=0)
    axes.set_xlabel(f"first principal component ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({explained[1]:.0%})")
    axes.set_title(f"PCA of the features of {len(points):,} training images at step {seen.step:,}", loc="left")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure_pixels(figure)


def principal_plane(features: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Points (N, 2) of features (N, D) on their first two principal components, and the share of variance of each.

    The sign of a component is such that its largest coordinate is positive, so that maps of one run look alike.
    """
    centred = features.double() - features.double().mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ components[:2].T  # (N, 2)
    for column in points.T:
        column *= 1.0 if column[column.abs().argmax()] >= 0 else -1.0
    if points.shape[1] < 2:
        points = torch.cat([points, torch.zeros(len(points), 2 - points.shape[1], dtype=points.dtype)], dim=1)
    variance = singular.square() / singular.square().sum().clamp(min=1e-30)
    shares = [*variance[:2].tolist(), 0.0, 0.0]
    return points.numpy(), (shares[0], shares[1])


def _spread_queries(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of a few images, of as many classes as there are."""
    _, first = np.unique(labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(labels)), first)
    return np.concatenate([np.sort(first), rest])[: min(count, len(labels) - 1)]


def _small(views: Tensor) -> Tensor:
    height, width = views.shape[-2:]
    if max(height, width) <= THUMBNAIL:
        return views
    scale = THUMBNAIL / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return interpolate(views.float(), size=size, mode="bilinear", antialias=True)


def _one_label(labels: np.ndarray) -> np.ndarray:
    """Labels (B,), of multi-hot ones (B, C) the first class, -1 where an image has none."""
    if labels.ndim == 1:
        return labels
    return np.where((labels > 0).any(1), labels.argmax(1), UNLABELLED)


def _name(seen: Seen, place: int) -> str:
    label = seen.labels[place]
    if label == UNLABELLED:
        return "image"
    return seen.classes[label] if seen.classes is not None and label < len(seen.classes) else f"class {label}"


def _verdict(seen: Seen, query: int, other: int) -> str:
    if UNLABELLED in (seen.labels[query], seen.labels[other]):
        return ""
    return " =" if seen.labels[query] == seen.labels[other] else " x"
