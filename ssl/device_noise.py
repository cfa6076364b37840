"""Random numbers made on the device that needs them, each a pure function of a key and a place.

`ssl.randomness` gives each image its numbers on the CPU; where thousands follow from one of those, they are made here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64 (Steele et al. 2014) as signed numbers: torch's int64 wraps on every device.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)


def key_of(uniform: Tensor) -> Tensor:
    """The key, int64 (...,), that two uniform numbers (..., 2) of `ssl.randomness` stand for: 48 bits."""
    words = (uniform.to(torch.float64) * 2**24).to(torch.int64)
    return words[..., 0] * 2**24 + words[..., 1]


def uniform_numbers(key: Tensor, place: Tensor) -> Tensor:
    """A multiple of 2**-24 in [0, 1), float32, for each `key` and `place`, int64 tensors that broadcast."""
    return _upper(_word(key, place), 40)


def normal_numbers(key: Tensor, place: Tensor) -> Tensor:
    """A standard normal number, float32, for each `key` and `place`, int64 tensors that broadcast."""
    word = _word(key, place)
    radius = (-2 * torch.log(1 - _upper(word, 40))).sqrt_()
    return radius * torch.cos(_upper(word, 16) * (2 * math.pi))  # Box and Muller 1958


def _word(key: Tensor, place: Tensor) -> Tensor:
    return _mixed(_mixed(key * _GOLDEN) + place * _GOLDEN)


def _mixed(word: Tensor) -> Tensor:
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1)):
        # The shift must bring in zeros, torch's brings in the sign.
        word = (word ^ (word >> shift & (1 << 64 - shift) - 1)) * multiplier
    return word


def _upper(word: Tensor, shift: int) -> Tensor:
    """The 24 bits from bit `shift` on, as a number in [0, 1)."""
    return (word >> shift & 0xFFFFFF).to(torch.float32) * 2**-24
