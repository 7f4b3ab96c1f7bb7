"""For tests of searches: a module with a rate and a size to find, and all that a search must leave alone."""

from __future__ import annotations

import copy
import random

import numpy
import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 MiB."


class Searched(pl.LightningModule):
    """A model with everything that steps change: batch norm, dropout, momentum, a scheduler, random batches."""

    def __init__(self, lr: float = 0.1, batch_size: int = 8, samples: int = 40) -> None:
        super().__init__()
        self.lr = lr
        self.batch_size = batch_size
        self.samples = samples
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.seen: list[list[float]] = []  # the first feature of each sample, by batch
        self.capacity = 10**9  # samples in a batch that fits into memory
        self.error = OUT_OF_MEMORY

    def compute_loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        self.calls += 1
        self.seen.append([round(float(value), 6) for value in x[:, 0]])
        if len(x) > self.capacity:
            raise RuntimeError(self.error)
        return torch.nn.functional.mse_loss(self.layers(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.compute_loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.compute_loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.compute_loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.compute_loss(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def make_loader(self, shuffle: bool = False) -> DataLoader:
        x = torch.randn(self.samples, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self.make_loader(shuffle=True)

    def val_dataloader(self):
        return self.make_loader()

    test_dataloader = predict_dataloader = val_dataloader

    @property
    def sizes(self) -> list[int]:
        """The sizes of batches that were met, without repetitions."""
        found = [len(batch) for batch in self.seen]
        return [size for at, size in enumerate(found) if at == 0 or found[at - 1] != size]


def random_states() -> list[object]:
    return [random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()]


def state_of(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, object]:
    """All that a search has to leave as it was, in values that can be compared."""
    names = [f"limit_{kind}_batches" for kind in ("train", "val", "test", "predict")]
    names += ["max_epochs", "min_epochs", "max_steps", "min_steps", "should_stop", "global_step", "current_epoch"]
    names += [
        "num_sanity_val_steps",
        "log_every_n_steps",
        "accumulate_grad_batches",
        "callbacks",
        "loggers",
        "profiler",
    ]
    return {
        **{name: getattr(trainer, name) for name in names},
        "objects": [id(part) for part in (trainer.callbacks, trainer.fit_loop, trainer.validate_loop, trainer.book)],
        "progress": copy.deepcopy(trainer.progress),
        "metrics": {name: value.tolist() for name, value in trainer.callback_metrics.items()},
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "buffers": {name: value.tolist() for name, value in module.named_buffers()},
        "modes": [(name, part.training) for name, part in module.named_modules()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "optimizers": [readable(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [(id(c), readable(c.scheduler.state_dict())) for c in trainer.lr_scheduler_configs],
        "callback states": [readable(callback.state_dict()) for callback in trainer.callbacks],
        "random": random_states(),
    }


def readable(state: object) -> str:
    torch.set_printoptions(precision=17, threshold=10**6)
    try:
        return repr(state)
    finally:
        torch.set_printoptions(profile="default")
