"""What a type checker knows of a module."""

from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, EarlyStopping
from fulmen.loggers import Logger
from fulmen.utilities.types import STEP_OUTPUT, OptimizerLRScheduler

Batch = tuple[Tensor, Tensor]


class Net(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)
        self.example_input_array = torch.ones(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch[0]).mean()
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=True, reduce_fx="mean", batch_size=4)
        self.log_dict({"a": 1, "b": 2.0, "c": loss})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        return {"loss": self(batch[0])}

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        return ["cat"]

    def configure_callbacks(self) -> list[Callback]:
        return [EarlyStopping("loss")]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(8)))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.train_dataloader()]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> int | None:
        return -1 if batch_idx > 3 else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.current_epoch

    def lr_scheduler_step(self, scheduler: LRScheduler | ReduceLROnPlateau, metric: Any) -> None:
        super().lr_scheduler_step(scheduler, metric)


class One(Net):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Two(Net):
    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, 1)]


class WithScheduler(Net):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "loss", "interval": "epoch"},
        }


class Several(Net):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        first = torch.optim.SGD(self.parameters(), lr=0.1)
        second = torch.optim.SGD(self.parameters(), lr=0.2)
        return [{"optimizer": first}, {"optimizer": second, "lr_scheduler": StepLR(second, 1)}]


class Alternating(LightningModule):
    def training_step(self, batch: Batch, batch_idx: int) -> Generator[Tensor, None, None]:
        yield batch[0].mean()
        yield batch[1].mean()


net = Net()
assert_type(net.trainer, Trainer)
assert_type(net.device, torch.device)
assert_type(net.dtype, torch.dtype)
assert_type(net.on_gpu, bool)
assert_type(net.current_epoch, int)
assert_type(net.global_step, int)
assert_type(net.global_rank, int)
assert_type(net.local_rank, int)
assert_type(net.logger, Logger | None)
assert_type(net.loggers, list[Logger])
assert_type(net.strict_loading, bool)
assert_type(net.automatic_optimization, bool)
assert_type(net.to("cpu"), Net)
assert_type(net.to(torch.float64).half().cpu().cuda(0), Net)
assert_type(net.freeze(), Net)
assert_type(net.unfreeze(), Net)
assert_type(net.all_gather(torch.ones(1)), Tensor)
assert_type(net.all_gather(1.0), Tensor)
assert_type(net.all_gather({"a": 1}), dict[str, int])
assert_type(net.lr_schedulers(), LRScheduler | ReduceLROnPlateau | list[LRScheduler | ReduceLROnPlateau] | None)
assert_type(net.clip_gradients(torch.optim.SGD(net.parameters()), 0.5, "norm"), Tensor | None)
rate: float = net.hparams.lr
initial: float = net.hparams_initial["lr"]
loaders: Iterable[Any] = LightningModule().train_dataloader()
