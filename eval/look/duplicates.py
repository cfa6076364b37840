"""`what=duplicates`: near-identical images within train, within test and across the two, for a person to act on.

Features name candidates: the nearest few of each image, if they are as close as copies of one image are. Pictures
decide (`eval.look.aligned`), since photos of one class are close too. Of CIFAR-10's test images 3.3 % have a near
duplicate in train (Barz and Denzler 2020, arXiv:1902.00423).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.look.aligned import COLOURS
from eval.look.duplicate_list import counts, groups, listed, picture, table
from eval.look.duplicate_pairs import Pool, confirmed
from eval.look.duplicate_search import candidates, similarity_of_copies
from eval.look.labels import in_classes_of
from eval.look.result import DoesNotApply, Look
from eval.look.scene import Scene

MOST_OF_ALL = 20_000
"""Images of each split that are searched among all looks, where nobody says how many."""


def look(scene: Scene) -> Look:
    """Duplicates within and across the splits of the scene's data, as a list, as groups and as pictures."""
    settings = scene.config.duplicates
    _check(settings)
    splits = ["train", "test"] if scene.has_test_split else ["train"]
    num = {split: _num_read(scene, len(scene.source(split))) for split in splits}
    print(f"duplicates: {_what_is_read(scene, num)}", flush=True)
    found = {split: scene.features(split, num=num[split]) for split in splits}
    if sum(map(len, found.values())) < 2:
        raise DoesNotApply("duplicates need two images or more")
    labels = [in_classes_of(found[s].labels, scene.source(s).classes, scene.classes) for s in splits]
    if len({each.ndim for each in labels}) > 1:
        raise ValueError("one of train and test names several classes per image, the other one; give both alike")
    pool = Pool(
        split=np.concatenate([np.full(len(found[split]), split) for split in splits]),
        index=np.concatenate([found[split].index for split in splits]),
        names=[name for split in splits for name in found[split].names],
        labels=np.concatenate(labels),
    )
    least = similarity_of_copies(scene, flip=settings.flip) if settings.similarity is None else settings.similarity
    first, second, similarity = candidates([found[split].features for split in splits], settings.neighbours, least)
    pairs = confirmed(scene, pool, first, second, similarity)
    group = groups(len(pool.names), pairs.first, pairs.second)
    metrics = counts(pool, pairs, group)
    data = {
        "searched": {
            "images": {split: len(found[split]) for split in splits},
            "candidates": len(first),
            "similarity": float(least),
            "similarity_given": settings.similarity is not None,
            "correlation": settings.correlation,
            "colours": COLOURS,
        },
        "groups": listed(pool, pairs, group, scene.classes),
    }
    pictures = {"": picture(scene, pool, pairs)} if len(pairs) else {}
    tables = {"": table(pool, pairs, group, scene.classes)}
    return Look(pictures, data, metrics=metrics, lines=_lines(data["searched"], metrics, settings), tables=tables)


def _num_read(scene: Scene, num: int) -> int:
    """How many of the `num` images of a split are searched: all, among other looks that were not named a part."""
    if scene.config.duplicates.images is not None:
        return min(scene.config.duplicates.images, num)
    return min(num, MOST_OF_ALL) if scene.config.what == "all" else num


def _what_is_read(scene: Scene, num: Mapping[str, int]) -> str:
    """How many images are read, and how to read fewer or more."""
    parts = [f"{read:,} of {len(scene.source(split)):,} images of {split}" for split, read in num.items()]
    is_cut = any(read < len(scene.source(split)) for split, read in num.items())
    advice = "; duplicates.images= takes more" if is_cut and scene.config.duplicates.images is None else ""
    return f"reads {' and '.join(parts)}{advice}"


def _check(settings: Any) -> None:
    for key in ("images", "neighbours"):
        if settings[key] is not None and settings[key] < 1:
            raise ValueError(f"duplicates.{key} must be at least 1, got {settings[key]}")
    if not 0 < settings.correlation <= 1:
        raise ValueError(f"duplicates.correlation must lie in (0, 1], got {settings.correlation}; 0.9 is usual")
    if settings.similarity is not None and not -1 <= settings.similarity <= 1:
        raise ValueError(
            f"duplicates.similarity is a cosine in -1..1, got {settings.similarity}; leave it out, and it is measured"
        )


def _lines(searched: dict[str, Any], metrics: dict[str, float], settings: Any) -> list[str]:
    lines = []
    if "pairs_across" in metrics:
        lines.append(
            f"{metrics['test_images_with_twin_in_train']:,} test images look alike one in train "
            f"({metrics['test_share_with_twin_in_train']:.2%})"
        )
    parts = [f"{metrics['pairs_in_train']:,} within train"]
    parts += [f"{metrics['pairs_in_test']:,} within test"] if "pairs_in_test" in metrics else []
    parts += [f"{metrics['pairs_across']:,} across"] if "pairs_across" in metrics else []
    lines.append(
        f"{metrics['pairs']:,} pairs look alike ({', '.join(parts)}), {metrics['pairs_exact']:,} of them equal in "
        f"every pixel; {metrics['images']:,} images in {metrics['groups']:,} groups"
    )
    if metrics.get("pairs_with_other_label"):
        number = metrics["pairs_with_other_label"]
        lines.append(f"{number:,} pairs have different labels: one of the two is wrong, or they are no copies")
    counts = " and ".join(f"{number:,} of {split}" for split, number in searched["images"].items())
    why = "given" if searched["similarity_given"] else "as 99 % of copies made of some images are"
    lines.append(
        f"searched: {counts}; {searched['candidates']:,} candidates with a cosine similarity of at least "
        f"{searched['similarity']:.3f} ({why}), of which the aligned pictures must correlate by "
        f"{settings.correlation:g} or more and agree in their colours; a person decides whether they are copies"
    )
    return lines
