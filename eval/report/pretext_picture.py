"""Relative location's answers about a few of the run's images, while it trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from eval.extract import centre_view
from eval.look.labels import class_name
from eval.look.place_pictures import answer_picture
from eval.look.places import ask
from eval.online import take_sample, untouched
from ssl.data.sources import Source
from ssl.data.subset import limit
from ssl.methods.relative_location import RelativeLocation
from ssl.online import OnlineSubject
from ssl.trainer import to_device

NUM_IMAGES = 4


class PretextSample:
    """Some of a run's images and where their patches are cut, drawn once by its seed: asked about again and again.

    It runs on one rank alone: no other one is waited for.
    """

    def __init__(self, source: Source, subject: OnlineSubject, method: RelativeLocation) -> None:
        few = limit(source, min(NUM_IMAGES, len(source)), seed=subject.seed)
        self.classes = source.classes
        at_its_size = replace(subject, image_size=method.view_size)
        self._sample = take_sample(few, [centre_view(method.view_size)], at_its_size, subject.seed)
        generator = torch.Generator().manual_seed(subject.seed)
        self._noise = torch.rand(len(few), method.num_noise, generator=generator)  # (N, num_noise)

    @torch.no_grad()
    def picture(self, subject: OnlineSubject, method: RelativeLocation) -> np.ndarray:
        """Patches and answers for those images that can be read. The training finds everything as it was."""
        sample = self._sample
        with untouched(subject), sample.loader:
            method.eval()
            batch = next(iter(sample.loader.sequential(batch_size=len(sample))))
            view = sample.augment(to_device(batch, subject.device))["views"][0]  # (N, C, H, W)
            answers = ask(method, view, self._noise.to(subject.device))
        readable = np.flatnonzero(~np.isin(batch["index"].numpy(), list(sample.loader.bad)))  # (M,)
        kept = torch.from_numpy(readable)
        names = [class_name(label, self.classes) or "image" for label in batch["label"].numpy()[readable]]
        return answer_picture(
            view.cpu()[kept],
            replace(answers, **{key: value.cpu()[kept] for key, value in vars(answers).items()}),
            names,
            patch_size=method.patch_size,
            mean=subject.mean,
            std=subject.std,
        )
