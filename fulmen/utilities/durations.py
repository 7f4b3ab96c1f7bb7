"""Lengths of time as users write them: ``"DD:HH:MM:SS"``, a `timedelta`, or its keyword arguments."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from fulmen.utilities.errors import MisconfigurationException, explain

_FORMAT = re.compile(r"(\d+):(\d\d):(\d\d):(\d\d)")
_UNITS = ("days", "hours", "minutes", "seconds")


def parse_duration(value: str | timedelta | dict[str, Any], name: str = "duration") -> timedelta:
    """The duration as a `timedelta`; ``name`` is what error messages call the argument.

    Raises:
        MisconfigurationException: for a string of another format.
        TypeError: for another type, or a dict with keys that are not arguments of `timedelta`.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, dict):
        try:
            return timedelta(**value)
        except TypeError as error:
            raise TypeError(
                explain(
                    what=f"`{name}={value!r}` is not a duration: {error}.",
                    fix="Use the keyword arguments of `datetime.timedelta`, for example `{'hours': 1}`.",
                )
            ) from None
    if not isinstance(value, str):
        raise TypeError(
            explain(
                what=f"`{name}={value!r}` is a {type(value).__name__}, not a duration.",
                fix="Use a string 'DD:HH:MM:SS', a `datetime.timedelta`, or a dict of its arguments.",
            )
        )
    match = _FORMAT.fullmatch(value.strip())
    if match is None:
        raise MisconfigurationException(
            explain(
                what=f"`{name}={value!r}` is not a duration.",
                why="A string is read as days:hours:minutes:seconds, with two digits for all but the days.",
                fix="Write DD:HH:MM:SS, for example '00:12:00:00' for twelve hours.",
            )
        )
    return timedelta(**{unit: int(digits) for unit, digits in zip(_UNITS, match.groups(), strict=True)})
