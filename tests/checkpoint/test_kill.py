"""Processes that are killed while they save; `python -m trials.kill` does the same a thousand times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def test_a_kill_at_any_moment_of_a_save_costs_nothing_that_was_saved_and_leaves_nothing_over():
    command = [sys.executable, "-W", "ignore", "-m", "trials.kill", "--trials", "100", "--naive", "8"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 trials, seed 0: 0 unreadable, 0 lost, 0 orphans" in done.stdout
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("all ")]
    (_, inside, half, *bad), naive = ([int(number) for number in row] for row in rows)
    assert bad == [0, 0, 0]
    assert inside >= 60 and half >= 25, "the kills do not meet the saves"
    assert naive[3] >= 1, "the same kills do not find the faults of a writer that has some"
