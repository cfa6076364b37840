"""Linear heads on a frozen backbone as a Method: images go through it as they are augmented, and every head learns from
the same features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.head_file import fold
from eval.heads import Standardizer
from eval.layers import FeatureSet, make_extract
from ssl.methods.base import Batch, Method


class ProbeHeads(Method):
    """One head, or one for each of `rates`, on each of `sets` of a backbone's features.

    A head is a linear layer, with `batchnorm` behind a BatchNorm without affine (He et al. 2021, appendix A.1). The
    losses are summed, so no head's gradient depends on another, and each learns at its own rate. Heads on features of
    equal size begin with equal weights. The backbone stays in eval mode, without gradients, and takes `batch_size`
    images at once; heads and their statistics are fp32. Raises ValueError for a batch size below 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sets: Sequence[FeatureSet],
        image_size: tuple[int, int],
        in_chans: int,
        num_classes: int,
        rates: Sequence[float] = (),
        batchnorm: bool = False,
        batchnorm_eps: float = 1e-5,
        init_std: float = 0.0,
        batch_size: int = 256,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image, got {batch_size}")
        self.backbone = backbone.requires_grad_(False)
        self.view_size = image_size
        self.sets = list(sets)
        self.rates = list(rates) or [1.0]
        self.batch_size = batch_size
        self.extract = make_extract(backbone, self.sets, device=device, dtype=dtype)
        with torch.no_grad():
            found = self.extract(torch.zeros(1, in_chans, *image_size, device=device))
        self.dimensions = [each.shape[1] for each in found]
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(dim, affine=False, eps=batchnorm_eps) if batchnorm else nn.Identity()
            for dim in self.dimensions
        )
        self.heads = nn.ModuleList(
            _linear(dim, num_classes, init_std, seed) for dim in self.dimensions for _ in self.rates
        )
        names = [f"heads.{number}." for number in range(len(self.heads))]
        self.lr_scales = {name: rate for name, rate in zip(names, self.rates * len(self.sets)) if rate != 1.0}

    def train(self, mode: bool = True) -> ProbeHeads:
        """Training mode of the heads; the backbone stays as it is."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The sum of all heads' losses, and the accuracy of the best of them on this batch."""
        label = batch["label"]
        features = self.features(batch["views"][0])
        with torch.autocast(label.device.type, enabled=False):
            logits = [logits for number, each in enumerate(features) for logits in self.logits(number, each)]
            losses = torch.stack([functional.cross_entropy(each, label) for each in logits])  # (H,)
        hits = torch.stack([(each.detach().argmax(1) == label).float().mean() for each in logits])  # (H,)
        return {"loss": losses.sum(), "accuracy": hits.max()}

    @torch.no_grad()
    def features(self, image: Tensor) -> list[Tensor]:
        """Normalised images (B, C, H, W) to the features of each set, (B, D_i) float32."""
        pieces = [self.extract(piece) for piece in image.split(self.batch_size)]
        return [torch.cat(each) for each in zip(*pieces)]

    def logits(self, number: int, features: Tensor) -> list[Tensor]:
        """Features (B, D) of the set of this number to the logits (B, classes) of each of its heads."""
        x = self.norms[number](features)  # (B, D)
        start = number * len(self.rates)
        return [head(x) for head in self.heads[start : start + len(self.rates)]]

    @torch.no_grad()
    def folded(self, head: int) -> tuple[Tensor, Tensor]:
        """Weight (classes, D) and bias (classes,) on raw features, on the CPU: the BatchNorm's statistics folded in."""
        linear, norm = self.heads[head], self.norms[head // len(self.rates)]
        assert isinstance(linear, nn.Linear)
        weight, bias = linear.weight.detach().cpu(), linear.bias.detach().cpu()
        if isinstance(norm, nn.Identity):
            return weight.clone(), bias.clone()
        mean, var = norm.running_mean.cpu(), norm.running_var.cpu()  # pyright: ignore
        return fold(weight, bias, Standardizer(mean, (var.double() + norm.eps).rsqrt()))  # pyright: ignore


def _linear(dim: int, num_classes: int, init_std: float, seed: int) -> nn.Linear:
    """A linear layer with normal weights and biases of 0, the same for the same arguments."""
    layer = nn.Linear(dim, num_classes)
    with torch.no_grad():
        layer.weight.normal_(std=init_std, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer
