"""What `self.log` accepts, and what users read of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.utilities.errors import MisconfigurationException


class Logs(Regression):
    def __init__(self, value, **options):
        super().__init__()
        self.value, self.options = value, options

    def training_step(self, batch, batch_idx):
        self.log("v", self.value, **self.options)
        return self.loss(batch)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (torch.tensor(3), 3.0),
        (torch.tensor(True), 1.0),
        (torch.tensor([[0.5]], dtype=torch.float16), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (np.float32(0.5), 0.5),
        (True, 1.0),
    ],
)
def test_values_of_steps_are_read_as_floats_as_those_of_epochs_are(value, read):
    trainer = make_trainer()
    trainer.fit(Logs(value, on_epoch=True), make_loader(4))
    assert set(trainer.callback_metrics) == {"v", "v_step", "v_epoch"}
    for name, found in (*trainer.callback_metrics.items(), *trainer.logged_metrics.items()):
        assert (found.dtype, found.shape, found.item()) == (torch.float32, (), read), name


@pytest.mark.parametrize(
    ("value", "options", "error", "words"),
    [
        (np.ones(1), {}, ValueError, "ndarray values cannot be logged"),
        (1.0, {"on_step": False, "on_epoch": False}, MisconfigurationException, "is not useful"),
    ],
)
def test_what_cannot_be_logged(value, options, error, words):
    with pytest.raises(error, match=words):
        make_trainer().fit(Logs(value, **options), make_loader(4))


def test_without_a_trainer_it_says_that_there_is_none():
    with pytest.warns(UserWarning, match="`self.trainer` reference is not registered"):
        Logs(1.0).log("never_logged_elsewhere", 1.0)


def test_counters_of_the_loops_are_read_under_their_names_in_the_api():
    seen = []

    class Model(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            loop = self.trainer.fit_loop
            batches = loop.epoch_loop.batch_progress
            seen.append((batches.current.ready, batches.total.ready, loop.epoch_progress.current.ready))
            assert loop.epoch_loop.batch_idx == batch_idx and loop.epoch_loop.val_loop is loop.val_loop

    trainer = make_trainer(max_epochs=2)
    assert not trainer.enable_validation and trainer.estimated_stepping_batches == -1
    assert trainer.fit_loop.epoch_progress.current.completed == 0
    trainer.fit(Model(), make_loader(8))
    assert seen == [(1, 1, 1), (2, 2, 1), (1, 3, 2), (2, 4, 2)]
    assert trainer.fit_loop.epoch_progress.current.completed == 2
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == trainer.fit_loop.epoch_loop.global_step == 4
