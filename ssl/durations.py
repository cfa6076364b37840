"""Lengths of time as people and schedulers write them."""

from __future__ import annotations

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WORDS = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")  # Slurm's D-HH:MM:SS


def seconds_of(text: str, *, key: str) -> float:
    """The seconds of 90m, 3h30m, 2d, 45s, 03:30:00 or 1-12:00:00, above 0. Raises ValueError that names `key`."""
    stripped = text.strip().replace(" ", "").lower()
    clock = _CLOCK.fullmatch(stripped)
    words = clock or _WORDS.fullmatch(stripped)
    numbers = [float(part or 0) for part in words.groups()] if words else []
    seconds = sum(number * unit for number, unit in zip(numbers, _UNITS.values()))
    if not seconds > 0:
        raise ValueError(
            f"{key}={text} is not a length of time; write it as 90m, 3h30m, 2d, 45s, or quoted as '03:30:00' or "
            "'1-12:00:00'"
        )
    return seconds
