"""Storing predictions, and callbacks made of functions."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fulmen
from fulmen.callbacks import BasePredictionWriter, Callback, LambdaCallback
from fulmen.utilities.errors import MisconfigurationException


class Writer(BasePredictionWriter):
    """Keeps what it is given to write."""

    def __init__(self, interval):
        super().__init__(interval)
        self.batches, self.epochs = [], []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.batches.append((prediction.item(), batch_indices, batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.epochs.append((predictions, batch_indices))


def loader(samples):
    return DataLoader(TensorDataset(torch.ones(samples, 2)), batch_size=2)


def predict(writer, model, loaders, **given):
    trainer = fulmen.Trainer(accelerator="cpu", logger=False, callbacks=writer, enable_progress_bar=False)
    return trainer.predict(model, loaders, **given)


BATCHES = [(4.0, [0, 1], 0, 0), (4.0, [2, 3], 1, 0), (2.0, [4], 2, 0)]
INDICES = [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_predictions_with_the_samples_they_belong_to(scripted_model, interval, returned):
    writer = Writer(interval)
    result = predict(writer, scripted_model(), loader(5), return_predictions=returned)
    assert result == ([4.0, 4.0, 2.0] if returned else None)
    assert writer.batches == (BATCHES if "batch" in interval else [])
    assert writer.epochs == ([([4.0, 4.0, 2.0], [INDICES])] if "epoch" in interval else [])
    assert writer.interval == interval


def test_several_loaders_give_a_list_each(scripted_model):
    writer = Writer("batch_and_epoch")
    predict(writer, scripted_model(), [loader(5), loader(3)], return_predictions=False)
    assert writer.batches == [*BATCHES, (4.0, [0, 1], 0, 1), (2.0, [2], 1, 1)]
    assert writer.epochs == [([[4.0, 4.0, 2.0], [4.0, 2.0]], [INDICES, [[0, 1], [2]]])]


def test_loader_that_does_not_tell_its_samples(scripted_model):
    class Endless(IterableDataset):
        def __iter__(self):
            yield from torch.ones(3, 1, 2)

    writer = Writer("batch_and_epoch")
    with pytest.warns(UserWarning, match="indices"):
        predict(writer, scripted_model(), DataLoader(Endless(), batch_size=2))
    assert [indices for _, indices, *_ in writer.batches] == [[], []]
    assert writer.epochs[0][1] == [[]]


def test_interval_is_checked():
    with pytest.raises(MisconfigurationException, match="Did you mean `batch`"):
        BasePredictionWriter("batches")


def test_steps_that_fetch_their_own_batches_cannot_be_written(scripted_model):
    class Model(scripted_model):
        def predict_step(self, dataloader_iter):
            return next(dataloader_iter)

    with pytest.raises(NotImplementedError, match="dataloader_iter"):
        predict(Writer("batch"), Model(), loader(2))


def test_functions_get_what_their_hook_gets(fit):
    seen = []
    callback = LambdaCallback(
        on_train_start=lambda trainer, pl_module: seen.append(("start", trainer.global_step)),
        on_train_batch_end=lambda trainer, pl_module, outputs, batch, batch_idx: seen.append(("batch", batch_idx)),
        setup=lambda trainer, pl_module, stage: seen.append(("setup", stage.value)),
    )
    fit(callback, max_epochs=1)
    assert seen == [("setup", "fit"), ("start", 0), *[("batch", n) for n in range(4)]]


def test_hooks_without_a_function_are_not_implemented():
    callback = LambdaCallback(on_train_start=print)
    assert list(vars(callback)) == ["on_train_start"]
    assert type(callback).on_train_end is Callback.on_train_end


def test_every_hook_can_be_given():
    hooks = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
    assert len(vars(LambdaCallback(**dict.fromkeys(hooks, print)))) == len(hooks)


def test_unknown_hook_is_an_error_with_a_suggestion():
    with pytest.raises(TypeError, match=r"on_trian_start.*Did you mean `on_train_start`"):
        LambdaCallback(on_trian_start=print)
