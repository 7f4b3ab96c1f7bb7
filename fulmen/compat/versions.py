"""Which version of Lightning is answered to programs that ask for one."""

from __future__ import annotations

import importlib
import os
import re

from fulmen.utilities.errors import MisconfigurationException

VARIABLE = "FULMEN_LIGHTNING_VERSION"
OLDEST = "2.0.0"
NEWEST = "2.6.6"
DISTRIBUTIONS = {
    "lightning": "lightning",
    "pytorch-lightning": "pytorch_lightning",
    "lightning-fabric": "lightning_fabric",
}
SUMMARY = "stand-in by fulmen"


def check_version(version: str) -> str:
    """The version itself, if it is one of those that fulmen can stand in for.

    Raises:
        MisconfigurationException: it is no version, or none from 2.0.0 to 2.6.6.

    Example:
        >>> check_version("2.5.0")
        '2.5.0'
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.?(post|rc|dev)\d+)?", version):
        raise MisconfigurationException(f"`version={version!r}` is no version of Lightning. Write one like '{NEWEST}'.")
    if not _numbers(OLDEST) <= _numbers(version) <= _numbers(NEWEST):
        what = f"fulmen stands in for Lightning {OLDEST} to {NEWEST}, and cannot answer {version!r}."
        raise MisconfigurationException(f"{what} Choose one of those.")
    return version


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def current_version() -> str:
    """The version that is answered: of the environment variable, of an installed stand-in, else the newest.

    Example:
        >>> current_version()
        '2...'
    """
    given = os.environ.get(VARIABLE) or importlib.import_module("fulmen.compat.distributions").installed_version()
    return check_version(given) if given else NEWEST
