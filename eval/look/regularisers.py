"""What keeps an image that is made by gradient ascent from becoming noise: the regularisers of cs231n's notes.

From Simonyan et al. 2013 (arXiv:1312.6034, section 2: the L2 norm), Yosinski et al. 2015 (arXiv:1506.06579, section 3:
decay, blur, clipping by norm and by contribution), Mordvintsev et al. 2015 (jitter) and Mahendran and Vedaldi 2014
(arXiv:1412.0035, section 2.1: total variation and the alpha-norm). All take images (B, C, H, W) with 0 at the mean
colour, and treat each image alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur


def l2_decay(image: Tensor, rate: float) -> Tensor:
    """The image without that share of it: a step down the gradient of its squared norm."""
    return image * (1 - rate)


def blur(image: Tensor, sigma: float) -> Tensor:
    """The image behind a Gaussian of standard deviation `sigma` pixels."""
    reach = min(max(math.ceil(3 * sigma), 1), min(image.shape[2:]) - 1)
    return gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])


def clip_small_norms(image: Tensor, share: float) -> Tensor:
    """The image with the mean colour in that share of its pixels: those whose values have the least norm."""
    return _without_least(image, torch.linalg.vector_norm(image, dim=1), share)


def clip_small_contributions(image: Tensor, gradient: Tensor, share: float) -> Tensor:
    """The image with the mean colour in that share of its pixels: those that contribute least to the activation.

    Setting a pixel to 0 changes the activation, to first order, by the sum over its channels of value times gradient.
    """
    return _without_least(image, (image * gradient).sum(1).abs(), share)


def jitter(image: Tensor, shift: tuple[int, int]) -> Tensor:
    """The image moved by (rows, columns), what leaves it on one side coming back on the other."""
    return image.roll(shift, dims=(2, 3))


def total_variation(image: Tensor, *, beta: float = 2.0) -> Tensor:
    """The mean over pixels of (squared differences to the right and downwards) to the power of beta / 2, (B,).

    Differences beyond the border are 0.
    """
    down = torch.diff(image, dim=2, append=image[:, :, -1:])  # (B, C, H, W)
    right = torch.diff(image, dim=3, append=image[:, :, :, -1:])
    squares = down.square() + right.square()
    return (squares if beta == 2 else (squares + 1e-12) ** (beta / 2)).sum(1).mean((1, 2))


def alpha_norm(image: Tensor, *, alpha: float = 6.0) -> Tensor:
    """The mean over pixels of the sum over channels of |value| to the power of alpha, (B,)."""
    return image.abs().pow(alpha).sum(1).mean((1, 2))


def clip_to_range(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images whose pixels are ones that an image can have, 0 to 1."""
    shift = torch.tensor(mean, dtype=image.dtype, device=image.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=image.dtype, device=image.device).view(-1, 1, 1)
    return image.clamp(-shift / scale, (1 - shift) / scale)


def _without_least(image: Tensor, value: Tensor, share: float) -> Tensor:
    """The image with 0 in the pixels of least `value` (B, H, W)."""
    count = round(share * math.prod(value.shape[1:]))
    least = value.flatten(1).argsort(dim=1, stable=True)[:, :count]  # (B, count)
    keep = torch.ones_like(value).flatten(1).scatter_(1, least, 0.0)
    return image * keep.view(len(image), 1, *image.shape[2:])
