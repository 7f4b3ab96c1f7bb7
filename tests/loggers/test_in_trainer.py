"""Loggers as the Trainer uses them: when they are called and which files a run leaves."""

from __future__ import annotations

import csv
import os

import pytest
import torch
from torch.utils.data import DataLoader

from fulmen import LightningModule, Trainer
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.loggers.logger import DummyLogger


class Model(LightningModule):
    """Logs the number of the batch."""

    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        self.log("train_loss", 1.79 + batch_idx)
        return self(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 3.0)
        self.log("val/acc", 0.1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def loader():
    return DataLoader(torch.ones(4, 4), batch_size=2)


def trainer_with(logger, tmp_path, **kwargs):
    return Trainer(
        **{
            "max_epochs": 1, "logger": logger, "log_every_n_steps": 1, "default_root_dir": tmp_path, "accelerator": "cpu",
            "enable_progress_bar": False, "enable_model_summary": False, **kwargs,
        }
    )  # fmt: skip


def rows_of(folder):
    with open(os.path.join(folder, "metrics.csv"), newline="") as file:
        return list(csv.reader(file))


def test_a_run_leaves_the_recorded_csv_file(tmp_path):
    trainer_with(CSVLogger(tmp_path), tmp_path).fit(Model(), loader(), loader())
    folder = tmp_path / "lightning_logs" / "version_0"
    assert rows_of(folder) == [
        ["epoch", "step", "train_loss", "val/acc", "val_loss"],
        ["0", "0", "1.79", "", ""],
        ["0", "1", "2.79", "", ""],
        ["0", "1", "", "0.1", "3.0"],
    ]
    assert (folder / "hparams.yaml").read_text() == "lr: 0.1\n"


def test_numbers_logged_from_tensors_read_back_exactly(tmp_path):
    values = []

    class Random(Model):
        def training_step(self, batch, batch_idx):
            value = torch.rand(())
            values.append(value.item())
            self.log("value", value)
            return self(batch).sum()

    trainer_with(CSVLogger(tmp_path, version="v"), tmp_path, max_epochs=3).fit(Random(), loader())
    rows = rows_of(tmp_path / "lightning_logs" / "v")
    assert [float(row[rows[0].index("value")]) for row in rows[1:]] == values


def test_a_crash_keeps_what_was_logged(tmp_path):
    class Crashes(Model):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError):
        trainer_with(CSVLogger(tmp_path), tmp_path, max_epochs=5).fit(Crashes(), loader())
    assert len(rows_of(tmp_path / "lightning_logs" / "version_0")) == 1 + 4


@pytest.mark.parametrize(
    ("logger", "log_dir", "checkpoints"),
    [
        (lambda d: CSVLogger(d), "lightning_logs/version_0", "lightning_logs/version_0"),
        (lambda d: CSVLogger(d, "n", "v1"), "n/v1", "n/v1"),
        (lambda d: TensorBoardLogger(d, name="", version=3, sub_dir="sub"), "version_3/sub", "version_3"),
        (lambda d: [CSVLogger(d, "one"), CSVLogger(d, "two")], "one/version_0", "one/version_0"),
        (lambda d: False, ".", "."),
    ],
)
def test_directories_derive_from_the_first_logger(tmp_path, logger, log_dir, checkpoints):
    trainer = trainer_with(logger(tmp_path), tmp_path)
    trainer.fit(Model(), loader())
    assert os.path.samefile(trainer.log_dir, tmp_path / log_dir)
    assert os.listdir(tmp_path / checkpoints / "checkpoints") == ["epoch=0-step=2.ckpt"]


def test_every_logger_gets_every_call(tmp_path):
    class Listening(DummyLogger):
        def __init__(self):
            self.steps, self.states = [], []

        def log_metrics(self, metrics, step=None):
            assert all(type(value) in (int, float) for value in metrics.values())
            self.steps.append((step, sorted(metrics)))

        def finalize(self, status):
            self.states.append(status)

    loggers = [Listening(), Listening()]
    trainer_with(loggers, tmp_path, enable_checkpointing=False).fit(Model(), loader(), loader())
    assert loggers[0].steps == loggers[1].steps == [
        (0, ["epoch", "train_loss"]), (1, ["epoch", "train_loss"]), (1, ["epoch", "val/acc", "val_loss"]),
    ]  # fmt: skip
    assert loggers[0].states == ["success"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_curves_hyper_parameters_and_the_graph(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, log_graph=True)
    model = Model()
    model.example_input_array = torch.ones(2, 4)
    trainer_with(logger, tmp_path).fit(model, loader(), loader())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars == {
        "epoch": [(0, 0.0), (1, 0.0), (1, 0.0)],
        "hp_metric": [(0, -1.0)],
        "train_loss": [(0, 1.79), (1, 2.79)],
        "val/acc": [(1, 0.1)],
        "val_loss": [(1, 3.0)],
    }
    assert events.Tags()["graph"]
    assert (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text() == "lr: 0.1\n"
