"""The loggers of Fabric: folders, files that are written at once, and what they refuse."""

from __future__ import annotations

import csv
import os

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fulmen.loggers
from fulmen.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from fulmen.utilities.rank_zero import rank_zero_only


def rows_of(logger):
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_the_root_is_the_folder_that_was_given(tmp_path, kind):
    logger = kind(tmp_path)
    assert logger.root_dir == str(tmp_path)
    assert (logger.name, logger.version) == ("lightning_logs", 0)
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert kind(root_dir=tmp_path, name="n", version="v").log_dir == str(tmp_path / "n" / "v")
    assert kind(tmp_path, name=None, version=7).log_dir == str(tmp_path / "version_7")
    (tmp_path / "n" / "version_4").mkdir(parents=True)
    assert kind(tmp_path, name="n").version == 5
    assert isinstance(logger, Logger) and issubclass(fulmen.loggers.Logger, Logger)
    assert logger.LOGGER_JOIN_CHAR == "-" and logger.group_separator == "/"


def test_rows_are_written_by_save_and_when_enough_wait(tmp_path):
    logger = CSVLogger(tmp_path, prefix="fit", flush_logs_every_n_steps=3)
    logger.log_metrics({"loss": torch.tensor(0.5)})
    logger.log_metrics({"loss": 0.25, "acc": 1})
    assert not os.path.exists(os.path.join(logger.log_dir, "metrics.csv"))
    logger.save()
    first = [{"fit-acc": "", "fit-loss": "0.5", "step": "0"}, {"fit-acc": "1", "fit-loss": "0.25", "step": "1"}]
    assert rows_of(logger) == first
    logger.log_metrics({"loss": 0.125}, step=2)  # the third step
    assert rows_of(logger)[2:] == [{"fit-acc": "", "fit-loss": "0.125", "step": "2"}]
    logger.log_metrics({"loss": 1}, step=3)
    logger.finalize("success")
    assert len(rows_of(logger)) == 4
    with pytest.raises(NotImplementedError, match="does not log hyper-parameters"):
        logger.log_hyperparams({"lr": 1})
    assert not os.path.exists(os.path.join(logger.log_dir, "hparams.yaml"))


def test_a_folder_of_another_run_is_said(tmp_path):
    old = CSVLogger(tmp_path, version=1)
    old.log_metrics({"a": 1})
    old.save()
    new = CSVLogger(tmp_path, version=1)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        new.log_metrics({"b": 2})
    new.save()
    assert rows_of(new) == [{"b": "2", "step": "0"}]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    for logger in (CSVLogger(tmp_path), TensorBoardLogger(tmp_path)):
        logger.log_metrics({"a": 1})
        logger.save()
        logger.finalize("success")
        logger.experiment.whatever(1)
    assert not any(tmp_path.iterdir())


def test_curves_hyperparameters_and_graphs_are_in_the_event_file(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="n", sub_dir="s", prefix="p", max_queue=5)
    assert logger.sub_dir == "s" and logger.log_dir == str(tmp_path / "n" / "version_0" / "s")
    logger.log_metrics({"loss": torch.tensor(0.5)}, step=3)
    logger.log_metrics({"several": {"a": 1.0, "b": 2.0}}, step=3)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": torch.zeros(2, 2)}})
    logger.log_graph(torch.nn.Linear(2, 1), torch.zeros(1, 2))
    logger.save()
    found = EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in found.Scalars("p-loss")] == [(3, 0.5)]
    assert [event.value for event in found.Scalars("p-hp_metric")] == [-1.0]
    assert found.Tags()["graph"]
    assert not list(tmp_path.rglob("hparams.yaml"))
    with pytest.raises(ValueError, match="cannot draw"):
        logger.log_metrics({"text": "long"})
    logger.finalize("success")


def test_no_table_without_a_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    assert EventAccumulator(logger.log_dir).Reload().Tags()["scalars"] == []
    logger.log_hyperparams({"lr": 0.1}, metrics={"best": 2.0}, step=4)
    logger.save()
    found = EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in found.Scalars("best")] == [(4, 2.0)]
