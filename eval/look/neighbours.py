"""`what=neighbours`: the nearest images in feature space, of the trained backbone and of the untrained one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.look.drawing import BAD, GOOD, captioned, framed, tile_side
from eval.look.labels import agree, class_name, in_classes_of, labelled
from eval.look.result import DoesNotApply, Look
from eval.look.samples import SampleFeatures, Shown
from eval.look.scene import Scene
from eval.neighbours import nearest
from eval.rows import Rows


@dataclass(frozen=True)
class Neighbours:
    """The k images of a bank closest to each of M others, nearest first: similarity and place in the bank, (M, k)."""

    similarity: Tensor
    place: np.ndarray


def look(scene: Scene) -> Look:
    """The images of train nearest to those shown; and of a sample, how many nearest images share the class."""
    settings = scene.config.neighbours
    shown = scene.shown()
    networks = backbones(scene)
    found = {name: _of_shown(scene, shown, network, settings.count) for name, network in networks.items()}
    bank = scene.features("train")
    labels = in_classes_of(shown.labels, shown.classes, scene.classes)
    rates = {name: _agreement(scene, network, settings.count) for name, network in networks.items()}
    metrics = {f"same_class_{name}": rate for name, (rate, _) in rates.items() if rate is not None}
    chance = next(iter(rates.values()))[1]
    if chance is not None:
        metrics["same_class_by_chance"] = chance
    picture = _picture(scene, shown, labels, bank, found)
    told = _told(shown, labels, bank, found, scene.classes)
    return Look({"": picture}, told, metrics=metrics, lines=_lines(scene, len(bank), settings.count, metrics))


def backbones(scene: Scene) -> dict[str, nn.Module]:
    """The trained backbone and the untrained one; only the latter where nothing was trained."""
    if scene.loaded is None:
        return {"untrained": scene.backbone}
    return {"trained": scene.backbone, "untrained": scene.untrained()}


def nearest_others(bank: Tensor, queries: Tensor, own: np.ndarray, count: int) -> Neighbours:
    """The `count` rows of `bank` (N, D) with the largest cosine similarity to each query (M, D), without itself.

    `own` (M,) is the row that is the query, -1 where none is. Raises ValueError where the bank has no other row.
    """
    count = min(count, len(bank) - 1 if (own >= 0).any() else len(bank))
    if count < 1:
        raise ValueError(f"neighbours are looked for among {len(bank)} images; give more, at least two")
    found = nearest(Rows(bank, "cosine", torch.device("cpu")), queries, count + 1, index="auto")
    place = found.place.numpy()  # (M, k+1)
    # Of images equal to the query, itself may stand anywhere, or behind the last that was found.
    dropped = np.where((place == own[:, None]).any(1), (place == own[:, None]).argmax(1), place.shape[1] - 1)  # (M,)
    if place.shape[1] == count:
        return Neighbours(found.closeness, place)
    kept = torch.from_numpy(np.arange(place.shape[1]) != dropped[:, None])  # (M, k+1)
    return Neighbours(found.closeness[kept].view(-1, count), place[kept.numpy()].reshape(-1, count))


def same_class_rate(labels: np.ndarray, bank_labels: np.ndarray, place: np.ndarray, own: np.ndarray) -> Any:
    """Share of neighbours with the query's class, over labelled queries; and what chance gives.

    Labels (M,) and (N,), or multi-hot; place (M, k) in the bank; own (M,) the query's own row, -1 where none.
    (None, None) where no query or no row of the bank has a label.
    """
    asked = np.flatnonzero(labelled(labels))
    known = labelled(bank_labels)
    if not len(asked) or not known.any():
        return None, None
    same = agree(labels[asked], bank_labels[place[asked]])  # (m, k)
    counted = known[place[asked]]  # (m, k)
    rate = same.sum() / max(counted.sum(), 1)
    every = np.flatnonzero(known)
    chances = []
    for query in asked:
        others = every[every != own[query]]
        chances.append(agree(labels[query][None], bank_labels[others][None]).mean() if len(others) else 0.0)
    return float(rate), float(np.mean(chances))


def _agreement(scene: Scene, network: nn.Module, count: int) -> tuple[float | None, float | None]:
    bank, queries = scene.features("train", network), scene.features(scene.split, network)
    if not one_of_each(bank, queries):
        return None, None
    own = np.arange(len(queries)) if scene.split == "train" else np.full(len(queries), -1)
    found = nearest_others(bank.features, queries.features, own, count)
    labels = in_classes_of(queries.labels, scene.source(scene.split).classes, scene.classes)
    return same_class_rate(labels, bank.labels, found.place, own)


def one_of_each(*features: SampleFeatures) -> bool:
    """Whether each of these has a labelled image, of equally many classes per image."""
    return all(labelled(each.labels).any() for each in features) and len({each.labels.ndim for each in features}) == 1


def _of_shown(scene: Scene, shown: Shown, network: nn.Module, count: int) -> Neighbours:
    if count < 1:
        raise ValueError(f"neighbours.count must be at least 1, got {count}")
    bank = scene.features("train", network)
    own = _own_places(scene, shown, bank)
    if len(bank) - int((own >= 0).any()) < 1:
        raise DoesNotApply(f"train has {len(bank)} image, so none has a neighbour")
    extract = scene.extract(network)
    step = scene.config.batch_size
    queries = torch.cat([extract(part).float().cpu() for part in shown.image.split(step)])  # (M, D)
    return nearest_others(bank.features, queries, own, count)


def _own_places(scene: Scene, shown: Shown, bank: SampleFeatures) -> np.ndarray:
    """Where in the bank each shown image itself is, -1 where it is not."""
    if scene.config.images is not None:
        rows: dict[Any, int] = {os.path.realpath(name): place for place, name in enumerate(bank.names)}
        return np.array([rows.get(os.path.realpath(name), -1) for name in shown.names])
    if scene.split != "train":
        return np.full(len(shown), -1)
    rows = {int(index): place for place, index in enumerate(bank.index)}
    return np.array([rows.get(int(index), -1) for index in shown.index])


def _picture(
    scene: Scene, shown: Shown, labels: np.ndarray, bank: SampleFeatures, found: dict[str, Neighbours]
) -> np.ndarray:
    size = tile_side(scene.image_size)
    rows, captions, titles = [], [], []
    for query in range(len(shown)):
        for place, (name, neighbours) in enumerate(found.items()):
            near = neighbours.place[query]  # (k,)
            tiles = list(scene.thumbnails("train", bank.index[near], size))
            same = _same(labels[query], bank.labels[near])
            own = class_name(labels[query], scene.classes)
            mine = square(shown.pixels[query], size) if place == 0 else None  # as thumbnails are
            rows.append([_framed(mine, None, size), *(_framed(tile, s, size) for tile, s in zip(tiles, same))])
            told = [
                _caption(class_name(bank.labels[row], scene.classes), s, float(closeness))
                for row, s, closeness in zip(near, same, neighbours.similarity[query])
            ]
            captions.append([(f"asked: {own}" if own else "asked") if place == 0 else None, *told])
            titles.append(scene.called(name))
    title = f"Nearest images of train (a sample of {len(bank):,}) by cosine similarity"
    marked = any(same is not None for query in range(len(shown)) for same in _same(labels[query], bank.labels[:1]))
    note = "\nBlue frame and =: the class of the image asked; orange frame and \u00d7: another class" if marked else ""
    return captioned(rows, captions=captions, row_titles=titles, title=title + note)


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle of a picture (h, w, 3), as large a square as it holds, at (size, size)."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    pixels = pixels[top : top + side, left : left + side]
    if side == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def _framed(tile: np.ndarray | None, same: bool | None, size: int) -> np.ndarray | None:
    if tile is None:
        return None
    ink = (255, 255, 255) if same is None else GOOD if same else BAD
    return framed(tile, ink, width=max(size // 24, 1))


def _same(label: np.ndarray, others: np.ndarray) -> list[bool | None]:
    """Whether each of `others` (k,) has a class of `label`; None where one of the two has no label."""
    if np.ndim(label) != others.ndim - 1 or not labelled(np.asarray(label)[None])[0]:
        return [None] * len(others)
    agreed = agree(np.asarray(label)[None], others[None])[0]  # (k,)
    return [bool(same) if known else None for same, known in zip(agreed, labelled(others))]


def _caption(name: str | None, same: bool | None, similarity: float) -> str:
    sign = "" if same is None else "= " if same else "\u00d7 "
    return f"{sign}{name or ''} {similarity:.3f}".strip()


def _told(
    shown: Shown, labels: np.ndarray, bank: SampleFeatures, found: dict[str, Neighbours], classes: Sequence[str] | None
) -> dict[str, Any]:
    queries = []
    for query, name in enumerate(shown.names):
        near = {
            which: [
                {
                    "image": bank.names[row],
                    "index": int(bank.index[row]),
                    "label": class_name(bank.labels[row], classes),
                    "similarity": float(similarity),
                }
                for row, similarity in zip(each.place[query], each.similarity[query])
            ]
            for which, each in found.items()
        }
        label = class_name(labels[query], classes)
        queries.append({"image": name, "index": int(shown.index[query]), "label": label, "neighbours": near})
    return {"bank": {"split": "train", "images": len(bank)}, "images": queries}


def _lines(scene: Scene, num_bank: int, count: int, metrics: dict[str, float]) -> list[str]:
    among = f"among the {count} nearest of {num_bank:,} images of train"
    if not metrics:
        return [f"nearest images of train ({num_bank:,}); without labels their classes cannot be compared"]
    lines = [
        f"{metrics[f'same_class_{name}']:.1%} have the class of the image asked, {among} ({scene.called(name)})"
        for name in ("trained", "untrained")
        if f"same_class_{name}" in metrics
    ]
    asked = len(scene.features(scene.split))
    return [*lines, f"{metrics['same_class_by_chance']:.1%} would by chance; {asked:,} images of {scene.split} asked"]
