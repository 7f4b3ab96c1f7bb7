"""A launcher that starts the processes again when one dies: `torchrun --max-restarts`."""

from __future__ import annotations

import os
import sys

import pytest
import torch

SCRIPT = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
import fulmen as pl
from support import Regression, make_trainer
from torch.utils.data import DataLoader, TensorDataset

class Model(Regression):
    def training_step(self, batch, batch_idx):
        step, attempt = self.trainer.global_step, os.environ.get("TORCHELASTIC_RESTART_COUNT", "1")
        if step == 8 and self.global_rank == 1 and attempt == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"steps-{attempt}-{self.global_rank}", "a") as file:
            file.write(f"{step}\\n")
        return super().training_step(batch, batch_idx)

def train(strategy):
    torch.manual_seed(1)
    model = Model()
    saver = pl.callbacks.ModelCheckpoint(f"checkpoints-{strategy}", every_n_train_steps=3)
    trainer = make_trainer(devices=2, strategy=strategy, max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    x = torch.randn(20, 4)
    trainer.fit(model, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 2, shuffle=True), ckpt_path="auto")
    return trainer, model

if __name__ == "__main__":
    trainer, model = train("ddp")
    if trainer.is_global_zero:
        torch.save(model.state_dict(), "weights")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_a_process_that_dies_costs_the_steps_since_the_last_file(script, ended, tmp_path, monkeypatch):
    (tmp_path / "restarts.py").write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    code, output = ended(script(before=(*torchrun, "--monitor-interval=0.1", "restarts.py")))
    assert code == 0, output
    steps = [list(map(int, (tmp_path / f"steps-{attempt}-0").read_text().split())) for attempt in (0, 1)]
    assert steps[0] in (list(range(8)), list(range(9)))
    assert steps[1] == list(range(6, 15))  # the newest file is of step 6, inside of an epoch

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    import restarts  # type: ignore[import-not-found]

    _, model = restarts.train("ddp_fork")  # never stopped
    for name, value in torch.load(tmp_path / "weights").items():
        assert torch.equal(value, model.state_dict()[name])
    assert os.path.exists(tmp_path / "checkpoints-ddp" / "epoch=2-step=15.ckpt")
