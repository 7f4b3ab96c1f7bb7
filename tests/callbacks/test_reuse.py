"""Callbacks in several runs: another Trainer begins anew, the same one goes on; and what a script may change on resuming."""

from __future__ import annotations

import os
import time

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    NonFiniteGuard,
    SpikeDetection,
    Timer,
)
from fulmen.callbacks.early_stopping import EarlyStoppingReason
from fulmen.loggers import CSVLogger


class Scripted(Regression):
    """Logs "v" as listed, by epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("v", torch.tensor(float(self.values[self.current_epoch])))


def trainer_with(callbacks, **kwargs):
    writes = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return make_trainer(callbacks=callbacks, enable_checkpointing=writes, **kwargs)


def fit(callbacks, values=(1, 2, 3, 4, 5, 6, 7, 8), ckpt_path=None, trainer=None, **kwargs):
    trainer = trainer or trainer_with(callbacks, **{"max_epochs": 8, **kwargs})
    module = Scripted(values)
    trainer.fit(module, make_loader(4), make_loader(4), ckpt_path=ckpt_path)
    return trainer


# ---------------------------------------------------------------------- another Trainer


def test_another_trainer_begins_anew_and_what_was_can_be_read_until_then(tmp_path):
    stopping, saving, timer = EarlyStopping("v", patience=2), ModelCheckpoint(tmp_path, "{epoch}", "v"), Timer()
    callbacks = [stopping, saving, timer]
    first = fit(callbacks)
    assert (first.current_epoch, stopping.wait_count, saving.best_model_score) == (3, 2, 1)
    trained = timer.time_elapsed()
    trainer_with(callbacks=callbacks).validate(Scripted([9] * 9), make_loader(4), verbose=False)
    assert stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert os.path.basename(saving.best_model_path) == "epoch=0.ckpt"
    assert timer.time_elapsed() == trained

    second = fit(callbacks, values=(9, 8, 7, 6, 5, 4, 3, 2), max_epochs=6)
    assert (second.current_epoch, stopping.wait_count, stopping.best_score) == (6, 0, 4)
    assert stopping.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert (os.path.basename(saving.best_model_path), saving.best_model_score) == ("epoch=5.ckpt", 4)
    assert [*saving.best_k_models] == [saving.best_model_path]
    assert os.path.exists(tmp_path / "epoch=0.ckpt")  # of the first run, which nobody may remove


def test_the_same_trainer_goes_on(tmp_path):
    stopping, saving = EarlyStopping("v", patience=9), ModelCheckpoint(tmp_path, monitor="v")
    trainer = fit([stopping, saving], max_epochs=3)
    trainer.max_epochs = 5
    fit([], trainer=trainer)
    assert (stopping.wait_count, stopping.best_score, saving.best_model_score) == (4, 1, 1)


def test_a_folder_that_was_found_for_one_run_is_not_that_of_the_next(tmp_path):
    saving = ModelCheckpoint()
    folders = []
    for _ in range(2):
        fit([saving], max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
        folders.append(saving.dirpath)
    assert [folder.split(os.sep)[-2] for folder in folders] == ["version_0", "version_1"]


def test_a_rule_that_hangs_on_the_trainer_is_found_out_for_each(tmp_path):
    stopping = EarlyStopping("v", patience=9)
    for every in (1, 2):
        fit([stopping], max_epochs=4, check_val_every_n_epoch=every)
    assert stopping.wait_count == 1  # after two validations, and not once per epoch


def test_the_counts_of_all_callbacks_are_forgotten():
    guard, spikes, windows = NonFiniteGuard("skip"), SpikeDetection(), GradientAccumulationScheduler({1: 2})
    used = [guard, spikes, windows]
    fit(used, max_epochs=2)
    guard.quarantine.append("of the first run")
    assert (len(spikes._recent), windows._set) == (2, 2)
    with pytest.raises(
        ValueError, match="accumulate_grad_batches=2"
    ):  # it is that Trainer's own, not what was set before
        fit(used, max_epochs=1, accumulate_grad_batches=2)
    assert (len(spikes._recent), guard.quarantine) == (0, [])


class Headed(Scripted):
    def __init__(self, values):
        super().__init__(values)
        self.backbone = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def test_finetuning_begins_anew():
    callback = BackboneFinetuning(1, lambda epoch: 1.0)
    groups = []
    for _ in range(2):
        trainer = trainer_with(callbacks=[callback], max_epochs=3)
        trainer.fit(Headed([1, 2, 3]), make_loader(4))
        groups.append([group["lr"] for group in trainer.optimizers[0].param_groups])
    assert groups[0] == groups[1]
    assert len(callback.state_dict()["internal_optimizer_metadata"][0]) == 2


# ---------------------------------------------------------------------- the script of a resumed run


@pytest.fixture
def stopped(tmp_path):
    """The file at the end of a run that stopped after its third epoch, with values 1, 2, 3."""
    stopping, saving = EarlyStopping("v", patience=2), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit([stopping, saving])
    return tmp_path / "epoch=2.ckpt"


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [({"patience": 2}, 3), ({"patience": 6}, 7), ({"patience": 9}, 8), ({"patience": 1}, 3),
     ({"patience": 6, "stopping_threshold": 9}, 4), ({"patience": 6, "divergence_threshold": 5}, 6)],
)  # fmt: skip
def test_rules_of_a_resumed_run_are_those_of_its_script(stopped, arguments, epochs):
    stopping = EarlyStopping("v", **arguments)
    assert fit([stopping], ckpt_path=stopped).current_epoch == epochs
    assert (stopping.patience, stopping.best_score) == (arguments["patience"], 1)


@pytest.mark.parametrize(
    ("before", "after", "epochs"),
    [({"divergence_threshold": 2}, {"divergence_threshold": 5}, 6), ({"divergence_threshold": 2}, {}, 8),
     ({"divergence_threshold": 2}, {"divergence_threshold": 2.5}, 3), ({"check_finite": True}, {"check_finite": False}, 8)],
)  # fmt: skip
def test_an_end_that_today_would_be_none_is_taken_back(tmp_path, before, after, epochs):
    values = (1, 2, float("nan"), 4, 5, 6, 7, 8) if "check_finite" in before else (1, 2, 3, 4, 5, 6, 7, 8)
    fit([EarlyStopping("v", patience=99, **before), ModelCheckpoint(tmp_path, "a")], values)
    stopping = EarlyStopping("v", patience=99, **after)
    trainer = fit([stopping], values, ckpt_path=tmp_path / "a.ckpt")
    assert trainer.current_epoch == epochs
    assert (stopping.stopping_reason is EarlyStoppingReason.NOT_STOPPED) == (epochs == 8)


def test_a_run_that_stopped_stays_stopped_whatever_its_file_is_of(tmp_path):
    trainer = fit([EarlyStopping("v", patience=2)])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert fit([EarlyStopping("v", patience=2)], ckpt_path=tmp_path / "after.ckpt").current_epoch == 3


@pytest.mark.parametrize(("kept", "then", "left"), [(3, 1, 1), (1, 3, 3), (-1, 2, 2), (2, -1, 4)])
def test_another_number_of_files_is_kept(tmp_path, kept, then, left):
    values = (9, 8, 7, 6, 5)
    fit([ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=kept)], values, max_epochs=3)
    saving = ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=then)
    fit([saving], values, max_epochs=5, ckpt_path=tmp_path / "epoch=2.ckpt")
    expected = {"epoch=4.ckpt", *(f"epoch={4 - back}.ckpt" for back in range(left))}
    assert {os.path.basename(path) for path in saving.best_k_models} == expected
    # The file that the run came from is never removed.
    assert {*os.listdir(tmp_path)} == expected | {"epoch=2.ckpt"}


def test_worse_values_do_not_enter_a_list_that_has_become_shorter(tmp_path):
    values = (1, 3, 5, 4, 9)
    fit([ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=3), ModelCheckpoint(tmp_path, "a")], values, max_epochs=3)
    saving = ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=1)
    fit([saving], values, max_epochs=5, ckpt_path=tmp_path / "a.ckpt")
    assert "epoch=3.ckpt" not in os.listdir(tmp_path)
    assert saving.best_model_score == 1


def test_files_are_remembered_though_they_are_written_at_other_times_now(tmp_path):
    fit([ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=2)], max_epochs=2)
    saving = ModelCheckpoint(tmp_path, "{epoch}", "v", save_top_k=2, every_n_train_steps=100)
    fit([saving], max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [os.path.basename(path) for path in saving.best_k_models] == ["epoch=0.ckpt", "epoch=1.ckpt"]


def test_more_time_and_earlier_unfreezing(tmp_path):
    class Slow(Scripted):
        def training_step(self, batch, batch_idx):
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    def run(duration, ckpt_path=None):
        timer = Timer({"milliseconds": duration}, interval="epoch")
        trainer = trainer_with(callbacks=[timer, ModelCheckpoint(tmp_path, "time")], max_epochs=4)
        trainer.fit(Slow(range(9)), make_loader(4), ckpt_path=ckpt_path)
        return trainer.current_epoch

    assert run(1) == 1
    assert run(100_000, tmp_path / "time.ckpt") == 4

    def tune(at, epochs, ckpt_path=None):
        callback = BackboneFinetuning(at, lambda epoch: 1.0)
        trainer = trainer_with(callbacks=[callback, ModelCheckpoint(tmp_path, "tune")], max_epochs=epochs)
        trainer.fit(module := Headed(range(9)), make_loader(4), ckpt_path=ckpt_path)
        return module.backbone.weight.requires_grad

    assert not tune(9, 3)
    assert tune(1, 5, tmp_path / "tune.ckpt")


def test_a_second_fit_goes_on_with_what_was_unfrozen():
    callback = BackboneFinetuning(1, lambda epoch: 0.5)
    trainer = trainer_with([callback], max_epochs=3)
    trainer.fit(module := Headed(range(9)), make_loader(4))
    before = module.backbone.weight.clone()
    trainer.max_epochs = 4
    trainer.fit(module, make_loader(4))
    groups = trainer.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.0025])
    assert not torch.equal(before, module.backbone.weight)


def test_the_window_of_losses_is_there_after_a_resume(tmp_path):
    first = SpikeDetection(window=3)
    trainer = fit([first], max_epochs=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = SpikeDetection(window=4)
    fit([again], max_epochs=4, ckpt_path=tmp_path / "a.ckpt")
    assert [*again._recent][:3] == [*first._recent]
    assert len(again._recent) == 4
