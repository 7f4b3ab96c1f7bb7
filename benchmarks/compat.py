"""What the import names of Lightning cost: ``python -m benchmarks.compat [PYTHON WITH LIGHTNING]``.

Prints what a script starts later under `fulmen run` than after `import fulmen` alone, and the import of the stand-in for
`lightning.pytorch` beside that of Lightning itself, if an interpreter that has it is named. Processor time, median of several.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPEATS = 5


def measure_seconds(*command: str) -> float:
    """Processor seconds of a process, the median of several."""
    path = os.pathsep.join([str(ROOT / "shim"), str(ROOT)])
    own = {**os.environ, "PYTHONPATH": path} if command[0] == sys.executable else dict(os.environ)
    spent = []
    for _ in range(REPEATS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env=own, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(spent)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text("import fulmen\n", encoding="utf-8")
        plain = measure_seconds(sys.executable, str(script))
        under_run = measure_seconds(sys.executable, "-m", "fulmen", "run", str(script))
    print(f"import fulmen                      {plain:6.3f} s")
    print(f"the same under `fulmen run`        {under_run:6.3f} s, {under_run - plain:.3f} s more (limit 0.1 s)")
    line = "import lightning.pytorch as pl; pl.Trainer, pl.LightningModule"
    stand_in = measure_seconds(sys.executable, "-c", line)
    print(f"lightning.pytorch by the stand-in  {stand_in:6.3f} s, with the Trainer and torch loaded")
    bare = measure_seconds(sys.executable, "-c", "import lightning.pytorch")
    print(f"the import alone                   {bare:6.3f} s")
    if len(sys.argv) > 1:
        real = measure_seconds(sys.argv[1], "-c", "import lightning.pytorch")
        print(
            f"lightning.pytorch itself           {real:6.3f} s: the stand-in takes {bare / real:.2f} of it (limit 0.3)"
        )


if __name__ == "__main__":
    main()
