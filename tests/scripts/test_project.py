"""The project's own files agree with each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def listed(name: str) -> list[str]:
    """The strings of a one- or many-line list in pyproject.toml (tomllib is not in Python 3.10)."""
    match = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.DOTALL | re.MULTILINE)
    assert match, name
    return re.findall(r'"([^"]+)"', match[1])


def test_the_version_is_the_one_that_is_installed_and_announced() -> None:
    import fulmen

    declared = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert fulmen.__version__ == declared
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_and_tqdm_are_all_that_is_required() -> None:
    assert listed("dependencies") == ["torch>=2.6", "tqdm>=4.60"]


def test_a_script_can_import_everything_without_any_optional_package(tmp_path: Path) -> None:
    code = """
import sys
for name in ("rich", "tensorboard", "tensorboardX", "torchmetrics", "psutil", "matplotlib", "sklearn", "yaml", "onnx"):
    sys.modules[name] = None
import fulmen, fulmen.callbacks, fulmen.loggers, fulmen.profilers, fulmen.utilities
for module in (fulmen, fulmen.callbacks, fulmen.loggers, fulmen.profilers, fulmen.utilities):
    for name in module.__all__:
        getattr(module, name)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_layers_are_the_same_in_both_places_that_check_them() -> None:
    from_pyproject = [set(re.findall(r"\w+", row)) for row in listed("layers")]
    rows = re.findall(r"^    \((\{.*?)\),$", (ROOT / "tests/architecture/test_layers.py").read_text(), re.MULTILINE)
    from_test = [set(re.findall(r'"(\w+)"', row)) for row in rows]
    assert from_pyproject == from_test[::-1]


def test_every_difference_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "differences.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| fulmen")]
    reference = r"(?:[\w/]+\.py)?::\w+"
    named = [re.search(rf"\| (`{reference}`(?:, `{reference}`)*) \|$", row) for row in rows]
    assert all(named), [row for row, match in zip(rows, named) if not match]
    missing, path = [], ROOT
    for match in named:
        for file, test in re.findall(r"`([\w/.]*)::(\w+)`", match[1]):
            path = ROOT / "tests" / file if file else path  # without a file, the one named before
            if not path.is_file() or f"def {test}(" not in path.read_text():
                missing.append(f"{path}::{test}")
    assert not missing, missing


def test_where_is_what_names_files_and_names_that_exist() -> None:
    page = (ROOT / "docs" / "where-is-what.md").read_text()
    rows = [line.split("|")[2:4] for line in page.splitlines() if line.startswith("| ") and ".py`" in line]
    assert len(rows) >= 20
    for files, names in rows:
        paths = [ROOT / "fulmen" / path for path in re.findall(r"`([\w/]+\.py)`", files)]
        assert all(path.is_file() for path in paths), files
        source = "\n".join(path.read_text() for path in paths)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(class|def) {name}\b|^{name}\b", source, re.MULTILINE), f"{name} is not in {files}"
