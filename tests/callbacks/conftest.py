"""A model whose validation loss is a script, and the shortest way to fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen

SCRIPT = (3.0, 1.0, 2.0, 0.5, 4.0)


class ScriptedModel(fulmen.LightningModule):
    """Four training batches per epoch; `val_loss` (and `val/acc`) in epoch n is the n-th number of the script."""

    def __init__(self, script: tuple[float, ...] = SCRIPT) -> None:
        super().__init__()
        self.script = script
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = self.script[min(self.current_epoch, len(self.script) - 1)]
        self.log_dict({"val_loss": value, "val/acc": value})

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> torch.Tensor:
        return batch[0].sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        return batches(4)

    def val_dataloader(self) -> DataLoader:
        return batches(2)


def batches(count: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(count, 2)), batch_size=1)


@pytest.fixture
def scripted_model() -> type[ScriptedModel]:
    return ScriptedModel


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    """`fit(callbacks, model=None, **trainer arguments)` gives the trainer."""

    def run(
        callbacks: Any, model: fulmen.LightningModule | None = None, ckpt_path: Any = None, **given: Any
    ) -> fulmen.Trainer:
        quiet = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
            "max_epochs": len(SCRIPT),
            "num_sanity_val_steps": 0,
        }
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        # Only where no callback is a checkpoint: those want the default.
        if not any(isinstance(callback, fulmen.callbacks.Checkpoint) for callback in callbacks):
            quiet["enable_checkpointing"] = False
        trainer = fulmen.Trainer(callbacks=callbacks, **{**quiet, **given})
        trainer.fit(model or ScriptedModel(), ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """`files(folder)`: relative paths of all files below it, sorted."""

    def names(folder: Path = tmp_path / "checkpoints") -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())

    return names
