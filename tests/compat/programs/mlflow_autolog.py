"""`mlflow.pytorch.autolog` writes what a training logged, its parameters and its checkpoints, without a line in the module."""

import os
import sys

import lightning.pytorch as pl
import mlflow
import mlflow.pytorch
import torch
from recording import Recording, print_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main(folder: str) -> None:
    torch.manual_seed(1)
    mlflow.set_tracking_uri(f"sqlite:///{os.path.join(folder, 'mlflow.db')}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("e", artifact_location=f"file://{folder}/artifacts"))
    mlflow.pytorch.autolog(
        log_models=False, checkpoint=True, checkpoint_monitor="val_loss", checkpoint_save_best_only=False
    )
    x = torch.randn(128, 4)
    loader = DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=32)
    recorder = Recorder()
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[recorder, stopping],
        default_root_dir=folder,
        enable_progress_bar=False,
    )
    module = Regression()
    with mlflow.start_run() as run:
        trainer.fit(module, loader, loader)
        trainer.test(module, loader, verbose=False)
        # By hand, because finding out the requirements of a model takes minutes.
        mlflow.pytorch.log_model(module, name="model", pip_requirements=["torch"], serialization_format="pickle")
    client = mlflow.MlflowClient()
    data = client.get_run(run.info.run_id).data
    history = client.get_metric_history(run.info.run_id, "val_loss")
    loaded = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/model")
    reloaded = torch.equal(loaded(x), module(x)) and "optimizer_name" in data.params
    names = sorted(name for name in data.metrics if "loss" in name)
    checkpoints = [item.path for item in client.list_artifacts(run.info.run_id, "checkpoints")]
    result = [*(data.metrics[name] for name in names), len(history), len(checkpoints)]
    print_report(pl, recorder, [trainer.checkpoint_callback.best_model_path], reloaded, result)


main(sys.argv[1])
