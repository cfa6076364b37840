"""What a pretraining method is to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Any]


class Method(nn.Module):
    """A backbone, the heads that only pretraining needs, and a loss.

    The trainer calls `forward` alone, through DistributedDataParallel, with a batch of `views`: list of V float tensors
    (B, C, H, W), normalised; `noise`: (B, num_noise) uniform numbers in [0, 1); `index`: (B,), and `label`: (B,), -1
    where there is none. It returns `loss`, and any scalars to log beside it, detached. A class that shows the backbone
    patches may offer `stem_size(image_size, **settings)`, which `model.stem=auto` then goes by.
    """

    backbone: nn.Module
    num_noise: int = 0
    """Uniform numbers that `forward` reads per image. They are a function of (seed, epoch, image index)."""
    view_size: tuple[int, int]
    """Height and width of the views that `forward` takes, in pixels."""
    depends_on_ranks: bool = False
    """True where a step depends on how the global batch is divided over ranks, as mixing the images of a part does."""
    lr_scales: Mapping[str, float] = MappingProxyType({})
    """Factors on the learning rate of the parameters whose names begin with a key; 1 for all others."""
    couples_images: bool = False
    """True where an image's loss depends on the other images of the global batch, as contrastive losses do.

    Such a method offers `forward(batch, embed_only=True)` -> (B, V, Z) and `contrast((B, V, Z))` -> {"loss": ...}, so
    that accumulation can keep all negatives.
    """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError
