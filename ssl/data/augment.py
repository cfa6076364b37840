"""Flip, colour, blur, normalisation and erasing of uint8 crops, each image by its own parameters, on any device.

Each operation equals torchvision's of the same name on float images in 0..1, clamping included. The work stays in
float32 from the uint8 crop to the normalised view, without torchvision's rounding to uint8 after each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl.data.erasing import erase_
from ssl.data.recycled import Recycled
from ssl.data.views import JITTER_OPERATIONS, View

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale
_CACHED_PIXELS = 2**17
"""Pixels worked on at once on a CPU, so that all the passes over them stay in its cache."""
_DEVICE_PIXELS = 2**25
"""Pixels worked on at once elsewhere: few launches, and intermediate results of at most about 2 GB."""


class Augment(nn.Module):
    """Turns uint8 crops and their parameters into float views, normalised by `mean` and `std` (C,) in units of 0..1.

    Raises ValueError where a view has operations that need red, green and blue, and the data has not three channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, views: Sequence[View], *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = list(mean), list(std)
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(f"mean and std need one number per channel, std above 0, got mean={mean} std={std}")
        for number, view in enumerate(views):
            coloured = [name for name in ("saturation", "hue", "grayscale") if getattr(view, name)]
            if coloured and len(mean) != 3:
                raise ValueError(
                    f"view {number} of the recipe has {', '.join(coloured)}, which need 3 channels, but mean={mean} "
                    f"says that the data has {len(mean)}; set them to 0 or take another augment="
                )
        self.views = list(views)
        self._recycled = Recycled()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with `views`, a list of float32 (B, C, h, w), in place of `crops` and `parameters`.

        `crops` are uint8 (B, C, h, w), one per view, on this module's device. `parameters` are what View.sample
        returned, as tensors (B, ...); they are best left on the CPU, where they decide what runs: reading them back
        from a GPU waits for it.
        """
        crops, parameters = batch["crops"], batch["parameters"]
        if not len(crops) == len(parameters) == len(self.views):
            raise ValueError(
                f"{len(self.views)} views need as many crops and parameters: {len(crops)}, {len(parameters)}"
            )
        result = {key: value for key, value in batch.items() if key not in ("crops", "parameters")}
        result["views"] = [
            self.make_view(view, crop, {name: torch.as_tensor(values).cpu().numpy() for name, values in given.items()})
            for view, crop, given in zip(self.views, crops, parameters, strict=True)
        ]
        return result

    @torch.no_grad()
    def make_view(self, view: View, crops: Tensor, parameters: Mapping[str, np.ndarray]) -> Tensor:
        """One view, float32 (B, C, h, w) and normalised, of uint8 `crops` (B, C, h, w) and its parameters."""
        if crops.shape[1] != len(self.mean):
            raise ValueError(f"crops have {crops.shape[1]} channels, but mean and std have {len(self.mean)}")
        kernel_size = view.blur_kernel_size((crops.shape[2], crops.shape[3])) if view.blur else 0
        if crops.device.type == "cpu":
            result = self._recycled.empty(crops.shape, torch.float32)
        else:
            result = torch.empty(crops.shape, device=crops.device)
        for rows in _chunks(parameters, crops):
            chunk = {name: values[rows] for name, values in parameters.items()}
            images = _take(result, rows) if _is_range(rows) else torch.empty_like(result[: len(rows)])
            _photometric(view, _take(crops, rows), images, chunk, kernel_size)
            images.mul_(1 / (white_level(view) * self.std)).sub_(self.mean / self.std)
            if view.erase:
                erase_(images, chunk["erase_box"], chunk["erase_key"], mode=view.erase_mode)
            if not _is_range(rows):  # else they lie in the result already
                _put(result, rows, images)
        return result


def _photometric(
    view: View, crops: Tensor, images: Tensor, parameters: Mapping[str, np.ndarray], kernel_size: int
) -> None:
    """Write the uint8 `crops` into `images`: flip, jitter, grayscale, blur, solarise, in this order."""
    images.copy_(with_flips(crops, parameters["flip"]))
    if white_level(view) == 1:
        images.div_(255)
    if view.jitter:
        for slot in range(len(JITTER_OPERATIONS)):
            kinds = np.where(parameters["jitter"], parameters["jitter_order"][:, slot], -1)  # (B,)
            for kind in sorted(set(kinds.tolist()) - {-1}):
                name = JITTER_OPERATIONS[kind]
                if name in parameters:
                    _change(images, kinds == kind, _ADJUST[name], parameters[name])
    if view.grayscale:
        _change(images, parameters["grayscale"], grayscale_)
    if view.blur:
        weights = gaussian_weights(parameters["blur_sigma"], kernel_size)
        _change(images, parameters["blur"], blur_, weights)
    if view.solarize:
        _change(
            images, parameters["solarize"], solarize_, np.full(len(images), view.solarize_threshold / 255, np.float32)
        )


def adjust_brightness_(images: Tensor, factor: Tensor) -> None:
    """Scale by `factor` (B, 1), in place."""
    images.mul_(_per_image(factor)).clamp_(0, 1)


def adjust_contrast_(images: Tensor, factor: Tensor) -> None:
    """Move away from the image's mean grey by `factor` (B, 1), in place. Without three channels grey is their mean."""
    mean = images.mean((2, 3))  # (B, C)
    if images.shape[1] == 3:
        grey = sum(weight * mean[:, channel] for channel, weight in enumerate(_LUMA))
    else:
        grey = mean.mean(1)
    images.mul_(_per_image(factor)).add_(_per_image((1 - factor[:, 0]) * grey)).clamp_(0, 1)


def adjust_saturation_(images: Tensor, factor: Tensor) -> None:
    """Move away from each pixel's grey by `factor` (B, 1), in place."""
    grey = _grey(images).mul_(_per_image(1 - factor))  # (B, 1, h, w)
    images.mul_(_per_image(factor)).add_(grey).clamp_(0, 1)


def adjust_hue_(images: Tensor, factor: Tensor) -> None:
    """Turn the hue of HSV by `factor` (B, 1), a share of the colour circle in -0.5..0.5, in place.

    No case distinction by the largest channel is needed. With each channel scaled to 0..1 between the pixel's smallest
    and largest, the hue's distance from red, in sixths of the circle, is green + blue - red + 1, on the side of the
    larger of green and blue; back, a channel is a trapezium of the distance from its own place on the circle.
    """
    red, green, blue = images.unbind(1)  # (B, h, w) each
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    hue = (green + blue).sub_(red).add_(largest).sub_(smallest, alpha=2)
    hue.div_(chroma.clamp_min(1e-9)).copysign_(green - blue)  # -3..3; 0 for grey, where chroma is 0
    hue = torch.add(_per_image(1 + factor)[:, 0], hue, alpha=1 / 6).frac_().mul_(6)  # turned, in 0..6
    away = torch.sub(hue, 3).abs_().sub_(1).clamp_(0, 1)
    torch.addcmul(smallest, chroma, away, out=red)
    for place, channel in ((2, green), (4, blue)):
        torch.sub(hue, place, out=away).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(largest, chroma, away, value=-1, out=channel)


_ADJUST: dict[str, Callable[..., None]] = {
    "brightness": adjust_brightness_,
    "contrast": adjust_contrast_,
    "saturation": adjust_saturation_,
    "hue": adjust_hue_,
}


def grayscale_(images: Tensor) -> None:
    """Put each pixel's grey in all three channels, in place."""
    images.copy_(_grey(images))


def white_level(view: View) -> int:
    """What white is before `view` is normalised: 1, or 255 where no operation comes before that needs 0..1."""
    return 1 if view.jitter or view.grayscale or view.blur or view.solarize else 255


def with_flips(crops: Tensor, flip: np.ndarray) -> Tensor:
    """The uint8 `crops` with left and right swapped where `flip` (B,)."""
    rows = np.flatnonzero(flip)
    if not len(rows):
        return crops
    part = _take(crops, rows).flip(-1)
    if len(rows) == len(crops):
        return part
    whole = crops.clone()
    _put(whole, rows, part)
    return whole


def solarize_(images: Tensor, threshold: Tensor) -> None:
    """Invert what is at or above `threshold` (B, 1), in place."""
    images.copy_(torch.where(images >= _per_image(threshold), 1 - images, images))


def gaussian_weights(sigma: np.ndarray, kernel_size: int) -> np.ndarray:
    """A normalised Gaussian per image, float32 (B, kernel_size); `sigma` (B,) in pixels."""
    place = np.arange(kernel_size) - kernel_size // 2
    weights = np.exp(-0.5 * (place / np.asarray(sigma, np.float64)[:, None]) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def blur_(images: Tensor, weights: Tensor) -> None:
    """Blur by a symmetric kernel per image, `weights` (B, K), along both sides with reflected borders, in place."""
    images.copy_((_blur_by_slices if images.device.type == "cpu" else _blur_by_convolution)(images, weights))


def _blur_by_convolution(images: Tensor, weights: Tensor) -> Tensor:
    """Two grouped convolutions, one group per image and channel: on a GPU few launches, and no TF32 in its kernel."""
    batch, channels, height, width = images.shape
    radius = weights.shape[1] // 2
    kernel = weights.repeat_interleave(channels, dim=0)[:, None, :, None]  # (B C, 1, K, 1)
    with torch.autocast(images.device.type, enabled=False):
        images = functional.pad(images, (0, 0, radius, radius), mode="reflect")
        images = images.reshape(1, batch * channels, height + 2 * radius, width)
        images = functional.conv2d(images, kernel, groups=batch * channels)
        images = functional.pad(images, (radius, radius, 0, 0), mode="reflect")
        images = functional.conv2d(images, kernel.transpose(2, 3), groups=batch * channels)
    return images.view(batch, channels, height, width)


def _blur_by_slices(images: Tensor, weights: Tensor) -> Tensor:
    """Sums of shifted slices, two at a time as the kernel is symmetric: 1.5 to 2.5 times grouped convolution on a CPU.

    Each image's slices of less weight than half a rounding error of 1 are left out.
    """
    radius = weights.shape[1] // 2
    reaches = (weights[:, :radius] >= 2**-26).sum(1).clamp_min(1)  # (B,)
    result = torch.empty_like(images)
    for reach in reaches.unique().tolist():
        rows = (reaches == reach).nonzero()[:, 0]
        result.index_copy_(0, rows, _blur_within(images.index_select(0, rows), weights[rows], reach))
    return result


def _blur_within(images: Tensor, weights: Tensor, reach: int) -> Tensor:
    """The blur by the middle 2 `reach` + 1 of the `weights` (B, K)."""
    radius = weights.shape[1] // 2
    weights = weights.T[:, :, None, None, None]  # (K, B, 1, 1, 1)
    pair = torch.empty_like(images)
    for side, padding in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        length = images.shape[side]
        padded = functional.pad(images, padding, mode="reflect")
        images = padded.narrow(side, reach, length) * weights[radius]
        for step in range(1, reach + 1):
            before, after = padded.narrow(side, reach - step, length), padded.narrow(side, reach + step, length)
            images.addcmul_(torch.add(before, after, out=pair), weights[radius - step])
    return images


def denormalize(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A normalised view (..., C, h, w) as a picture in 0..1."""
    return (view * view.new_tensor(list(std)).view(-1, 1, 1) + view.new_tensor(list(mean)).view(-1, 1, 1)).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    """(B,) or (B, 1) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return red.mul(_LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]  # (B, 1, h, w)


def _chunks(parameters: Mapping[str, np.ndarray], crops: Tensor) -> Iterator[np.ndarray]:
    """The batch's rows in parts that are worked on at once, images of one jitter order beside each other."""
    if "jitter" in parameters:
        order = parameters["jitter_order"] @ (64, 16, 4, 1)
        rows = np.argsort(np.where(parameters["jitter"], order, -1), kind="stable")
    else:
        rows = np.arange(len(crops))
    pixels = _CACHED_PIXELS if crops.device.type == "cpu" else _DEVICE_PIXELS
    most = max(1, pixels // (crops.shape[2] * crops.shape[3]))
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


def _change(images: Tensor, chosen: np.ndarray, operation: Callable[..., None], *values: np.ndarray) -> None:
    """Apply an in-place operation to the `chosen` (B,) images, given their rows of `values` (B, ...)."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return
    factors = [
        torch.from_numpy(value[rows].reshape(len(rows), -1)).to(images.device, torch.float32, non_blocking=True)
        for value in values
    ]
    part = _take(images, rows)
    operation(part, *factors)
    if not _is_range(rows):
        _put(images, rows, part)


def _take(images: Tensor, rows: np.ndarray) -> Tensor:
    """The rows as a view where they are a range, else as a copy."""
    if _is_range(rows):
        return images[rows[0] : rows[-1] + 1]
    return images.index_select(0, torch.from_numpy(rows).to(images.device, non_blocking=True))


def _put(images: Tensor, rows: np.ndarray, part: Tensor) -> None:
    if _is_range(rows):
        images[rows[0] : rows[-1] + 1] = part
    elif images.device.type == "cpu":
        images.numpy()[rows] = part.numpy()  # a fifth of the time of index_copy_
    else:
        images.index_copy_(0, torch.from_numpy(rows).to(images.device, non_blocking=True), part)


def _is_range(rows: np.ndarray) -> bool:
    return rows[-1] - rows[0] == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all())
