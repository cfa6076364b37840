"""`what=outliers`: images whose features are far from those of all others."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from eval.look.drawing import captioned, tile_side
from eval.look.labels import class_name
from eval.look.neighbours import nearest_others
from eval.look.result import DoesNotApply, Look
from eval.look.samples import SampleFeatures
from eval.look.scene import Scene

SHOWN = 24
COLUMNS = 8
LISTED_AT_LEAST = 50
NORMAL_MAD = 0.6745
"""Median absolute deviation of a normal distribution of standard deviation 1."""


def look(scene: Scene) -> Look:
    """The images of a sample farthest from the others, ranked, and which of them lie apart from all the rest."""
    settings = scene.config.outliers
    if settings.neighbours < 1 or settings.threshold <= 0:
        raise ValueError(
            f"outliers.neighbours must be at least 1 and outliers.threshold above 0, got {settings.neighbours} and "
            f"{settings.threshold}"
        )
    sample = scene.features()
    if len(sample) < 3:
        raise DoesNotApply(f"outliers are told from other images; there are {len(sample)}")
    distance = mean_distance(sample.features, settings.neighbours)  # (N,)
    score = robust_score(distance)  # (N,)
    order = np.argsort(-score, kind="stable")
    num = int((score >= settings.threshold).sum())
    metrics = {"outliers": num, "share": num / len(sample), "largest_score": float(score[order[0]])}
    data = {
        "split": scene.split,
        "images": len(sample),
        "neighbours": min(settings.neighbours, len(sample) - 1),
        "threshold": settings.threshold,
        "median_distance": float(np.median(distance)),
        "ranking": [_told(sample, scene, int(place), distance, score) for place in order[: max(num, LISTED_AT_LEAST)]],
    }
    arrays = {"index": sample.index, "distance": distance, "score": score}
    picture = _picture(scene, sample, order[:SHOWN], score, settings.threshold)
    return Look({"": picture}, data, arrays=arrays, metrics=metrics, lines=_lines(scene, data, num))


def mean_distance(features: Tensor, count: int) -> np.ndarray:
    """Mean cosine distance (N,) of features (N, D) to the `count` nearest others, 1 minus similarity."""
    found = nearest_others(features, features, np.arange(len(features)), count)
    return (1 - found.similarity.double().mean(1)).clamp_min(0).numpy()


def robust_score(distance: np.ndarray) -> np.ndarray:
    """How far the logarithm of each distance (N,) lies above the median, in robust standard deviations.

    The modified z-score (Iglewicz and Hoaglin 1993), which few outliers do not move; they advise 3.5 as its limit. Of
    the logarithm, because distances are positive and lie around their median by factors, not by differences. 0 for
    all where more than half of the distances are equal.
    """
    value = np.log(np.maximum(distance, 1e-12))
    above = value - np.median(value)
    spread = np.median(np.abs(above))
    return NORMAL_MAD * above / spread if spread > 0 else np.zeros_like(above)


def _told(sample: SampleFeatures, scene: Scene, place: int, distance: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    return {
        "image": sample.names[place],
        "index": int(sample.index[place]),
        "label": class_name(sample.labels[place], scene.source(scene.split).classes),
        "distance": float(distance[place]),
        "score": float(score[place]),
        "outlier": bool(score[place] >= scene.config.outliers.threshold),
    }


def _picture(scene: Scene, sample: SampleFeatures, order: np.ndarray, score: np.ndarray, least: float) -> np.ndarray:
    tiles = list(scene.thumbnails(scene.split, sample.index[order], tile_side(scene.image_size)))
    classes = scene.source(scene.split).classes
    verdicts = [f"{score[place]:.1f}{' outlier' if score[place] >= least else ''}" for place in order]
    texts = [f"{said}\n{class_name(sample.labels[place], classes) or ''}" for said, place in zip(verdicts, order)]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    captions = [texts[start : start + COLUMNS] for start in range(0, len(texts), COLUMNS)]
    title = f"Farthest from all others, of {len(sample):,} images of {scene.split}, with robust z-scores"
    return captioned(rows, captions=captions, title=f"{title}\nFrom {least:g} on an image is called an outlier")


def _lines(scene: Scene, data: dict[str, Any], num: int) -> list[str]:
    threshold, count = data["threshold"], data["neighbours"]
    first = data["ranking"][0]
    return [
        f"{num:,} of {data['images']:,} images of {scene.split} are outliers: their mean distance to the {count} "
        f"nearest others lies {threshold:g} robust standard deviations or more above the median (of logarithms)",
        f"farthest: {first['image']} (score {first['score']:.1f}); the list is in outliers.json",
    ]
