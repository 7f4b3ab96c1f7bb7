"""``python shim/build_wheels.py VERSION``: the wheels that stand in for that version of Lightning, in dist/."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fulmen.compat.versions import DISTRIBUTIONS, NEWEST, check_version

SHIM = Path(__file__).parent
ALL = "fulmen-lightning-shim"


def build_wheel(distribution: str, packages: list[str], version: str, out: Path) -> None:
    """Builds one distribution from the packages, after the example of the project file beside this one."""
    project = (SHIM / "pyproject.toml").read_text(encoding="utf-8")
    project = project.replace(f'name = "{ALL}"', f'name = "{distribution}"')
    project = re.sub(r'^version = ".*"', f'version = "{version}"', project, flags=re.MULTILINE)
    project = re.sub(r"^packages = .*", f"packages = {packages}", project, flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(project, encoding="utf-8")
        shutil.copy(SHIM / "README.md", folder)
        for package in packages:
            shutil.copytree(SHIM / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out.resolve())]
        subprocess.run(command, cwd=folder, check=True)


def build_wheels(version: str, out: Path) -> None:
    """Builds one wheel for each name of Lightning, and the one with all of its packages."""
    check_version(version)
    for distribution, package in DISTRIBUTIONS.items():
        build_wheel(distribution, [package], version, out)
    build_wheel(ALL, list(DISTRIBUTIONS.values()), version, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", nargs="?", default=NEWEST)
    parser.add_argument("--out", type=Path, default=Path("dist"))
    options = parser.parse_args()
    build_wheels(options.version, options.out)
