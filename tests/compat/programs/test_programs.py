"""Libraries that were written for Lightning, as they come from the registry, each in a program of a few lines.

They run where `make test-compat` has installed them, and are skipped elsewhere. Each runs twice, on fulmen and on the
Lightning that the libraries brought along, and has to come to the same numbers. FULMEN_COMPAT_REFERENCE may name a Python of
another environment for the second.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REFERENCE = os.environ.get("FULMEN_COMPAT_REFERENCE", sys.executable)
pytestmark = pytest.mark.skipif(
    os.environ.get("FULMEN_COMPAT_PROGRAMS") != "1",
    reason="needs the libraries of programs/requirements.txt; `make test-compat` installs them and runs this",
)
# By program, the package that it needs beside this one.
PROGRAMS = {
    "darts_nbeats": "darts",
    "gluonts_deepar": "gluonts",
    "hydra_launched": "hydra",
    "mlflow_autolog": "mlflow",
    "neuralforecast_models": "neuralforecast",
    "optuna_pruning": "optuna_integration",
    "optuna_two_ranks": "optuna_integration",
    "pytorch_forecasting_tft": "pytorch_forecasting",
    "torchmetrics_collection": "torchmetrics",
}
# Lightning shuffles on several ranks what the loader does not shuffle.
OTHER_ORDER = {"optuna_two_ranks"}


def run_program(command: list[str], program: str, folder: Path) -> dict:
    """The report of one program, started in a folder of its own."""
    folder.mkdir()
    words = [*command, str(HERE / f"{program}.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_library_trains_saves_and_loads(program, tmp_path):
    if importlib.util.find_spec(PROGRAMS[program]) is None:
        pytest.skip(f"{PROGRAMS[program]} is not installed here")
    ours = run_program([sys.executable, "-m", "fulmen", "run"], program, tmp_path / "fulmen")
    assert ours["trainer"] == "fulmen.trainer"  # and not the Lightning that a library brought along
    tenth = max(1, len(ours["losses"]) // 10)
    assert sum(ours["losses"][-tenth:]) < sum(ours["losses"][:tenth])
    assert ours["saved"] > 0 and not ours["missing"] and ours["reloaded"]
    theirs = run_program([REFERENCE], program, tmp_path / "lightning")
    assert not theirs["trainer"].startswith("fulmen")
    if program not in OTHER_ORDER:
        assert ours["losses"] == theirs["losses"]
    assert ours["result"] == pytest.approx(theirs["result"], rel=1e-6)
    print(f"{program}: {ours['fit_s'] / theirs['fit_s']:.2f} of the time of Lightning {theirs['version']}")
