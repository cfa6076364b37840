"""Manifold mixup and PatchUp: images are mixed behind a random layer of the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.mixing import BetaShare, Classify, Mixed, Mixing, box_mask, box_share, cut_box, mix
from ssl.device_noise import key_of, uniform_numbers
from ssl.models.hidden import HiddenLayer, replaced_output

KINDS = ("hard", "soft")


class _HiddenMixing(Mixing):
    """Chooses a layer per batch: 0 is the image itself, k the output of the backbone's k-th hidden layer."""

    def __init__(
        self, *, num_classes: int, layers: Sequence[int], probability: float, smoothing: float, multi_label: bool
    ) -> None:
        super().__init__(num_classes=num_classes, smoothing=smoothing, multi_label=multi_label)
        self.layers = sorted({int(layer) for layer in layers})
        if not self.layers or self.layers[0] < 0:
            raise ValueError(f"layers must name one or more of 0 (the image), 1, 2, ... (layers); got {list(layers)}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must lie above 0 and at most at 1, got {probability}")
        self.probability = probability

    def check(self, layers: Sequence[HiddenLayer]) -> None:
        """Refuse layers that the backbone does not have."""
        if self.layers[-1] > len(layers):
            raise ValueError(f"layers={self.layers} are more than the backbone's {len(layers)}; 0 is the image")

    def choose(self, noise: Tensor) -> int | None:
        """The batch's layer, None where it is not to be mixed; reading it back waits for a GPU once per step."""
        applied, place = noise[0, :2].tolist()
        return self.layers[int(place * len(self.layers))] if applied < self.probability else None


class ManifoldMixup(_HiddenMixing):
    """Mixup behind a random layer (Verma et al. 2018, algorithm in section 2).

    alpha: of the Beta distribution of the share, one for the batch; layers: the eligible ones. Raises ValueError.
    """

    num_noise = 3  # mixed at all, layer, share

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float = 2.0,
        layers: Sequence[int] = (0, 1, 2),
        probability: float = 1.0,
        smoothing: float = 0.0,
        multi_label: bool = False,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            layers=layers,
            probability=probability,
            smoothing=smoothing,
            multi_label=multi_label,
        )
        self.share = BetaShare(alpha)

    def forward(
        self,
        classify: Classify,
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        model: nn.Module | None = None,
        layers: Sequence[HiddenLayer] = (),
        std: Sequence[float] = (),
    ) -> Mixed:
        """As Mixing's; `layers` are needed."""
        self.check(layers)
        layer = self.choose(noise)
        if layer is None:
            return super().forward(classify, images, labels, noise)
        own = self.share(noise[:1, 2].to(images.device))  # (1,)
        targets = mix(self.soft_targets(labels), own.to(torch.float32))
        if layer == 0:
            logits = classify(mix(images, own.to(images.dtype)))
        else:
            with replaced_output(layers[layer - 1].module, lambda hidden: mix(hidden, own.to(hidden.dtype))):
                logits = classify(images)
        return Mixed(self.loss(logits, targets), logits, targets)


class PatchUp(_HiddenMixing):
    """Blocks of a hidden layer are exchanged, `hard`, or mixed, `soft` (Faramarzi et al. 2020, equations 2 to 7).

    gamma: about the share of features that change; block_size: side of a block, odd, cut to the layer's size; alpha: of
    the Beta distribution of soft's share. One mask holds for the whole batch, its channels independent; tokens are laid
    out as the grid that they come from, and class and register tokens stay. On the image itself (layer 0) it is CutMix.
    The loss is the sum of the paper's two terms, so about twice that of other ways. Raises ValueError.
    """

    num_noise = 7  # mixed at all, layer, share, two for the mask, box's centre down and across

    def __init__(
        self,
        *,
        num_classes: int,
        kind: str = "hard",
        gamma: float = 0.5,
        block_size: int = 7,
        alpha: float = 2.0,
        layers: Sequence[int] = (0, 1, 2),
        probability: float = 0.7,
        smoothing: float = 0.0,
        multi_label: bool = False,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            layers=layers,
            probability=probability,
            smoothing=smoothing,
            multi_label=multi_label,
        )
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not known; choose one of {', '.join(KINDS)}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie above 0 and at most at 1, got {gamma}")
        if block_size < 1 or block_size % 2 == 0:
            raise ValueError(f"block_size must be odd, 1 or more, got {block_size}")
        self.kind = kind
        self.gamma = gamma
        self.block_size = block_size
        self.share = BetaShare(alpha)
        self.cut_share = BetaShare(1.0)

    def forward(
        self,
        classify: Classify,
        images: Tensor,
        labels: Tensor,
        noise: Tensor,
        *,
        model: nn.Module | None = None,
        layers: Sequence[HiddenLayer] = (),
        std: Sequence[float] = (),
    ) -> Mixed:
        """As Mixing's; `layers` are needed."""
        self.check(layers)
        layer = self.choose(noise)
        if layer is None:
            return super().forward(classify, images, labels, noise)
        first = noise[:1].to(images.device)  # (1, 7)
        own = self.soft_targets(labels)  # (B, C)
        other = own.flip(0)
        if layer == 0:
            size = (images.shape[2], images.shape[3])
            box = cut_box(self.cut_share(first[:, 2]), first[:, 5:7].to(torch.float64), size)
            unchanged = box_share(box, size).to(torch.float32)  # (1,)
            logits = classify(torch.where(box_mask(box, size), images.flip(0), images))
        else:
            share = self.share(first[:, 2]).to(torch.float32) if self.kind == "soft" else None  # (1,)
            logits, unchanged = self._classify(classify, images, layers[layer - 1], key_of(first[0, 3:5]), share)
            if share is not None:
                other = mix(own, share)
        targets = unchanged * own + (1 - unchanged) * other  # W of the paper
        apart = unchanged * self.loss(logits, own) + (1 - unchanged) * self.loss(logits, other)
        return Mixed((apart + self.loss(logits, targets)).squeeze(), logits, targets)

    def _classify(
        self, classify: Classify, images: Tensor, layer: HiddenLayer, key: Tensor, share: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The logits, and the share of the layer's features that stayed."""
        kept: list[Tensor] = []

        def change(hidden: Tensor) -> Tensor:
            grid = layer.to_grid(hidden, images)  # (B, C, h, w)
            place = torch.arange(grid[0].numel(), device=hidden.device).view(grid.shape[1:])
            mask = keep_mask(uniform_numbers(key, place), gamma=self.gamma, block_size=self.block_size)
            kept.append(mask.mean()[None])
            return layer.from_grid(patch_up(grid, mask, share=share), hidden)

        with replaced_output(layer.module, change):
            logits = classify(images)
        return logits, kept[0]


def keep_mask(uniform: Tensor, *, gamma: float, block_size: int) -> Tensor:
    """PatchUp's mask (C, h, w), 0 in the blocks that change, from `uniform` numbers (C, h, w).

    A feature is a block's centre with DropBlock's probability, so that about `gamma` of all would change if none
    reached beyond an edge or overlapped. A block larger than the layer is cut to its largest odd side.
    """
    height, width = uniform.shape[1:]
    side = min(block_size, (min(height, width) - 1) // 2 * 2 + 1)
    chance = gamma * height * width / (side**2 * (height - side + 1) * (width - side + 1))
    centre = (uniform < chance).to(torch.float32)
    return 1 - functional.max_pool2d(centre[None], side, stride=1, padding=side // 2)[0]


def patch_up(hidden: Tensor, mask: Tensor, *, share: Tensor | None) -> Tensor:
    """`hidden` (B, C, h, w) where `mask` (C, h, w) is 1; elsewhere that of image B-1-i, or a mixture with it.

    `share` (1,) is what the mixture has of the image's own; None exchanges.
    """
    other = hidden.flip(0) if share is None else mix(hidden, share.to(hidden.dtype))
    return torch.where(mask.bool(), hidden, other)
