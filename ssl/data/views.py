"""A view's recipe, and its parameters for a batch of images as numbers, before any pixel is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ssl.data.policies import Policy, parse_policy
from ssl.randomness import uniforms_by_use

CROPS = ("random_resized", "random", "center", "resize")
INTERPOLATIONS = ("bicubic", "bilinear")
JITTER_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""The operations that a number in `jitter_order` stands for, in torchvision's numbering."""
PROBABILITIES = ("flip", "jitter", "grayscale", "blur", "solarize", "erase")
"""The parts of a view that an image has or has not, in the order in which they are done."""
ERASE_MODES = ("const", "rand", "pixel")
_CROP_TRIES = 10
_ERASE_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class View:
    """One view's recipe. What is left at its default is not done.

    crop: `random_resized` (torchvision's rule: a share `scale` of the area and an aspect `ratio`, ten tries, then a
    central box), `random` (a box of `fraction` of each side, anywhere), `center` (the largest central box of the
    view's shape, times `fraction`; an image that already has the view's size is taken whole) or `resize` (all of it,
    squashed). flip, jitter, grayscale, blur, solarize: probabilities, in the order in which they are done.
    brightness, contrast, saturation, hue: torchvision's ColorJitter strengths. blur_sigma: pixels of the view;
    blur_kernel: share of the view's shorter side. solarize_threshold: 0..255. policy: RandAugment or AutoAugment in
    timm's words, such as `rand-m9-mstd0.5-inc1` (`parse_policy` tells them all), done right after the flip. erase: the
    probability with which boxes of the normalised view are overwritten (Zhong et al. 2017): 1 to erase_count of them,
    each with a share `erase_area` of the view, divided by their number, and an aspect `erase_ratio`, height by width;
    erase_mode: with zeros (`const`), one normal colour per box (`rand`), or a normal number per pixel and channel.
    Raises ValueError for values that are out of range or that have no effect.
    """

    crop: str = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    fraction: float = 1.0
    interpolation: str = "bicubic"
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: float = 0.1
    solarize: float = 0.0
    solarize_threshold: float = 128.0
    policy: str | None = None
    erase: float = 0.0
    erase_mode: str = "pixel"
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_ratio: tuple[float, float] = (0.3, 1 / 0.3)
    erase_count: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, _pair(field.name, value))
            elif isinstance(field.default, float):
                _check(_is_number(value), f"{field.name} must be a number, got {value!r}")
        _check(self.crop in CROPS, f"crop={self.crop!r} is not known; choose one of {', '.join(CROPS)}")
        _check(
            self.interpolation in INTERPOLATIONS,
            f"interpolation={self.interpolation!r} is not known; choose one of {', '.join(INTERPOLATIONS)}",
        )
        for name in PROBABILITIES:
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} is a probability and must lie in 0..1, got {value}")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            _check(value >= 0, f"{name} is a strength and must be at least 0, got {value}")
        _check(0 <= self.hue <= 0.5, f"hue is a share of the colour circle and must lie in 0..0.5, got {self.hue}")
        _check(0 < self.scale[1] <= 1, f"scale is a share of the image's area and must lie in 0..1, got {self.scale}")
        _check(self.ratio[0] > 0, f"ratio is width by height and must be above 0, got {self.ratio}")
        _check(0 < self.fraction <= 1, f"fraction is a share of the image's side and must lie in 0..1: {self.fraction}")
        _check(self.blur_sigma[0] > 0, f"blur_sigma is in pixels and must be above 0, got {self.blur_sigma}")
        _check(0 < self.blur_kernel <= 1, f"blur_kernel is a share of the view's side in 0..1, got {self.blur_kernel}")
        _check(0 <= self.solarize_threshold <= 255, f"solarize_threshold must lie in 0..255: {self.solarize_threshold}")
        if self.policy is not None:
            _check(isinstance(self.policy, str), f"policy must be text such as rand-m9-mstd0.5-inc1: {self.policy!r}")
            parse_policy(self.policy)
        self._check_erase()
        if self.fraction != 1 and self.crop not in ("random", "center"):
            raise ValueError(f"fraction={self.fraction} has no effect with crop={self.crop}; set crop=random or center")
        if self.crop != "random_resized" and (self.scale, self.ratio) != (View.scale, View.ratio):
            raise ValueError(f"scale and ratio have no effect with crop={self.crop}; leave them out")
        if self.jitter and not self.jitter_operations:
            raise ValueError(
                f"jitter={self.jitter} has no effect without any of {', '.join(JITTER_OPERATIONS)} above 0"
            )
        if self.jitter_operations and not self.jitter:
            raise ValueError(
                f"{', '.join(self.jitter_operations)} have no effect while jitter=0; "
                "set jitter to the probability with which an image's colours are jittered, or these to 0"
            )

    def _check_erase(self) -> None:
        _check(
            self.erase_mode in ERASE_MODES,
            f"erase_mode={self.erase_mode!r} is not known; choose one of {', '.join(ERASE_MODES)}",
        )
        _check(
            0 < self.erase_area[1] <= 1,
            f"erase_area is a share of the view and must lie in 0..1, got {self.erase_area}",
        )
        _check(self.erase_ratio[0] > 0, f"erase_ratio is height by width and must be above 0, got {self.erase_ratio}")
        _check(
            isinstance(self.erase_count, int) and not isinstance(self.erase_count, bool) and self.erase_count >= 1,
            f"erase_count is the largest number of boxes and must be a whole number from 1 on, got {self.erase_count}",
        )
        given = [
            name
            for name in ("erase_mode", "erase_area", "erase_ratio", "erase_count")
            if getattr(self, name) != getattr(View, name)
        ]
        if given and not self.erase:
            raise ValueError(f"{', '.join(given)} have no effect while erase=0; set erase to a probability above 0")

    @property
    def parsed_policy(self) -> Policy | None:
        """What `policy` names."""
        return None if self.policy is None else parse_policy(self.policy)

    @property
    def jitter_operations(self) -> tuple[str, ...]:
        """The operations of the colour jitter that this view has."""
        return tuple(name for name in JITTER_OPERATIONS if getattr(self, name))

    def blur_kernel_size(self, size: tuple[int, int]) -> int:
        """The blur's odd kernel size for views of `size` (h, w), as SimCLR's data_util.py has it: 23 for 224 pixels.

        Raises ValueError where the kernel would be a single pixel, or would not fit.
        """
        radius = int(min(size) * self.blur_kernel / 2)
        _check(
            0 < radius < min(size),
            f"blur_kernel={self.blur_kernel} is a kernel of {2 * radius + 1} pixels for views of {size[0]}x{size[1]}, "
            f"which must lie in 3..{2 * min(size) - 1}; set blur=0 or another blur_kernel",
        )
        return 2 * radius + 1

    def sample(
        self, *, seed: int, epoch: int, index: np.ndarray, view: int, height: np.ndarray, width: np.ndarray,
        size: tuple[int, int],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """This view's parameters for the images `index` (B,) of `height` (B,) and `width` (B,) pixels.

        `view` is the view's place in the recipe, `size` (h, w) what the crop will be resized to. Always returned:
        `box` int64 (B, 4), top, left, height, width in source pixels; `flip` bool (B,). Where the view has them:
        `jitter` bool and `jitter_order` int64 (B, 4) into JITTER_OPERATIONS, with the factors `brightness` `contrast`
        `saturation` `hue` float32; `grayscale` bool; `blur` bool with `blur_sigma` float32; `solarize` bool;
        `policy_op` and `policy_argument` (Policy.sample) with `policy_flip` bool, the flip that belongs before the
        policy, `flip` being False then; `erase_box` int64 (B, erase_count, 4) in pixels of the view, without area where
        nothing is erased, with `erase_key` int64 (B,), which the noise follows from. Each row is a function of (seed,
        epoch, index, view, height, width, size) alone.
        """
        drawn = uniforms_by_use(seed, epoch, index, {f"view {view} {use}": n for use, n in self._uses().items()})
        draws = {use: drawn[f"view {view} {use}"] for use in self._uses()}  # (B, count) each

        def chosen(name: str) -> np.ndarray:
            if name in draws:
                return draws[name][:, 0] < getattr(self, name)  # (B,)
            return np.full(len(index), bool(getattr(self, name)))

        box = self._box(draws.get("crop"), np.asarray(height, np.int64), np.asarray(width, np.int64), size)
        parameters = {"box": box, "flip": chosen("flip")}
        if self.jitter:
            parameters["jitter"] = chosen("jitter")
            parameters["jitter_order"] = np.argsort(draws["jitter_order"], axis=1, kind="stable")
            for name in self.jitter_operations:
                strength, centre = getattr(self, name), 0 if name == "hue" else 1
                low = -strength if name == "hue" else max(0.0, 1 - strength)
                parameters[name] = _between(low, centre + strength, draws[f"{name} factor"][:, 0])
        if self.grayscale:
            parameters["grayscale"] = chosen("grayscale")
        if self.blur:
            parameters["blur"] = chosen("blur")
            parameters["blur_sigma"] = _between(*self.blur_sigma, draws["blur_sigma"][:, 0])
        if self.solarize:
            parameters["solarize"] = chosen("solarize")
        if (policy := self.parsed_policy) is not None:
            parameters["policy_flip"], parameters["flip"] = parameters["flip"], np.zeros(len(index), bool)
            parameters |= policy.sample(draws)
        if self.erase:
            boxes = self._erase_boxes(draws, size)
            parameters["erase_box"] = np.where(chosen("erase")[:, None, None], boxes, 0)
            parameters["erase_key"] = (draws["erase_key"].astype(np.float64) * 2**24).astype(np.int64) @ (2**24, 1)
        return parameters

    def _uses(self) -> dict[str, int]:
        """What this view draws, and how many numbers for each image; a probability of 0 or 1 needs none."""
        uses = {"random_resized": {"crop": 2 * _CROP_TRIES + 2}, "random": {"crop": 2}}.get(self.crop, {})
        uses |= {name: 1 for name in PROBABILITIES if 0 < getattr(self, name) < 1}
        if self.jitter:
            uses |= {"jitter_order": 4} | {f"{name} factor": 1 for name in self.jitter_operations}
        if self.blur:
            uses["blur_sigma"] = 1
        if (policy := self.parsed_policy) is not None:
            uses |= policy.uses()
        if self.erase:
            uses |= {"erase_box": self.erase_count * (2 * _ERASE_TRIES + 2), "erase_key": 2}
            uses |= {"erase_count": 1} if self.erase_count > 1 else {}
        return uses

    def _erase_boxes(self, draws: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """The boxes (B, erase_count, 4) of views of `size` (h, w), those beyond an image's own number without area."""
        num_images = len(draws["erase_box"])
        number = np.ones(num_images, np.int64)  # boxes of each image
        if self.erase_count > 1:
            number += np.floor(draws["erase_count"][:, 0].astype(np.float64) * self.erase_count).astype(np.int64)
        drawn = draws["erase_box"].reshape(num_images, self.erase_count, -1)  # (B, erase_count, 22)
        boxes = [
            erase_box(drawn[:, place], size, share=1 / number, area=self.erase_area, ratio=self.erase_ratio)
            for place in range(self.erase_count)
        ]
        exists = np.arange(self.erase_count) < number[:, None]  # (B, erase_count)
        return np.where(exists[:, :, None], np.stack(boxes, axis=1), 0)

    def _box(
        self, draws: np.ndarray | None, height: np.ndarray, width: np.ndarray, size: tuple[int, int]
    ) -> np.ndarray:
        """The crop's box (B, 4): top, left, height, width."""
        if self.crop == "random_resized":
            assert draws is not None
            return random_resized_box(draws, height, width, scale=self.scale, ratio=self.ratio)
        if self.crop == "random":
            assert draws is not None
            return _place(
                draws, height, width, _at_least_one(height * self.fraction), _at_least_one(width * self.fraction)
            )
        if self.crop == "center":
            zoom = np.minimum(height / size[0], width / size[1]) * self.fraction  # source pixels per pixel of the view
            whole = (height == size[0]) & (width == size[1])
            box_height = np.where(whole, height, _at_least_one(size[0] * zoom))
            box_width = np.where(whole, width, _at_least_one(size[1] * zoom))
            return np.stack(((height - box_height) // 2, (width - box_width) // 2, box_height, box_width), axis=1)
        return np.stack((np.zeros_like(height), np.zeros_like(width), height, width), axis=1)


def make_views(config: Iterable[Mapping[str, Any]]) -> list[View]:
    """The views that an `augment` recipe lists; an entry with `count: n` stands for n views with those values.

    Raises ValueError for an empty list, for keys that View does not have, and for what View refuses.
    """
    known = [field.name for field in fields(View)]
    views = []
    for entry in config:
        values = dict(entry)
        count = values.pop("count", 1)
        unknown = [str(key) for key in values if key not in known]
        if unknown:
            raise ValueError(f"a view has no key {', '.join(unknown)}; it has count, {', '.join(known)}")
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"count is how many views an entry stands for and must be at least 1, got {count}")
        views += [View(**values)] * count
    if not views:
        raise ValueError("augment.views is empty; list at least one view, such as {crop: random_resized, flip: 0.5}")
    return views


def random_resized_box(
    draws: np.ndarray, height: np.ndarray, width: np.ndarray, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes (B, 4) by the rule of torchvision's RandomResizedCrop.get_params, from uniform `draws` (B, 22).

    Ten tries at a share of the area, uniform in `scale`, and an aspect, log-uniform in `ratio`; the first that fits is
    placed uniformly, and where none fits the largest central box within `ratio` is taken.
    """
    area_draws, ratio_draws = draws[:, :_CROP_TRIES].astype(np.float64), draws[:, _CROP_TRIES : 2 * _CROP_TRIES]
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * area_draws)  # (B, tries)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * ratio_draws.astype(np.float64))  # (B, tries)
    try_width, try_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (try_width > 0) & (try_width <= width[:, None]) & (try_height > 0) & (try_height <= height[:, None])
    first, row = fits.argmax(axis=1), np.arange(len(height))
    box_height, box_width = try_height[row, first].astype(np.int64), try_width[row, first].astype(np.int64)
    box = _place(draws[:, 2 * _CROP_TRIES :], height, width, box_height, box_width)

    # The central box: the side that is too long for `ratio` is cut.
    central_height = np.where(width / height < ratio[0], _at_least_one(width / ratio[0]), height)
    central_width = np.where(width / height > ratio[1], _at_least_one(height * ratio[1]), width)
    top, left = (height - central_height) // 2, (width - central_width) // 2
    central = np.stack((top, left, central_height, central_width), axis=1)
    return np.where(fits.any(axis=1)[:, None], box, central)


def erase_box(
    draws: np.ndarray,
    size: tuple[int, int],
    *,
    share: np.ndarray,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Boxes to erase (B, 4) in views of `size` (h, w), from uniform `draws` (B, 22), by timm's RandomErasing's rule.

    Ten tries at a share of the area, uniform in `area` and times `share` (B,), and an aspect, height by width,
    log-uniform in `ratio`; the first that is smaller than the view along both sides is placed uniformly. Where none
    is, the box has no area.
    """
    shares = area[0] + (area[1] - area[0]) * draws[:, :_ERASE_TRIES].astype(np.float64)
    pixels = shares * (size[0] * size[1]) * share[:, None]  # (B, tries)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draws[:, _ERASE_TRIES : 2 * _ERASE_TRIES].astype(np.float64))  # (B, tries)
    height, width = np.rint(np.sqrt(pixels * aspect)), np.rint(np.sqrt(pixels / aspect))
    fits = (height < size[0]) & (width < size[1])
    first, row = fits.argmax(axis=1), np.arange(len(draws))
    box_height, box_width = height[row, first].astype(np.int64), width[row, first].astype(np.int64)
    box = _place(draws[:, 2 * _ERASE_TRIES :], np.array(size[0]), np.array(size[1]), box_height, box_width)
    return np.where(fits.any(axis=1)[:, None], box, 0)


def _place(
    draws: np.ndarray, height: np.ndarray, width: np.ndarray, box_height: np.ndarray, box_width: np.ndarray
) -> np.ndarray:
    """Boxes (B, 4) of the given sizes, anywhere in their images with equal probability; uniform `draws` (B, 2)."""
    # 24 bits per draw times a side of up to 2^28 pixels stays exact in float64.
    top = np.floor(draws[:, 0].astype(np.float64) * (height - box_height + 1))
    left = np.floor(draws[:, 1].astype(np.float64) * (width - box_width + 1))
    return np.stack((top, left, box_height, box_width), axis=1).astype(np.int64)


def _between(low: float, high: float, draws: np.ndarray) -> np.ndarray:
    """Uniform numbers float32 in low..high from uniform `draws` in [0, 1)."""
    return (low + (high - low) * draws.astype(np.float64)).astype(np.float32)


def _at_least_one(pixels: np.ndarray) -> np.ndarray:
    return np.maximum(np.rint(pixels).astype(np.int64), 1)


def _pair(name: str, value: Any) -> tuple[float, float]:
    """`value` as (low, high), whatever kind of sequence the configuration gave."""
    pair = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} must be two numbers, low and high, got {value!r}")
    return float(pair[0]), float(pair[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
