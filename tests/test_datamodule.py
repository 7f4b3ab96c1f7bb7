"""`LightningDataModule`: made from datasets, printed, stored and loaded."""

from __future__ import annotations

import pickle

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

DATASET = TensorDataset(torch.zeros(7, 1))


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=4, seed=1):
        super().__init__()
        self.save_hyperparameters()
        self.epochs_seen = 0

    def train_dataloader(self):
        return make_loader(batch_size=self.hparams.batch_size)

    def state_dict(self):
        return {"epochs_seen": self.epochs_seen}

    def load_state_dict(self, state_dict):
        self.epochs_seen = state_dict["epochs_seen"]


def test_training_data_are_shuffled_and_the_others_are_not():
    datamodule = pl.LightningDataModule.from_datasets(DATASET, DATASET, batch_size=3)
    train, val = datamodule.train_dataloader(), datamodule.val_dataloader()
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(val.sampler, SequentialSampler)
    assert train.batch_size == val.batch_size == 3
    assert train.pin_memory


def test_an_iterable_dataset_is_not_shuffled():
    loader = pl.LightningDataModule.from_datasets(Stream()).train_dataloader()
    assert len(list(loader)) == 1


def test_collections_of_datasets_become_collections_of_loaders():
    datamodule = pl.LightningDataModule.from_datasets(
        {"a": DATASET, "b": [DATASET, Stream()]}, test_dataset=(DATASET, DATASET)
    )
    train = datamodule.train_dataloader()
    assert isinstance(train["a"], DataLoader)
    assert [type(loader) for loader in train["b"]] == [DataLoader, DataLoader]
    assert len(datamodule.test_dataloader()) == 2


def test_loaders_that_were_not_asked_for_do_not_exist():
    datamodule = pl.LightningDataModule.from_datasets(val_dataset=DATASET)
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        datamodule.train_dataloader()


def test_constructor_arguments_are_passed_on_if_they_are_accepted():
    assert Data.from_datasets(DATASET, batch_size=2, num_workers=1, seed=9).hparams == {"batch_size": 2, "seed": 9}
    with pytest.raises(TypeError, match="unknown"):
        Data.from_datasets(DATASET, unknown=1)


def test_a_datamodule_from_datasets_reaches_another_process():
    datamodule = pickle.loads(pickle.dumps(pl.LightningDataModule.from_datasets(DATASET, batch_size=3)))
    assert len(datamodule.train_dataloader()) == 3


def test_printing_tells_the_sizes_of_the_datasets():
    datamodule = pl.LightningDataModule.from_datasets(DATASET, [DATASET, Stream()])
    assert str(datamodule) == (
        "{Train dataloader: size=7}\n"
        "{Validation dataloader: 1. size=7 ; 2. size=NA}\n"
        "{Test dataloader: None}\n"
        "{Predict dataloader: None}"
    )


def test_printing_before_setup_does_not_fail():
    class NotReady(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(self.dataset)

    assert str(NotReady()).startswith("{Train dataloader: None}")


def test_defaults():
    datamodule = pl.LightningDataModule()
    assert datamodule.trainer is None
    assert datamodule.prepare_data_per_node is True
    assert datamodule.allow_zero_length_dataloader_with_multiple_devices is False
    assert datamodule.state_dict() == {}
    assert datamodule.name is None


def test_a_stored_datamodule_comes_back_with_its_arguments_and_its_state(tmp_path):
    datamodule = Data(3)
    datamodule.epochs_seen = 5
    path = tmp_path / "last.ckpt"
    trainer = make_trainer()
    trainer.fit(Regression(), datamodule=datamodule)
    trainer.save_checkpoint(path)
    assert datamodule.trainer is trainer

    loaded = Data.load_from_checkpoint(path, seed=8)
    assert loaded.hparams == {"batch_size": 3, "seed": 8}
    assert loaded.epochs_seen == 5

    class Sub(Data):
        """Another class has its state under another name."""

    assert Sub.load_from_checkpoint(path).epochs_seen == 0
    with pytest.raises(TypeError, match="Data.load_from_checkpoint"):
        datamodule.load_from_checkpoint(path)
