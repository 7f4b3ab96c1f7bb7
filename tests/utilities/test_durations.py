"""Lengths of time as users write them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from fulmen.utilities.durations import parse_duration
from fulmen.utilities.errors import MisconfigurationException


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:00:05", 5),
        ("0:00:01:05", 65),
        ("12:00:00:00", 12 * 86400),
        ({"hours": 1, "seconds": 0.5}, 3600.5),
        (timedelta(minutes=2), 120),
    ],
)
def test_every_notation_is_a_length_of_time(value, seconds):
    assert parse_duration(value).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "05", "00:00:05", "0:0:0:5", "-1:00:00:00", "a:00:00:00", "00:00:00:05.5"])
def test_other_text_is_refused(text):
    with pytest.raises(MisconfigurationException, match="`limit='.*DD:HH:MM:SS"):
        parse_duration(text, "limit")


@pytest.mark.parametrize("value", [None, 5, 1.5, [1], {"second": 5}])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="timedelta"):
        parse_duration(value)
