"""What a run keeps in memory does not grow with the number of its batches, unless somebody asked for it."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from ranks import run_ranks
from support import make_trainer
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import BasePredictionWriter, Callback

EVERY, BATCH = 600, 16


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.layer(batch[0]).mean(), on_step=True, on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Looks(Callback):
    """Takes down how much memory is in use, after a start and once more."""

    def __init__(self):
        self.bytes = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == EVERY // 2:
            tracemalloc.start()
        if batch_idx in (EVERY // 2 + 20, EVERY // 2 + 20 + EVERY):
            gc.collect()
            self.bytes.append(tracemalloc.get_traced_memory()[0])

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end


class Writes(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch")
        self.wrong = 0

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.wrong += not torch.equal(batch[1][:, 0].long(), torch.tensor(batch_indices))


def growth(verb, callbacks=(), num_ranks=1, **loading):
    """Bytes per batch."""
    torch.manual_seed(0)
    samples = num_ranks * BATCH * (EVERY * 3 // 2 + 24)
    data = TensorDataset(torch.randn(samples, 2), torch.arange(samples).unsqueeze(1))
    looks = Looks()
    trainer = make_trainer(callbacks=[looks, *callbacks], **({"devices": num_ranks} if num_ranks > 1 else {}))
    try:
        run, more = getattr(trainer, verb), {"return_predictions": False} if verb == "predict" else {}
        more |= {"verbose": False} if verb in ("validate", "test") else {}
        run(Net(), DataLoader(data, BATCH, **loading), **more)
    finally:
        tracemalloc.stop()
    return (looks.bytes[1] - looks.bytes[0]) / EVERY


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_no_loop_keeps_something_of_each_batch(verb):
    assert growth(verb, shuffle=True) < 40  # of a batch of predictions without these: 190 bytes and more


@pytest.mark.parametrize("loading", [{}, {"shuffle": True}, {"num_workers": 1}])
def test_a_writer_of_batches_is_told_the_samples_and_nothing_is_kept(loading):
    writer = Writes()
    assert growth("predict", [writer], **loading) < 100
    assert writer.wrong == 0


def on_each_rank():
    writer = Writes()
    return growth("predict", [writer], num_ranks=2), writer.wrong


def test_several_processes_keep_nothing_either():
    for grown, wrong in run_ranks(2, on_each_rank):
        assert grown < 150 and wrong == 0  # a kept prediction is 190 bytes and more, what a watchdog allocates some
