"""Supervised fine-tuning as a Method: the whole timm model with its classifier, soft labels, and what mixes images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eval.hidden_mixing import ManifoldMixup, PatchUp
from eval.mixing import Mixing
from ssl.methods.base import Batch, Method
from ssl.models.classifier import set_mode
from ssl.models.hidden import HiddenLayer, hidden_layers


class FineTuning(Method):
    """The loss of timm's model with its classifier, against labels that may be smoothed and mixed.

    `mixing` makes the targets and the loss; in eval mode nothing is mixed. Parameters of `backbone` that require no
    gradient stay as they are, in eval mode. `std` is what the images were divided by, in units of 0..1.
    """

    def __init__(
        self, backbone: nn.Module, *, image_size: tuple[int, int], mixing: Mixing, std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.view_size = image_size
        self.mixing = mixing
        self.num_noise = mixing.num_noise
        self.depends_on_ranks = mixing.num_noise > 0
        self.std = list(std)
        self.layers: list[HiddenLayer] = []
        if isinstance(mixing, ManifoldMixup | PatchUp):
            self.layers = hidden_layers(backbone)
            mixing.check(self.layers)

    def train(self, mode: bool = True) -> FineTuning:
        """Training mode, but for the frozen parts."""
        super().train(mode)
        set_mode(self.backbone, mode)
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image, label = batch["views"][0], batch["label"]
        if self.training:
            mixed = self.mixing(
                self._logits, image, label, batch["noise"], model=self.backbone, layers=self.layers, std=self.std
            )
        else:
            mixed = Mixing.forward(self.mixing, self._logits, image, label, batch["noise"])
        outputs = {"loss": mixed.loss}
        if type(self.mixing) is Mixing and not self.mixing.multi_label:  # of unmixed images alone it says something
            outputs["accuracy"] = (mixed.logits.argmax(1) == label).float().mean().detach()
        return outputs

    def _logits(self, image: Tensor) -> Tensor:
        return self.backbone(image).float()  # (B, classes), in fp32 as losses of soft targets need them


@torch.no_grad()
def plain_logits(model: nn.Module, image: Tensor, *, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Logits (B, classes) in fp32 of normalised images (B, C, H, W)."""
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.autocast(image.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return model(image).float()
