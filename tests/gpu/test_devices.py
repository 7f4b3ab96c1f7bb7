"""On one CUDA device: a group of one over NCCL, started in each way that needs no second GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SCRIPT = """
import copy, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
import fulmen as pl
from support import Regression, make_loader, make_trainer

class Model(Regression):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x):
        return self.layer(self.norm(x))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("synced", loss, on_epoch=True, sync_dist=True)
        return loss, len(batch[0])

    def on_train_start(self):
        strategy = self.trainer.strategy
        if not isinstance(strategy, pl.strategies.DDPStrategy):
            return
        assert dist.get_backend() == "nccl" and self.device.type == "cuda"
        assert strategy.broadcast({"a": 1}) == {"a": 1}
        assert strategy.reduce(torch.tensor(3.0, device="cuda"), reduce_op="sum").item() == 3
        assert strategy.all_gather(torch.ones(2, device="cuda")).sum() == 2
        strategy.barrier()

def main():
    strategy, precision = sys.argv[1:3]
    torch.manual_seed(0)
    model = Model()
    alone = copy.deepcopy(model)
    arguments = {"accelerator": "gpu", "devices": 1, "max_epochs": 2, "precision": precision, "accumulate_grad_batches": 2}
    trainer = make_trainer(strategy=strategy, sync_batchnorm=True, **arguments)
    trainer.fit(model, make_loader(20), make_loader(10))
    number = trainer.validate(model, make_loader(10), verbose=False)[0]["val_loss"]
    predictions = trainer.predict(model, make_loader(10))
    one = make_trainer(**arguments)
    one.fit(alone, make_loader(20), make_loader(10))
    for a, b in zip(model.state_dict().values(), alone.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert abs(number - one.validate(alone, make_loader(10), verbose=False)[0]["val_loss"]) < 1e-5
    assert sum(map(len, predictions)) == 10
    print("AS ONE", trainer.global_step)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "torchrun"])
def test_a_group_of_one_over_nccl_gives_the_numbers_of_one_device(strategy, precision, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", strategy, precision]
    if strategy == "torchrun":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "1",
            "train.py",
            "ddp",
            precision,
        ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and "AS ONE 6" in done.stdout, done.stderr[-3000:]
