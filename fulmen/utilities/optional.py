"""Optional packages: is one there in the right version, and a helpful error if not."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from types import ModuleType

from fulmen.utilities.errors import explain

# Packages whose distribution has another name than the module.
DISTRIBUTIONS = {
    "comet_ml": "comet-ml",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
    "transformer_engine": "transformer-engine",
}


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.1.0.post3+cu118"`` is (2, 1, 0). Enough to compare minimum versions."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else [0]
    return (*numbers, *[0] * (3 - len(numbers)))


@functools.cache
def version_of(package: str) -> tuple[int, ...]:
    """The installed version as numbers; empty when it is unknown."""
    try:
        return _release(importlib.metadata.version(DISTRIBUTIONS.get(package, package)))
    except importlib.metadata.PackageNotFoundError:
        return ()


@functools.cache
def available(package: str, minimum: str = "") -> bool:
    """Can ``package`` be imported, in a version such as ``">=10.2.2"``? The package itself is not imported."""
    try:
        found = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
    if not found or not minimum:
        return found
    return version_of(package.split(".")[0]) >= _release(minimum.lstrip("> ="))


def require(package: str, why: str, extra: str = "", minimum: str = "") -> ModuleType:
    """Import and return an optional package.

    Args:
        why: what it is needed for, as the end of "`package` is needed …".
        extra: what to type after ``pip install``, when it is not the package's own name.

    Raises:
        ModuleNotFoundError: with the line that installs it.
    """
    name = extra or DISTRIBUTIONS.get(package.split(".")[0], package.split(".")[0])
    if not available(package, minimum):
        what = f"`{package}` is needed {why}, but " + (f"no version {minimum} is" if minimum else "it is not")
        raise ModuleNotFoundError(
            explain(f"{what} installed.", fix=f'Run `pip install "{name}{minimum}"`.'), name=package
        )
    return importlib.import_module(package)
