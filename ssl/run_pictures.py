"""Pictures of a run's first images: what the method sees, and what it makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import ssl.distributed as distributed
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.methods.base import Batch, Method
from ssl.pictures import reconstruction_panel, views_panel
from ssl.sharding import gathered_weights
from ssl.tracking import Tracker
from ssl.trainer import to_device


def first_images(loader: Loader, device: torch.device, *, count: int) -> Batch:
    """The first images of the set, as the method sees them in epoch 0."""
    batches = loader.sequential(batch_size=min(count, len(loader)))
    batch = next(iter(batches))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    return to_device(batch, device)


@dataclass(frozen=True)
class RunPictures:
    """Views of a few images, and reconstructions where the method makes them."""

    tracker: Tracker
    method: Method
    augment: Augment
    few: Batch
    mean: list[float]
    std: list[float]

    def show(self, step: int) -> None:
        """Give the tracker the pictures of `step`. Every rank calls it; the first makes them."""
        with gathered_weights(self.method):
            if distributed.is_main():
                self._show(step)

    def _show(self, step: int) -> None:
        training = self.method.training
        self.method.eval()  # so that pictures draw no random numbers and move no statistics
        with torch.no_grad():
            batch = self.augment(self.few)
            picture = views_panel(batch["views"], mean=self.mean, std=self.std)
            self.tracker.images(step, "views", picture)
            reconstruct = getattr(self.method, "reconstruct", None)
            if reconstruct is not None:
                panels = reconstruct(batch["views"][0], batch["noise"])
                picture = reconstruction_panel(panels, mean=self.mean, std=self.std)
                self.tracker.images(step, "reconstructions", picture)
        self.method.train(training)
