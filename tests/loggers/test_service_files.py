"""What a run leaves in the files of the tracking clients, read back row by row.

The clients work offline; `make test-services` installs them into an environment of their own and runs this.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader

import fulmen as pl
from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger

# Regression on 12 samples in batches of 4, for two epochs.
STEPS = [0, 1, 2, 3, 4, 5]
EPOCH_OF_STEP = [0, 0, 0, 1, 1, 1]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: run `make test-services`")


class Recorded(Regression):
    """Keeps the losses it logs."""

    def __init__(self, lr: float = 0.1, shape: dict | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/batches", float(batch_idx), reduce_fx="max")


def train(logger: Logger) -> tuple[Recorded, pl.Trainer]:
    torch.manual_seed(0)
    model = Recorded(lr=0.01, shape={"hidden": {"width": 3}})
    trainer = pl.Trainer(
        max_epochs=2, logger=logger, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(monitor="loss", save_top_k=1)],
    )  # fmt: skip
    trainer.fit(model, make_loader(), make_loader())
    assert len(model.losses) == len(STEPS)
    return model, trainer


def read_wandb_records(path: Path) -> Iterator:
    """The records of a ``.wandb`` file: 7 bytes, then LevelDB's log format, blocks of 32 KiB with parts of records."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    position = 7
    body = b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        body += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(body)
            body = b""


@needs("wandb")
def test_wandb_has_every_step_and_the_hyperparameters(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    logger = WandbLogger(name="mine", project="p", save_dir="w", offline=True, prefix="pre")
    model, trainer = train(logger)
    wandb.finish()
    (path,) = Path("w", "wandb").glob(f"offline-run-*-{logger.version}/run-{logger.version}.wandb")
    records = list(read_wandb_records(path))

    runs = {
        (record.run.run_id, record.run.project, record.run.display_name) for record in records if record.HasField("run")
    }
    assert runs == {(logger.version, "p", "mine")}
    rows = [as_row(record.history.item) for record in records if record.HasField("history")]
    train_rows = [row for row in rows if "pre-loss" in row]
    assert [row["trainer/global_step"] for row in train_rows] == STEPS
    assert [row["pre-epoch"] for row in train_rows] == EPOCH_OF_STEP
    assert [row["pre-loss"] for row in train_rows] == pytest.approx(model.losses, rel=1e-12)
    val_rows = [(row["trainer/global_step"], row["pre-val/batches"]) for row in rows if "pre-val/batches" in row]
    assert val_rows == [(2, 2.0), (5, 2.0)]
    config = {}
    for record in records:
        config.update(as_row(record.config.update))
    assert config["lr"] == 0.01 and config["shape"] == {"hidden": {"width": 3}}
    axes = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in records}
    assert axes["*"] == "trainer/global_step"
    assert Path(trainer.checkpoint_callback.best_model_path).parent == Path("w", "p", logger.version, "checkpoints")


def as_row(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@needs("mlflow")
@pytest.mark.parametrize("fails", [False, True])
def test_mlflow_has_every_step_and_the_checkpoint_in_its_database(tmp_path, monkeypatch, fails):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = MLFlowLogger(
        "exp", run_name="mine", tracking_uri=f"sqlite:///{tmp_path}/ml.db", artifact_location=str(tmp_path / "artifacts"),
        tags={"team": "x"}, prefix="pre", log_model=True,
    )  # fmt: skip
    if fails:
        monkeypatch.setattr(Recorded, "on_fit_end", fail)
        with pytest.raises(KeyError, match="on purpose"):
            train(logger)
    else:
        model, trainer = train(logger)
    run_id = logger.version
    with sqlite3.connect("ml.db") as database:
        (run,) = database.execute("select name, status, experiment_id from runs where run_uuid = ?", [run_id])
        rows = "select value, step from metrics where run_uuid = ? and key = ? order by step, timestamp"
        losses = database.execute(rows, [run_id, "pre-loss"]).fetchall()
        epochs = database.execute("select distinct step, value from metrics where key = 'pre-epoch'").fetchall()
        batches = database.execute(rows, [run_id, "pre-val/batches"]).fetchall()
        params = dict(database.execute("select key, value from params where run_uuid = ?", [run_id]).fetchall())
        tags = dict(database.execute("select key, value from tags where run_uuid = ?", [run_id]).fetchall())
    assert (run[0], run[1], str(run[2])) == ("mine", "FAILED" if fails else "FINISHED", logger.name)
    assert [step for _, step in losses] == STEPS
    assert sorted(epochs) == list(zip(STEPS, EPOCH_OF_STEP, strict=True))
    assert batches == [(2.0, 2), (2.0, 5)]
    assert params == {"lr": "0.01", "shape/hidden/width": "3"} and tags["team"] == "x"
    folders = {path.name: path for path in (tmp_path / "artifacts" / run_id / "artifacts").iterdir()}
    (name,) = folders
    assert {path.name for path in folders[name].iterdir()} == {"aliases.txt", "metadata.yaml", f"{name}.ckpt"}
    if not fails:
        assert [loss for loss, _ in losses] == pytest.approx(model.losses, rel=1e-12)
        best = Path(trainer.checkpoint_callback.best_model_path)
        assert (folders[name] / best.name).read_bytes() == best.read_bytes()


def fail(self) -> None:
    raise KeyError("on purpose")


@needs("mlflow")
def test_mlflow_says_how_a_deleted_experiment_comes_back(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = MLFlowLogger("exp", tracking_uri=f"sqlite:///{tmp_path}/ml.db")
    first.experiment.delete_experiment(first.experiment_id)
    with pytest.raises(pl.utilities.MisconfigurationException, match=r"restore --experiment-id \d+.*another"):
        MLFlowLogger("exp", tracking_uri=f"sqlite:///{tmp_path}/ml.db").log_metrics({"a": 1.0})
    assert MLFlowLogger("other", tracking_uri=f"sqlite:///{tmp_path}/ml.db").experiment_id != first.experiment_id


@needs("comet_ml")
def test_comet_has_every_step_with_its_epoch_in_the_archive(monkeypatch):
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    logger = CometLogger(project="p", name="mine", online=False, offline_directory="c", prefix="pre")
    model, trainer = train(logger)
    logger.experiment.end()
    (path,) = Path("c").glob(f"{logger.version}*.zip")
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        about = json.loads(archive.read("experiment.json"))
    assert about["project_name"] == "p"
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    losses = [metric for metric in metrics if metric["metricName"] == "pre-loss"]
    assert [(metric["step"], metric["epoch"]) for metric in losses] == list(zip(STEPS, EPOCH_OF_STEP, strict=True))
    assert [float(metric["metricValue"]) for metric in losses] == pytest.approx(model.losses, rel=1e-12)
    assert not [metric for metric in metrics if metric["metricName"] == "pre-epoch"]
    batches = [metric for metric in metrics if metric["metricName"] == "pre-val/batches"]
    assert [(metric["step"], float(metric["metricValue"])) for metric in batches] == [(2, 2.0), (5, 2.0)]
    params = [message["payload"].get("param") for message in messages if message["type"] == "parameter_msg"]
    values = {param["paramName"]: param["paramValue"] for param in params if param}
    assert values["lr"] == 0.01 and values["shape/hidden/width"] == 3
    checkpoints = Path("c", "p", logger.version, "checkpoints")
    assert Path(trainer.checkpoint_callback.best_model_path).parent == checkpoints
