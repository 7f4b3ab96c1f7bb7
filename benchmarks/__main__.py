"""Every benchmark, one after the other: ``python -m benchmarks [--package NAME] [--quick]``."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("calls", "imports", "overhead", "fabric", "lr_find", "autoencoder", "precision", "memory", "ddp", "async_save")

if __name__ == "__main__":
    failed = []
    for name in NAMES:
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
