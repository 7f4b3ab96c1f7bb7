"""Files of earlier versions of this package resume: names inside of the code may change, what files hold may not.

`written_before/` holds what ``python tests/checkpoint/test_written_before.py FOLDER`` wrote with fulmen 0.1.0 as it was
before its files were moved and renamed, with torch 2.13. Write a file anew only for a new case: the point is their age.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import run_ranks
from support import make_loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fulmen as pl
from fulmen.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from fulmen.loggers import CSVLogger
from fulmen.strategies import DDPStrategy, FSDPStrategy
from fulmen.utilities.combined_loader import CombinedLoader

STORED = Path(__file__).parent / "written_before"
EPOCHS, BATCHES = 3, 7
UNFIT = (
    "holds states of callbacks|does not fit|Keys of the|does not say how|left out|another shape|of version|begin anew"
)


class Model(pl.LightningModule):
    """Noise from every generator, buffers, metrics over the epoch, and hyper-parameters that are values and objects."""

    def __init__(self, rate=0.05, paths=(), options=None):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
        self.layer = nn.Linear(3, 1)

    def loss(self, batch):
        x, y = batch
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        return (self.layer(self.backbone(x)) - y).pow(2).mean() * noise

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"largest": loss.detach(), "rows": float(len(batch[0]))}, reduce_fx="max", on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        wanted = (p for p in self.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(wanted, lr=self.hparams.rate)
        by_step = {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}
        on_plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [by_step, {"scheduler": on_plateau, "monitor": "val_loss", "interval": "epoch"}]


class Manual(Model):
    """Two optimizers, stepped by hand."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("loss", loss, on_epoch=True)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.SGD(self.backbone.parameters(), lr=0.02, momentum=0.9)
        return [first, torch.optim.SGD(self.layer.parameters(), lr=0.02)], [torch.optim.lr_scheduler.StepLR(first, 3)]


class Alternating(Model):
    """Two optimizers, each with a loss that a generator yields for it."""

    def training_step(self, batch, batch_idx):
        yield self.loss(batch)
        yield self.loss(batch) * 0.5

    def configure_optimizers(self):
        first = torch.optim.SGD(self.backbone.parameters(), lr=0.02, momentum=0.9)
        return [first, torch.optim.SGD(self.layer.parameters(), lr=0.02)]


class OneSchedule(Model):
    """With the one scheduler that an average of weights takes the place of."""

    def configure_optimizers(self):
        optimizers, schedulers = super().configure_optimizers()
        return optimizers, schedulers[:1]


class Loaders(Model):
    """Several training loaders, of which one is shorter than the others."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["long"], batch_idx) + self.loss(batch["short"])


class Noisy(Dataset):
    """Samples that are changed at random by whoever reads them, in a process of its own."""

    def __len__(self):
        return 4 * BATCHES

    def __getitem__(self, index):
        x = torch.full((4,), float(index)) / 10 + torch.rand(4) + random.random()
        return x, x.sum(0, keepdim=True)


class Saves(pl.Callback):
    """Writes a file when a hook is reached in the second epoch, for the last time at that batch."""

    def __init__(self, path, hook, batch_idx=None):
        self.path = path
        setattr(self, hook, partial(self.save, batch_idx=batch_idx))

    def save(self, trainer, module, *given, batch_idx):
        if trainer.current_epoch == 1 and not trainer.sanity_checking and batch_idx in (None, *given[-1:]):
            trainer.save_checkpoint(self.path)


def shuffled():
    return DataLoader(make_loader(4 * BATCHES).dataset, 4, shuffle=True)


def from_workers():
    return DataLoader(Noisy(), 4, shuffle=True, num_workers=2)


def combined():
    short = DataLoader(make_loader(12, seed=2).dataset, 4, shuffle=True)
    return CombinedLoader({"long": shuffled(), "short": short}, "max_size_cycle")


def every_callback(folder):
    return [
        ModelCheckpoint(folder, "{epoch}-{step}", monitor="val_loss", save_top_k=2, save_last=True),
        EarlyStopping("val_loss", patience=9),
        EMAWeightAveraging(decay=0.9),
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 0.5),
        Timer("00:12:00:00"),
    ]


def schedule(folder):
    return [GradientAccumulationScheduler({0: 1, 1: 2})]


def averaging(folder):
    return [StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=2), ModelCheckpoint(folder, "{epoch}")]


class Case(NamedTuple):
    """In which hook, after which batch of the second epoch, the file is written, and what the run is made of."""

    hook: str
    batch_idx: int | None = None
    model: type[Model] = Model
    loader: Callable[[], Any] = shuffled
    callbacks: Callable[[Path], list] = lambda folder: []
    arguments: dict = {}


CASES = {
    "window": Case("on_train_batch_end", 5, callbacks=every_callback, arguments={"accumulate_grad_batches": 4}),
    "batch_start": Case("on_train_batch_start", 3, callbacks=schedule),
    "validating": Case("on_validation_batch_end", 1, callbacks=every_callback, arguments={"val_check_interval": 3}),
    "epoch_end": Case("on_train_epoch_end", callbacks=every_callback),
    "averaging": Case("on_train_batch_end", 2, OneSchedule, callbacks=averaging),
    "manual": Case("on_train_batch_end", 2, Manual),
    "alternating": Case("on_train_batch_end", 2, Alternating, arguments={"accumulate_grad_batches": 2}),
    "loaders": Case("on_train_batch_end", 4, Loaders, combined),
    "workers": Case("on_train_batch_end", 2, loader=from_workers),
}
ON_TWO_RANKS = {
    "ranks": Case("on_train_batch_end", 2, arguments={"accumulate_grad_batches": 2}),
    "sharded": Case("on_train_batch_end", 1),
}


def fit(case, folder, ckpt_path=None, saved=None, **arguments):
    """The weights at the end of a run, which leaves a file at `saved`."""
    callbacks = case.callbacks(folder) + ([] if saved is None else [Saves(saved, case.hook, case.batch_idx)])
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3 if ckpt_path is None else 99)  # a new process has other generators: the file brings them
    model = case.model(0.02, [PurePosixPath("a/b")], Namespace(deep=[1, 2]))
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    arguments = {"logger": CSVLogger(folder, version=0), "enable_checkpointing": saves, **case.arguments, **arguments}
    trainer = make_trainer(max_epochs=EPOCHS, log_every_n_steps=2, callbacks=callbacks, **arguments)
    trainer.fit(model, case.loader(), make_loader(8, seed=5), ckpt_path=ckpt_path)
    assert trainer.current_epoch >= EPOCHS
    return {name: gather_full(value.detach()).clone() for name, value in model.state_dict().items()}


def fit_on_ranks(name, folder, ckpt_path, saved):
    strategy = FSDPStrategy(state_dict_type="sharded", process_group_backend="gloo")
    strategy = strategy if name == "sharded" else DDPStrategy(process_group_backend="gloo")
    return fit(ON_TWO_RANKS[name], folder, ckpt_path, saved, strategy=strategy, devices=2)


def gather_full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def read(path):
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)


def layout(value, path=""):
    """Paths and types of nested content; file names in keys without their folders."""
    if isinstance(value, dict):
        named = ((Path(key).name if isinstance(key, str) else key, child) for key, child in value.items())
        return {item for key, child in named for item in layout(child, f"{path}/{key}")} | {f"{path} dict"}
    if isinstance(value, (list, tuple)):
        return {item for index, child in enumerate(value) for item in layout(child, f"{path}/{index}")} | {path}
    return {f"{path} {type(value).__name__}"}


def check(path, path_now, weights, expected):
    """Same layout as a file of today, same weights: bit by bit, if this machine computes as the one that wrote it did."""
    stored, now = read(path), read(path_now)
    of_torch = ("optimizer_states", "lr_schedulers")  # whose versions differ in what they keep
    found, found_now = (layout({k: v for k, v in file.items() if k not in of_torch}) for file in (stored, now))
    assert found - found_now == set() and found_now - found == set()
    saved, saved_now = (file.get("state_dict", {}) for file in (stored, now))  # a sharded one has them elsewhere
    exact = all(torch.equal(value, saved_now[name]) for name, value in saved.items())
    precision = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(saved, saved_now, **precision)
    torch.testing.assert_close(weights, expected, **precision)


@pytest.fixture
def stored(tmp_path):
    """Where the file of a case lies, in a folder of the test."""

    def unpack(name):
        shutil.unpack_archive(STORED / f"{name}.tar.xz", tmp_path / "stored" / name)
        return tmp_path / "stored" / name / "saved.ckpt"

    return unpack


@pytest.mark.parametrize("name", CASES)
def test_a_run_ends_with_the_weights_of_one_that_was_not_interrupted(tmp_path, stored, name):
    expected = fit(CASES[name], tmp_path / "whole", saved=tmp_path / "now.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = fit(CASES[name], tmp_path / "resumed", ckpt_path=stored(name))
    check(stored(name), tmp_path / "now.ckpt", weights, expected)
    assert not [warning for warning in caught if re.search(UNFIT, str(warning.message))]


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_processes_do_so_too(tmp_path, stored, name):
    expected = run_ranks(2, fit_on_ranks, name, tmp_path / "whole", None, tmp_path / "now.ckpt")
    weights = run_ranks(2, fit_on_ranks, name, tmp_path / "resumed", stored(name), None)
    check(stored(name), tmp_path / "now.ckpt", weights[0], expected[0])


def test_hyper_parameters_that_are_objects_are_those_of_the_run(stored):
    model = Model.load_from_checkpoint(stored("window"))
    assert model.hparams.paths == [PurePosixPath("a/b")] and model.hparams.options == Namespace(deep=[1, 2])


def write_files(folder):
    for name, case in CASES.items():
        fit(case, folder / "runs", saved=folder / name / "saved.ckpt")
    for name in ON_TWO_RANKS:
        run_ranks(2, fit_on_ranks, name, folder / "runs", None, folder / name / "saved.ckpt")
    shutil.rmtree(folder / "runs")
    for case in folder.iterdir():
        shutil.make_archive(str(case), "xztar", case)
        shutil.rmtree(case)


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
