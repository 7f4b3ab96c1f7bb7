"""Trials of `optuna` that its callback prunes while they train."""

import os
import sys

import lightning.pytorch as pl
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback
from recording import Recording, print_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


class Regression(pl.LightningModule):
    def __init__(self, lr: float):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def main(folder: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(128, 4)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=32)
    recorder = Recorder()
    saved = []

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(2)
        pruning = PyTorchLightningPruningCallback(trial, monitor="val_loss")
        checkpoint = pl.callbacks.ModelCheckpoint(os.path.join(folder, str(trial.number)))
        trainer = pl.Trainer(
            max_epochs=5,
            accelerator="cpu",
            callbacks=[pruning, checkpoint] + ([recorder] if trial.number == 0 else []),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # The rates fall, so that later trials are worse than the median of those before them.
        trainer.fit(Regression(lr=0.1 / 10**trial.number), loader, loader)
        pruning.check_pruned()
        saved.append(checkpoint.best_model_path)
        return trainer.callback_metrics["val_loss"].item()

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=1)
    study = optuna.create_study(direction="minimize", pruner=pruner)
    study.optimize(objective, n_trials=3)
    pruned = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
    steps = [len(trial.intermediate_values) for trial in study.trials]
    reloaded = Regression.load_from_checkpoint(saved[0]).hparams.lr == 0.1
    print_report(pl, recorder, saved, reloaded, [study.best_value, len(pruned), *steps])


main(sys.argv[1])
