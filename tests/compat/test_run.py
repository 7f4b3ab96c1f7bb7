"""``python -m fulmen run``: programs that were written for Lightning run as `python` would run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fulmen.console.commands import run_command

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, pickle, sys
import multiprocessing
from pathlib import Path
import importlib.metadata
import lightning.pytorch as pl
import beside

class Kept:
    pass

def look():
    import __main__
    return [
        __name__, pl.__name__, importlib.metadata.version("lightning"), __main__ is sys.modules["__main__"],
        pickle.loads(pickle.dumps(Kept)) is Kept, "__spec__" in vars(__main__), beside.WHERE, sys.argv[1:],
    ]

def report(folder):
    Path(folder, "child").write_text(json.dumps(look()))

if __name__ == "__main__":
    folder = sys.argv[1]
    found = {"main": look(), "argv0": sys.argv[0], "path0": sys.path[0], "file": __file__, "spec": str(__spec__)}
    Path(folder, "main").write_text(json.dumps(found))
    child = multiprocessing.get_context("spawn").Process(target=report, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
"""

ENDINGS = """
import sys
import lightning.pytorch
kind = sys.argv[1]
if kind == "exit":
    sys.exit(7)
if kind == "says":
    sys.exit("as it says")
if kind == "interrupt":
    raise KeyboardInterrupt
if kind == "hook":
    sys.excepthook = lambda kind, error, trace: print("its own hook", trace.tb_frame.f_code.co_name)
def fail():
    raise ValueError("as it fails")
if kind != "well":
    fail()
"""

RANKS = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel

if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=sys.argv[1], max_steps=2, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    sys.stdout.write(f"rank {trainer.global_rank} of {trainer.world_size}: {trainer.global_step} steps\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    for name, text in {"program": PROGRAM, "endings": ENDINGS, "ranks": RANKS, "wrong": "x = = 1"}.items():
        (folder / "package" / f"{name}.py").write_text(text)
    (folder / "package" / "beside.py").write_text("WHERE = 'beside the script'")
    (folder / "beside.py").write_text("WHERE = 'in the folder of the call'")
    return folder


def start(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return start(folder, "-m", "fulmen", "run", *words)


def test_a_script_finds_itself_as_python_would_have_it(folder, tmp_path):
    done = ran(folder, "--lightning-version", "2.5.0", "package/program.py", str(tmp_path), "-m", "--", "-x")
    assert done.returncode == 0, done.stderr
    main = json.loads((tmp_path / "main").read_text())
    words = [str(tmp_path), "-m", "--", "-x"]
    seen = ["lightning.pytorch", "2.5.0", True, True, True, "beside the script", words]
    assert main["main"] == ["__main__", *seen]
    assert main["argv0"] == "package/program.py" and main["spec"] == "None"
    assert main["path0"] == str(folder / "package") and main["file"] == str(folder / "package" / "program.py")
    # A process that inherits nothing has the names as well, and the same version.
    assert json.loads((tmp_path / "child").read_text()) == ["__mp_main__", *seen]


def test_a_module_finds_itself_as_python_would_have_it(folder, tmp_path):
    done = ran(folder, "-m", "package.program", str(tmp_path))
    assert done.returncode == 0, done.stderr
    main = json.loads((tmp_path / "main").read_text())
    assert main["main"][0] == "__main__" and main["main"][6] == "in the folder of the call"
    assert main["path0"] == str(folder) and main["argv0"] == main["file"] == str(folder / "package" / "program.py")
    assert "name='package.program'" in main["spec"]
    assert json.loads((tmp_path / "child").read_text())[0] == "__mp_main__"


@pytest.mark.parametrize("kind", ["well", "exit", "says", "fails", "hook"])
def test_programs_end_as_they_do_without(folder, kind):
    words = ("package/endings.py", kind)
    with_names = ran(folder, *words)
    (folder / "lightning" / "pytorch").mkdir(parents=True, exist_ok=True)
    plain = start(folder, *words, PYTHONPATH=str(folder))
    assert (with_names.returncode, with_names.stdout, with_names.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )


def test_an_interrupted_program_ends_by_the_signal(folder):
    done = ran(folder, "package/endings.py", "interrupt")
    assert done.returncode == -signal.SIGINT and done.stderr.startswith("Traceback") and "fulmen/" not in done.stderr


def test_programs_that_cannot_start_are_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path_hooks", list(sys.path_hooks))
    cases = {
        ("missing.py",): (2, "missing.py"),
        (str(folder),): (2, str(folder)),
        (): (2, "SCRIPT"),
        ("--lightning-version", "3.1.0", "x.py"): (2, "3.1.0"),
        ("-m", "no.such.module"): ("fulmen run: No module named 'no'", ""),
        ("-m", "json.nothing"): ("fulmen run: There is no module 'json.nothing'", ""),
    }
    for words, (code, said) in cases.items():
        with pytest.raises(SystemExit) as ended:
            run_command(["run", *words])
        assert ended.value.code == code or str(ended.value.code).startswith(str(code))
        assert said in capsys.readouterr().err


def test_a_program_that_is_no_python_is_shown_as_python_shows_it(folder):
    done, plain = ran(folder, "package/wrong.py"), start(folder, "package/wrong.py")
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr) and "SyntaxError" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_processes_of_a_run_have_the_names_as_well(folder, strategy):
    done = ran(folder, "package/ranks.py", strategy)
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2: 2 steps" in done.stdout
    assert ("rank 1 of 2: 2 steps" in done.stdout) == (strategy == "ddp")


@pytest.mark.slow
def test_torchrun_starts_such_programs(folder):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29531"]
    done = start(folder, *torchrun, "-m", "fulmen", "run", "package/ranks.py", "ddp")
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2: 2 steps" in done.stdout and "rank 1 of 2: 2 steps" in done.stdout
