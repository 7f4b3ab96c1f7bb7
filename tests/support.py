"""Small real models and data that the tests share."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl


class Regression(pl.LightningModule):
    """A linear model whose loss, logs and optimizer are all visible to a test."""

    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class ManualRegression(Regression):
    """The same with manual optimization; with `clip`, gradients are clipped to that norm, and `norms` are what they were."""

    def __init__(self, clip: float | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clip = clip
        self.norms: list[float] = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if self.clip is not None:
            norm = self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            self.norms.append(norm.item())
        optimizer.step()


class Storyteller(Regression):
    """Writes down what happens, sanity checks as "s": "s t0 t1 v |"."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def training_step(self, batch, batch_idx):
        self.told.append(f"t{batch_idx}")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self):
        self.told.append("s" if self.trainer.sanity_checking else "v")

    def on_train_epoch_end(self):
        self.told.append("|")

    @property
    def story(self) -> str:
        return " ".join(self.told)


class SavesAfterFirstEpoch(pl.Callback):
    """Writes a checkpoint at the end of the first epoch."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def make_loader(samples: int = 12, batch_size: int = 4, shuffle: bool = False, seed: int = 1) -> DataLoader:
    """A regression problem with a known answer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    y = x.sum(dim=1, keepdim=True)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def make_trainer(**kwargs) -> pl.Trainer:
    """A Trainer with everything off that a test does not ask for."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet}
    return pl.Trainer(**{**defaults, **kwargs})
