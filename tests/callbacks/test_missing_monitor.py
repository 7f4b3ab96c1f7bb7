"""What is monitored and is not there: named with the reason and the fix, as soon as it can be known."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import EarlyStopping, ModelCheckpoint
from fulmen.utilities.errors import MisconfigurationException

WATCHERS = ("stopping", "checkpoint", "schedule")


class Net(Regression):
    """Counts its steps; `logs` says how validation logs."""

    def __init__(self, monitor=None, **logs):
        super().__init__()
        self.watched, self.logs, self.steps = monitor, logs, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), **self.logs)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        if self.watched is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.watched}}


def run(watcher, monitor, folder, kind=Net, val=True, logs=None, **kwargs):
    model = kind(monitor if watcher == "schedule" else None, **(logs or {}))
    callbacks = {"stopping": [EarlyStopping(monitor)], "checkpoint": [ModelCheckpoint(folder, monitor=monitor)]}
    kwargs = {"max_epochs": 2, "enable_checkpointing": watcher == "checkpoint", **kwargs}
    trainer = make_trainer(callbacks=callbacks.get(watcher, []), **kwargs)
    try:
        trainer.fit(model, make_loader(), make_loader() if val else None)
    finally:
        trainer.steps_made = model.steps
        run.last = trainer
    return trainer


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_value_of_single_steps_is_named_as_such(watcher, tmp_path):
    with pytest.raises((RuntimeError, MisconfigurationException), match=r"single steps only.*on_epoch=True") as told:
        run(watcher, "val_loss", tmp_path, logs={"on_step": True, "on_epoch": False})
    assert "`validation_step`" in str(told.value) and run.last.steps_made == 3
    with pytest.raises((RuntimeError, MisconfigurationException), match="`val_loss_step` is not .*'val_loss_epoch'"):
        run(watcher, "val_loss_step", tmp_path, logs={"on_step": True, "on_epoch": True})


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_only_validation_could_log_is_refused_before_the_first_batch_if_there_is_none(watcher, tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`val_loss` will not be available.*no `val_dataloader`"):
        run(watcher, "val_loss", tmp_path, val=False)
    assert run.last.steps_made == 0

    class Unwritten(Net):
        validation_step = Regression.__mro__[1].validation_step

    with pytest.raises(MisconfigurationException, match=r"no `validation_step`.*Define it in Unwritten"):
        run(watcher, "val_loss", tmp_path, kind=Unwritten)
    assert run.last.steps_made == 0


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_an_earlier_call_logged_is_not_what_this_one_monitors(watcher, tmp_path):
    """A second fit begins without the metrics of the first, so that what it asks of validation it must get itself."""
    trainer = run(watcher, "val_loss", tmp_path)
    assert "val_loss" in trainer.callback_metrics
    for _ in range(2):
        trainer.fit_loop.max_epochs += 1
        with pytest.raises(MisconfigurationException, match=r"`val_loss` will not be available.*no validation in this"):
            trainer.fit(trainer.lightning_module, make_loader())
        assert trainer.global_step == 6
    trainer.fit(trainer.lightning_module, make_loader(), make_loader())
    assert trainer.current_epoch == 4 and trainer.global_step == 12


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_name_nobody_logs_ends_the_first_epoch_with_the_nearest_one(watcher, tmp_path):
    with pytest.raises((RuntimeError, MisconfigurationException), match="no such name was logged.*val_loss"):
        run(watcher, "val_los", tmp_path)
    assert run.last.steps_made == 3


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_validation_of_ones_own_may_log_what_is_monitored(watcher, tmp_path):
    class Own(Net):
        validation_step = Regression.__mro__[1].validation_step

        def on_train_epoch_end(self):
            self.log("val_loss", 1.0)

    assert run(watcher, "val_loss", tmp_path, kind=Own, val=False).steps_made == 6


def test_what_need_not_be_there_is_not_asked_for(tmp_path):
    for given in ({"fast_dev_run": True}, {"limit_val_batches": 0}):
        run("checkpoint", "val_loss", tmp_path, **given)
    trainer = make_trainer(callbacks=[EarlyStopping("val_loss", strict=False)])
    trainer.fit(Net(), make_loader())
    assert trainer.global_step == 3


def test_a_value_that_comes_later_is_waited_for(tmp_path):
    class Late(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1:
                self.log("train_accuracy", 1.0)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="no such name was logged"):
        run("checkpoint", "train_accuracy", tmp_path, kind=Late, val=False)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=1-step=6.ckpt"]


def test_without_validation_it_stops_after_training_epochs(tmp_path):
    """An interval of validation that never comes does not keep it from looking."""

    class Same(Net):
        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

    for given in ({"val_check_interval": 2, "limit_val_batches": 0}, {"check_val_every_n_epoch": 2}):
        trainer = make_trainer(callbacks=[EarlyStopping("flat", patience=2)], max_epochs=9, **given)
        trainer.fit(Same(), make_loader())
        assert trainer.current_epoch == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stopping_threshold": 10.0}, "Stopping threshold"),
        ({"divergence_threshold": 0.5}, "Divergence threshold"),
        ({"patience": 1}, "did not improve"),
        ({"check_finite": True}, "not finite"),
    ],
)
def test_one_line_says_why_training_stopped(arguments, words, caplog):
    class Told(Net):
        def on_train_epoch_end(self):
            self.log("value", float("nan") if words == "not finite" else 1.0)

    for verbose in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="fulmen"):
            callback = EarlyStopping("value", verbose=verbose, **arguments)
            make_trainer(callbacks=[callback], max_epochs=9).fit(Told(), make_loader())
        lines = [record.getMessage() for record in caplog.records if words in record.getMessage()]
        assert len(lines) == 1 and "value" in lines[0]
        assert callback.stopping_reason_message in lines[0]
        assert caplog.text.count("`Trainer.fit` stopped: ") == 1


def test_a_stop_of_ones_own_is_said_too(caplog):
    class Stops(Net):
        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    with caplog.at_level(logging.INFO, logger="fulmen"):
        make_trainer(max_epochs=9).fit(Stops(), make_loader())
    assert "`Trainer.fit` stopped: `trainer.should_stop` was set." in caplog.text


# ---------------------------------------------------------------------- "epoch" and "step", which are always there


@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize(
    ("monitor", "mode", "trigger", "kept"),
    [
        ("step", "max", {"every_n_train_steps": 4}, [8, 12]),
        ("step", "min", {"every_n_train_steps": 4}, [4, 8]),
        ("epoch", "max", {"every_n_train_steps": 4}, [4, 8]),
        ("step", "max", {"train_time_interval": timedelta(0)}, [14, 15]),
    ],
)
def test_the_counters_are_monitored_inside_an_epoch(tmp_path, monitor, mode, trigger, kept, val):
    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 15:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    saver = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode, save_top_k=2, save_last=True, **trigger)
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(Breaks(), make_loader(80), make_loader() if val else None)
    names = {f"epoch=0-step={step}.ckpt" for step in kept} | {"last.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == names


def test_a_counter_of_the_user_counts_as_what_it_is(tmp_path):
    class Own(Net):
        def validation_step(self, batch, batch_idx):
            self.log("step", 100.0)

    saver = ModelCheckpoint(tmp_path, monitor="step", every_n_train_steps=3, mode="max", filename="{step}")
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=2)
    trainer.fit(Own(), make_loader(), make_loader())
    assert saver.best_model_score == 100
