"""The pruning callback of `optuna` under two processes: both end when one of them is told to."""

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
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        # The first epoch is the best, which the pruner below does not forgive.
        self.log("val_loss", float(self.current_epoch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder: str) -> None:
    storage = f"sqlite:///{os.path.join(folder, 'study.db')}"
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    recorder = Recorder()
    checkpoint = pl.callbacks.ModelCheckpoint(os.path.join(folder, "checkpoints"))
    finished = []

    def objective(trial: optuna.Trial) -> float:
        torch.manual_seed(2)
        x = torch.randn(128, 4)
        loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=16)
        pruning = PyTorchLightningPruningCallback(trial, monitor="val_loss")
        trainer = pl.Trainer(
            max_epochs=6,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            callbacks=[pruning, recorder, checkpoint],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Regression(), loader, loader)
        finished.append(trainer.current_epoch)
        pruning.check_pruned()
        return trainer.callback_metrics["val_loss"].item()

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.PatientPruner(None, patience=1)
    name = f"study-{rank}"
    study = optuna.create_study(direction="minimize", pruner=pruner, storage=storage, study_name=name)
    study.optimize(objective, n_trials=1)
    if rank == 0:
        pruned = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.PRUNED]
        path = checkpoint.best_model_path
        reloaded = torch.load(path, weights_only=False)["state_dict"]["net.weight"].shape == (1, 4)
        print_report(pl, recorder, [path], reloaded, [len(pruned), *finished])


main(sys.argv[1])
