"""Optional packages: found by the name they are imported under, whatever distribution brings them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fulmen.utilities.optional import import_optional, is_installed


def install(folder: Path, distribution: str, package: str, version: str) -> None:
    """What an installer leaves of a package with one file."""
    (folder / f"{package}.py").write_text("answer = 42\n")
    about = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (about / "RECORD").write_text(f"{package}.py,,\n")
    (about / "top_level.txt").write_text(f"{package}\n")


def test_a_distribution_of_another_name_brings_the_package_with_its_version(tmp_path, monkeypatch):
    install(tmp_path, "fulmen-test-skinny", "fulmen_test_tracker", "2.8.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_installed("fulmen_test_tracker") and is_installed("fulmen_test_tracker", ">=2.8.0")
    assert not is_installed("fulmen_test_tracker", ">=2.9")
    assert import_optional("fulmen_test_tracker", "here", ">=2.8").answer == 42
    sys.modules.pop("fulmen_test_tracker")
    with pytest.raises(ModuleNotFoundError, match=r"no version >=3 is installed.*fulmen_test_tracker>=3"):
        import_optional("fulmen_test_tracker", "here", ">=3")


def test_a_package_that_is_not_there_is_named_with_the_line_that_installs_it():
    assert not is_installed("no_such_package_at_all", ">=1")
    with pytest.raises(ModuleNotFoundError, match=r"needed by this test, but it is not installed.*pip install"):
        import_optional("no_such_package_at_all", "by this test")
