"""What `import fulmen` adds to `import torch`: modules are counted, seconds only reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = 113
# A script pays for these when it uses what they are for.
FORBIDDEN = (
    "torchmetrics", "tensorboard", "tensorboardX", "torch.utils.tensorboard", "tensorflow", "rich", "tqdm", "fsspec",
    "jsonargparse", "yaml", "matplotlib", "pandas", "scipy", "sklearn", "psutil", "wandb", "mlflow", "comet_ml", "deepspeed",
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.onnx", "onnx",
)  # fmt: skip
SCRIPT_NAMES = ("Trainer", "LightningModule", "LightningDataModule", "Callback")
PROBE = """
import json, sys, torch
before = set(sys.modules)
import fulmen
for name in sys.argv[1:]:
    getattr(fulmen, name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def modules_added(*names: str) -> list[str]:
    """Modules that `import fulmen`, and asking for these names, adds to an interpreter that has torch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", PROBE, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("names", [(), SCRIPT_NAMES], ids=["import", "script"])
def test_few_modules_and_none_of_the_slow_ones(names: tuple[str, ...]) -> None:
    added = modules_added(*names)
    print(f"\n{len(added)} modules over torch, {MODULES} allowed")
    assert len(added) <= MODULES
    slow = [module for module in added if any(module == name or module.startswith(name + ".") for name in FORBIDDEN)]
    assert not slow


def test_importing_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import imports

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    found = imports.probe("fulmen", imports.NAMES)
    print(f"\n{found['seconds']:.3f} seconds over torch")
    assert not found["events"], "threads, processes, network, files or environment were touched"
