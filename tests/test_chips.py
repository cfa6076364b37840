"""The GPUs whose peaks are known, by their names."""

from __future__ import annotations

import re

import pytest

from ssl.chips import PEAKS, chip_named, known_names


def test_the_chips_that_are_listed_are_names_that_are_taken():
    names = known_names()
    assert len(set(names)) == len(PEAKS)
    assert [chip_named(name) for name in names] == names
    assert {"H100", "A100-SXM4-40GB", "A800 80GB", "V100-SXM2-16GB", "GH200 480GB"} <= set(names)
    with pytest.raises(ValueError, match=re.escape(f"these are: {', '.join(names)}")):
        chip_named("H10")
