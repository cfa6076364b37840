"""RandAugment and AutoAugment: which operations an image gets, as numbers, and their pixels by timm's own functions.

RandAugment is Cubuk et al. 2019 with timm's additions, AutoAugment Cubuk et al. 2018. timm draws while it works on the
pixels; here the operations and their arguments are a function of uniform numbers, and the pixels follow from those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, auto_augment_policy, rand_augment_choices
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

FULL_LEVEL = 10.0
AUTO_POLICIES = ("original", "originalr", "v0", "v0r", "3a", "cifar10")
RAND_SETS = ("weights", "3a", "3aw")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_GREY = 128 / 255
_WHOLE = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal", "SolarizeAdd")
_PATTERN = re.compile(r"(mstd|mmax|inc|[mnp])(\d+(?:\.\d+)?|inf)")

Argument = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _signed(scale: float, centre: float = 0.0, lowest: float = -np.inf) -> Argument:
    """`centre` plus or minus a share of `scale`; the negative side where the draw is above one half, as in timm."""

    def argument(level: np.ndarray, draw: np.ndarray) -> np.ndarray:
        size = level / FULL_LEVEL * scale
        return np.maximum(lowest, centre + np.where(draw > 0.5, -size, size))

    return argument


def _steps(
    level: np.ndarray, draw: np.ndarray, *, scale: float, start: float = 0.0, sign: int = 1, most: float = np.inf
) -> np.ndarray:
    """`start` plus or minus the whole part of a share of `scale`."""
    return start + sign * np.minimum(most, np.floor(level / FULL_LEVEL * scale))


def _enhanced(level: np.ndarray, draw: np.ndarray) -> np.ndarray:
    return level / FULL_LEVEL * 1.8 + 0.1


def _between(level: np.ndarray, draw: np.ndarray, *, low: float, high: float) -> np.ndarray:
    return np.clip(low + (high - low) * (level / FULL_LEVEL), low, high)


def _any_blur(level: np.ndarray, draw: np.ndarray) -> np.ndarray:
    return 0.1 + (2.0 * np.clip(level / FULL_LEVEL, 0, 1) - 0.1) * draw


def _none(level: np.ndarray, draw: np.ndarray) -> np.ndarray:
    return np.zeros_like(level)


_ENHANCED = ("Color", "Contrast", "Brightness", "Sharpness")
ARGUMENTS: dict[str, Argument] = {
    "AutoContrast": _none,
    "Equalize": _none,
    "Invert": _none,
    "Rotate": _signed(30.0),
    "Posterize": partial(_steps, scale=4),
    "PosterizeIncreasing": partial(_steps, scale=4, start=4, sign=-1),
    "PosterizeOriginal": partial(_steps, scale=4, start=4),
    "Solarize": partial(_steps, scale=256, most=256),
    "SolarizeIncreasing": partial(_steps, scale=256, most=256, start=256, sign=-1),
    "SolarizeAdd": partial(_steps, scale=110, most=128),
    **dict.fromkeys(_ENHANCED, _enhanced),
    **{f"{name}Increasing": _signed(0.9, centre=1.0, lowest=0.1) for name in _ENHANCED},
    "ShearX": _signed(0.3),
    "ShearY": _signed(0.3),
    "TranslateXRel": _signed(0.45),
    "TranslateYRel": _signed(0.45),
    "Desaturate": partial(_between, low=0.5, high=1.0),
    "GaussianBlur": partial(_between, low=0.1, high=2.0),
    "GaussianBlurRand": _any_blur,
    # torchvision's own scales, for the policy that was found on CIFAR-10.
    "CifarTranslateX": _signed(150 / 331),
    "CifarTranslateY": _signed(150 / 331),
    "CifarPosterize": lambda level, draw: 8 - np.rint(level / FULL_LEVEL * 4),
    "CifarSolarize": lambda level, draw: 255 - level / FULL_LEVEL * 255,
}
"""Level (n,) in 0..10 and uniform draw (n,) to an operation's one argument (n,), by timm's name of the operation."""

OPERATIONS = tuple(ARGUMENTS)
"""The operations that a number in `policy_op` stands for."""
_CIFAR = {
    "TranslateX": "CifarTranslateX",
    "TranslateY": "CifarTranslateY",
    "Posterize": "CifarPosterize",
    "Solarize": "CifarSolarize",
    **{name: f"{name}Increasing" for name in _ENHANCED},
}
_PIXELS = {
    "GaussianBlurRand": "GaussianBlur",
    "CifarTranslateX": "TranslateXRel",
    "CifarTranslateY": "TranslateYRel",
    "CifarPosterize": "Posterize",
    "CifarSolarize": "Solarize",
}


@dataclass(frozen=True, eq=False)
class Policy:
    """What is drawn for each image: `num_chosen` rows of a table, whose operations are done from left to right.

    `operation` int64, `probability` and `level` float64 are (R, K): R rows of K operations. Rows are equally likely and
    drawn with replacement, or without it by `weight` (R,). `level_std` spreads the levels by a normal distribution,
    or uniformly over 0..level where it is infinite; they are then cut to 0..`largest_level`.
    """

    operation: np.ndarray
    probability: np.ndarray
    level: np.ndarray
    num_chosen: int
    weight: np.ndarray | None = None
    level_std: float = 0.0
    largest_level: float = FULL_LEVEL

    @property
    def num_operations(self) -> int:
        """How many operations an image gets at most: L."""
        return self.num_chosen * self.operation.shape[1]

    def uses(self) -> dict[str, int]:
        """What is drawn, and how many numbers for each image."""
        uses = {"policy choice": self.num_chosen if self.weight is None else len(self.weight)}
        uses |= {"policy chance": self.num_operations, "policy sign": self.num_operations}
        return uses | ({"policy level": self.num_operations} if self.level_std else {})

    def sample(self, draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`policy_op` int64 (B, L) into OPERATIONS, -1 for none, and `policy_argument` float64 (B, L), from `draws`."""
        choice = draws["policy choice"].astype(np.float64)
        num_images, num_rows = len(choice), len(self.operation)
        if self.weight is None:
            row = np.minimum((choice * num_rows).astype(np.int64), num_rows - 1)  # (B, num_chosen)
        else:
            # The first arrivals of exponential clocks are drawn one after the other by weight, without replacement.
            row = np.argsort(-np.log1p(-choice) / self.weight, axis=1, kind="stable")[:, : self.num_chosen]
        shape = (num_images, self.num_operations)
        operation, level = self.operation[row].reshape(shape), self.level[row].reshape(shape)
        chance = draws["policy chance"] < self.probability[row].reshape(shape)
        if self.level_std == np.inf:
            level = level * draws["policy level"]
        elif self.level_std:
            # The middle of each of the draws' 2^24 steps, because a normal number of quantile 0 is infinite.
            quantile = torch.from_numpy(draws["policy level"].astype(np.float64) + 2.0**-25)
            level = level + self.level_std * torch.special.ndtri(quantile).numpy()
        level = np.clip(level, 0, self.largest_level)
        argument = np.zeros(shape)
        for number in np.unique(operation):
            chosen = operation == number
            argument[chosen] = ARGUMENTS[OPERATIONS[number]](level[chosen], draws["policy sign"][chosen])
        return {"policy_op": np.where(chance, operation, -1), "policy_argument": np.where(chance, argument, 0.0)}


@cache
def parse_policy(text: str) -> Policy:
    """The policy that `text` names, in timm's words.

    `rand-m9-mstd0.5-inc1`: RandAugment with magnitude m (0..10), its standard deviation mstd (`inf` and above 100:
    uniform in 0..m), n operations (2), each done with probability p (0.5), inc1 for operations that grow stronger with
    the magnitude, mmax for another largest magnitude, and t for another set of operations. `autoaugment-original`:
    the policy found on ImageNet; `-originalr`, `-v0`, `-v0r`, `-3a` are timm's others, and `-cifar10` is the one found
    on CIFAR-10, with torchvision's table and magnitudes; `-mstd` spreads their magnitudes. Raises ValueError.
    """
    kind, *words = text.split("-")
    if kind == "rand":
        return _rand_augment(text, words)
    if kind == "autoaugment" and words and words[0] in AUTO_POLICIES:
        return _auto_augment(text, words[0], words[1:])
    named = ", ".join(f"autoaugment-{name}" for name in AUTO_POLICIES)
    raise ValueError(f"policy={text!r} is not known; give rand-m9-mstd0.5-inc1 with other numbers, or one of {named}")


def apply_policy_(
    crops: Tensor, parameters: Mapping[str, np.ndarray], *, interpolation: str, fill: Sequence[float] | None = None
) -> None:
    """Flip uint8 `crops` (B, C, h, w) and do their policies' operations, in place, as `parameters` (B, ...) say.

    `fill` is the colour (C,) in 0..1 of what moves in from beyond the edge; grey where it is left out.
    """
    filling = tuple(min(255, round(255 * value)) for value in fill or [_GREY] * crops.shape[1])
    colour = filling[0] if crops.shape[1] == 1 else filling
    settings = {"resample": _RESAMPLING[interpolation], "fillcolor": colour}
    for row, flip in enumerate(parameters["policy_flip"].tolist()):
        if flip:
            crops[row] = crops[row].flip(-1)
        operations = parameters["policy_op"][row]
        if not (operations >= 0).any():
            continue
        pixels = crops[row].permute(1, 2, 0).contiguous().numpy()  # (h, w, C)
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        for number, argument in zip(operations.tolist(), parameters["policy_argument"][row].tolist()):
            if number >= 0:
                image = _do(OPERATIONS[number], image, argument, settings)
        changed = torch.from_numpy(np.array(image)).view(*pixels.shape)
        crops[row] = changed.permute(2, 0, 1)


def _do(name: str, image: Image.Image, argument: float, settings: Mapping[str, object]) -> Image.Image:
    pixels_of = _PIXELS.get(name, name)
    if pixels_of.startswith("Posterize") and argument == 0:
        return Image.new(image.mode, image.size)  # no bit is kept: black. Pillow 13 refuses what its elders did
    if ARGUMENTS[name] is _none:
        return NAME_TO_OP[pixels_of](image, **settings)
    return NAME_TO_OP[pixels_of](image, int(argument) if pixels_of in _WHOLE else argument, **settings)


def _rand_augment(text: str, words: Sequence[str]) -> Policy:
    sets = [word[1:] for word in words if word.startswith("t")]
    for name in sets:
        if name not in RAND_SETS or len(sets) > 1:
            raise ValueError(f"policy={text!r} names the operations {name!r}; give one of {', '.join(RAND_SETS)}")
    numbers = _numbers(text, [word for word in words if not word.startswith("t")])
    largest, num_chosen, magnitude = numbers.pop("mmax", 10), numbers.pop("n", 2), numbers.pop("m", 10)
    probability, std, increasing = numbers.pop("p", 0.5), numbers.pop("mstd", 0), numbers.pop("inc", 0)
    _check(0 < largest < np.inf, f"policy={text!r}: mmax must be above 0")
    _check(0 <= magnitude <= largest, f"policy={text!r}: m is a magnitude and must lie in 0..{largest:g}")
    _check(0 < probability <= 1, f"policy={text!r}: p is a probability and must lie above 0 and at most at 1")
    _check(num_chosen >= 1, f"policy={text!r}: n is how many operations an image gets, a whole number from 1 on")
    _check(increasing in (0, 1), f"policy={text!r}: inc must be 0 or 1")
    _check(not (sets and "inc" in text), f"policy={text!r}: inc has no effect beside t{sets}; leave one of them out")
    chosen = rand_augment_choices(sets[0] if sets else "", increasing=bool(increasing))
    weight = np.array(list(chosen.values()), np.float64) if isinstance(chosen, dict) else None
    _check(
        weight is None or num_chosen <= len(weight),
        f"policy={text!r}: only {len(chosen)} operations can be drawn without replacement; set n to at most that",
    )
    rows = [[(name, probability, magnitude)] for name in chosen]
    return _policy(rows, int(num_chosen), weight=weight, level_std=_std(std), largest_level=float(largest))


def _auto_augment(text: str, name: str, words: Sequence[str]) -> Policy:
    numbers = _numbers(text, words)
    std = numbers.pop("mstd", 0)
    _check(not numbers, f"policy={text!r}: an autoaugment policy takes mstd alone, got also {', '.join(numbers)}")
    if name == "cifar10":
        # Its magnitudes are the ten numbers 0..9 of a range's equal parts.
        rows = [
            [(_CIFAR.get(kind, kind), chance, (step or 0) * FULL_LEVEL / 9) for kind, chance, step in row]
            for row in AutoAugment(AutoAugmentPolicy.CIFAR10).policies
        ]
    else:
        rows = [[(step.name, step.prob, step.magnitude) for step in row] for row in auto_augment_policy(name)]
    return _policy(rows, 1, level_std=_std(std))


def _policy(
    rows: Sequence[Sequence[tuple[str, float, float]]],
    num_chosen: int,
    *,
    weight: np.ndarray | None = None,
    level_std: float = 0.0,
    largest_level: float = FULL_LEVEL,
) -> Policy:
    """A policy from rows of (operation, probability, level)."""
    return Policy(
        operation=np.array([[OPERATIONS.index(name) for name, _, _ in row] for row in rows], np.int64),
        probability=np.array([[probability for _, probability, _ in row] for row in rows], np.float64),
        level=np.array([[level for _, _, level in row] for row in rows], np.float64),
        num_chosen=num_chosen,
        weight=weight,
        level_std=level_std,
        largest_level=largest_level,
    )


def _numbers(text: str, words: Sequence[str]) -> dict[str, float]:
    """The settings between the dashes; m, n, inc and mmax are whole numbers."""
    numbers: dict[str, float] = {}
    for word in words:
        match = _PATTERN.fullmatch(word)
        if match is None or match[1] in numbers or (match[1] in ("n", "m", "inc", "mmax") and not match[2].isdigit()):
            raise ValueError(
                f"policy={text!r}: {word!r} is no setting that it takes; allowed are m9, n2, inc1 and mmax10 with "
                "whole numbers, p0.5 and mstd0.5 with any, each once"
            )
        numbers[match[1]] = float(match[2])
    return numbers


def _std(value: float) -> float:
    return np.inf if value > 100 else float(value)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
