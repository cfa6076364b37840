"""What is evaluated while a run goes on, off the path of training: `python -m ssl.pretrain online=knn ...`.

Each reads a bounded, seeded sample, which is chosen and copied at the first evaluation and kept. Nothing of the
training moves: no random state, no BatchNorm statistics, no module's mode.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

import ssl.distributed as distributed
from eval.collapse import ADVICE, signs_of_collapse
from eval.extract import centre_view
from eval.knn import knn
from eval.layers import ExtractSets, FeatureSet, make_extract, parse_sets, resolve_sets
from eval.sample import USUAL_VIEW, NotFiniteFeatures, Sample, ViewFeatures
from eval.spectra import health, lidar
from eval.splits import Splits, make_splits
from ssl.config import build
from ssl.data.sources import Source
from ssl.data.subset import limit
from ssl.data.views import View
from ssl.online import OnlineSubject, StopRun

HEALTH = ("rankme", "alpha_req", "feature_std", "mean_cosine", "dead_dimensions", "lidar")
CONFIRMATIONS = 2
"""Evaluations in a row that must see a collapse before the run is ended: the first steps at a large learning rate may
look like one and recover.
"""
SETTLED = 50
"""Steps before which nothing is called a collapse: with BatchNorm's momentum of 0.1 its running statistics, by which
features are made here, are still mixed with their initial values.
"""
VIEW_IMAGES = 256


class OnlineKnn:
    """kNN accuracy as `eval.knn` computes it, of `num_test` images among `num_train`: {"knn_top1": ...}.

    Images are drawn by `seed`, equally many of each class. Where the data cannot be judged, as images without labels,
    one warning says so and nothing is evaluated.
    """

    def __init__(
        self,
        *,
        k: int = 20,
        temperature: float = 0.07,
        num_train: int = 5000,
        num_test: int = 1000,
        pooling: str = "model",
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        _check_at_least(1, k=k, num_test=num_test, batch_size=batch_size)
        if num_train < k:
            raise ValueError(f"num_train={num_train} images have no k={k} neighbours; give a larger num_train")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; DINO's is 0.07")
        self.k, self.temperature = k, temperature
        self.num_train, self.num_test = num_train, num_test
        self.sets = parse_sets("last", pooling)
        self.batch_size, self.seed = batch_size, seed
        self._splits: Splits | None = None
        self._samples: tuple[Sample, Sample] | None = None
        self._skip = False

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        if self._samples is None and not self._skip:
            self._open(subject)
        if self._splits is None or self._samples is None:
            return {}
        try:
            with untouched(subject):
                extract = extractor(subject, self.sets)
                train, test = (_read(sample, extract, self.batch_size) for sample in self._samples)
        except NotFiniteFeatures as error:
            subject.warn(f"step {subject.step}: no kNN accuracy, {error}")
            return {}
        scores = knn(
            train.features[:, 0],
            train.labels,
            test.features[:, 0],
            self._splits.in_classes_of_train(test.labels),
            k=[self.k],
            temperature=[self.temperature],
            num_classes=len(self._splits.classes),
        )
        return _same_everywhere({"knn_top1": scores.first()["top1"]}, ("knn_top1",), subject.device)

    def _open(self, subject: OnlineSubject) -> None:
        """Choose and copy the images, or say once why there are none."""
        try:
            splits = make_splits(subject.data, own=False, seed=subject.seed, command="online kNN")
        except ValueError as error:
            self._skip = True
            subject.warn(f"no kNN accuracy during this run: {error}")
            return
        view = [centre_view(subject.image_size)]
        train = take_sample(limit(splits.train, self.num_train, seed=self.seed), view, subject, self.seed)
        test = take_sample(limit(splits.test, self.num_test, seed=self.seed), view, subject, self.seed)
        self._splits, self._samples = replace(splits, train=train.loader.source, test=test.loader.source), (train, test)


class OnlineHealth:
    """Label-free health of the features of `sample` of the run's images: see `eval.spectra` for what is measured.

    `views` of each of `view_images` images give LiDAR besides; 0 leaves it out. What looks like collapse (see
    `eval.collapse`) is said in a warning, when it begins; with `stop_on_collapse` it ends the run once a second
    evaluation in a row agrees. The untrained model is what later ones are compared with.
    """

    def __init__(
        self,
        *,
        sample: int = 512,
        views: int = 0,
        view_images: int | None = None,
        pooling: str = "model",
        batch_size: int = 256,
        stop_on_collapse: bool = False,
        seed: int = 0,
    ) -> None:
        _check_at_least(2, sample=sample)
        _check_at_least(1, batch_size=batch_size)
        if views < 0 or views == 1:
            raise ValueError(f"views={views}: LiDAR compares 2 views of an image or more; views=0 leaves it out")
        if view_images is not None:
            _check_at_least(2, view_images=view_images)
            if views == 0:
                raise ValueError(f"view_images={view_images} has no effect with views=0, which leaves LiDAR out")
        self.sample, self.views, self.view_images = sample, views, view_images or VIEW_IMAGES
        self.sets = parse_sets("last", pooling)
        self.batch_size, self.seed = batch_size, seed
        self.stop_on_collapse = stop_on_collapse
        self._central: Sample | None = None
        self._in_views: list[Sample] = []  # one, or none without LiDAR
        self._start: dict[str, float] | None = None
        self._num_collapsed = 0  # evaluations in a row

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        if self._central is None:
            self._open(subject)
        assert self._central is not None
        try:
            with untouched(subject):
                extract = extractor(subject, self.sets)
                features = _read(self._central, extract, self.batch_size).features[:, 0]  # (N, D)
                in_views = [_read(each, extract, self.batch_size).features for each in self._in_views]  # (n, V, D)
        except NotFiniteFeatures as error:
            return self._judge(subject, {}, [str(error)])
        metrics = health(features)
        if in_views:
            metrics["lidar"] = lidar(in_views[0])
        metrics = _same_everywhere(metrics, HEALTH, subject.device)
        signs = []
        if subject.step >= SETTLED:
            signs = signs_of_collapse(metrics, dimensions=features.shape[1], start=self._start)
        if self._start is None:
            self._start = {"step": subject.step, **metrics}
        return self._judge(subject, metrics, signs)

    def begin(self, subject: OnlineSubject) -> None:
        """Look at the untrained model, with which later evaluations are compared."""
        self(subject)

    def state(self) -> dict[str, Any]:
        """What a run that is continued goes on from: the first evaluation, and how many in a row saw a collapse."""
        return {"start": self._start, "num_collapsed": self._num_collapsed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._start, self._num_collapsed = state["start"], state["num_collapsed"]

    def _judge(self, subject: OnlineSubject, metrics: dict[str, float], signs: list[str]) -> dict[str, float]:
        self._num_collapsed = self._num_collapsed + 1 if signs else 0
        said = f"step {subject.step}: the features look collapsed: {'; '.join(signs)}. What helps: {ADVICE}"
        if self.stop_on_collapse and self._num_collapsed >= CONFIRMATIONS:
            raise StopRun(f"{said}. Ended by stop_on_collapse, at the second evaluation in a row", metrics)
        if self._num_collapsed == 1:
            subject.warn(said + (". If the next evaluation agrees, the run ends" if self.stop_on_collapse else ""))
        return metrics

    def _open(self, subject: OnlineSubject) -> None:
        source = limit(build(subject.data["source"], split="train"), subject.data.get("limit"), seed=subject.seed)
        few = limit(source, self.sample, seed=self.seed)
        self._central = take_sample(few, [centre_view(subject.image_size)], subject, self.seed)
        if self.views:
            few = limit(source, self.view_images, seed=self.seed)
            self._in_views = [take_sample(few, [USUAL_VIEW] * self.views, subject, self.seed)]


@contextlib.contextmanager
def untouched(subject: OnlineSubject) -> Iterator[None]:
    """Without gradients; afterwards each module's mode and the random states are what they were."""
    modes = [(module, module.training) for module in subject.method.modules()]
    devices = [subject.device] if subject.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def extractor(subject: OnlineSubject, sets: list[FeatureSet]) -> ExtractSets:
    sets = resolve_sets(subject.backbone, sets)
    return make_extract(subject.backbone, sets, device=subject.device, dtype=subject.dtype)


def take_sample(source: Source, views: list[View], subject: OnlineSubject, seed: int) -> Sample:
    return Sample(
        source,
        views,
        image_size=subject.image_size,
        channels=subject.channels,
        mean=subject.mean,
        std=subject.std,
        device=subject.device,
        seed=seed,
        threads=subject.threads,
    )


def _read(sample: Sample, extract: ExtractSets, batch_size: int) -> ViewFeatures:
    rank, world_size = distributed.rank(), distributed.world_size()
    return sample.read(extract, batch_size=batch_size, rank=rank, world_size=world_size)


def _same_everywhere(metrics: Mapping[str, float], names: tuple[str, ...], device: torch.device) -> dict[str, float]:
    """`metrics` as the mean over ranks of what each computed from the same features.

    Their processors may round differently, and a verdict must be the same on all of them.
    """
    values = torch.tensor([metrics.get(name, math.nan) for name in names], dtype=torch.float64, device=device)
    values = distributed.mean_over_ranks(values).tolist()
    return {name: value for name, value in zip(names, values) if not math.isnan(value)}


def _check_at_least(least: int, **settings: int) -> None:
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
