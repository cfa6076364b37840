"""What is told of duplicates: their groups, how many they are, a table with a line for each pair, and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eval.look.drawing import captioned, tile_side
from eval.look.duplicate_pairs import Pairs, Pool, parts
from eval.look.labels import agree, class_name, labelled
from eval.look.scene import Scene

SHOWN_PAIRS, COLUMNS = 24, 8


def groups(num: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of `num` images the group (num,) that each is in by pairs (P,), through others too; of the smallest member."""
    links = coo_array((np.ones(len(first)), (first, second)), shape=(num, num))
    _, number = connected_components(links, directed=False)
    _, smallest, group = np.unique(number, return_index=True, return_inverse=True)
    return smallest[group]


def counts(pool: Pool, pairs: Pairs, group: np.ndarray) -> dict[str, float]:
    """How many pairs, groups and images there are, within and across the splits."""
    one, two = pool.split[pairs.first], pool.split[pairs.second]
    members = np.unique(np.concatenate([pairs.first, pairs.second]))
    differ = _labels_differ(pool, pairs)
    metrics: dict[str, float] = {
        "pairs": len(pairs),
        "pairs_exact": int(pairs.exact.sum()),
        "pairs_in_train": int(((one == "train") & (two == "train")).sum()),
        "groups": len(np.unique(group[members])),
        "images": len(members),
    }
    if (pool.split == "test").any():
        metrics["pairs_in_test"] = int(((one == "test") & (two == "test")).sum())
        metrics["pairs_across"] = int((one != two).sum())
        in_train = np.unique(group[members[pool.split[members] == "train"]])
        leaked = np.isin(group, in_train) & (pool.split == "test")
        metrics["test_images_with_twin_in_train"] = int(leaked.sum())
        metrics["test_share_with_twin_in_train"] = float(leaked.sum() / (pool.split == "test").sum())
    if differ is not None:
        metrics["pairs_with_other_label"] = int(differ.sum())
    return metrics


def _labels_differ(pool: Pool, pairs: Pairs) -> np.ndarray | None:
    """Which pairs (P,) have two labels without a class in common; None where no image is labelled."""
    known = labelled(pool.labels)
    if not known.any():
        return None
    same = agree(pool.labels[pairs.first], pool.labels[pairs.second][:, None])[:, 0]
    return known[pairs.first] & known[pairs.second] & ~same


def _image(pool: Pool, place: int, classes: Sequence[str] | None) -> dict[str, Any]:
    return {
        "split": str(pool.split[place]),
        "index": int(pool.index[place]),
        "image": pool.names[place],
        "label": class_name(pool.labels[place], classes),
    }


def listed(pool: Pool, pairs: Pairs, group: np.ndarray, classes: Sequence[str] | None) -> list[dict[str, Any]]:
    """The groups, the largest first, each with its images and its pairs, the surest first."""
    by_group: dict[int, list[int]] = {}
    for pair in np.argsort(-pairs.correlation, kind="stable").tolist():
        by_group.setdefault(int(group[pairs.first[pair]]), []).append(pair)
    every = []
    for own in by_group.values():
        members = sorted({int(place) for pair in own for place in (pairs.first[pair], pairs.second[pair])})
        every.append(
            {
                "images": [_image(pool, place, classes) for place in members],
                "pairs": [
                    {
                        "images": [members.index(int(pairs.first[pair])), members.index(int(pairs.second[pair]))],
                        "kind": pairs.kind(pair),
                        "similarity": float(pairs.similarity[pair]),
                        "correlation": float(pairs.correlation[pair]),
                        "colours": float(pairs.colours[pair]),
                    }
                    for pair in own
                ],
            }
        )
    return sorted(every, key=lambda each: -len(each["images"]))


def table(pool: Pool, pairs: Pairs, group: np.ndarray, classes: Sequence[str] | None) -> str:
    """A CSV line for each pair, groups together, the surest pair of each first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = ("split", "index", "image", "label")
    heads = [f"{key}_{which}" for which in ("a", "b") for key in keys]
    writer.writerow(["group", "kind", "correlation", "colours", "similarity", *heads])
    names = {number: place for place, number in enumerate(np.unique(group[pairs.first]).tolist(), start=1)}
    for pair in np.lexsort([-pairs.correlation, group[pairs.first]]).tolist():
        two = [_image(pool, int(place), classes) for place in (pairs.first[pair], pairs.second[pair])]
        numbers = [f"{each[pair]:.4f}" for each in (pairs.correlation, pairs.colours, pairs.similarity)]
        cells = [each[key] if each[key] is not None else "" for each in two for key in keys]
        writer.writerow([names[int(group[pairs.first[pair]])], pairs.kind(pair), *numbers, *cells])
    return stream.getvalue()


def picture(scene: Scene, pool: Pool, pairs: Pairs) -> np.ndarray:
    """Some pairs, evenly from the least sure to the surest, one image above the other; if any, across splits."""
    across = pool.split[pairs.first] != pool.split[pairs.second]
    some = pairs.chosen(across) if across.any() else pairs
    order = np.argsort(some.correlation, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN_PAIRS, len(order))).round().astype(int))]
    size = tile_side(scene.image_size)
    rows, captions = [], []
    for each in parts(len(order), COLUMNS):
        chosen = order[each.start : each.stop].tolist()
        for which in (some.first, some.second):
            rows.append([_thumbnail(scene, pool, int(which[pair]), size) for pair in chosen])
            captions.append([_caption(scene, pool, int(which[pair])) for pair in chosen])
        captions[-1] = [
            f"{text}\n{some.kind(pair)} {some.correlation[pair]:.2f}" for text, pair in zip(captions[-1], chosen)
        ]
    what = "pairs across train and test" if across.any() else "pairs"
    title = f"{len(order)} of {len(some):,} {what} that look alike, the least sure first, one image above the other"
    return captioned(rows, captions=captions, title=title)


def _thumbnail(scene: Scene, pool: Pool, place: int, size: int) -> np.ndarray:
    return scene.thumbnails(str(pool.split[place]), [int(pool.index[place])], size)[0]


def _caption(scene: Scene, pool: Pool, place: int) -> str:
    name = class_name(pool.labels[place], scene.classes)
    return f"{pool.split[place]} {pool.index[place]}" + (f"\n{name}" if name else "")
