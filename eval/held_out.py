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
from ssl.checkpoint import last_saved, read_state, steps_saved
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.sources import Source
from ssl.models.backbones import is_token_model
from ssl.online import OnlineSubject, StopRun
from ssl.sharding import Gathering
from ssl.tensor_files import load_strictly, save_tensors, sha256, sync
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
    Weights that cannot be written are not kept: the run goes on with a warning, and the next better ones are tried.
    """

    def __init__(self, source: Source, *, folder: Path, patience: int | None, **shown: Any) -> None:
        self.source, self.folder, self.patience, self.shown = source, folder, patience, shown
        self.best, self.best_step, self.worse, self.ended = -1.0, 0, 0, False
        self.sha256: str | None = None  # of the best step's file

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
            self.worse = 0
            self._keep(score, method, subject)
        else:
            self.worse += 1
        assert self.patience is not None
        self.ended = self.worse >= self.patience or subject.last
        if not self.ended:
            return
        if self.best_step != subject.step:
            self._put_back(method)
        raise StopRun(
            f"the held-out accuracy was highest, {self.best:.1%}, after step {self.best_step}, whose weights are kept; "
            f"ended after step {subject.step}",
            metrics,
        )

    def _keep(self, score: float, method: nn.Module, subject: OnlineSubject) -> None:
        """Note the best weights so far, and write them where later ones may have to give way to them."""
        digest = None
        if not subject.last:
            digest, problem = _write(method.state_dict(), self._path(subject.step))
            if problem is not None:
                before = f"those of step {self.best_step} stay the best" if self.best_step else "none are kept yet"
                subject.warn(f"{problem}. The run goes on, and tries again with the next better ones; {before}")
                return
        self.best, self.best_step, self.sha256 = score, subject.step, digest

    def _put_back(self, method: nn.Module) -> None:
        """Load the best weights. Raises ValueError on all ranks where they are no longer what was written."""
        path, problem = self._path(self.best_step), None
        if distributed.is_main():
            try:
                if self.sha256 not in (None, sha256(path)):
                    problem = "its SHA-256 is not that of the weights that were written"
            except OSError as error:
                problem = error.strerror or str(error)
        problem = distributed.from_main(problem)
        if problem is not None:
            raise ValueError(
                f"{path}, the weights of the best evaluation, is missing or damaged: {problem}. The last checkpoint "
                f"({last_saved(self.folder)}) can be evaluated as it is, with ckpt=; or start again in another out="
            )
        load_strictly(method, TensorFile(path), path)

    def _path(self, step: int) -> Path:
        return self.folder / f"best_{step:08d}.safetensors"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. Weights that neither it nor any checkpoint that is there knows of are removed."""
        if distributed.is_main():
            self._remove_unknown()
        return {
            "best": self.best,
            "best_step": self.best_step,
            "sha256": self.sha256,
            "worse": self.worse,
            "ended": self.ended,
        }

    def load(self, state: dict[str, Any]) -> None:
        """What a checkpoint kept."""
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
        self.ended, self.sha256 = state["ended"], state.get("sha256")  # runs of earlier versions kept none

    def _remove_unknown(self) -> None:
        # This checkpoint may fail to be written: then the run goes on from an earlier one, and needs its weights.
        known = {self._path(self.best_step)}
        try:
            saved = steps_saved(self.folder)
        except ValueError:  # a folder that cannot be listed now: the next save tries again
            return
        for _, checkpoint in saved:
            with contextlib.suppress(ValueError, KeyError):  # a damaged one that no run goes on from
                known.add(self._path(read_state(checkpoint)["evaluations"][NAME]["best_step"]))
        for path in self.folder.glob("best_*.safetensors"):
            if path not in known:
                with contextlib.suppress(OSError):  # it stays, and the next save tries again
                    path.unlink()


def plain_loss(logits: Tensor, labels: Tensor, *, multi_label: bool) -> float:
    """Mean cross-entropy, not smoothed, of logits (N, C) and labels (N,), or binary of multi-hot ones (N, C)."""
    if multi_label:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).item()
    return nn.functional.cross_entropy(logits, labels).item()


def _write(tensors: dict[str, Tensor], path: Path) -> tuple[str | None, str | None]:
    """Write whole or not at all, on the first rank; the file's SHA-256 and what was wrong, one of them None, on all."""
    digest, problem = None, None
    with Gathering() as gathering:
        whole = gathering.of(tensors)
        if distributed.is_main():
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                save_tensors(whole, partial)
                digest = sha256(partial)
                sync(partial)
                os.replace(partial, path)
                sync(path.parent)
            except OSError as error:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                digest = None
                problem = f"the best weights so far could not be written to {path}: {error.strerror or error}"
    return distributed.from_main((digest, problem))
