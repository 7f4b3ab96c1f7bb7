"""Fixtures that start processes: a line of code, a script that trains, and waiting for all that comes of it."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_python():
    """Runs code in a fresh process and gives its exit status."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return lambda code: subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The folder of a job of one task, and a `scontrol` that writes down there what it was told."""
    for name, value in {"SLURM_NTASKS": 1, "SLURM_JOB_ID": 77, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}.items():
        monkeypatch.setenv(name, str(value))
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    return tmp_path


SCRIPT = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch
import fulmen as pl
from support import Regression, make_loader, make_trainer

mode, strategy = sys.argv[1:3]

class Model(Regression):
    def on_train_start(self):
        with open(f"pid-{self.global_rank}", "w") as file:
            file.write(str(os.getpid()))

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and mode == f"raises {self.global_rank}":
            raise ValueError(f"rank {self.global_rank} is unhappy")
        if batch_idx == 1 and mode == f"dies {self.global_rank}":
            os._exit(7)
        if mode == "long":
            time.sleep(0.01)
        return super().training_step(batch, batch_idx)

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

class Hears(pl.Callback):
    def on_exception(self, trainer, module, exception):
        say("heard of", type(exception).__name__)

def main():
    epochs = 10000 if mode == "long" else 2
    trainer = make_trainer(devices=2, strategy=strategy, max_epochs=epochs, callbacks=Hears())
    model = Model()
    trainer.fit(model, make_loader())
    results = trainer.test(model, make_loader(), verbose=False)
    words = [trainer.global_rank, trainer.global_step, trainer.current_epoch, sorted(results[0]), trainer.state.status.value]
    say("done", *words)

if __name__ == "__main__" or mode == "unguarded":
    main()
"""


@pytest.fixture
def script(tmp_path):
    """Starts a script that trains; what it prints is in one stream, and it leads a session of its own."""
    (tmp_path / "train.py").write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(*arguments, before=("train.py",), stdin=None, **variables):
        command = [sys.executable, *before, *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env={**environment, **variables}, text=True, start_new_session=True,
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


@pytest.fixture
def ended():
    """Waits for a process and all who write to its output; gives its exit code and that output."""
    return _ended


def _ended(process, seconds=600):
    """Exit code and output, once all who write to it have ended."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running: {process.communicate()[0][-3000:]}")
    return process.returncode, output
