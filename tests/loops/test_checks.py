"""Methods whose names are only nearly those of hooks, and stages that there are not: found before anything runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import Callback
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning, is_one_letter_apart


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()


def fit_with(owner: str, **methods):
    """Fit, with methods added to the module, a callback or the datamodule."""
    base = {"module": Plain, "callback": Callback, "datamodule": Data}
    made = {kind: type("Mine", (cls,), methods if kind == owner else {})() for kind, cls in base.items()}
    trainer = make_trainer(callbacks=[made["callback"]], max_epochs=1)
    trainer.fit(made["module"], datamodule=made["datamodule"])
    return trainer


def nothing(self, *args):
    """A method of the user's own."""


@pytest.mark.parametrize(
    "owner, name, hook",
    [
        ("module", "on_training_epoch_end", "on_train_epoch_end"), ("module", "val_step", "validation_step"),
        ("module", "on_val_epoch_end", "on_validation_epoch_end"), ("module", "on_train_step_end", "on_train_batch_end"),
        ("callback", "on_training_start", "on_train_start"), ("callback", "on_fit_begin", "on_fit_start"),
        ("datamodule", "validation_dataloader", "val_dataloader"),
        ("datamodule", "transfer_batches_to_device", "transfer_batch_to_device"),
    ],
)  # fmt: skip
def test_a_method_named_like_a_hook_is_warned_of_and_training_runs(owner, name, hook):
    with pytest.warns(PossibleUserWarning, match=f"Mine.{name}` would never be called.*hook `{hook}`"):
        assert fit_with(owner, **{name: nothing}).global_step == 3


@pytest.mark.parametrize(
    "owner, name, hook",
    [
        ("module", "on_train_epoch_ends", "on_train_epoch_end"), ("module", "configure_model_", "configure_model"),
        ("callback", "on_train_bach_end", "on_train_batch_end"), ("callback", "set_up", "setup"),
        ("callback", "on_exeption", "on_exception"), ("callback", "state_dit", "state_dict"),
        ("datamodule", "perpare_data", "prepare_data"), ("datamodule", "val_dataloaders", "val_dataloader"),
        ("datamodule", "tset_dataloader", "test_dataloader"),
    ],
)  # fmt: skip
def test_a_hook_misspelt_by_one_letter_is_refused(owner, name, hook):
    with pytest.raises(MisconfigurationException, match=f"Mine.{name}`.*Did you mean `{hook}`"):
        fit_with(owner, **{name: nothing})


@pytest.mark.parametrize(
    "owner, name, hook",
    [
        ("module", "training_epoch_end", "on_train_epoch_end"), ("module", "on_epoch_end", "on_train_epoch_end"),
        ("module", "validation_step_end", "on_validation_batch_end"), ("module", "on_hpc_save", "on_save_checkpoint"),
        ("callback", "on_batch_end", "on_train_batch_end"),
        ("callback", "on_keyboard_interrupt", "on_exception"), ("callback", "on_init_end", "setup"),
    ],
)  # fmt: skip
def test_hooks_of_older_versions_are_refused_with_their_successors(owner, name, hook):
    with pytest.raises(NotImplementedError, match=f"Support for `{name}` has been removed.*Use `{hook}`"):
        fit_with(owner, **{name: nothing})


@pytest.mark.parametrize(
    "owner, names",
    [
        ("module", ["on_epoch_end", "on_train_epoch_end"]), ("module", ["log_dicts"]), ("module", ["train_on", "freezes"]),
        ("module", ["training_epoch", "_on_train_epoch_ends"]), ("callback", ["on_batch_end", "on_train_batch_end"]),
        ("callback", ["write_step"]), ("datamodule", ["loader"]),
        ("module", ["on_train_epoch_end", "on_training_epoch_end", "on_train_epoch_ends"]),
    ],
)  # fmt: skip
def test_other_methods_are_the_users_own_business(owner, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PossibleUserWarning)
        assert fit_with(owner, **dict.fromkeys(names, nothing)).global_step == 3


def test_one_letter_apart_means_one_slip_of_a_finger():
    close = [("setup", "setupp"), ("setup", "stup"), ("setup", "setap"), ("setup", "steup")]
    assert all(is_one_letter_apart(*pair) and is_one_letter_apart(*pair[::-1]) for pair in close)
    assert not any(is_one_letter_apart("setup", other) for other in ("setup", "set", "pusetup", "setpp_", "sepup_"))


def equal(self, stage):
    if stage == "train":
        raise AssertionError


def reversed_equal(self, stage):
    if "val" == stage or stage is None:  # noqa: SIM300
        raise AssertionError


def contained(self, stage):
    if stage in ("training", "validation"):
        raise AssertionError


def in_a_callback(self, trainer, module, stage):
    if stage != "fit" and stage == "testing":
        raise AssertionError


def of_another_name(self, verb):
    if verb == "fti":
        raise AssertionError


@pytest.mark.parametrize(
    "owner, setup, unknown, meant",
    [
        ("datamodule", equal, "train", "fit"), ("module", reversed_equal, "val", "validate"),
        ("datamodule", contained, "validation", "validate"), ("callback", in_a_callback, "testing", "test"),
        ("module", of_another_name, "fti", "fit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("hook", ["setup", "teardown"])
def test_a_stage_that_there_is_not_is_named_with_the_one_that_was_meant(owner, setup, unknown, meant, hook):
    with pytest.warns(PossibleUserWarning, match=f"Mine.{hook}` compares `stage` with '{unknown}'.*mean '{meant}'"):
        fit_with(owner, **{hook: setup})


def both_spellings(self, stage):
    self.ready = stage == "fit" or stage == "train" or stage in ("test", "testing", None)


def made_anew(self, stage):
    stage = "train" if stage == "fit" else stage
    self.ready = stage == "train"


def of_something_else(self, stage):
    self.ready = self.__class__.__name__ == "train" and stage == "predict"


@pytest.mark.parametrize("setup", [both_spellings, made_anew, of_something_else])
def test_a_setup_that_also_serves_the_right_stage_is_not_warned_of(setup):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PossibleUserWarning)
        fit_with("datamodule", setup=setup)
