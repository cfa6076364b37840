"""Which class an image shows: `python -m eval.predict ckpt=runs/<run> images=photos/`, and from Python:

from eval.predict import load_predictor
predictor = load_predictor("runs/<run>")
predictor(["a.jpg", "b.png"])
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from eval.classifier import Classifier, load_classifier
from eval.config import register
from eval.extract import centre_view
from eval.images import Images, find_images, read_views
from eval.subject import choose_device
from ssl.command import run_command
from ssl.config import Device, ModelConfig, Precision, check, plain
from ssl.data.augment import Augment
from ssl.data.sources import Source
from ssl.trainer import choose_dtype

USAGE = """eval.predict needs ckpt= and images=:
  python -m eval.predict ckpt=runs/<run> images=photo.jpg          a fine-tuned run, or one with a probed head
  python -m eval.predict ckpt=runs/<run>/eval/linear_probe.head images=photos/ format=csv out=predictions.csv
  python -m eval.predict ckpt=runs/<run> "images='photos/**/*.jpg'" top=1"""
COLUMNS = ("path", "rank", "class", "label", "score")


class Format(Enum):
    table = "table"
    json = "json"
    csv = "csv"


@dataclass
class PredictConfig:
    """What `python -m eval.predict` takes."""

    ckpt: str | None = None  # a fine-tuned run or its export, a run with a probed head, or a head's folder
    images: Any = None  # a file, a folder, a glob, or a list of those
    backbone: str | None = None  # where the backbone of a probed head lies now, if it was moved
    model: ModelConfig | None = None  # what a file of another project's weights is of
    top: int = 5  # classes named for each image, at most all
    format: Format = Format.table
    out: str | None = None  # file; null: printed
    device: Device = Device.auto  # auto: the GPU where there is one
    precision: Precision = (
        Precision.auto
    )  # auto: bf16 where the hardware computes in it, else fp16 on a GPU, fp32 on a CPU
    batch_size: int = 64  # images that the model takes at once
    threads: int | None = None  # null: the cores that this process may use


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first; none where it could not be decoded."""

    path: str
    classes: list[str]
    labels: list[int]
    scores: list[float]
    """Probabilities: they sum up to 1 over all classes, or stand for themselves where the model is multi-label."""
    error: str | None = None
    """Why the image could not be decoded."""


class Predictor:
    """Names the classes of images: a list in, a list of `Prediction` out, in the same order."""

    def __init__(
        self,
        classifier: Classifier,
        *,
        device: torch.device,
        top: int = 5,
        batch_size: int = 64,
        threads: int | None = None,
    ) -> None:
        if top < 1:
            raise ValueError(f"top must be at least 1 class, got {top}")
        self.classifier, self.device = classifier, device
        self.top = min(top, len(classifier.classes))
        self.batch_size, self.threads = batch_size, threads
        view = centre_view(classifier.image_size)
        self.augment = Augment([view], mean=classifier.mean, std=classifier.std).to(device)

    def __call__(self, images: Any) -> list[Prediction]:
        """Predictions for paths, Pillow images and uint8 arrays (H, W) or (H, W, C), or for one of those."""
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            images = [images]
        if not len(images):
            return []
        return list(self.stream(Images(images, channels=self.classifier.channels)))

    def stream(self, source: Source) -> Iterator[Prediction]:
        """Predictions for every image of `source`, in its order; a few batches are held at a time."""
        batches = read_views(
            source,
            size=self.classifier.image_size,
            channels=self.classifier.channels,
            batch_size=self.batch_size,
            threads=self.threads,
        )
        for views in batches:
            found: dict[int, Prediction] = {
                index: Prediction(source.describe(index), [], [], [], error=reason)
                for index, reason in views.failed.items()
            }
            if len(views.index):
                scores = self.scores(views.normalised(self.augment, self.device))  # (B, C)
                best, label = scores.topk(self.top, dim=1)  # (B, k), (B, k)
                for index, row, labels in zip(views.index.tolist(), best.tolist(), label.tolist()):
                    names = [self.classifier.classes[each] for each in labels]
                    found[index] = Prediction(source.describe(index), names, labels, row)
            yield from (found[index] for index in sorted(found))

    @torch.no_grad()
    def scores(self, image: Tensor) -> Tensor:
        """Probabilities (B, C) of normalised images (B, 3, H, W), on the CPU. Raises ValueError where one is NaN."""
        logits = self.classifier.model(image).float().cpu()  # (B, C)
        if not torch.isfinite(logits).all():
            raise ValueError(f"{self.classifier.title} gives logits that are not finite; give precision=fp32")
        return logits.sigmoid() if self.classifier.multi_label else logits.softmax(dim=1)


def load_predictor(
    ckpt: str | Path,
    *,
    backbone: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
    top: int = 5,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    threads: int | None = None,
) -> Predictor:
    """A predictor from a fine-tuned run or its export, a run with a probed head, or a head's folder.

    Raises ValueError where `ckpt` names no classes, or where a head's backbone is gone or another one.
    """
    place = choose_device(device)
    dtype = choose_dtype(precision, place)
    classifier = load_classifier(ckpt, backbone=backbone, model=model, device=place, dtype=dtype)
    return Predictor(classifier, device=place, top=top, batch_size=batch_size, threads=threads)


def run(config: DictConfig) -> dict[str, int]:
    """Predict what `config.images` names, write or print it; returns how many images were named and skipped.

    Images that cannot be decoded are named on the standard error stream. Raises ValueError where that is all of them.
    """
    predictor = load_predictor(
        config.ckpt,
        backbone=config.backbone,
        model=plain(config.model),
        top=config.top,
        device=config.device.name,
        precision=config.precision.name,
        batch_size=config.batch_size,
        threads=config.threads,
    )
    source = find_images(plain(config.images))
    counts = {"predicted": 0, "skipped": 0}
    with _opened(config.out) as file:
        _WRITE[config.format.name](_decoded(predictor.stream(source), counts), file)
        if not counts["predicted"]:  # inside, so that no empty file takes the place of an older one
            raise ValueError(f"none of the {len(source)} images of {source.name} could be decoded")
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    _say(f"{counts['predicted']} images{skipped}; {predictor.classifier.title}")
    if config.out:
        _say(f"written: {config.out}")
    elif config.format == Format.table:
        words = shlex.join([f"ckpt={config.ckpt}", f"images={config.images}", "format=csv", "out=predictions.csv"])
        _say(f"next: python -m eval.predict {words}")
    return counts


def _decoded(predictions: Iterable[Prediction], counts: dict[str, int]) -> Iterator[Prediction]:
    """The predictions of images that could be decoded; the others are named at once."""
    for prediction in predictions:
        if prediction.error is not None:
            counts["skipped"] += 1
            _say(f"skipped: {prediction.error}")
            continue
        counts["predicted"] += 1
        yield prediction


def _rows(predictions: Iterable[Prediction]) -> Iterator[tuple[str, int, str, int, float]]:
    for each in predictions:
        for rank, (name, label, score) in enumerate(zip(each.classes, each.labels, each.scores), start=1):
            yield each.path, rank, name, label, score


def _write_table(predictions: Iterable[Prediction], file: TextIO) -> None:
    for each in predictions:
        file.write(each.path + "\n")
        width = max(map(len, each.classes))
        for name, label, score in zip(each.classes, each.labels, each.scores):
            file.write(f"  {score:6.1%}  {name:<{width}}  (label {label})\n")


def _write_csv(predictions: Iterable[Prediction], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(predictions))


def _write_json(predictions: Iterable[Prediction], file: TextIO) -> None:
    """One array, an object for each image on its own line, written as they come."""
    before = "[\n"
    for each in predictions:
        top = [
            {"class": name, "label": label, "score": score}
            for name, label, score in zip(each.classes, each.labels, each.scores)
        ]
        file.write(before + json.dumps({"path": each.path, "predictions": top}, allow_nan=False))
        before = ",\n"
    file.write("[]\n" if before == "[\n" else "\n]\n")


_WRITE = {"table": _write_table, "json": _write_json, "csv": _write_csv}


@contextlib.contextmanager
def _opened(out: str | None) -> Iterator[TextIO]:
    """The standard output, or a file that takes its name when it is whole."""
    if out is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    path = Path(out).expanduser()
    if path.is_dir():
        raise OSError(f"out={out} is a folder; give the file that the predictions are written to")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _say(message: str) -> None:
    """On the standard error stream: the other one carries the predictions."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """The command line. Without `ckpt` or `images` it ends with exit code 2, another mistake with 1 and a message."""
    register(PredictConfig)

    def task(config: DictConfig) -> None:
        if config.ckpt is None or config.images is None:
            _say(USAGE)
            raise SystemExit(2)
        check(config, PredictConfig)
        try:
            run(config)
        except BrokenPipeError:  # the reader has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    run_command(task, config_name="predict")


if __name__ == "__main__":
    main()
