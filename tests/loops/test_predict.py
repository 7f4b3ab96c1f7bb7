"""Predict: every sample once, in order, and the outputs come back."""

from __future__ import annotations

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader

from fulmen.callbacks import BasePredictionWriter
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*eval mode", "ignore:.*shuffl", "ignore:.*validation_step")


def test_the_outputs_of_all_batches_come_back():
    model = Regression()
    predictions = make_trainer().predict(model, make_loader(10))
    assert [p.shape for p in predictions] == [(4, 1), (4, 1), (2, 1)]
    expected = model(torch.cat([batch[0] for batch in make_loader(10)]))
    assert torch.equal(torch.cat(predictions), expected)
    assert not torch.cat(predictions).requires_grad


def test_several_loaders_give_several_lists():
    class Model(Regression):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return dataloader_idx, batch_idx

    predictions = make_trainer().predict(Model(), [make_loader(8), make_loader(4)])
    assert predictions == [[(0, 0), (0, 1)], [(1, 0)]]


def test_the_last_batch_is_never_dropped():
    """5 samples in batches of 2 with `drop_last=True`: 2, 2 and 1."""
    loader = DataLoader(make_loader(5).dataset, batch_size=2, drop_last=True)
    assert [len(p) for p in make_trainer().predict(Regression(), loader)] == [2, 2, 1]


def test_without_a_predict_step_the_batch_goes_through_forward():
    class Model(Regression):
        predict_step = __import__("fulmen").LightningModule.predict_step

        def forward(self, x):
            return x * 2

    (prediction,) = make_trainer().predict(Model(), DataLoader(torch.ones(2, 4), batch_size=2))
    assert torch.equal(prediction, torch.full((2, 4), 2.0))


def test_predictions_may_be_left_out():
    assert make_trainer().predict(Regression(), make_loader(), return_predictions=False) is None


@pytest.mark.parametrize("output", [{"a": 1}, [torch.ones(1)], "text"])
def test_outputs_may_be_anything(output):
    class Model(Regression):
        def predict_step(self, batch, batch_idx):
            return output

    assert make_trainer().predict(Model(), make_loader(8)) == [output, output]


def test_nothing_predicted_is_warned_about_once():
    class Model(Regression):
        def predict_step(self, batch, batch_idx):
            return None

    for _ in range(2):  # in each run
        with pytest.warns(UserWarning, match="returned") as warned:
            assert make_trainer().predict(Model(), make_loader(8)) == [None, None]
        assert len([w for w in warned if "returned" in str(w.message)]) == 1


def test_loaders_side_by_side_are_refused():
    from fulmen.utilities import CombinedLoader

    loader = CombinedLoader([make_loader(), make_loader()], "max_size_cycle")
    with pytest.raises(ValueError, match="sequential"):
        make_trainer().predict(Regression(), loader)


def test_training_side_by_side_is_the_only_way():
    from fulmen.utilities import CombinedLoader

    with pytest.raises(ValueError, match="sequential"):
        make_trainer().fit(Regression(), CombinedLoader([make_loader(), make_loader()], "sequential"))


def test_a_step_that_is_none_is_refused():
    class Model(Regression):
        predict_step = None

    with pytest.raises(MisconfigurationException, match="predict_step"):
        make_trainer().predict(Model(), make_loader())


def test_nothing_to_predict():
    assert not make_trainer(limit_predict_batches=0).predict(Regression(), make_loader())


def test_writers_know_which_samples_a_batch_was_made_of():
    class Writer(BasePredictionWriter):
        def __init__(self):
            super().__init__("batch_and_epoch")
            self.batches, self.epoch = [], None

        def write_on_batch_end(self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
            self.batches.append((dataloader_idx, batch_idx, list(batch_indices), prediction.flatten().tolist()))

        def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
            self.epoch = predictions, batch_indices

    class Model(Regression):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return batch

    writer = Writer()
    data = torch.arange(5).float()
    loaders = [DataLoader(data, batch_size=2), DataLoader(data, batch_size=3, shuffle=True)]
    kept = make_trainer(callbacks=[writer]).predict(Model(), loaders, return_predictions=False)
    assert kept is None
    assert [(loader, batch) for loader, batch, _, _ in writer.batches] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert all(indices == values for _, _, indices, values in writer.batches)
    predictions, indices = writer.epoch
    assert [[len(p) for p in loader] for loader in predictions] == [[2, 2, 1], [3, 2]]
    assert indices[0] == [[0, 1], [2, 3], [4]]
    assert sorted(index for batch in indices[1] for index in batch) == [0, 1, 2, 3, 4]


def test_the_transfer_hooks_are_told_the_loader():
    seen = []

    class Model(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append(dataloader_idx)
            return batch

        def predict_step(self, batch, batch_idx, dataloader_idx):
            return batch_idx

    make_trainer().predict(Model(), [make_loader(8), make_loader(4)])
    assert seen == [0, 0, 1]
