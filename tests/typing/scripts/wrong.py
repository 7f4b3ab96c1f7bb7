"""Mistakes that a type checker must find: on each line with the word, and on no other."""

import torch
from torch import Tensor

import fulmen as pl
from fulmen.callbacks import ModelChekpoint  # mistake
from fulmen.utilities.types import OptimizerLRScheduler

pl.Trainr  # mistake
pl.Trainer(max_epoch=1)  # mistake
pl.Trainer(max_epochs="3")  # mistake
pl.Trainer(accelerator="gpuu")  # mistake
pl.Trainer(strategy="dpp")  # mistake
pl.Trainer(precision="fp16")  # mistake
pl.Trainer(profiler="simpel")  # mistake
pl.Trainer(gradient_clip_algorithm="norms")  # mistake
pl.Trainer(deterministic="yes")  # mistake
pl.Trainer(logger=pl.LightningModule())  # mistake
pl.Trainer(callbacks=[pl.LightningModule()])  # mistake
pl.Trainer("cpu")  # mistake
trainer = pl.Trainer()
trainer.fit()  # mistake
trainer.fit(torch.nn.Linear(1, 1))  # mistake
trainer.fit(pl.LightningModule(), train_dataloader=[])  # mistake
trainer.fit(pl.LightningModule(), ckpt=None)  # mistake
trainer.fit(pl.LightningModule(), 3)  # mistake
trainer.validate(dataloaders=3)  # mistake
trainer.max_epochs = "3"  # mistake
trainer.curent_epoch  # mistake
trainer.callback_metrics["loss"].itm()  # mistake
pl.Callback().state_keys  # mistake


class Net(pl.LightningModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> str:  # mistake
        self.log("loss", "0.1")  # mistake
        self.log("loss", batch.mean(), on_stp=True)  # mistake
        self.log("loss", batch.mean(), reduce_fx="median")  # mistake
        return "loss"

    def configure_optimizers(self) -> int:  # mistake
        return 1

    def on_train_start(self, epoch: int) -> None:  # mistake
        self.optimizers(use_pl_optimizers=True)  # mistake
        step: str = self.global_step  # mistake


class Scheduled(pl.LightningModule):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"interval": "epochs"}}  # mistake


class Listener(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer) -> None:  # mistake
        pass
