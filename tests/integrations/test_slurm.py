"""One command that SLURM starts, tells to end, puts back into the queue and starts again, until it is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs signals"),
    pytest.mark.filterwarnings("ignore:.*validation_step"),
]


@pytest.fixture
def job(slurm, monkeypatch):
    """The folder of a job that has a name, too."""
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    return slurm


class Told(Regression):
    """SLURM says after so many steps of all starts that its time is over."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps = steps

    def training_step(self, batch, batch_idx):
        if self.global_step == self.steps:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().training_step(batch, batch_idx)


def start(folder: Path, ckpt_path: str, steps: int | None = None) -> tuple[int, list[torch.Tensor]]:
    """The command, once: at which step it began and the weights at its end; it may be told to end after so many steps."""
    began = []

    class Model(Told):
        def on_train_start(self):
            began.append(self.global_step)

    torch.manual_seed(1)
    model = Model(steps)
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=1000)
    trainer = make_trainer(default_root_dir=folder, callbacks=[saver], enable_checkpointing=True, max_epochs=3)
    if steps is None:
        trainer.fit(model, make_loader(20, shuffle=True), ckpt_path=ckpt_path)
    else:
        with pytest.raises(SystemExit):
            trainer.fit(model, make_loader(20, shuffle=True), ckpt_path=ckpt_path)
    return began[0], [weight.detach() for weight in model.parameters()]


@pytest.mark.filterwarnings("ignore:.*is not empty")
@pytest.mark.parametrize("ckpt_path", ["hpc", "auto"])
def test_a_first_start_begins_anew_and_a_requeued_one_goes_on(job, ckpt_path):
    assert start(job / "told to end", ckpt_path, steps=3)[0] == 0
    assert start(job / "told to end", ckpt_path, steps=9)[0] == 4
    began, weights = start(job / "told to end", ckpt_path)
    assert began == 10
    assert (job / "told").read_text() == "requeue 77\n" * 2
    never_told = start(job / "in peace", ckpt_path)
    assert never_told[0] == 0 and all(map(torch.equal, weights, never_told[1]))


def test_without_slurm_hpc_still_needs_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"no `hpc_ckpt_N.ckpt` is in"):
        make_trainer(default_root_dir=tmp_path).fit(Regression(), make_loader(), ckpt_path="hpc")


def test_hpc_is_for_training_also_in_a_job(job):
    with pytest.raises(ValueError, match=r"no `hpc_ckpt_N.ckpt` is in"):
        make_trainer(default_root_dir=job).validate(Regression(), make_loader(), ckpt_path="hpc")


SCRIPT = """
import sys, time, torch
import fulmen as pl
from support import Regression, make_loader, make_trainer

class Model(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_step == int(sys.argv[2]):
            print("ready", flush=True)
            time.sleep(60)  # interrupted by the signal, whose handler returns here
        return super().training_step(batch, batch_idx)
    def on_train_start(self):
        print("began", self.global_step, flush=True)

pl.seed_everything(1)
saver = pl.callbacks.ModelCheckpoint("saved", every_n_train_steps=1000)
trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=3)
trainer.fit(Model(), make_loader(20, shuffle=True), ckpt_path=sys.argv[1])
print("over", trainer.global_step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ckpt_path", ["hpc", "auto"])
def test_the_same_with_real_processes(job, ckpt_path):
    (job / "train.py").write_text(SCRIPT.replace("time.sleep(60)", "time.sleep(0.5)"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(told_after: int) -> tuple[int, list[str]]:
        command = [sys.executable, "-W", "ignore", "train.py", ckpt_path, str(told_after)]
        process = subprocess.Popen(command, cwd=job, env=environment, text=True, stdout=subprocess.PIPE)
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line == "ready\n":
                process.send_signal(signal.SIGUSR1)
        return process.wait(), [line for line in lines if line.startswith(("began", "over"))]

    assert run(3) == (143, ["began 0"])
    assert run(9) == (143, ["began 4"])
    assert run(-1) == (0, ["began 10", "over 15"])
    assert (job / "told").read_text() == "requeue 77\n" * 2
