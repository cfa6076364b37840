"""What a pretraining method is to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from ssl.config import build, locate, plain

Batch = dict[str, Any]


class Method(nn.Module):
    """A backbone, the heads that only pretraining needs, and a loss.

    The trainer calls `forward` alone, through DistributedDataParallel, with a batch of `views`: list of V float tensors
    (B, C, H, W), normalised; `noise`: (B, num_noise) uniform numbers in [0, 1); `index`: (B,), and `label`: (B,), -1
    where there is none. It returns `loss`, and any scalars to log beside it, detached. A class that shows the backbone
    patches may offer `stem_size(image_size, **settings)`, which `model.stem=auto` then goes by. One that another method
    replaces for some backbones may offer `stand_in(config, backbone, image_size, in_chans)`: that method's config, and
    a sentence that says why, or None.
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
    notes: tuple[str, ...] = ()
    """What the log and the effective recipe say of it beside its settings."""
    couples_images: bool = False
    """True where an image's loss depends on the other images of the global batch, as contrastive losses do.

    Such a method offers `forward(batch, embed_only=True)` -> (B, V, Z) and `contrast((B, V, Z))` -> {"loss": ...}, so
    that accumulation can keep all negatives.
    """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


def build_method(
    config: Mapping[str, Any] | DictConfig,
    *,
    within: str | None = None,
    backbone: nn.Module,
    image_size: tuple[int, int],
    in_chans: int,
) -> Method:
    """The method that a config names, or the one that stands in for it with this backbone, which its notes then say.

    `within` is that of `ssl.config.build`. Raises ValueError where the method and the backbone do not go together.
    """
    node: Mapping[str, Any] = plain(config)
    target, why = str(node.get("_target_")), ()
    if "_target_" in node and (within is None or target.startswith(within)):
        stand_in = getattr(locate(target), "stand_in", None)
        found = None if stand_in is None else stand_in(node, backbone, image_size, in_chans)
        if found is not None:
            node, why = found[0], (found[1],)
    method = build(node, within=within, backbone=backbone, image_size=image_size, in_chans=in_chans)
    if why:
        method.notes = (*why, *method.notes)
    return method
