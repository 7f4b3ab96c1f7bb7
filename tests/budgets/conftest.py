"""The budgets use the measuring code of `benchmarks/`, which is no installed package."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="module")
def fulmen():
    """The package as the benchmarks see it; what they silence speaks again afterwards."""
    import warnings

    from benchmarks import harness

    names = ("fulmen", "lightning", "lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        yield harness.load("fulmen")
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
