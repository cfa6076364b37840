"""The labelled images that a backbone is judged on: a train and a test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ssl.config import CONF, build
from ssl.data.sources import UNLABELLED, NoTestSplit, Source, checksum
from ssl.data.subset import Subset, limit, split_held_out

TEST_FRACTION = 0.2
OVERRIDABLE = ("limit", "image_size", "max_bad_fraction", "in_memory_gib")
READ_ONLY_URLS = ("", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https", "memory", "file", "local")
"""Kinds of urls (fsspec's) that a checkpoint may name its images by; "" is a path."""
DEFAULTS = {"max_bad_fraction": 0.01, "in_memory_gib": 4.0, "channels": 3}


@dataclass(frozen=True)
class Splits:
    """Two labelled sources and what their labels mean: `test_classes[i]` is the train label of test label i."""

    train: Source
    test: Source
    classes: list[str]
    test_classes: np.ndarray
    test_split: str
    notes: list[str] = field(default_factory=list)

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes: labels are multi-hot (N, C)."""
        return self.train.labels.ndim == 2

    def identity(self) -> dict[str, Any]:
        """What tells these splits from others."""
        return {"images": self.images, "num_train": len(self.train), "test_split": self.test_split}

    @cached_property
    def images(self) -> dict[str, int]:
        """A checksum over a few images of each split: tells sets of equal names and counts apart."""
        return {"train": checksum(self.train), "test": checksum(self.test)}

    def in_classes_of_train(self, labels: Tensor) -> Tensor:
        """Labels of test images, (N,) or multi-hot (N, C), as train numbers them."""
        if not self.multi_label:
            return torch.from_numpy(self.test_classes)[labels]
        known = torch.from_numpy(np.flatnonzero(self.test_classes >= 0))  # the others have no image
        joined = torch.zeros(len(labels), len(self.classes), dtype=labels.dtype)
        joined[:, torch.from_numpy(self.test_classes)[known]] = labels[:, known]
        return joined


def data_settings(given: Mapping[str, Any], own: Mapping[str, Any] | None, *, subject: str) -> dict[str, Any]:
    """A data yaml's values without nulls: `given`, or for `data=checkpoint` the subject's `own` with what is given.

    `own` is what the checkpoint says of its data; None for a baseline, which is judged on the embedded images then. It
    may come from anyone: nothing is downloaded for it, and of urls only those that are read and no more are followed.
    """
    values = {key: value for key, value in given.items() if value is not None}
    if values["name"] != "checkpoint":
        return {**DEFAULTS, **values}
    if own is None:
        node = OmegaConf.create({"data": OmegaConf.load(f"{CONF}/data/embedded.yaml")})
        own = OmegaConf.to_container(node, resolve=True)["data"]  # pyright: ignore
    if not own:
        raise ValueError(f"ckpt={subject} does not say which images it was made from; give data=, such as data=cifar10")
    merged = {**DEFAULTS, **{key: value for key, value in own.items() if value is not None}}  # pyright: ignore
    merged |= {key: values[key] for key in OVERRIDABLE if key in values}
    if not isinstance(merged.get("source"), Mapping):
        raise ValueError(f"ckpt={subject} does not say how its images are read; give data=, such as data=cifar10")
    merged["source"] = {key: value for key, value in merged["source"].items() if key != "download"}
    unused = sorted(set(values) - {"name", "root", *OVERRIDABLE})
    if unused:
        raise ValueError(
            f"data.{unused[0]} has no effect on the checkpoint's own data; data=checkpoint takes root, "
            f"{', '.join(OVERRIDABLE)}. To judge on other images give data=<name>"
        )
    if "root" in values:
        if "root" not in merged["source"]:
            raise ValueError(f"data.root has no effect: the data {merged['name']} is not read from a folder")
        merged["root"] = values["root"]
        merged["source"] = {**merged["source"], "root": values["root"]}
    elif (kind := _kind_of_url(merged["source"].get("root"))) not in READ_ONLY_URLS:
        raise ValueError(
            f"ckpt={subject} names its images by {merged['source']['root']}; a checkpoint may come from anyone, and "
            f"{kind}:// may do more than read. Where you trust it, give it as data.root="
        )
    return merged


def _kind_of_url(root: Any) -> str:
    """What stands before `://`, such as `s3`, or `simplecache::s3` of a url in another; nothing of a path."""
    head, found, _ = str(root).partition("://")
    return head if found else ("" if "::" not in str(root) else str(root).split("::")[0])


def make_splits(data: Mapping[str, Any], *, own: bool, seed: int, command: str, multi_label: bool = False) -> Splits:
    """Build the train and test sources of `data`; `own` where a checkpoint names them and not the person who asks.

    Where there is no test split, a seeded, stratified fifth of train becomes it, and the notes say so. Raises
    ValueError where there are no labels, one class only, or several classes per image and not `multi_label`.
    """
    source = data["source"]
    within = "ssl.data." if own else None  # a checkpoint may come from anyone and names no code but ours
    try:
        train: Source = build(source, within=within, split="train")
    except ValueError as error:
        hint = "were the images moved, give data.root=; to judge on others, data=<name>"
        raise ValueError(
            f"{error}\nThat is the data that the checkpoint names: {hint}" if own else str(error)
        ) from error
    where = f"data={data['name']}" + (f" at {data['root']}" if data.get("root") else "")
    train = _labelled(train, what=f"{command} needs labels; {where}")
    notes = []
    try:
        test: Source = build(source, within=within, split="test")
    except NoTestSplit as error:
        kept, held_out = split_held_out(train.labels, TEST_FRACTION, seed)
        test_split = f"{TEST_FRACTION:.0%} held out of train, stratified, seed {seed}"
        notes.append(
            f"there is no test split ({error}); {len(held_out)} of the {len(train)} labelled images, held out by seed "
            f"{seed}, stand in for it. Pretraining may have seen them, without labels"
        )
        train, test = Subset(train, kept), Subset(train, held_out)
    else:
        test_split = "the data's own"
        test = _labelled(test, what=f"{command} needs a labelled test split; {where}")
    train = limit(train, data.get("limit"), seed=seed)
    _check_labels(train, test, command=command, where=where, multi_label=multi_label)
    classes, test_classes = _join_classes(train, test, where=where)
    return Splits(train, test, classes, test_classes, test_split, notes)


def _labelled(source: Source, *, what: str) -> Source:
    """`source` without the images that have no label. Raises ValueError, beginning with `what`, if none has one."""
    has_label = source.labels != UNLABELLED  # (N,) or (N, C)
    has_label = has_label if has_label.ndim == 1 else has_label.all(1)
    if has_label.all():
        return source
    if not has_label.any():
        raise ValueError(
            f"{what} has none: {source.name}. Sort the images into one folder per class (train/<class>/..., "
            "test/<class>/...), or judge on a labelled set with data=<name> data.root=PATH"
        )
    return Subset(source, np.flatnonzero(has_label))


def _check_labels(train: Source, test: Source, *, command: str, where: str, multi_label: bool) -> None:
    if train.labels.ndim != test.labels.ndim:
        raise ValueError(
            f"{where}: one of train and test names several classes per image, the other one; give both alike"
        )
    if train.labels.ndim == 1:
        if len(np.unique(train.labels)) < 2:
            raise ValueError(f"{command} needs two classes or more; {where} has one in train: {train.name}")
        return
    if not multi_label:
        raise ValueError(
            f"{command} needs one class per image; {where} is multi-label, an image may have several of its "
            f"{train.labels.shape[1]} classes. Judge it by python -m eval.linear_probe, which reports mAP"
        )
    present = train.labels.mean(0)  # (C,)
    if not ((present > 0) & (present < 1)).any():
        raise ValueError(
            f"{command} needs a class that some images of train have and others lack; in {where} each class is that of "
            f"all images or of none: {train.name}"
        )


def _join_classes(train: Source, test: Source, *, where: str) -> tuple[list[str], np.ndarray]:
    """Class names of train, and for each of test's labels the one that train gives that class."""
    if train.classes is None or test.classes is None:
        count = int(max(train.labels.max(), test.labels.max())) + 1
        if train.labels.ndim == 2:
            raise ValueError(f"{where}: labels of several classes per image need the names of the classes")
        return [str(label) for label in range(count)], np.arange(count)
    unknown = [
        name for label, name in enumerate(test.classes) if name not in train.classes and _has_class(test.labels, label)
    ]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{where}: {len(unknown)} classes of test are not in train ({shown}), so no image of theirs can be named "
            "right; give both splits the same class folders"
        )
    place = {name: label for label, name in enumerate(train.classes)}
    return list(train.classes), np.array([place.get(name, -1) for name in test.classes], np.int64)


def _has_class(labels: np.ndarray, label: int) -> bool:
    """Whether an image is of the class; labels (N,) or multi-hot (N, C)."""
    return bool((labels == label).any() if labels.ndim == 1 else labels[:, label].any())
