"""Watching a slice of train during fine-tuning, and ending the run when it has stopped getting better."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssl.distributed as distributed
from eval.extract import Features, centre_view, extract_all
from eval.finetuning import FineTuning, plain_logits
from eval.scores import headline
from ssl.checkpoint import read_state, steps_saved
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.sources import Source
from ssl.models.backbones import is_token_model
from ssl.online import OnlineSubject, StopRun
from ssl.sharding import Gathering
from ssl.tensor_files import load_strictly, save_tensors
from ssl.tensor_stream import TensorFile

NAME = "held_out"
"""Its name among a run's evaluations."""


def classify(
    model: nn.Module,
    source: Source,
    *,
    size: tuple[int, int],
    channels: int,
    mean: list[float],
    std: list[float],
    batch_size: int,
    threads: int | None,
    max_bad_fraction: float,
    device: torch.device,
    dtype: torch.dtype,
    title: str,
) -> Features:
    """Logits (N, C) of the central view of every image of `source`, in order, without those that cannot be decoded."""
    channels_last = not is_token_model(model)
    with Loader(
        source,
        [centre_view(size)],
        size=size,
        channels=channels,
        seed=0,  # the central view draws nothing
        threads=threads,
        in_memory_gib=0.0,
        max_bad_fraction=max_bad_fraction,
        pin_memory=device.type == "cuda",
    ) as loader:
        augment = Augment(loader.views, mean=mean, std=std).to(device)
        return extract_all(
            lambda image: [plain_logits(model, image, dtype=dtype, channels_last=channels_last)],
            loader,
            augment,
            batch_size=batch_size,
            device=device,
            title=title,
        )[0]


class HeldOut:
    """An evaluation for `ssl.training.train`: accuracy and loss of a model on images that it is not trained on.

    With `patience`, the run ends after that many evaluations without a better accuracy, and when it ends, then or at
    the last step of its schedule, the model gets back the weights of its best evaluation
    (`<folder>/best_<step>.safetensors`): the choice is made on these images, never on the test split.
    """

    def __init__(self, source: Source, *, folder: Path, patience: int | None, **shown: Any) -> None:
        self.source, self.folder, self.patience, self.shown = source, folder, patience, shown
        self.best, self.best_step, self.worse, self.ended = -1.0, 0, 0, False

    def __call__(self, subject: OnlineSubject) -> dict[str, float]:
        method = subject.method
        assert isinstance(method, FineTuning)
        found = classify(
            method.backbone,
            self.source,
            device=subject.device,
            dtype=subject.dtype,
            title="held out",
            **self.shown,
        )
        multi_label = method.mixing.multi_label
        scores = headline(found.features, found.labels, multi_label=multi_label)
        metrics = {f"held_out_{name}": value for name, value in scores.items()}
        metrics["held_out_loss"] = plain_loss(found.features, found.labels, multi_label=multi_label)
        if self.patience is not None:
            self._compare(scores["map" if multi_label else "top1"], method, subject, metrics)
        return metrics

    def _compare(self, score: float, method: nn.Module, subject: OnlineSubject, metrics: dict[str, float]) -> None:
        # Processors may round differently, and every rank must come to the same verdict.
        score = distributed.mean_over_ranks(torch.tensor([score], dtype=torch.float64, device=subject.device)).item()
        if score > self.best:
            self.best, self.best_step, self.worse = score, subject.step, 0
            _write(method.state_dict(), self._path(subject.step))
        else:
            self.worse += 1
        assert self.patience is not None
        self.ended = self.worse >= self.patience or subject.last
        if not self.ended:
            return
        load_strictly(method, TensorFile(self._path(self.best_step)), self._path(self.best_step))
        raise StopRun(
            f"the held-out accuracy was highest, {self.best:.1%}, after step {self.best_step}, whose weights are kept; "
            f"ended after step {subject.step}",
            metrics,
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"best_{step:08d}.safetensors"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Weights that neither it nor any checkpoint that is there knows of are removed."""
        if distributed.is_main():
            self._remove_unknown()
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse, "ended": self.ended}

    def load(self, state: dict[str, Any]) -> None:
        """What a checkpoint kept."""
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
        self.ended = state["ended"]

    def _remove_unknown(self) -> None:
        # This checkpoint may fail to be written: then the run goes on from an earlier one, and needs its weights.
        known = {self._path(self.best_step)}
        for _, checkpoint in steps_saved(self.folder):
            with contextlib.suppress(ValueError, KeyError):  # a damaged one that no run goes on from
                known.add(self._path(read_state(checkpoint)["evaluations"][NAME]["best_step"]))
        for path in self.folder.glob("best_*.safetensors"):
            if path not in known:
                path.unlink(missing_ok=True)


def plain_loss(logits: Tensor, labels: Tensor, *, multi_label: bool) -> float:
    """Mean cross-entropy, not smoothed, of logits (N, C) and labels (N,), or binary of multi-hot ones (N, C)."""
    if multi_label:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).item()
    return nn.functional.cross_entropy(logits, labels).item()


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write whole or not at all, on the first rank, before any rank goes on. Raises OSError on all where it cannot."""
    problem = None
    with Gathering() as gathering:
        whole = gathering.of(tensors)
        if distributed.is_main():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_tensors(whole, partial)
                os.replace(partial, path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                problem = f"the best weights so far could not be written to {path}: {error.strerror}"
    problem = distributed.from_main(problem)
    if problem is not None:
        raise OSError(f"{problem}; make room, then run the same command again: it goes on from the last checkpoint")
