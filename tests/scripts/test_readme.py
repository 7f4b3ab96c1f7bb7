"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python_blocks(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_four_steps_run_as_printed(tmp_path: Path) -> None:
    (block,) = python_blocks()
    script = tmp_path / "four_steps.py"
    script.write_text(
        block + "\nprint('RESULTS', results[0]['test_loss'], len(predictions), predictions[0].shape[0])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    loss, batches, rows = done.stdout.split("RESULTS ")[1].split()
    assert float(loss) < 0.05
    assert (int(batches), int(rows)) == (1, 100)


@pytest.mark.slow
def test_the_script_for_two_devices_runs_as_printed(tmp_path: Path) -> None:
    """The number of two processes is that of one, and predictions are complete."""
    (block,) = python_blocks("docs/devices.md")
    script = tmp_path / "two_devices.py"
    one = "pl.Trainer(accelerator='cpu', devices=1, logger=False).validate(model, val, verbose=False)"
    script.write_text(block + f"        print('ONE', {one})\n")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = [float(number) for number in re.findall(r"'val_loss': ([\d.e-]+)", done.stdout)]
    assert "297 codes" in done.stdout and len(numbers) == 3  # of both processes, and of one alone
    assert max(numbers) - min(numbers) < 1e-6


def test_the_four_steps_fit_on_a_screen() -> None:
    (block,) = python_blocks()
    assert len([line for line in block.splitlines() if line.strip()]) <= 40


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, broken
