"""Training goes on from files of versions before 2.0.

`golden_1_6.json` is what `python -m trials.interchange --golden` took from files that version 1.6.5 wrote inside of
different hooks, with the batch that its own run trained next. Versions 1.7, 1.8 and 1.9 write the same counters.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import make_trainer
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import EarlyStopping, ModelCheckpoint
from fulmen.checkpoint import upgrade
from fulmen.checkpoint.lightning_format import API_VERSION, migrate_checkpoint, to_loops
from fulmen.console.commands import run_command
from fulmen.utilities.errors import PossibleUserWarning

GOLDEN = json.loads((Path(__file__).parent / "golden_1_6.json").read_text())
CASES = GOLDEN["cases"]


def revived(value):
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: revived(child) for key, child in value.items()}
    return [revived(child) for child in value] if isinstance(value, list) else value


def write(path, case, version=GOLDEN["version"]):
    """A file of that case, with the states of the one that is recorded in full."""
    content = {**CASES["epoch_end"]["content"], **CASES[case]["content"]}
    torch.save({**revived(content), "pytorch-lightning_version": version}, path)
    return torch.load(path, weights_only=True)


class Model(pl.LightningModule):
    """As in the run that was recorded; keeps what it was when the first batch came."""

    def __init__(self, width=2):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)
        self.first, self.validations = None, 0

    def on_validation_end(self):
        self.validations += self.first is None

    def on_train_batch_start(self, batch, batch_idx):
        if self.first is None:
            trainer = self.trainer
            place = {"epoch": trainer.current_epoch, "batch": batch_idx, "global_step": trainer.global_step}
            states = {name: value.clone() for name, value in self.state_dict().items()}
            optimizer = {
                k: {n: v.clone() for n, v in s.items()} for k, s in self.optimizers().state_dict()["state"].items()
            }
            self.first = place, states, optimizer, trainer.lr_scheduler_configs[0].scheduler.state_dict()

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).pow(2).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def resumed(path, **arguments):
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    callbacks = [ModelCheckpoint("/run/kept", monitor="val_loss", save_top_k=2, every_n_epochs=1)]
    callbacks[0]._save_checkpoint = callbacks[0]._remove_checkpoint = lambda trainer, filepath: None
    callbacks.append(EarlyStopping("val_loss", patience=9))
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=True, **arguments)
    model = Model()
    trainer.fit(model, loader, loader, ckpt_path=path)
    return model, callbacks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["1.6.5", "1.9.5"])
def test_training_goes_on_at_the_batch_that_the_run_would_have_trained_next(tmp_path, case, version):
    saved = write(tmp_path / "a.ckpt", case, version)
    model, (_, stopping) = resumed(tmp_path / "a.ckpt", **CASES[case]["arguments"])
    place, weights, optimizer, scheduler = model.first
    assert place == CASES[case]["next"]
    assert all(torch.equal(weights[name], value) for name, value in saved["state_dict"].items())
    for key, state in saved["optimizer_states"][0]["state"].items():
        assert all(torch.equal(optimizer[key][name], value) for name, value in state.items())
    assert stopping.best_score < 1
    assert model.validations == (case in ("last_batch_end", "validation_end"))
    if case == "epoch_end":
        assert scheduler["last_epoch"] == saved["lr_schedulers"][0]["last_epoch"] == 2


def test_callbacks_and_the_end_of_the_run_are_those_of_the_run_that_wrote_the_file(tmp_path):
    saved = write(tmp_path / "a.ckpt", "epoch_end")
    model, (checkpoints, stopping) = resumed(tmp_path / "a.ckpt")
    states = list(saved["callbacks"].values())
    assert len(checkpoints.best_k_models) == 2
    assert checkpoints.best_model_score <= min(
        state["best_model_score"] for state in states if "best_model_score" in state
    )
    assert stopping.best_score == checkpoints.best_model_score and stopping.wait_count == 0
    end = [torch.tensor(values) for values in CASES["epoch_end"]["end"]]
    for found, expected in zip(model.parameters(), end):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-7)


def test_the_counters_have_the_layout_of_today():
    def layout(tree):
        return {key: layout(value) for key, value in tree.items()} if isinstance(tree, dict) else type(tree)

    content = {**CASES["epoch_end"]["content"], "pytorch-lightning_version": "1.6.5"}
    assert layout(migrate_checkpoint(content)["loops"]) == layout(to_loops({}))


def test_older_ones_are_read_as_far_as_is_sure():
    old = {"pytorch-lightning_version": "1.4.9", "epoch": 3, "global_step": 12, "callbacks": {int: {}}}
    with pytest.warns(PossibleUserWarning, match="1.4.9"):
        loops = migrate_checkpoint({**old, "NativeMixedPrecisionPlugin": {"scale": 2.0}})["loops"]
    assert loops == to_loops({"epochs": 3, "steps": 12})


def test_upgrade_brings_files_up_to_date_and_keeps_what_was(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "inner").mkdir()
    path, new = tmp_path / "inner" / "a.ckpt", tmp_path / "new.ckpt"
    write(path, "epoch_end")
    write(new, "epoch_end", API_VERSION)
    (tmp_path / "broken.ckpt").write_text("nothing")
    before, untouched = path.read_bytes(), new.read_bytes()
    with pytest.raises(SystemExit) as ended:
        run_command(["upgrade", str(tmp_path), "--map-to-cpu"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and "1 of 3 files" in said.err
    assert f"{path}: was of version 1.6.5" in said.out and f"{new}: up to date" in said.out
    assert "broken.ckpt: left as it is" in said.out and not (tmp_path / "broken.ckpt.bak").exists()
    assert path.with_name("a.ckpt.bak").read_bytes() == before and new.read_bytes() == untouched
    caplog.clear()
    model, _ = resumed(path)
    assert model.first[0] == CASES["epoch_end"]["next"] and "brought up to date" not in caplog.text
    assert torch.load(path)["legacy_pytorch-lightning_version"] == "1.6.5"


def test_the_command_is_found_under_its_earlier_path_too():
    root = str(Path(__file__).parents[2])
    words = [sys.executable, "-m", "fulmen", "upgrade", "--help"]
    ended = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
    assert "--map-to-cpu" in ended.stdout
    assert importlib.import_module("fulmen.utilities.upgrade_checkpoint").main is upgrade.main
