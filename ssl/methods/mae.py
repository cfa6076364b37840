"""MAE: masked autoencoders (He et al. 2021, arXiv:2111.06377)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ssl.methods.base import Batch, Method
from ssl.models.backbones import is_token_model
from ssl.models.positions import sincos_2d
from ssl.models.token_maps import MAPS_FIT, find_token_map, model_label
from ssl.models.tokens import check_token_model, encode, take

DECODER = ("decoder_dim", "decoder_depth", "decoder_heads")


def patchify(image: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row: (B, C, H, W) to `(B, N, P*P*C)`, channels last within a patch."""
    rows, columns = patch_size
    batch, channels, height, width = image.shape
    x = image.reshape(batch, channels, height // rows, rows, width // columns, columns)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, H/P, W/P, P, P, C)
    return x.reshape(batch, -1, rows * columns * channels)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> Tensor:
    """Undo `patchify`: `(B, N, P*P*C)` to (B, C, H, W)."""
    (rows, columns), (grid_h, grid_w) = patch_size, grid_size
    x = patches.reshape(len(patches), grid_h, grid_w, rows, columns, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, H/P, P, W/P, P)
    return x.reshape(len(patches), -1, grid_h * rows, grid_w * columns)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Return K, the whole number of patches that a ratio leaves visible (rounded down, as in the reference)."""
    return math.floor(num_patches * (1 - mask_ratio) + 1e-6)  # 10 * (1 - 0.9) is 0.9999...


def random_mask(noise: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Split patches at random: noise (B, N) to indices of the visible (B, K) and of the masked (B, N-K) patches.

    The K patches with the smallest noise stay visible; all others are masked, which means predicted.
    """
    order = noise.argsort(dim=1, stable=True)  # stable: equal numbers must not fall differently on another device
    return order[:, :visible], order[:, visible:]


class MAE(Method):
    """Encode a random quarter of the patches, and predict the pixels of the others (He et al. 2021, section 3).

    The recipe's numbers are those of table 8. Positions are fixed 2-d sines and cosines, in the encoder held by timm's
    own `pos_embed`. With `norm_pixel_targets` a patch's target is standardised by its own mean and unbiased variance.
    Raises ValueError where backbone, image size, mask ratio and decoder do not go together.
    """

    backbone: VisionTransformer

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pixel_targets: bool = True,
        image_size: tuple[int, int],
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        encoder = check_token_model(backbone, needed_by="method=mae")
        check_settings(encoder, image_size, mask_ratio, decoder_dim, decoder_depth, decoder_heads)
        self.backbone = encoder
        self.mask_ratio = mask_ratio
        self.norm_pixel_targets = norm_pixel_targets
        self.view_size = (image_size[0], image_size[1])
        self.patch_size: tuple[int, int] = encoder.patch_embed.patch_size
        self.grid_size: tuple[int, int] = (image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1])
        self.num_noise = self.grid_size[0] * self.grid_size[1]

        layer_norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_blocks = nn.Sequential(
            *(
                Block(decoder_dim, decoder_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=layer_norm)
                for _ in range(decoder_depth)
            )
        )
        self.decoder_norm = layer_norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size[0] * self.patch_size[1] * in_chans)
        positions = sincos_2d(decoder_dim, *self.grid_size)
        self.register_buffer("decoder_pos_embed", positions[None], persistent=False)  # derived, so not stored
        self.decoder_pos_embed: Tensor
        self.initialize()

    @staticmethod
    def stand_in(
        config: Mapping[str, Any], backbone: nn.Module, image_size: tuple[int, int], in_chans: int
    ) -> tuple[dict[str, Any], str] | None:
        """SimMIM's config for a backbone that cannot drop tokens but keeps them on a map; None for one that can.

        Ratio and targets stay those of `config`. Raises ValueError where the backbone has no tokens to mask, and where
        the decoder, which SimMIM does not have, was set.
        """
        if is_token_model(backbone):
            return None
        name = model_label(backbone)
        if find_token_map(backbone, image_size=image_size, in_chans=in_chans) is None:
            raise ValueError(
                "method=mae needs a backbone that splits the image into tokens, each of one patch, got "
                f"{name}; try model=vit_b, whose masked tokens are dropped, or, whose are masked in place, {MAPS_FIT}."
            )
        defaults = inspect.signature(MAE).parameters
        decoder = [key for key in DECODER if config.get(key, defaults[key].default) != defaults[key].default]
        if decoder:
            raise ValueError(
                f"{', '.join(f'method.{key}={config[key]}' for key in decoder)} would have no effect with {name}: its "
                "tokens cannot be dropped, so method=mae masks them in place, as SimMIM does, and needs no decoder; "
                f"leave {', '.join(decoder)} out."
            )
        node = {key: value for key, value in config.items() if key not in DECODER}
        why = (
            f"method=mae is SimMIM here, without a decoder, as {name} cannot drop tokens; its own recipe: method=simmim"
        )
        return {**node, "_target_": "ssl.methods.simmim.SimMIM"}, why

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights as the reference does: Xavier-uniform layers, normal(0.02) tokens, fixed positions."""
        self.apply(_initialize_layer)
        encoder = self.backbone
        projection = encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))  # as a linear layer
        for token in (encoder.cls_token, encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        positions = encoder.pos_embed
        assert positions is not None
        positions.zero_()  # class and register tokens stand nowhere
        positions[0, -self.num_noise :] = sincos_2d(encoder.embed_dim, *self.grid_size).to(positions)
        positions.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["views"][0]
        visible, masked = random_mask(batch["noise"], num_visible(self.num_noise, self.mask_ratio))
        prediction = self.predict(image, visible, masked)  # (B, N-K, P*P*C)
        target, _, _ = self.targets(image, masked)  # (B, N-K, P*P*C)
        return {"loss": (prediction.float() - target).square().mean()}

    def predict(self, image: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked patches' targets from the visible ones, `(B, N-K, P*P*C)` in the order of `masked`."""
        encoder = self.backbone
        latent = encoder.fc_norm(
            encode(encoder, image, visible)
        )  # (B, prefix+K, D); one of norm, fc_norm is an identity
        latent = self.decoder_embed(latent)  # (B, prefix+K, decoder_dim)
        positions = self.decoder_pos_embed.expand(len(image), -1, -1)  # (B, N, decoder_dim)
        prefix = encoder.num_prefix_tokens
        # Attention has no order: with each token's position added, visible and masked need not be put back in place.
        x = torch.cat(
            [
                latent[:, :prefix],
                latent[:, prefix:] + take(positions, visible),
                self.mask_token + take(positions, masked),
            ],
            dim=1,
        )  # (B, prefix+N, decoder_dim)
        x = self.decoder_blocks(x)
        x = x[:, prefix + visible.shape[1] :]  # (B, N-K, decoder_dim)
        return self.decoder_pred(self.decoder_norm(x))

    def targets(self, image: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the masked patches' targets `(B, N-K, P*P*C)`, and the mean and deviation (B, N-K, 1) taken out."""
        pixels = take(patchify(image.float(), self.patch_size), masked)  # (B, N-K, P*P*C)
        if not self.norm_pixel_targets:
            zero = pixels.new_zeros(*pixels.shape[:2], 1)
            return pixels, zero, zero + 1
        variance, mean = torch.var_mean(pixels, dim=-1, correction=1, keepdim=True)
        deviation = (variance + 1e-6).sqrt()
        return (pixels - mean) / deviation, mean, deviation

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor, mask_ratio: float | None = None) -> dict[str, Tensor]:
        """Return pictures (B, C, H, W) on the images' normalised scale: `input`, `masked` and `reconstruction`.

        Masked patches are zero in `masked`, and predictions in `reconstruction`, put back on the true patch's scale.
        """
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        _check_ratio(self.num_noise, ratio)
        visible, masked = random_mask(noise, num_visible(self.num_noise, ratio))
        prediction = self.predict(images, visible, masked).float()  # (B, N-K, P*P*C)
        _, mean, deviation = self.targets(images, masked)
        patches = patchify(images.float(), self.patch_size)  # (B, N, P*P*C)
        index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        pictures = {
            "input": patches,
            "masked": patches.scatter(1, index, 0.0),
            "reconstruction": patches.scatter(1, index, prediction * deviation + mean),
        }
        return {name: unpatchify(picture, self.patch_size, self.grid_size) for name, picture in pictures.items()}


def _initialize_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _check_ratio(num_patches: int, mask_ratio: float) -> None:
    if not 0 < num_visible(num_patches, mask_ratio) < num_patches:
        least, most = 1 / num_patches, 1 - 1 / num_patches
        raise ValueError(
            f"method.mask_ratio={mask_ratio} leaves {num_visible(num_patches, mask_ratio)} of {num_patches} patches "
            f"visible; at least one must be visible and one masked, so give a ratio from {least:.4f} to {most:.4f}."
        )


def check_settings(
    encoder: VisionTransformer,
    image_size: tuple[int, int],
    mask_ratio: float,
    decoder_dim: int,
    decoder_depth: int,
    decoder_heads: int,
) -> None:
    """Raise ValueError, naming the setting to change, where MAE cannot be built from these values."""
    if encoder.pos_embed is None:
        raise ValueError(
            "method=mae needs position embeddings, got a backbone without; leave pos_embed out of model.args."
        )
    if encoder.attn_pool is not None:
        raise ValueError(
            "method=mae cannot train a backbone's attention pooling, which its features would pass through; "
            "set +model.args.global_pool=avg."
        )
    if tuple(encoder.patch_embed.img_size) != tuple(image_size):
        raise ValueError(
            f"The backbone is built for {encoder.patch_embed.img_size} pixels, and method=mae got {image_size}."
        )
    if encoder.embed_dim % 4:
        raise ValueError(
            f"method=mae needs a backbone whose width 4 divides, got {encoder.embed_dim}; try model=vit_b."
        )
    if decoder_dim % 4 or decoder_dim % decoder_heads:
        raise ValueError(
            f"method.decoder_dim={decoder_dim} must be divisible by 4 and by method.decoder_heads={decoder_heads}."
        )
    if decoder_depth < 1:
        raise ValueError(f"method.decoder_depth must be at least 1, got {decoder_depth}.")
    _check_ratio(encoder.patch_embed.num_patches, mask_ratio)
