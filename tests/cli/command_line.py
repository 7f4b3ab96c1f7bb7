"""Models, data and short runs for the tests of the command line."""

from __future__ import annotations

import torch
from support import Regression, make_loader

import fulmen as pl
from fulmen.cli import LightningCLI, LRSchedulerCallable, OptimizerCallable

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "max_epochs": 1, "num_sanity_val_steps": 0, "limit_train_batches": 1,
}  # fmt: skip


class Net(Regression):
    """Its data come from the datamodule."""

    def __init__(self, width: int = 3, scale: float = 1.0):
        """A model that is 100% linear.

        Args:
            width: how many %s of them
            scale: factor
        """
        super().__init__()
        self.save_hyperparameters()
        self.width = width
        self.scale = scale

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Wide(Net):
    """A subclass with another argument."""

    def __init__(self, width: int = 8, height: int = 5):
        super().__init__(width)
        self.save_hyperparameters()
        self.height = height


class Part(torch.nn.Module):
    """Something that a model is given."""

    def __init__(self, size: int = 2):
        super().__init__()
        self.size = size


class Injected(Regression):
    """A model that is given its parts, its optimizer and its scheduler."""

    def __init__(
        self, part: torch.nn.Module, optimizer: OptimizerCallable = torch.optim.SGD,
        scheduler: LRSchedulerCallable = torch.optim.lr_scheduler.ConstantLR,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.part = part
        self.optimizer = optimizer
        self.scheduler = scheduler

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


class Data(pl.LightningDataModule):
    """Twelve samples."""

    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size

    def train_dataloader(self):
        return make_loader(batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def build_net(width: int = 6) -> Net:
    """A model made by a function."""
    return Net(width, scale=2.0)


def build_data(batch_size: int = 3) -> Data:
    return Data(batch_size)


def build_trainer(max_epochs: int = 2, callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
    return pl.Trainer(**{**QUIET, "max_epochs": max_epochs, "callbacks": callbacks})


def make_cli(*args, cls=LightningCLI, model=Net, data=Data, trainer=None, **kwargs):
    """A command line whose Trainer is quiet, with `args` as if they came from a shell."""
    defaults = {**QUIET, **(trainer or {})} if kwargs.get("trainer_class", pl.Trainer) is pl.Trainer else trainer
    kwargs.setdefault("save_config_callback", None)
    return cls(model, data, trainer_defaults=defaults, args=list(args), **kwargs)


def names_of(objects) -> list[str]:
    return [type(each).__name__ for each in objects]
