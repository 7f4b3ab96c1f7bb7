"""The benchmarks run and print their rows; how fast is not asked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROWS = {
    "calls": ("over the bare loop, nothing on", "each further self.log", "frames from fit to training_step"),
    "imports": ("import fulmen", "threads, processes, network, files, environment"),
    "overhead": ("nothing on", "defaults on, 1 log", "each further log"),
    "memory": ("bare loop", "fit, nothing on", "fit, defaults on, TQDM bar"),
    "autoencoder": (),
    "precision": ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
    "ddp": ("784-64-3-64-784, batch 128: elapsed", "8-2, batch 4: at work"),
    "exact": ("2 processes", "3 processes", "4 processes"),
    "async_save": ("at once", "in the background"),
    "preempt": ("ended with 143, saved at a step, same bits", "10 of 10"),
}


TRIALS = ("exact", "preempt")


def run(name: str, *arguments: str) -> str:
    folder = "trials" if name in TRIALS else "benchmarks"
    command = [sys.executable, "-m", f"{folder}.{name}", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_each_benchmark_prints_its_rows(name: str) -> None:
    output = run(name)
    for row in ROWS[name]:
        assert row in output


def test_absent_data_is_said_aloud(tmp_path: Path) -> None:
    assert run("autoencoder", "--data-dir", str(tmp_path)).startswith("SKIPPED")
