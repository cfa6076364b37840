"""The very views that a run trains on, of chosen images in chosen epochs: through its loader and its augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.look.estimate import Estimate
from ssl.data.augment import Augment
from ssl.data.loader import Batch, Loader
from ssl.data.sources import Source
from ssl.data.views import View
from ssl.trainer import to_device


class RunViews:
    """The batches that training makes of `source` with these views and this seed, image by image.

    Everything is as in `ssl.training.train`: a view and the noise of a method are functions of (seed, epoch, index).
    `in_memory_gib` must be the run's too: images that are held are resized by other arithmetic than images that are
    decoded one by one, and differ by up to one grey level.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        size: tuple[int, int],
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_noise: int = 0,
        in_memory_gib: float = 4.0,
        max_bad_fraction: float = 0.01,
        threads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.loader = Loader(
            source,
            views,
            size=size,
            channels=len(mean),
            seed=seed,
            num_noise=num_noise,
            threads=threads,
            in_memory_gib=in_memory_gib,
            max_bad_fraction=max_bad_fraction,
            prefetch=0,
            fill=list(mean),
        )
        self.augment = Augment(self.loader.views, mean=mean, std=std).to(self.device)

    def drawn(self, index: Sequence[int], *, epoch: int = 0) -> Batch:
        """The images `index` as the loader gives them in `epoch`: uint8 crops, parameters, noise, index, label."""
        estimate = Estimate(f"views of {len(index):,} images", len(index))
        found = []
        for each in index:
            found.append(self._one(int(each), epoch))
            estimate.at(len(found))
        return joined(found)

    def seen(self, drawn: Batch) -> dict[str, Any]:
        """What the method is given: `views`, a list of normalised (B, C, h, w), and the rest of the batch."""
        return self.augment(to_device(drawn, self.device))

    def shown_index(self, index: int) -> int:
        """The image whose pixels stand for `index`: itself, or the one that replaces it where it cannot be decoded."""
        attempt = 0
        while (candidate := self.loader.bad_list.candidate(index, attempt)) in self.loader.bad:
            attempt += 1
        return int(candidate)

    def _one(self, index: int, epoch: int) -> Batch:
        # Of as many ranks as there are images, each has one: its own index, and its own random numbers with it.
        batches = self.loader.sequential(batch_size=1, rank=index, world_size=len(self.loader), epoch=epoch)
        try:
            return next(batches)
        finally:
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one behind another: tensors along their first dimension, within lists and dicts alike."""
    return {key: _join([batch[key] for batch in batches]) for key in batches[0]}


def _join(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {key: _join([value[key] for value in values]) for key in first}
    return [_join(each) for each in zip(*values, strict=True)]
