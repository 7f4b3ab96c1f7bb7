from __future__ import annotations

import argparse
import csv
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

import fulmen
from fulmen.loggers import CSVLogger
from fulmen.utilities.rank_zero import rank_zero_only


def text_of(logger):
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        return file.read().replace("\r\n", "\n")


def rows_of(logger):
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        return list(csv.DictReader(file))


def test_directories_follow_name_and_version(tmp_path):
    logger = CSVLogger(tmp_path)
    assert (logger.name, logger.version, logger.group_separator) == ("lightning_logs", 0, "/")
    assert logger.save_dir == str(tmp_path)
    assert logger.root_dir == str(tmp_path / "lightning_logs")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert CSVLogger(tmp_path, "n", "v1").log_dir == str(tmp_path / "n" / "v1")
    assert CSVLogger(tmp_path, "n", 7).log_dir == str(tmp_path / "n" / "version_7")
    assert CSVLogger(tmp_path, name=None, version="v1").log_dir == str(tmp_path / "v1")
    assert CSVLogger(tmp_path, name="").name == ""
    assert not any(tmp_path.iterdir())  # nothing is made before it is needed


def test_the_next_version_is_one_more_than_the_highest(tmp_path):
    for folder in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / "lightning_logs" / folder).mkdir(parents=True)
    logger = CSVLogger(tmp_path)
    assert logger.version == 11
    logger.experiment  # noqa: B018  makes the folder
    assert CSVLogger(tmp_path).version == 12
    assert logger.version == 11


def test_the_file_has_one_column_per_name_and_one_row_per_call(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0, "train_loss": 1.79}, step=0)
    logger.log_metrics({"epoch": 0, "train_loss": torch.tensor(2.5)}, step=1)
    logger.log_metrics({"epoch": 0, "val_loss": 3.0, "val/acc": 3.0}, step=1)
    logger.finalize("success")
    assert text_of(logger) == "epoch,step,train_loss,val/acc,val_loss\n0,0,1.79,,\n0,1,2.5,,\n0,1,,3.0,3.0\n"


def test_the_header_grows_without_losing_rows(tmp_path):
    logger = CSVLogger(tmp_path, prefix="pre")
    written = []
    for step, metrics in enumerate([{"b": 1.5}, {"a": 0.1}, {"b": 2.0}, {"a": 1.0, "c,d": 2.0}]):
        logger.log_metrics(metrics, step)
        logger.experiment.save()
        written.append(text_of(logger))
    assert written[-1] == 'pre-a,pre-b,"pre-c,d",step\n,1.5,,0\n0.1,,,1\n,2.0,,2\n1.0,,2.0,3\n'
    assert written[2].startswith(written[1])  # rows without a new name are appended
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


def test_rows_with_known_names_are_appended_to_the_same_file(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.experiment.save()
    inode = os.stat(logger.experiment.metrics_file_path).st_ino
    for step in range(1, 50):
        logger.log_metrics({"a": 1.0}, step)
        logger.experiment.save()
    assert os.stat(logger.experiment.metrics_file_path).st_ino == inode
    logger.log_metrics({"new": 1.0}, 50)
    logger.experiment.save()
    assert len(rows_of(logger)) == 51


def test_numbers_read_back_exactly(tmp_path):
    numbers = [1 / 3, 1e-30, 5e-324, 1.7976931348623157e308, float(torch.tensor(0.1)), float("inf"), -0.0]
    logger = CSVLogger(tmp_path)
    for step, number in enumerate(numbers):
        logger.log_metrics({"x": number, "nan": float("nan"), "int": 2**60, "flag": True}, step)
    logger.finalize("success")
    rows = rows_of(logger)
    assert [float(row["x"]).hex() for row in rows] == [number.hex() for number in numbers]
    assert rows[0]["nan"] == "nan"
    assert int(rows[0]["int"]) == 2**60
    assert rows[0]["flag"] == "True"


def test_without_a_step_rows_are_numbered(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=2)
    for _ in range(5):
        logger.log_metrics({"a": 1.0})
    logger.finalize("success")
    assert [row["step"] for row in rows_of(logger)] == ["0", "1", "2", "3", "4"]


def test_rows_wait_in_memory_until_they_are_due(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=10)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert len(rows_of(logger)) == 1  # the file appears at once
    for step in range(1, 25):
        logger.log_metrics({"a": 1.0}, step)
        logger.save()
    assert len(rows_of(logger)) == 20
    assert len(logger.experiment.metrics) == 5
    logger.save()  # asked twice in a row: somebody wants to read
    assert len(rows_of(logger)) == 25
    logger.log_metrics({"a": 1.0}, 25)
    logger._written_at -= 5.0
    logger.save()
    assert len(rows_of(logger)) == 26
    logger.log_metrics({"a": 1.0}, 26)
    logger.finalize("success")
    assert len(rows_of(logger)) == 27


def test_a_killed_process_loses_only_the_rows_that_were_waiting(tmp_path):
    script = f"""
import os, signal
from fulmen.loggers import CSVLogger
logger = CSVLogger({str(tmp_path)!r}, version=0, flush_logs_every_n_steps=7)
for step in range(40):
    logger.log_metrics({{"a": step / 3, **({{"late": 1.0}} if step == 30 else {{}})}}, step)
    logger.save()
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = os.path.dirname(os.path.dirname(fulmen.__file__))
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root})
    assert ended.returncode == -signal.SIGKILL
    rows = rows_of(CSVLogger(tmp_path, version=0))
    assert 33 < len(rows) <= 40
    assert [float(row["a"]) for row in rows] == [step / 3 for step in range(len(rows))]


def test_an_existing_folder_is_warned_about_and_its_metrics_removed(tmp_path):
    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"old": 1.0}, 0)
    first.log_hyperparams({"lr": 1})
    first.finalize("success")
    second = CSVLogger(tmp_path, version=0)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        second.log_metrics({"new": 1.0}, 0)
    assert sorted(os.listdir(second.log_dir)) == ["hparams.yaml"]
    second.finalize("success")
    assert text_of(second) == "new,step\n1.0,0\n"


def test_hyper_parameters_are_written_only_if_there_are_any(tmp_path):
    yaml = pytest.importorskip("yaml")
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert os.listdir(logger.log_dir) == ["metrics.csv"]
    logger.log_hyperparams(argparse.Namespace(lr=0.1))
    logger.log_hyperparams({"layers": [1, 2]})
    logger.save()
    with open(os.path.join(logger.log_dir, "hparams.yaml")) as file:
        assert yaml.safe_load(file) == {"lr": 0.1, "layers": [1, 2]}


def test_an_unused_logger_leaves_nothing_behind(tmp_path):
    CSVLogger(tmp_path).finalize("success")
    assert not any(tmp_path.iterdir())


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.save()
    logger.finalize("success")
    assert not any(tmp_path.iterdir())


def test_a_pickled_logger_goes_on_where_it_was(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, 1)
    copy.finalize("success")
    assert [row["a"] for row in rows_of(copy)] == ["1.0", "2.0"]


def test_metrics_can_go_to_a_remote_folder():
    fsspec = pytest.importorskip("fsspec")
    logger = CSVLogger("memory://runs-of-test", flush_logs_every_n_steps=1)
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_metrics({"a": 2.0}, 1)
    logger.log_metrics({"b": 3.0}, 2)
    files = fsspec.filesystem("memory")
    text = files.cat("/runs-of-test/lightning_logs/version_0/metrics.csv").decode().replace("\r\n", "\n")
    assert text == "a,b,step\n1.0,,0\n2.0,,1\n,3.0,2\n"
    assert CSVLogger("memory://runs-of-test").version == 1


def test_the_number_of_waiting_rows_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="flush_logs_every_n_steps=0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)
