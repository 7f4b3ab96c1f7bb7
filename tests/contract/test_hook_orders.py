"""The order in which hooks run, compared event by event with recordings of PyTorch Lightning 2.6."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The exit status after Ctrl-C is 130, as of other programs; the hooks are the same.
ON_PURPOSE = [
    "fit_keyboard_interrupt: at event 62: recorded '== SystemExit(1), status interrupted', got '== SystemExit(130)"
]


@pytest.fixture(scope="module")
def answer(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the recorder says about all scenarios, run in one process of their own."""
    recordings = shared / "reference" / "hook_orders.json"
    command = [sys.executable, str(shared / "tools" / "record_hooks.py"), "--package", "fulmen"]
    command += ["--compare", str(recordings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path_factory.mktemp("hooks")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_scenario_was_run(answer: str, shared: Path) -> None:
    recorded = json.loads((shared / "reference" / "hook_orders.json").read_text())["scenarios"]
    compared = answer.splitlines()[-1].rpartition("/")[2]
    assert int(compared) == len(recorded) >= 63


def test_hooks_run_in_the_recorded_order(answer: str) -> None:
    differences = [line for line in answer.splitlines() if line.startswith("DIFF")]
    unknown = [line for line in differences if not any(line.startswith(f"DIFF {known}") for known in ON_PURPOSE)]
    assert not unknown, "\n".join(unknown)
    equal, _, compared = answer.splitlines()[-1].removeprefix("hooks ").partition("/")
    assert int(equal) == int(compared) - len(ON_PURPOSE)
