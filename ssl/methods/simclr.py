"""SimCLR: two views of an image attract each other, views of other images repel.

Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations (arXiv:2002.05709).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl.methods.base import Batch, Method
from ssl.methods.nt_xent import normalise, nt_xent_and_top1
from ssl.models.backbones import feature_dim, pooled_features
from ssl.models.heads import Projector


class SimCLR(Method):
    """A backbone, a projector, and NT-Xent over both views of all images of all ranks.

    `one_forward` sends both views through the network together, so that BatchNorm's statistics are those of 2B images,
    as in google-research/simclr; False sends them one after the other, each with statistics of its own, as lightly and
    solo-learn do. Without BatchNorm both give the same.
    """

    couples_images = True

    def __init__(
        self,
        backbone: nn.Module,
        *,
        temperature: float,
        projection_dim: int = 128,
        projection_hidden_dim: int | None = None,
        projection_depth: int = 2,
        one_forward: bool = True,
        image_size: tuple[int, int],
        in_chans: int = 3,
    ) -> None:
        """Build the projector for the backbone, its hidden layers as wide as the features where no width is given."""
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f"method.temperature must be positive, got {temperature}; published recipes use 0.1 to 0.5"
            )
        self.backbone = backbone
        self.projector = Projector(
            feature_dim(backbone, image_size=image_size, in_chans=in_chans),
            out_dim=projection_dim,
            hidden_dim=projection_hidden_dim,
            depth=projection_depth,
        )
        self.temperature = temperature
        self.one_forward = one_forward
        self.view_size = image_size

    def forward(self, batch: Batch, embed_only: bool = False) -> dict[str, Tensor] | Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what `contrast` returns, or with `embed_only` the embeddings (B, V=2, Z) that it takes."""
        views = batch["views"]
        if len(views) != 2:
            raise ValueError(f"method=simclr needs two views of each image, got {len(views)}; try augment=simclr")
        if self.one_forward:
            embeddings = torch.stack(self._embed(torch.cat(views)).chunk(2), 1)  # (B, 2, Z)
        else:
            embeddings = torch.stack([self._embed(view) for view in views], 1)  # (B, 2, Z)
        return embeddings if embed_only else self.contrast(embeddings)

    def contrast(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Return `loss`, and two signs of what was learned, from embeddings (B, V=2, Z) that are not normalised.

        `contrastive_top1` is the share of views that are nearest to their image's other view. `embedding_std` is the
        standard deviation over this rank's normalised embeddings, averaged over their dimensions: 1 / sqrt(Z) where
        they are spread over the whole sphere, 0 where they have collapsed to one point.
        """
        loss, top1 = nt_xent_and_top1(embeddings, temperature=self.temperature)
        spread = normalise(embeddings.detach()).flatten(0, 1).std(0, correction=0).mean()
        return {"loss": loss, "contrastive_top1": top1, "embedding_std": spread}

    def _embed(self, image: Tensor) -> Tensor:
        return self.projector(pooled_features(self.backbone, image))  # (B, Z)
