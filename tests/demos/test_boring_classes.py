"""The smallest models and data run with every verb."""

from __future__ import annotations

import pytest
import torch
from support import make_trainer

from fulmen.demos import BoringDataModule, BoringModel, DemoModel
from fulmen.demos.boring_classes import (
    BoringDataModuleNoLen,
    IterableBoringDataModule,
    ManualOptimBoringModel,
    Net,
    RandomDataset,
    RandomDictDataset,
    RandomIterableDataset,
    RandomIterableDatasetWithLen,
)

FEW = {f"limit_{kind}_batches": 2 for kind in ("train", "val", "test", "predict")}


class ManyLoaders(BoringModel):
    def validation_step(self, batch, batch_idx, dataloader_idx):
        return super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx, dataloader_idx):
        return super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx):
        return self(batch)

    def training_step(self, batch, batch_idx):
        return self.step(torch.cat(batch))


@pytest.mark.parametrize(
    ("model", "data", "predictions"),
    [
        (BoringModel, None, 2),
        (ManualOptimBoringModel, None, 2),
        (BoringModel, BoringDataModule, 2),
        (BoringModel, BoringDataModuleNoLen, 2),
        (ManyLoaders, IterableBoringDataModule, 2),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_every_verb_runs(model, data, predictions):
    module = model()
    before = module.layer.weight.detach().clone()
    given = {} if data is None else {"datamodule": data()}
    trainer = make_trainer(**FEW)
    trainer.fit(module, **given)
    assert trainer.global_step == 2 and not torch.equal(before, module.layer.weight)
    trainer.validate(module, verbose=False, **given)
    trainer.test(module, verbose=False, **given)
    assert len(trainer.predict(module, **given)) == predictions


def test_a_boring_model_learns_to_return_ones():
    torch.manual_seed(0)
    module = BoringModel()
    weight, bias = module.layer.weight.detach().clone(), module.layer.bias.detach().clone()
    loader = module.train_dataloader()
    assert len(loader) == 64 and loader.batch_size == 1
    make_trainer(limit_train_batches=1, limit_val_batches=0).fit(module, loader)
    x = loader.dataset[0]
    error = 2 * (weight @ x + bias - 1) / 2  # of the mean over two outputs
    torch.testing.assert_close(module.layer.weight, weight - 0.1 * torch.outer(error, x))
    torch.testing.assert_close(module.layer.bias, bias - 0.1 * error)
    preds = torch.tensor([[1.0, 3.0]])
    assert module.loss(preds) == 2.0 and module.loss(preds, torch.zeros(1, 2)) == 5.0
    step = module.training_step(torch.zeros(2, 32), 0)["loss"]
    assert step == module.validation_step(torch.zeros(2, 32), 0)["x"] == module.test_step(torch.zeros(2, 32), 0)["y"]
    [optimizer], [scheduler] = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD) and scheduler.step_size == 1


def test_datasets_have_what_they_promise():
    data = RandomDataset(3, 4)
    assert len(data) == 4 and data[1].shape == (3,) and torch.equal(data[1], data[1])
    sample = RandomDictDataset(3, 4)[2]
    assert torch.allclose(sample["a"] + 2, sample["b"])
    stream = RandomIterableDataset(3, 4)
    first, second = list(stream), list(stream)
    assert len(first) == 4 and not torch.equal(first[0], second[0])
    with pytest.raises(TypeError):
        len(stream)
    assert len(RandomIterableDatasetWithLen(3, 4)) == 4
    whole = BoringDataModule()
    for stage in ("fit", "test", "predict"):
        whole.setup(stage)
    parts = [whole.random_train, whole.random_val, whole.random_test, whole.random_predict]
    assert torch.equal(torch.stack([x for part in parts for x in part]), whole.random_full.data)


def test_sizes_can_be_chosen():
    demo = DemoModel(out_dim=3, learning_rate=0.5)
    assert demo.l1.out_features == 3 and demo.configure_optimizers().param_groups[0]["lr"] == 0.5
    x = torch.randn(2, 32)
    assert torch.equal(demo.training_step(x, 0), torch.relu(demo.l1(x)).sum())
    assert torch.allclose(Net()(torch.zeros(2, 1, 28, 28)).exp().sum(dim=1), torch.ones(2))
