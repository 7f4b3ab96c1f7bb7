"""Optional packages: is one there in the right version, and a helpful error if not."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from types import ModuleType

from fulmen.utilities.seed import isolate_rng


def _distribution_name(package: str) -> str:
    """What is installed to have the package."""
    top = package.partition(".")[0]
    return {"comet_ml": "comet-ml", "sklearn": "scikit-learn", "yaml": "PyYAML"}.get(top, top)


def _parse_release(version: str) -> list[int]:
    """The leading numbers of a version: ``"2.1.post3+cu118"`` is [2, 1, 0]. Enough to compare minimum versions."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    return numbers + [0] * (3 - len(numbers))


def _installed_version(package: str) -> str:
    """The version of what brings the package: mlflow-skinny, say, brings ``mlflow`` too."""
    try:
        return importlib.metadata.version(_distribution_name(package))
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
        if not others:
            raise
        return importlib.metadata.version(others[0])


@functools.cache
def is_installed(package: str, minimum: str = "") -> bool:
    """Can ``package`` be imported, in a version such as ``">=10.2.2"``? The package itself is not imported."""
    try:
        found = importlib.util.find_spec(package) is not None
        version = _installed_version(package) if found and minimum else ""
    except (ImportError, ValueError):  # a parent is missing, or nobody knows the version
        return False
    return found and _parse_release(version) >= _parse_release(minimum.lstrip("> ="))


def import_optional(package: str, why: str, minimum: str = "", extra: str = "") -> ModuleType:
    """Import an optional package, or raise an error with the line that installs it; it "is needed ``why``".

    With ``extra`` the line installs that extra of fulmen.
    """
    if not is_installed(package, minimum):
        missing = f"`{package}` is needed {why}, but " + (f"no version {minimum} is" if minimum else "it is not")
        wanted = f"'fulmen[{extra}]'" if extra else f'"{_distribution_name(package)}{minimum}"'
        fix = f"Run `pip install {wanted}`."
        raise ModuleNotFoundError(f"{missing} installed. {fix}", name=package)
    if package in sys.modules:
        return sys.modules[package]
    with isolate_rng():
        return importlib.import_module(package)
