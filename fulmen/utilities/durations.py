"""Lengths of time as users write them: ``"DD:HH:MM:SS"``, a `timedelta`, or its keyword arguments."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from fulmen.utilities.errors import MisconfigurationException

_FORMAT = re.compile(r"(?P<days>\d+):(?P<hours>\d\d):(?P<minutes>\d\d):(?P<seconds>\d\d)")


def parse_duration(value: str | timedelta | dict[str, Any], name: str = "duration") -> timedelta:
    """The duration as a `timedelta`; error messages call it ``name``. Only an ill-formed string is a misconfiguration."""
    if isinstance(value, timedelta):
        return value
    what = f"`{name}={value!r}` is not a valid duration."
    if isinstance(value, str):
        if match := _FORMAT.fullmatch(value.strip()):
            return timedelta(**{unit: int(digits) for unit, digits in match.groupdict().items()})
        raise MisconfigurationException(f"{what} Write DD:HH:MM:SS, '00:12:00:00' for twelve hours.")
    try:
        return timedelta(**value)
    except TypeError as error:
        hint = "Use 'DD:HH:MM:SS', a `datetime.timedelta`, or a dict such as {'hours': 1}."
        raise TypeError(f"{what} {hint}") from error
