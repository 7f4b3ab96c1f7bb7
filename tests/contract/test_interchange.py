"""Files go both ways between fulmen and the reference package: run with its interpreter in FULMEN_REFERENCE_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = os.environ.get("FULMEN_REFERENCE_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not REFERENCE, reason="needs FULMEN_REFERENCE_PYTHON: a Python that has Lightning 2.x installed"
)

SCRIPT = """
import importlib, json, sys, warnings, logging
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, TensorDataset
pl = importlib.import_module(sys.argv[1])
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
callbacks = importlib.import_module(sys.argv[1] + ".callbacks")

class Model(pl.LightningModule):
    def __init__(self, width=3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

def fit(epochs, folder, ckpt_path=None):
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    loader = DataLoader(TensorDataset(x), batch_size=2)
    kept = [callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1),
            callbacks.EarlyStopping("val_loss", patience=9)]
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=kept, num_sanity_val_steps=0,
                         enable_progress_bar=False, enable_model_summary=False)
    model = Model()
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder + "/after.ckpt")
    state = {"epoch": trainer.current_epoch, "step": trainer.global_step,
             "lr": trainer.optimizers[0].param_groups[0]["lr"], "wait": kept[1].wait_count,
             "weight": model.layer.weight.flatten().tolist()}
    print("STATE " + json.dumps(state))

if sys.argv[2] == "load":
    model = Model.load_from_checkpoint(sys.argv[3])
    print("STATE " + json.dumps({"width": model.hparams.width, "weight": model.layer.weight.flatten().tolist()}))
else:
    fit(int(sys.argv[3]), sys.argv[4], sys.argv[5] if len(sys.argv) > 5 else None)
"""


def call(package: str, *arguments: str) -> dict:
    python = sys.executable if package == "fulmen" else REFERENCE
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root if package == "fulmen" else ""}
    done = subprocess.run(
        [python, "-c", SCRIPT, package, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("STATE ")).removeprefix("STATE ")
    )


PAIRS = [("lightning.pytorch", "fulmen"), ("fulmen", "lightning.pytorch")]


@pytest.mark.parametrize("writer, reader", PAIRS)
def test_hyper_parameters_and_weights_are_read(tmp_path, writer, reader):
    written = call(writer, "fit", "2", str(tmp_path))
    assert call(reader, "load", str(tmp_path / "epoch=1.ckpt")) == {"width": 3, "weight": written["weight"]}


@pytest.mark.parametrize("name", ["epoch=1.ckpt", "after.ckpt"])
@pytest.mark.parametrize("writer, reader", PAIRS)
def test_training_continues_from_the_other_ones_file(tmp_path, writer, reader, name):
    call(writer, "fit", "2", str(tmp_path / "first"))
    whole = call(writer, "fit", "4", str(tmp_path / "whole"))
    resumed = call(reader, "fit", "4", str(tmp_path / "rest"), str(tmp_path / "first" / name))
    assert resumed == whole
