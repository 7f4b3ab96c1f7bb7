"""The example as a user runs it: a program with a configuration file, started from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def test_the_example_trains_as_its_file_and_its_options_say(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        str(ROOT / "examples/mnist_cli.py"),
        "fit",
        "--config",
        str(ROOT / "examples/mnist_cli.yaml"),
    ]
    options = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=3",
        "--model.latent=5",
        "--trainer.enable_progress_bar=false",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (saved,) = tmp_path.rglob("config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert config["trainer"]["max_epochs"] == 1 and config["model"]["latent"] == 5
    assert config["model"].get("in_features", 64) == 64
    assert list(tmp_path.rglob("*.ckpt")) and list(tmp_path.rglob("metrics.csv"))
