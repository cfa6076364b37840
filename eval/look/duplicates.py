"""`what=duplicates`: near-identical images within train, within test and across the two, for a person to act on.

Features name candidates: the nearest few of each image, if they are as close as copies of one image are. Pictures
decide (`eval.look.aligned`), since photos of one class are close too. Of CIFAR-10's test images 3.3 % have a near
duplicate in train (Barz and Denzler 2020, arXiv:1902.00423).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

from eval.images import Views
from eval.look.aligned import SIDE, aligned_correlation, structure
from eval.look.drawing import captioned
from eval.look.labels import agree, class_name, in_classes_of, labelled
from eval.look.neighbours import nearest_others
from eval.look.result import DoesNotApply, Look
from eval.look.samples import sample_index
from eval.look.scene import Scene
from eval.neighbours import nearest
from eval.rows import Rows
from ssl.data.decode import crop_resize
from ssl.data.reader import UNREADABLE, Reader
from ssl.data.sources import Source
from ssl.data.threads import available_cores

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
COPIES, REACHED = 256, 0.01
"""Images of which copies are made, and the share of copies that may lie below the similarity that is derived."""
READ_AT_ONCE = 512
SHOWN_PAIRS, COLUMNS = 24, 8


@dataclass(frozen=True)
class Pool:
    """The images of all splits that are compared, one split behind another: N images."""

    split: np.ndarray
    """(N,) names of splits."""
    index: np.ndarray
    """(N,) in the split."""
    names: list[str]
    labels: np.ndarray
    """(N,), or multi-hot (N, C), as train numbers them."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of images that are duplicates: places in the pool, the first before the second."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray
    """Cosine of their features."""
    correlation: np.ndarray
    """Of the aligned pictures."""
    mirrored: np.ndarray
    exact: np.ndarray
    """Whether all pixels are equal."""

    def __len__(self) -> int:
        return len(self.first)

    def kind(self, pair: int) -> str:
        """`exact`, `mirrored` or `near`."""
        return "exact" if self.exact[pair] else "mirrored" if self.mirrored[pair] else "near"

    def chosen(self, which: np.ndarray) -> Pairs:
        """The pairs that `which`, a mask or places, names."""
        return Pairs(*(getattr(self, each)[which] for each in Pairs.__dataclass_fields__))


def look(scene: Scene) -> Look:
    """Duplicates within and across the splits of the scene's data, as a list, as groups and as pictures."""
    settings = scene.config.duplicates
    _check(settings)
    splits = ["train", "test"] if scene.has_test_split else ["train"]
    found = {split: scene.features(split, num=settings.images or len(scene.source(split))) for split in splits}
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
    pairs = _confirmed(scene, pool, first, second, similarity)
    group = groups(len(pool.names), pairs.first, pairs.second)
    metrics = _metrics(pool, pairs, group)
    data = {
        "searched": {
            "images": {split: len(found[split]) for split in splits},
            "candidates": len(first),
            "similarity": float(least),
            "similarity_given": settings.similarity is not None,
            "correlation": settings.correlation,
        },
        "groups": _grouped(pool, pairs, group, scene.classes),
    }
    pictures = {"": _picture(scene, pool, pairs)} if len(pairs) else {}
    table = {"": _table(pool, pairs, group, scene.classes)}
    return Look(pictures, data, metrics=metrics, lines=_lines(data["searched"], metrics, settings), tables=table)


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


@dataclass(frozen=True)
class SmallPictures:
    """Whole images made small, luma uint8 (n, 32, 32); a digest of the pixels of each, None of those not decodable."""

    luma: Tensor
    digest: list[bytes | None]


def read_small(source: Source, index: np.ndarray, *, channels: int, threads: int | None = None) -> SmallPictures:
    """The images of `source` at `index` (n,), sorted, made small without regard to their shape."""
    reader = Reader(source, channels=channels)
    luma = torch.zeros(len(index), SIDE, SIDE, dtype=torch.uint8)
    digest: list[bytes | None] = [None] * len(index)

    def read(slots: Iterable[int]) -> None:
        for slot in slots:
            number = int(index[slot])
            try:
                data, size = reader.open(number)
                image = reader.decode(number, data, size)
            except UNREADABLE:
                continue
            image = np.ascontiguousarray(image)
            digest[slot] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()
            small = crop_resize(image, (0, 0, *size), (SIDE, SIDE), "bilinear")  # (C, 32, 32)
            luma[slot] = torch.from_numpy(_luma(small))

    with ThreadPoolExecutor(threads or available_cores()) as pool:
        list(pool.map(read, _parts(len(index), READ_AT_ONCE)))
    return SmallPictures(luma, digest)


def _parts(num: int, size: int) -> list[range]:
    return [range(start, min(start + size, num)) for start in range(0, num, size)]


def _luma(image: np.ndarray) -> np.ndarray:
    """uint8 (C, h, w) as uint8 (h, w)."""
    weights = np.array(LUMA if len(image) == 3 else [1 / len(image)] * len(image), np.float32)
    return np.tensordot(weights, image.astype(np.float32), 1).round().clip(0, 255).astype(np.uint8)


def compare(
    pictures: SmallPictures, first: np.ndarray, second: np.ndarray, *, flip: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pairs of places in `pictures` (P,): their correlation, whether mirrored, whether all pixels are equal."""
    correlation, mirrored = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    for each in _parts(len(first), READ_AT_ONCE):
        part = slice(each.start, each.stop)
        one, two = (structure(pictures.luma[places[part]].float() / 255) for places in (first, second))  # (B, 32, 32)
        value, turned = aligned_correlation(one, two, flip=flip)
        correlation[part], mirrored[part] = value.numpy(), turned.numpy()
    digest = pictures.digest
    exact = np.array([digest[a] is not None and digest[a] == digest[b] for a, b in zip(first, second)], bool)
    return correlation, mirrored, exact


def groups(num: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of `num` images the group (num,) that each is in by pairs (P,), through others too; of the smallest member."""
    links = coo_array((np.ones(len(first)), (first, second)), shape=(num, num))
    _, number = connected_components(links, directed=False)
    _, smallest, group = np.unique(number, return_index=True, return_inverse=True)
    return smallest[group]


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


def _confirmed(scene: Scene, pool: Pool, first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> Pairs:
    """The candidates whose pictures are equal or correlate."""
    settings = scene.config.duplicates
    used = np.unique(np.concatenate([first, second]))  # (n,) in the pool, so by split and by index
    parts = [
        read_small(
            scene.source(split),
            pool.index[used[pool.split[used] == split]],
            channels=scene.channels,
            threads=scene.config.threads,
        )
        for split in dict.fromkeys(pool.split.tolist())
    ]
    pictures = SmallPictures(torch.cat([each.luma for each in parts]), [d for each in parts for d in each.digest])
    one, two = np.searchsorted(used, first), np.searchsorted(used, second)
    correlation, mirrored, exact = compare(pictures, one, two, flip=settings.flip)
    every = Pairs(first, second, similarity, correlation, mirrored & ~exact, exact)
    return every.chosen(exact | (correlation >= settings.correlation))


def _metrics(pool: Pool, pairs: Pairs, group: np.ndarray) -> dict[str, float]:
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


def _grouped(pool: Pool, pairs: Pairs, group: np.ndarray, classes: Sequence[str] | None) -> list[dict[str, Any]]:
    """The groups, the largest first, each with its images and its pairs, the surest first."""
    by_group: dict[int, list[int]] = {}
    for pair in np.argsort(-pairs.correlation, kind="stable").tolist():
        by_group.setdefault(int(group[pairs.first[pair]]), []).append(pair)
    listed = []
    for own in by_group.values():
        members = sorted({int(place) for pair in own for place in (pairs.first[pair], pairs.second[pair])})
        listed.append(
            {
                "images": [_image(pool, place, classes) for place in members],
                "pairs": [
                    {
                        "images": [members.index(int(pairs.first[pair])), members.index(int(pairs.second[pair]))],
                        "kind": pairs.kind(pair),
                        "similarity": float(pairs.similarity[pair]),
                        "correlation": float(pairs.correlation[pair]),
                    }
                    for pair in own
                ],
            }
        )
    return sorted(listed, key=lambda each: -len(each["images"]))


def _table(pool: Pool, pairs: Pairs, group: np.ndarray, classes: Sequence[str] | None) -> str:
    """A CSV line for each pair, groups together, the surest pair of each first."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    keys = ("split", "index", "image", "label")
    heads = [f"{key}_{which}" for which in ("a", "b") for key in keys]
    writer.writerow(["group", "kind", "correlation", "similarity", *heads])
    names = {number: place for place, number in enumerate(np.unique(group[pairs.first]).tolist(), start=1)}
    for pair in np.lexsort([-pairs.correlation, group[pairs.first]]).tolist():
        two = [_image(pool, int(place), classes) for place in (pairs.first[pair], pairs.second[pair])]
        numbers = [f"{pairs.correlation[pair]:.4f}", f"{pairs.similarity[pair]:.4f}"]
        cells = [each[key] if each[key] is not None else "" for each in two for key in keys]
        writer.writerow([names[int(group[pairs.first[pair]])], pairs.kind(pair), *numbers, *cells])
    return stream.getvalue()


def _picture(scene: Scene, pool: Pool, pairs: Pairs) -> np.ndarray:
    """Some pairs, evenly from the least sure to the surest, one image above the other; if any, across splits."""
    across = pool.split[pairs.first] != pool.split[pairs.second]
    some = pairs.chosen(across) if across.any() else pairs
    order = np.argsort(some.correlation, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN_PAIRS, len(order))).round().astype(int))]
    size = min(max(scene.image_size), 96)
    rows, captions = [], []
    for each in _parts(len(order), COLUMNS):
        chosen = order[each.start : each.stop].tolist()
        for which in (some.first, some.second):
            rows.append([_thumbnail(scene, pool, int(which[pair]), size) for pair in chosen])
            captions.append([_caption(scene, pool, int(which[pair])) for pair in chosen])
        captions[-1] = [
            f"{text}\n{some.kind(pair)} {some.correlation[pair]:.2f}" for text, pair in zip(captions[-1], chosen)
        ]
    what = "pairs across train and test" if across.any() else "pairs"
    title = f"Duplicates: {len(order)} of {len(some):,} {what}, the least sure first, one image above the other"
    return captioned(rows, captions=captions, title=title)


def _thumbnail(scene: Scene, pool: Pool, place: int, size: int) -> np.ndarray:
    return scene.thumbnails(str(pool.split[place]), [int(pool.index[place])], size)[0]


def _caption(scene: Scene, pool: Pool, place: int) -> str:
    name = class_name(pool.labels[place], scene.classes)
    return f"{pool.split[place]} {pool.index[place]}" + (f"\n{name}" if name else "")


def _lines(searched: dict[str, Any], metrics: dict[str, float], settings: Any) -> list[str]:
    lines = []
    if "pairs_across" in metrics:
        lines.append(
            f"{metrics['test_images_with_twin_in_train']:,} test images have a twin in train "
            f"({metrics['test_share_with_twin_in_train']:.2%})"
        )
    parts = [f"{metrics['pairs_in_train']:,} within train"]
    parts += [f"{metrics['pairs_in_test']:,} within test"] if "pairs_in_test" in metrics else []
    parts += [f"{metrics['pairs_across']:,} across"] if "pairs_across" in metrics else []
    lines.append(
        f"{metrics['pairs']:,} pairs ({', '.join(parts)}), {metrics['pairs_exact']:,} of them equal in every pixel; "
        f"{metrics['images']:,} images in {metrics['groups']:,} groups"
    )
    if metrics.get("pairs_with_other_label"):
        number = metrics["pairs_with_other_label"]
        lines.append(f"{number:,} pairs have different labels: one of the two is wrong, or they are no copies")
    counts = " and ".join(f"{number:,} of {split}" for split, number in searched["images"].items())
    why = "given" if searched["similarity_given"] else "as 99 % of copies made of some images are"
    lines.append(
        f"searched: {counts}; {searched['candidates']:,} candidates with a cosine similarity of at least "
        f"{searched['similarity']:.3f} ({why}), called duplicates where the aligned pictures correlate by "
        f"{settings.correlation:g} or more"
    )
    return lines
