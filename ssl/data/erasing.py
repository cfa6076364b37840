"""Random erasing (Zhong et al. 2017) of normalised views, with noise that is a function of a key per image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl.device_noise import normal_numbers


def erase_(views: Tensor, box: np.ndarray, key: np.ndarray, *, mode: str) -> None:
    """Overwrite the boxes of `views` (B, C, h, w) in place, one after the other.

    `box` int64 (B, K, 4) is top, left, height, width in pixels; one without area changes nothing. Each pixel's and
    channel's noise (`pixel`), or each box's and channel's (`rand`), is standard normal and a function of the image's
    `key` int64 (B,) and its place in the view; `const` writes 0, which is the mean colour of a normalised view.
    """
    _, channels, height, width = views.shape
    channel = torch.arange(channels, device=views.device)
    keys = torch.from_numpy(key).to(views.device, non_blocking=True)  # (B,)
    for number in range(box.shape[1]):
        rows = np.flatnonzero(box[:, number, 2] * box[:, number, 3])
        if not len(rows):
            continue
        image, y, x = _pixels(rows, box[rows, number], views.device)  # (T,) each
        if mode == "pixel":
            place = (channel * height + y[:, None]) * width + x[:, None]  # (T, C)
            noise = normal_numbers(keys[image, None], place)
        elif mode == "rand":
            place = channels * (height * width + number) + channel  # (C,), beyond all the places of pixels
            noise = normal_numbers(keys[:, None], place)[image]
        else:
            noise = views.new_zeros(())
        views[image, :, y, x] = noise.to(views.dtype)


def _pixels(rows: np.ndarray, box: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of every pixel in the boxes (R, 4) of the images `rows` (R,), each (T,)."""
    area = box[:, 2] * box[:, 3]
    columns = np.stack((rows, box[:, 0], box[:, 1], box[:, 3], np.cumsum(area) - area, area))
    image, top, left, width, start, count = torch.from_numpy(columns).to(device, non_blocking=True)  # (R,) each
    total = int(area.sum())
    place = torch.repeat_interleave(torch.arange(len(rows), device=device), count, output_size=total)  # (T,)
    within = torch.arange(total, device=device) - start[place]
    y = top[place] + torch.div(within, width[place], rounding_mode="floor")
    return image[place], y, left[place] + within % width[place]
