"""`what=clusters`: k-means of the features, and labels that disagree with what surrounds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor

from eval.look.drawing import captioned, tile_side
from eval.look.labels import class_name, labelled, one_class
from eval.look.neighbours import nearest_others
from eval.look.result import DoesNotApply, Look
from eval.look.samples import SampleFeatures
from eval.look.scene import Scene
from eval.neighbours import closeness_in_double
from eval.rows import unit_length
from eval.scan import import_faiss

UNLABELLED_CLUSTERS = 10
ITERATIONS, RESTARTS = 50, 5
SHOWN_CLUSTERS, SHOWN_SUSPECTS, COLUMNS = 20, 16, 8
LISTED_SUSPECTS = 200


@dataclass(frozen=True)
class Clustering:
    """Centroids (K, D), the cluster of each image (N,), and how close it is to it and to the next best, (N,) each.

    Closeness is the cosine similarity, or minus the squared distance.
    """

    centroids: np.ndarray
    cluster: np.ndarray
    closeness: np.ndarray
    next_best: np.ndarray


@dataclass(frozen=True)
class Votes:
    """What the neighbours of each image (N,) say of its label: the other class with most votes, and shares of votes."""

    rival: np.ndarray
    own: np.ndarray
    against: np.ndarray

    @property
    def margin(self) -> np.ndarray:
        """By how much the rival wins, in -1..1."""
        return self.against - self.own


def look(scene: Scene) -> Look:
    """Clusters of a sample with representative images; where labels exist, their purity and suspected label errors."""
    settings = scene.config.clusters
    sample, classes = scene.features(), scene.source(scene.split).classes
    known = labelled(sample.labels)
    has_labels = one_class(sample.labels) and known.sum() > 1  # one label has no other to agree with
    usual = min(UNLABELLED_CLUSTERS, len(sample) // 2)
    if has_labels:
        usual = len(np.unique(sample.labels[known]))
    num = usual if settings.count is None else settings.count
    _check(settings, num, len(sample))
    found = cluster(sample.features, num, spherical=settings.spherical, seed=scene.seed)
    size = np.bincount(found.cluster, minlength=num)  # (K,)
    metrics = {"clusters": num, "empty": int((size == 0).sum()), "largest_share": float(size.max() / len(sample))}
    pictures = {"": _picture(scene, sample, found, settings.images)}
    data: dict[str, Any] = {"split": scene.split, "images": len(sample)}
    data["clusters"] = [_told(scene, sample, found, number, settings.images) for number in range(num)]
    notes = []
    if has_labels:
        metrics |= agreement(sample.labels[known], found.cluster[known])
        votes = label_votes(sample.features[torch.from_numpy(known)], sample.labels[known], settings.neighbours)
        suspects = np.flatnonzero(votes.margin >= settings.margin)
        suspects = suspects[np.argsort(-votes.margin[suspects], kind="stable")]
        metrics |= {"suspected_labels": len(suspects), "neighbours_agree": float((votes.margin < 0).mean())}
        places = np.flatnonzero(known)[suspects]
        data["suspected_labels"] = [
            _suspect(scene, sample, found, int(place), votes, int(row))
            for place, row in zip(places[:LISTED_SUSPECTS], suspects)
        ]
        if len(places):
            pictures["suspected_labels"] = _suspects_picture(scene, sample, places, votes, suspects)
    elif one_class(sample.labels):
        notes.append("one image is labelled: purity and suspected label errors are left out; give more sample=")
    elif known.any():
        notes.append("images have several classes each: purity and suspected label errors are left out")
    else:
        notes.append("no image is labelled: purity and suspected label errors are left out")
    arrays = {"index": sample.index, "cluster": found.cluster, "closeness": found.closeness}
    lines = _lines(data, metrics, settings, classes) + notes
    return Look(pictures, data, arrays=arrays, metrics=metrics, lines=lines)


def cluster(features: Tensor, num: int, *, spherical: bool, seed: int) -> Clustering:
    """K-means of features (N, D) by faiss, the best of 5 starts; `spherical` by cosine similarity (Dhillon and Modha
    2001).
    """
    faiss = import_faiss()
    if faiss is None:
        raise DoesNotApply("k-means is faiss's, which cannot be imported; install it: pip install faiss-cpu")
    rows = np.ascontiguousarray((unit_length(features) if spherical else features.float()).numpy())  # (N, D)
    means = faiss.Kmeans(
        rows.shape[1],
        num,
        niter=ITERATIONS,
        nredo=RESTARTS,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,  # no fewer images are warned of, and none are left out of large clusters
        max_points_per_centroid=len(rows),
    )
    means.train(rows)
    centroids = means.centroids  # (K, D)
    closeness = closeness_in_double(  # (N, K)
        torch.from_numpy(rows).double(), torch.from_numpy(centroids).double(), "cosine" if spherical else "euclidean"
    ).numpy()
    best = closeness.argmax(1)  # (N,)
    others = np.where(np.arange(num) == best[:, None], -np.inf, closeness)
    next_best = others.max(1) if num > 1 else np.full(len(rows), -np.inf)
    return Clustering(centroids, best, closeness[np.arange(len(rows)), best], next_best)


def agreement(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Purity, normalised mutual information and adjusted Rand index of labels (N,) and clusters (N,).

    Purity is the share of images that are of the most frequent class of their cluster; it grows with the number of
    clusters, the other two do not.
    """
    counts = contingency_matrix(labels, clusters)  # (C, K)
    return {
        "purity": float(counts.max(0).sum() / counts.sum()),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def label_votes(features: Tensor, labels: np.ndarray, count: int) -> Votes:
    """The vote of the `count` nearest others of features (N, D) on each label (N,), by cosine similarity; each counts
    as its rank's inverse logarithm, so that the nearest say most.
    """
    values, number = np.unique(labels, return_inverse=True)  # (C,), (N,)
    place = nearest_others(features, features, np.arange(len(features)), count).place  # (N, k)
    weight = 1 / np.log2(np.arange(2, place.shape[1] + 2))  # (k,)
    votes = np.zeros((len(labels), len(values)))
    for rank in range(place.shape[1]):
        votes[np.arange(len(labels)), number[place[:, rank]]] += weight[rank] / weight.sum()
    own = votes[np.arange(len(labels)), number]
    votes[np.arange(len(labels)), number] = -1
    rival = votes.argmax(1)
    return Votes(values[rival], own, votes.max(1).clip(min=0))


def _check(settings: Any, num: int, available: int) -> None:
    for key in ("images", "neighbours"):
        if settings[key] < 1:
            raise ValueError(f"clusters.{key} must be at least 1, got {settings[key]}")
    if available < 2:
        raise DoesNotApply(f"there is nothing to cluster in {available} image")
    if not 1 <= num <= available:
        raise ValueError(f"clusters.count must lie in 1..{available}, the images sampled, got {num}; give more sample=")
    if not -1 <= settings.margin <= 1:
        raise ValueError(f"clusters.margin is a difference of shares of votes in -1..1, got {settings.margin}")


def _members(found: Clustering, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a cluster the images nearest to its centroid, and those that another centroid comes nearest to."""
    own = np.flatnonzero(found.cluster == number)
    typical = own[np.argsort(-found.closeness[own], kind="stable")][:count]
    rest = np.setdiff1d(own, typical)
    doubt = found.closeness[rest] - found.next_best[rest]
    return typical, rest[np.argsort(doubt, kind="stable")][:count]


def _told(scene: Scene, sample: SampleFeatures, found: Clustering, number: int, count: int) -> dict[str, Any]:
    typical, doubtful = _members(found, number, count)
    own = found.cluster == number
    told: dict[str, Any] = {"size": int(own.sum())}
    if one_class(sample.labels):
        known = own & labelled(sample.labels)
        labels, counts = np.unique(sample.labels[known], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        classes = scene.source(scene.split).classes
        told["classes"] = {str(class_name(labels[each], classes)): int(counts[each]) for each in order}
    told["typical"] = [sample.names[place] for place in typical]
    told["doubtful"] = [sample.names[place] for place in doubtful]
    return told


def _suspect(
    scene: Scene, sample: SampleFeatures, found: Clustering, place: int, votes: Votes, row: int
) -> dict[str, Any]:
    classes = scene.source(scene.split).classes
    mates = found.cluster == found.cluster[place]
    labels, counts = np.unique(sample.labels[mates & labelled(sample.labels)], return_counts=True)
    return {
        "image": sample.names[place],
        "index": int(sample.index[place]),
        "label": class_name(sample.labels[place], classes),
        "neighbours_say": class_name(votes.rival[row], classes),
        "votes_for_label": float(votes.own[row]),
        "votes_for_other": float(votes.against[row]),
        "cluster": int(found.cluster[place]),
        "cluster_is_mostly": class_name(labels[counts.argmax()], classes),
    }


def _picture(scene: Scene, sample: SampleFeatures, found: Clustering, count: int) -> np.ndarray:
    """A row for each cluster, the largest first: typical images, then doubtful ones."""
    classes = scene.source(scene.split).classes
    size = np.bincount(found.cluster, minlength=len(found.centroids))
    order = [int(each) for each in np.argsort(-size, kind="stable") if size[each]][:SHOWN_CLUSTERS]
    side = tile_side(scene.image_size)
    rows, captions, titles = [], [], []
    for number in order:
        typical, doubtful = _members(found, number, count)
        row: list[np.ndarray | None] = list(scene.thumbnails(scene.split, sample.index[typical], side))
        texts: list[str | None] = [class_name(sample.labels[place], classes) for place in typical]
        row += [None] * (count - len(typical) + 1)
        texts += [None] * (count - len(typical) + 1)
        if len(doubtful):
            row += list(scene.thumbnails(scene.split, sample.index[doubtful], side))
            texts += [class_name(sample.labels[place], classes) for place in doubtful]
        rows.append(row)
        captions.append(texts)
        titles.append(f"{size[number]:,} images")
    left_out = f"; the {len(order)} largest" if len(order) < (size > 0).sum() else ""
    title = f"{len(size)} clusters of {len(sample):,} images of {scene.split}{left_out}"
    title += "\nLeft: nearest to the centroid. Right: closest to belonging to another cluster"
    return captioned(rows, captions=captions, row_titles=titles, title=title)


def _suspects_picture(
    scene: Scene, sample: SampleFeatures, places: np.ndarray, votes: Votes, rows_of_votes: np.ndarray
) -> np.ndarray:
    classes = scene.source(scene.split).classes
    side = tile_side(scene.image_size)
    tiles = list(scene.thumbnails(scene.split, sample.index[places[:SHOWN_SUSPECTS]], side))
    texts = [
        f"label: {class_name(sample.labels[place], classes)}\nnear: {class_name(votes.rival[row], classes)} "
        f"{votes.against[row]:.0%}"
        for place, row in zip(places[:SHOWN_SUSPECTS], rows_of_votes)
    ]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    captions = [texts[start : start + COLUMNS] for start in range(0, len(texts), COLUMNS)]
    title = f"Labels that the nearest images contradict most, {len(tiles)} of {len(places):,}: label errors, or images "
    return captioned(rows, captions=captions, title=f"{title}that the backbone does not understand")


def _lines(data: dict[str, Any], metrics: dict[str, float], settings: Any, classes: list[str] | None) -> list[str]:
    sizes = [each["size"] for each in data["clusters"]]
    how = "cosine similarity" if settings.spherical else "distance"
    lines = [f"{len(sizes)} clusters of {data['images']:,} images by {how}, of {min(sizes):,} to {max(sizes):,} images"]
    if metrics["empty"]:
        lines.append(f"{metrics['empty']} clusters are empty: the features hold fewer different images than that")
    if "purity" not in metrics:
        return lines
    num = len(classes or [])
    lines.insert(
        0,
        f"purity {metrics['purity']:.1%}, NMI {metrics['nmi']:.3f}, adjusted Rand index {metrics['ari']:.3f}"
        + (f" ({num} classes)" if num else ""),
    )
    lines.append(
        f"{metrics['suspected_labels']:,} labels are suspected: another class wins the vote of the "
        f"{settings.neighbours} nearest images by {settings.margin:g} or more. Labels win "
        f"{metrics['neighbours_agree']:.1%} of all votes; where that is low, most suspects are the backbone's mistakes"
    )
    return lines
