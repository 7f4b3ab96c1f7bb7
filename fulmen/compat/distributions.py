"""What `importlib.metadata` answers about the distributions that fulmen stands in for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from typing import NoReturn

from fulmen.compat.versions import DISTRIBUTIONS, SUMMARY, current_version

DESCRIPTION = "fulmen answers to this name in this process. Nothing of the distribution of this name is used."


class StandIn(Distribution):
    """The metadata of one distribution: its name, the version that is answered, and that it is a stand-in."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            head = f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {current_version()}\nSummary: {SUMMARY}\n"
            return f"{head}Requires-Dist: fulmen\n\n{DESCRIPTION}\n"
        return {"top_level.txt": DISTRIBUTIONS[self._name], "INSTALLER": "fulmen"}.get(filename)

    def locate_file(self, path: object) -> NoReturn:
        raise FileNotFoundError(f"{path}: {DESCRIPTION}")


def find_stand_ins(context: DistributionFinder.Context) -> Iterator[StandIn]:
    """Those of the asked name; all of them if none is asked for."""
    asked = None if context.name is None else context.name.lower().replace("_", "-").replace(".", "-")
    return (StandIn(name) for name in DISTRIBUTIONS if asked in (None, name))


def installed_version() -> str | None:
    """The version of a stand-in that is installed as a distribution of its own; None if there is none."""
    for name in DISTRIBUTIONS:
        found = next(iter(MetadataPathFinder.find_distributions(DistributionFinder.Context(name=name))), None)
        if found is not None and found.metadata["Summary"] == SUMMARY:
            return found.version
    return None
