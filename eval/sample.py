"""A sample of images copied into memory, and its features in one or several views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.layers import ExtractSets
from ssl.data.augment import Augment
from ssl.data.loader import Loader
from ssl.data.reader import UNREADABLE
from ssl.data.sources import Source
from ssl.data.stream import in_order
from ssl.data.views import View
from ssl.distributed import gather_rows
from ssl.trainer import to_device

MAX_BAD_FRACTION = 0.5
"""Of a sample: a few broken files among few images say little about the set, which the training's own limit guards."""

USUAL_VIEW = View(crop="random_resized", scale=(0.2, 1.0), flip=0.5)
"""What an image is seen in, again and again, where no recipe is known: MAE's crop and flip."""


class NotFiniteFeatures(ValueError):
    """The backbone gives NaN or infinity."""


class Copied:
    """All images of `source` as it reads them, encoded or not: the set that they were drawn from can be let go."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.labels = np.array(source.labels)
        self.classes = source.classes
        self.num_ignored = source.num_ignored
        self._images = [_read(source, index) for index in in_order(source)]
        self._names = [source.describe(index) for index in range(len(source))]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes | np.ndarray:
        image = self._images[index]
        if isinstance(image, Exception):
            raise image
        return image

    def describe(self, index: int) -> str:
        return self._names[index]


def _read(source: Source, index: int) -> bytes | np.ndarray | Exception:
    try:
        data = source.read(index)
    except UNREADABLE as error:
        return error  # the loader meets it, counts it and goes on
    return data.copy() if isinstance(data, np.ndarray) else data


@dataclass(frozen=True)
class ViewFeatures:
    """Features (N, V, D) float32 and labels (N,), or multi-hot (N, C), in order without the undecodable images."""

    features: Tensor
    labels: Tensor
    num_bad: int


class Sample:
    """The images of `source` in `views`, ready to be read again and again: by epoch and again by step alike.

    Each view's random numbers are a function of (seed, image), whatever the number of ranks, and the same at each
    reading. `source` is copied, encoded as it is: no more than the sample itself stays in memory.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        image_size: tuple[int, int],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        self.device = device
        self.loader = Loader(
            Copied(source),
            views,
            size=image_size,
            channels=channels,
            seed=seed,
            threads=threads,
            in_memory_gib=0.0,
            max_bad_fraction=MAX_BAD_FRACTION,
            pin_memory=device.type == "cuda",
        )
        self.augment = Augment(self.loader.views, mean=mean, std=std).to(device)

    def __len__(self) -> int:
        return len(self.loader)

    @torch.no_grad()
    def read(self, extract: ExtractSets, *, batch_size: int, rank: int = 0, world_size: int = 1) -> ViewFeatures:
        """Features of every image in every view, those of `extract`'s first set, `batch_size` views at once.

        Each rank reads its share, and all of them get the features of all. Raises NotFiniteFeatures, and ValueError
        where no image can be decoded.
        """
        num_views = len(self.loader.views)
        # A rank without an image takes part in the gathering too, and has to know how wide a feature is.
        features, labels = [self._nothing(extract)], [torch.from_numpy(self.loader.source.labels[:0].astype(np.int64))]
        images = max(batch_size // num_views, 1)
        with self.loader:
            for batch in self.loader.sequential(batch_size=images, rank=rank, world_size=world_size):
                views = self.augment(to_device(batch, self.device))["views"]
                stacked = torch.stack(views, dim=1)  # (B, V, C, h, w)
                found = extract(stacked.flatten(0, 1))[0].float().cpu().unflatten(0, (-1, num_views))  # (B, V, D)
                readable = torch.from_numpy(~np.isin(batch["index"].numpy(), list(self.loader.bad)))  # (B,)
                features.append(found[readable])
                labels.append(batch["label"].cpu()[readable])
        every = gather_rows(torch.cat(features))  # (N, V, D)
        if not torch.isfinite(every).all():
            raise NotFiniteFeatures(
                f"{int((~torch.isfinite(every)).flatten(1).any(1).sum())} of the {len(every)} images of "
                f"{self.loader.source.name} have features that are not finite; the backbone has diverged: go back to "
                "an earlier checkpoint, or compute in fp32"
            )
        if len(every) == 0:
            raise ValueError(f"none of the {len(self)} sampled images of {self.loader.source.name} can be decoded")
        return ViewFeatures(every, gather_rows(torch.cat(labels)), num_bad=len(self) - len(every))

    def _nothing(self, extract: ExtractSets) -> Tensor:
        blank = torch.zeros(1, self.loader.channels, *self.loader.size, device=self.device)
        return extract(blank)[0].float().cpu()[:0, None].expand(0, len(self.loader.views), -1)  # (0, V, D)
