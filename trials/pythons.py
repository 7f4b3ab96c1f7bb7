"""The core of the suite on every Python from 3.10 on that this machine has, each in an environment of its own.

    python -m trials.pythons                     # installs torch for each: gigabytes, the first time
    python -m trials.pythons --only 3.10 3.13 --tests tests/loops
    python -m trials.pythons --list              # only says which there are

Environments are kept as `.venv-3.X`. What pip needs to know, such as `PIP_INDEX_URL`, is read from the environment.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 10)
CORE = (
    "tests/loops/test_fit.py", "tests/data", "tests/metrics", "tests/utilities", "tests/console", "tests/test_trainer.py",
    "tests/test_module.py", "tests/test_datamodule.py", "tests/test_names.py", "tests/test_pickling.py",
)  # fmt: skip
PACKAGES = (
    "numpy",
    "psutil",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pyyaml",
    "rich",
    "tensorboard",
    "torchmetrics",
    "omegaconf",
)
ASK = "import sys; print(*sys.version_info[:3], sys.implementation.name, sys.prefix == sys.base_prefix)"


class Outcome(NamedTuple):
    """What one interpreter did."""

    version: str
    result: str
    seconds: float


def candidates() -> Iterator[Path]:
    """Programs that may be a Python, from pyenv and from the PATH."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob("versions/*/bin/python"))
    for folder in filter(None, os.environ.get("PATH", "").split(os.pathsep)):
        yield from sorted(Path(folder).glob("python3.[0-9]*"))


def find_interpreters() -> dict[str, Path]:
    """The newest CPython of each minor version that is new enough, by ``3.X``."""
    newest: dict[tuple[int, int], tuple[int, Path]] = {}
    for program in candidates():
        if not re.fullmatch(r"python(3\.\d+)?", program.name):
            continue
        try:
            asked = subprocess.run([str(program), "-I", "-c", ASK], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        words = asked.stdout.split()
        if asked.returncode or words[3:] != ["cpython", "True"]:  # a shim without a version, or an environment
            continue
        minor = (int(words[0]), int(words[1]))
        if minor >= OLDEST and int(words[2]) > newest.get(minor, (-1, program))[0]:
            newest[minor] = (int(words[2]), program)
    return {".".join(map(str, minor)): newest[minor][1] for minor in sorted(newest)}


def run_tests(version: str, interpreter: Path, tests: Sequence[str]) -> Outcome:
    """Makes the environment if it is not there, and runs the tests in it."""
    started = time.perf_counter()
    home = ROOT / f".venv-{version}"
    python = home / "bin" / "python"
    ready = home / ".installed"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--editable",
        ".",
        *PACKAGES,
    ]
    try:
        if not ready.exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([str(interpreter), "-m", "venv", str(home)], check=True)
            subprocess.run([*install, "--constraint", "constraints.txt"], cwd=ROOT, check=True)
            ready.touch()
    except subprocess.CalledProcessError as error:
        return Outcome(version, f"not installed: status {error.returncode}", time.perf_counter() - started)
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", "not slow", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was said"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*failed, sep="\n", end="\n" if failed else "")
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", lines[-1])) or lines[-1]
    return Outcome(version, f"{'ok' if done.returncode == 0 else 'FAILED'}: {counts}", time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="3.X", help="these versions")
    parser.add_argument("--tests", nargs="+", default=CORE, help="files and folders instead of the core of the suite")
    parser.add_argument("--list", action="store_true", help="say which interpreters there are, and run nothing")
    options = parser.parse_args()
    found = find_interpreters()
    if missing := set(options.only or ()) - set(found):
        parser.error(f"There is no Python {', '.join(sorted(missing))} here. There are: {', '.join(found) or 'none'}.")
    chosen = {version: found[version] for version in options.only or found}
    if options.list:
        for version, interpreter in chosen.items():
            print(f"{version:6} {interpreter}")
        return
    outcomes = []
    for version, interpreter in chosen.items():
        print(f"Python {version}, {interpreter}", flush=True)
        outcomes.append(run_tests(version, interpreter, options.tests))
    print(f"\n{'python':8} {'result':44} {'seconds':>8}")
    for one in outcomes:
        print(f"{one.version:8} {one.result:44} {one.seconds:8.0f}")
    if not outcomes or any(not one.result.startswith("ok") for one in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
