"""Lengths of time as people and schedulers write them."""

import pytest

from ssl.durations import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("3h30m", 12600),
        ("2d", 172800),
        ("1.5h", 5400),
        ("45s", 45),
        (" 1 D 2 h ", 93600),
        ("03:30:00", 12600),
        ("1-12:00:00", 129600),
        ("100:00:30", 360030),
    ],
)
def test_lengths_of_time_are_read_as_they_are_written(text: str, seconds: float):
    assert seconds_of(text, key="trainer.max_time") == seconds


@pytest.mark.parametrize("text", ["", "90", "3 hours", "30m3h", "-1h", "0m", "03:30", "03:75:00", "1h1h", "nan"])
def test_what_is_no_length_of_time_is_refused_with_the_key(text: str):
    with pytest.raises(ValueError, match=r"trainer\.max_time=.*90m"):
        seconds_of(text, key="trainer.max_time")
