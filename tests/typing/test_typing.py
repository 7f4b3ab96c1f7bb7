"""What mypy and pyright say about scripts that use the public API, and about the public properties of four classes.

In `scripts/`, `assert_type` holds what is revealed; `wrong.py` marks each line that must be an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import fulmen
from fulmen import Callback, LightningDataModule, LightningModule, Trainer
from fulmen.engine.accelerators import AcceleratorRegistry
from fulmen.engine.resolve import ALIASES, PRECISIONS
from fulmen.engine.strategy_registry import StrategyRegistry
from fulmen.utilities import types

pytestmark = pytest.mark.slow  # both read all of torch
ROOT = Path(fulmen.__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"
CLASSES = (Trainer, LightningModule, LightningDataModule, Callback)
CONFIGURATION = f"""
[tool.mypy]
strict = true
mypy_path = "{ROOT}"
cache_dir = "{ROOT / ".mypy_cache" / "typing"}"
[[tool.mypy.overrides]]
module = "fulmen.*"
ignore_errors = true
[tool.pyright]
extraPaths = ["{ROOT}", "{Path(torch.__file__).parents[1]}"]
"""


def run_checker(checker: str, folder: Path, *files: Path) -> str:
    """What a type checker says, started in an empty folder; skips where it does not run."""
    (folder / "pyproject.toml").write_text(CONFIGURATION)
    started = subprocess.run([sys.executable, "-m", checker, "--version"], capture_output=True, text=True, timeout=1200)
    if started.returncode != 0:
        pytest.skip(f"{checker} does not run here: {(started.stdout + started.stderr)[-200:]}")
    command = [sys.executable, "-m", checker, *map(str, files)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    return done.stdout + done.stderr


def public_properties(cls: type) -> dict[str, property]:
    found = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    ours = {name for base in cls.__mro__ if base.__module__.startswith("fulmen.") for name in vars(base)}
    return {n: p for n, p in found.items() if n in ours and isinstance(p, property) and not n.startswith("_")}


def forwarded_path(prop: property) -> str | None:
    """The attribute that a property forwards to: `strategy.world_size`."""
    found = re.fullmatch(r"operator\.attrgetter\('(.+)'\)", repr(prop.fget))
    return found[1] if found else None


@pytest.fixture(scope="module")
def told_by_mypy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """About the scripts, and about one line per property: both in one run, which reads torch once."""
    folder = tmp_path_factory.mktemp("mypy")
    lines = ["from fulmen import Callback, LightningDataModule, LightningModule, Trainer"]
    for cls in CLASSES:
        lines.append(f"def about_{cls.__name__}(it: {cls.__name__}) -> None:")
        for name, prop in public_properties(cls).items():
            lines.append(f"    reveal_type(it.{name})")
            if path := forwarded_path(prop):
                lines.append(f"    reveal_type(it.{path})")
    (folder / "properties.py").write_text("\n".join(lines))
    return run_checker("mypy", folder, folder / "properties.py", *sorted(SCRIPTS.glob("*.py")))


def lines_with_errors(told: str) -> set[tuple[str, int]]:
    found = re.findall(r"([\w.]+\.py):(\d+)(?::\d+)?:? (?:- )?error", told)
    return {(file, int(line)) for file, line in found}


MISTAKES = {
    ("wrong.py", number)
    for number, line in enumerate((SCRIPTS / "wrong.py").read_text().splitlines(), start=1)
    if line.endswith("# mistake")
}


def test_mypy_accepts_what_is_right_and_nothing_else(told_by_mypy: str) -> None:
    assert lines_with_errors(told_by_mypy) == MISTAKES, told_by_mypy


def test_pyright_accepts_what_is_right_and_nothing_else(tmp_path: Path) -> None:
    told = run_checker("pyright", tmp_path, *sorted(SCRIPTS.glob("*.py")))
    assert lines_with_errors(told) == MISTAKES, told


def revealed(told: str, folder_file: str = "properties.py") -> list[str]:
    return re.findall(rf'{re.escape(folder_file)}:\d+: note: Revealed type is "(.+)"', told)


def test_no_public_property_is_unknown_to_a_type_checker(told_by_mypy: str) -> None:
    types_found = iter(revealed(told_by_mypy))
    unknown, different = [], []
    for cls in CLASSES:
        for name, prop in public_properties(cls).items():
            kind = next(types_found)
            if kind == "Any":
                unknown.append(f"{cls.__name__}.{name}")
            if forwarded_path(prop):
                origin = next(types_found)
                if "Any" not in origin and name not in NARROWED and origin != kind:
                    different.append(f"{cls.__name__}.{name} is {kind}, and what it forwards to {origin}")
    assert next(types_found, None) is None
    assert not unknown
    assert not different


# None only before and between runs, which nearly all who read them know not to be in.
NARROWED = ("stage", "lightning_module")


def test_names_that_are_typed_are_those_that_are_known() -> None:
    assert set(get_args(types.AcceleratorName)) == {"auto", "gpu", *AcceleratorRegistry}
    assert set(get_args(types.StrategyName)) == {"auto", *StrategyRegistry}
    assert set(get_args(types.PrecisionName)) == set(PRECISIONS)
    spelled = {value for part in get_args(types.PrecisionInput) for value in get_args(part)}
    assert {str(value) for value in spelled} == {*PRECISIONS, *ALIASES}
