"""Parts that others wrote with less, or with more, than the base classes have: they are used as they are."""

from __future__ import annotations

import io

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import fulmen as pl
from fulmen.data.loaders import rebuild_loader, record_arguments
from fulmen.optimizers import LightningOptimizer, schedule_new_groups
from fulmen.strategies import SingleDeviceStrategy


class BareData(pl.LightningDataModule):
    def __init__(self) -> None:
        self.prepared = False

    def prepare_data(self) -> None:
        self.prepared = True

    def train_dataloader(self) -> DataLoader:
        return make_loader()


def test_a_datamodule_need_not_call_the_base_constructor() -> None:
    data = BareData()
    make_trainer(max_epochs=1).fit(Regression(), datamodule=data)
    assert data.prepared


class ShuffledLoader(DataLoader):
    def __init__(self, dataset, shuffle=True, **kwargs) -> None:
        self.shuffle = shuffle
        super().__init__(dataset, shuffle=shuffle, **kwargs)


def test_a_loader_that_shuffles_by_its_own_default_can_be_made_again() -> None:
    data = TensorDataset(torch.arange(4.0))
    with record_arguments():
        loader = ShuffledLoader(data, batch_size=2)
    again = rebuild_loader(loader, sampler=SequentialSampler(data))
    assert type(again) is ShuffledLoader
    assert [batch.tolist() for (batch,) in again] == [[0.0, 1.0], [2.0, 3.0]]


class Warmup(LRScheduler):
    """A composition of schedulers that is not torch's."""

    def __init__(self, optimizer, schedulers) -> None:
        self._schedulers = schedulers
        super().__init__(optimizer)

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None) -> None:
        for scheduler in self._schedulers:
            scheduler.step()


def test_new_groups_follow_the_schedulers_inside_of_any_composition() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    inner = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    composition = Warmup(optimizer, [inner])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.01})
    schedule_new_groups(composition)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.step()
    composition.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * 0.5 for rate in rates])


class OwnNames(SingleDeviceStrategy):
    def __init__(self) -> None:
        super().__init__("cpu")
        self.precision = "fast"

    @property
    def lightning_module(self):
        return self._lightning_module


class PlainLauncher:
    is_interactive_compatible = False

    def launch(self, function, *args, trainer=None, **kwargs):
        return function(*args, **kwargs)


class OwnLauncher(SingleDeviceStrategy):
    launcher = PlainLauncher()


class Failing(Regression):
    def training_step(self, batch, batch_idx):
        raise ZeroDivisionError("mine")


def test_a_strategy_may_use_names_of_its_own() -> None:
    trainer = make_trainer(max_epochs=1, strategy=OwnNames())
    model = Regression()
    trainer.fit(model, make_loader())
    assert trainer.strategy.lightning_module is model
    assert trainer.strategy.precision == "fast"


def test_a_launcher_without_more_than_launch_shows_the_error_of_the_run() -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        make_trainer(max_epochs=1, strategy=OwnLauncher("cpu")).fit(Failing(), make_loader())


def test_the_schedule_of_a_model_checkpoint_is_known_by_the_names_that_libraries_read() -> None:
    callback = pl.callbacks.ModelCheckpoint(every_n_train_steps=3)
    assert (callback._every_n_train_steps, callback._every_n_epochs, callback._train_time_interval) == (3, 0, None)


def test_a_module_pickled_before_it_knew_of_fabric_still_logs() -> None:
    module = Regression()
    state = {name: value for name, value in module.__dict__.items() if "fabric" not in name}
    older = Regression.__new__(Regression)
    older.__setstate__(state)
    assert older.fabric is None
    file = io.BytesIO()
    torch.save(older, file)
    assert older.global_rank == 0


class Switching(torch.optim.SGD):
    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.1)
        self._strategy = "fast"

    def switch(self) -> None:
        self._strategy = "slow"


def test_attributes_of_an_optimizer_are_read_and_written_through_its_wrapper() -> None:
    optimizer = Switching([nn.Parameter(torch.zeros(1))])
    wrapped = LightningOptimizer(optimizer)
    assert wrapped._strategy == "fast"
    wrapped.switch()
    assert optimizer._strategy == "slow"
