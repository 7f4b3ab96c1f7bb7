import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_python():
    """Runs code in a fresh process and gives its exit status."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return lambda code: subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode
