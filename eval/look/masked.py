"""What a masked image model makes of an image at a mask ratio, and how far that is better than a flat colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssl.methods.base import Method
from ssl.methods.mae import MAE, num_visible, patchify, random_mask, unpatchify
from ssl.methods.simmim import SimMIM

Size = tuple[int, int]


@dataclass(frozen=True)
class Reconstruction:
    """Pictures (B, C, H, W) on the images' normalised scale, targets that were normalised put back on it."""

    mask_ratio: float
    hidden: Tensor
    """bool (B, 1, H, W): True for the pixels that the encoder did not see."""
    image: Tensor
    pasted: Tensor
    """The prediction where pixels were hidden, the image everywhere else."""
    output: Tensor | None
    """What the decoder gives everywhere, also for the patches that were seen; None where the method does not say."""


@torch.no_grad()
def reconstruct(method: Method, image: Tensor, noise: Tensor, mask_ratio: float) -> Reconstruction:
    """Mask `mask_ratio` of images (B, C, H, W) as `noise` (B, num_noise) says, and let `method` fill them in.

    `method` is in eval mode and has `reconstruct(images, noise, mask_ratio)`, as MAE and SimMIM do.
    """
    found: dict[str, Tensor] = method.reconstruct(image, noise, mask_ratio)  # pyright: ignore[reportCallIssue]
    return Reconstruction(
        mask_ratio=mask_ratio,
        hidden=hidden_pixels(method, noise, mask_ratio, found),
        image=found["input"],
        pasted=found["reconstruction"],
        output=whole_output(method, image, noise, mask_ratio),
    )


def hidden_pixels(method: Method, noise: Tensor, mask_ratio: float, found: dict[str, Tensor] | None = None) -> Tensor:
    """True for the pixels that `noise` hides from the encoder, bool (B, 1, H, W).

    Of a method that is neither MAE nor SimMIM those in which the pictures `found` by `reconstruct` show it.
    """
    if isinstance(method, SimMIM):
        return method.on_pixels(method.mask(noise, mask_ratio))
    if isinstance(method, MAE):
        _, masked = random_mask(noise, num_visible(method.num_noise, mask_ratio))
        patches = torch.zeros_like(noise, dtype=torch.bool).scatter(1, masked, True)  # (B, N)
        rows, columns = method.patch_size
        grid = patches.view(-1, *method.grid_size)  # (B, H/P, W/P)
        return grid.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)[:, None]
    if found is None:
        raise ValueError(f"{type(method).__name__} does not say which pixels it hides")
    return (found["masked"] != found["input"]).any(1, keepdim=True)


@torch.no_grad()
def whole_output(method: Method, image: Tensor, noise: Tensor, mask_ratio: float) -> Tensor | None:
    """What the decoder gives for every patch (B, C, H, W), on the images' normalised scale; None for other methods.

    No loss was ever taken on patches that were seen, so what stands there is poorer (He et al. 2021, figure 2).
    """
    if isinstance(method, SimMIM):
        _, mean, deviation = method.targets(image)
        patches = patchify(method.predict(image, method.mask(noise, mask_ratio)).float(), method.mask_patch)
        return unpatchify(patches * deviation + mean, method.mask_patch, method.mask_grid)
    if not isinstance(method, MAE):
        return None
    visible, masked = random_mask(noise, num_visible(method.num_noise, mask_ratio))
    kept: list[Tensor] = []

    def keep(layer: nn.Module, given: Any, tokens: Tensor) -> None:
        kept.append(tokens)

    handle = method.decoder_blocks.register_forward_hook(keep)
    try:
        method.predict(image, visible, masked)
    finally:
        handle.remove()
    if not kept:
        return None  # a subclass that predicts without this decoder
    tokens = kept[0][:, method.backbone.num_prefix_tokens :]  # (B, N, decoder_dim): the visible ones, then the masked
    order = torch.cat([visible, masked], dim=1)  # (B, N)
    _, mean, deviation = method.targets(image, order)
    patches = method.decoder_pred(method.decoder_norm(tokens)).float() * deviation + mean  # (B, N, P*P*C)
    placed = torch.empty_like(patches).scatter(1, order.unsqueeze(-1).expand_as(patches), patches)
    return unpatchify(placed, method.patch_size, method.grid_size)


def errors(method: Method, found: Reconstruction, std: list[float]) -> dict[str, Tensor]:
    """Mean squared error over the hidden pixels and channels of each image, (B,), in units of 0..1.

    `model` is that of the reconstruction. `mean_colour` is that of the mean colour of the visible pixels, which anyone
    could guess. `patch_mean`, where the targets were normalised patch by patch, is that of each patch's own mean: the
    reconstruction is given the mean and the deviation of every hidden patch, and has to be better than this to know
    anything that it was not told.
    """
    scale = found.image.new_tensor(std).view(-1, 1, 1)
    hidden = found.hidden.expand_as(found.image)  # (B, C, H, W)

    def error(picture: Tensor) -> Tensor:
        difference = torch.where(hidden, (picture - found.image) * scale, 0.0).square().double()
        return difference.sum((1, 2, 3)) / hidden.sum((1, 2, 3))

    seen = torch.where(hidden, 0.0, found.image).sum((2, 3)) / (~hidden).sum((2, 3))  # (B, C)
    values = {"model": error(found.pasted), "mean_colour": error(seen[:, :, None, None].expand_as(found.image))}
    size = patch_size(method)
    if getattr(method, "norm_pixel_targets", False) and size is not None:
        values["patch_mean"] = error(flat_patches(found.image, size))
    return values


def flat_patches(image: Tensor, size: Size) -> Tensor:
    """Images (B, C, H, W) whose patches are each the mean over their pixels and channels: a normalised target of 0."""
    patches = patchify(image, size)
    grid = (image.shape[2] // size[0], image.shape[3] // size[1])
    return unpatchify(patches.mean(-1, keepdim=True).expand_as(patches), size, grid)


def patch_size(method: Any) -> Size | None:
    """Height and width of what is masked at once; None for methods that do not say."""
    return method.mask_patch if isinstance(method, SimMIM) else method.patch_size if isinstance(method, MAE) else None


def usual_ratios(method: Method) -> list[float]:
    """0.5, 0.75, 0.9 and the method's own, as far as they leave a patch visible and a patch hidden."""
    ratios = {0.5, 0.75, 0.9, float(getattr(method, "mask_ratio", 0.75))}
    return [ratio for ratio in sorted(ratios) if 0 < num_visible(method.num_noise, ratio) < method.num_noise]
