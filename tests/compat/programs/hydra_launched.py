"""A script that `hydra` starts: trainer, callbacks and module are made from a configuration that names their classes."""

import os
import sys

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from recording import Recording, print_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


CONFIG = {
    "seed": 3,
    "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
    "callbacks": [
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": "val_loss", "dirpath": "checkpoints"},
        {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val_loss", "patience": 5},
    ],
    "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "."},
    "trainer": {
        "_target_": "lightning.pytorch.Trainer",
        "max_epochs": 3,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    },
}
ConfigStore.instance().store(name="config", node=CONFIG)


class Regression(pl.LightningModule):
    def __init__(self, optimizer, config: DictConfig):
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.make_optimizer = optimizer
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@hydra.main(version_base=None, config_name="config")
def main(config: DictConfig) -> None:
    pl.seed_everything(config.seed, workers=True)
    x = torch.randn(128, 4)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=32)
    recorder = Recorder()
    callbacks = [hydra.utils.instantiate(each) for each in config.callbacks]
    logger = hydra.utils.instantiate(config.logger)
    trainer = hydra.utils.instantiate(config.trainer, callbacks=[*callbacks, recorder], logger=logger)
    module = Regression(hydra.utils.instantiate(config.optimizer), config)
    trainer.fit(module, loader, loader)
    path = trainer.checkpoint_callback.best_model_path
    loaded = Regression.load_from_checkpoint(path, optimizer=None, weights_only=False)
    reloaded = loaded.hparams.config.seed == 3 and OmegaConf.is_config(loaded.hparams.config)
    assert os.path.exists(".hydra/config.yaml")
    print_report(pl, recorder, [path], reloaded, [trainer.callback_metrics["val_loss"], config.trainer.max_epochs])


sys.argv = [sys.argv[0], f"hydra.run.dir={sys.argv[1]}", "hydra.job.chdir=true", *sys.argv[2:]]
main()
