"""Metrics of `torchmetrics` as attributes of a module, logged as objects."""

import sys

import lightning.pytorch as pl
import torch
from recording import Recording, print_report
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class Recorder(Recording, pl.Callback):
    """Keeps the losses of a training."""


class Classifier(pl.LightningModule):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, classes))
        metrics = MetricCollection([MulticlassAccuracy(classes), MulticlassF1Score(classes)])
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.mean_loss = MeanMetric()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.train_metrics(logits, y)
        self.mean_loss(loss)
        self.log_dict(self.train_metrics, on_step=True, on_epoch=True)
        self.log("mean_loss", self.mean_loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.val_metrics.update(self.net(x), y)

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(folder: str) -> None:
    pl.seed_everything(1, workers=True)
    x = torch.randn(256, 8)
    y = x[:, :3].argmax(dim=1)
    data = TensorDataset(x, y)
    recorder = Recorder()
    checkpoint = pl.callbacks.ModelCheckpoint(folder, monitor="val_MulticlassAccuracy", mode="max", save_last=True)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[recorder, checkpoint],
        logger=False,
        enable_progress_bar=False,
        deterministic=True,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(data, batch_size=32, shuffle=True), DataLoader(data, batch_size=64))
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    loaded = Classifier.load_from_checkpoint(checkpoint.best_model_path)
    best = trainer.validate(loaded, DataLoader(data, batch_size=64), verbose=False)[0]
    reloaded = abs(best["val_MulticlassAccuracy"] - float(checkpoint.best_model_score)) < 1e-6
    saved = [checkpoint.best_model_path, checkpoint.last_model_path]
    print_report(pl, recorder, saved, reloaded, [*metrics.values(), *best.values()])


main(sys.argv[1])
