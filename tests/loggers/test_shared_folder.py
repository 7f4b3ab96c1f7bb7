"""Runs that share a folder of logs do not end each other, nor write into each other's files."""

from __future__ import annotations

import csv
import logging
import multiprocessing
import os
import time
import warnings

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.loggers import CSVLogger, TensorBoardLogger

RUNS, STEPS = 2, 40


def run(number, folder, start, kind, told):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("fulmen").addHandler(handler)
    warnings.simplefilter("ignore")
    try:
        given = {"csv": CSVLogger(folder), "both": [CSVLogger(folder), TensorBoardLogger(folder)], "default": True}[
            kind
        ]
        saver = ModelCheckpoint(every_n_train_steps=10)
        trainer = make_trainer(
            logger=given, callbacks=[saver], enable_checkpointing=True, max_epochs=-1, max_steps=STEPS,
            default_root_dir=folder, log_every_n_steps=1,
        )  # fmt: skip
        model, loader = Regression(lr=0.001 * (number + 1)), make_loader()
        start.wait()
        trainer.fit(model, loader)
        told.put((number, [str(logger.version) for logger in trainer.loggers], saver.best_model_path, lines))
    except BaseException as error:
        told.put((number, repr(error), "", lines))


def together(folder, kind):
    """What several runs that start at the same moment say."""
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(["torch"])
    start, told = context.Barrier(RUNS), context.Queue()
    runs = [context.Process(target=run, args=(n, str(folder), start, kind, told)) for n in range(RUNS)]
    for process in runs:
        process.start()
    said = sorted(told.get(timeout=1200) for _ in runs)
    for process in runs:
        process.join(60)
    return said


@pytest.mark.parametrize(
    "kind", ["csv", pytest.param("both", marks=pytest.mark.slow), pytest.param("default", marks=pytest.mark.slow)]
)
def test_each_run_has_a_version_of_its_own(tmp_path, kind):
    if kind == "both":
        pytest.importorskip("tensorboard")
    said = together(tmp_path, kind)
    versions = [versions for _, versions, _, _ in said]
    assert all(isinstance(found, list) and len(set(found)) == 1 for found in versions), versions
    assert sorted(found[0] for found in versions) == ["0", "1"]
    for _, (version, *_), path, lines in said:
        assert os.path.dirname(path) == str(tmp_path / "lightning_logs" / f"version_{version}" / "checkpoints")
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
        moved = [line for line in lines if "Another run has taken" in line]
        assert all(f"logs to version_{version}" in line for line in moved) and len(moved) <= 1
        if kind != "default":
            with open(tmp_path / "lightning_logs" / f"version_{version}" / "metrics.csv") as file:
                assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(STEPS))


def test_a_folder_that_was_taken_meanwhile_is_left_alone(tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    assert logger.version == 0  # seen, but not yet made
    other = CSVLogger(tmp_path)
    make_trainer(logger=other, log_every_n_steps=1).fit(Regression(), make_loader())
    before = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_bytes()
    with caplog.at_level(logging.INFO, logger="fulmen"):
        make_trainer(logger=logger, log_every_n_steps=1).fit(Regression(), make_loader())
    assert (other.version, logger.version) == (0, 1)
    assert "Another run has taken version_0" in caplog.text and "logs to version_1" in caplog.text
    assert (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_bytes() == before


def test_a_folder_the_user_made_or_opened_before_the_run_is_the_runs(tmp_path):
    logger = CSVLogger(tmp_path)
    os.makedirs(logger.log_dir)
    (tmp_path / "lightning_logs" / "version_0" / "config.yaml").write_text("a: 1\n")
    trainer = make_trainer(logger=[logger, TensorBoardLogger(tmp_path)], log_every_n_steps=1)
    trainer.fit(Regression(), make_loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Regression(), make_loader())
    opened = CSVLogger(tmp_path)
    opened.log_metrics({"before": 1.0}, step=0)
    opened.save()
    make_trainer(logger=opened, log_every_n_steps=1).fit(Regression(), make_loader())
    assert (logger.version, opened.version) == (0, 1)
    assert sorted(os.listdir(tmp_path / "lightning_logs")) == ["version_0", "version_1"]


def test_a_given_version_that_two_runs_share_ends_neither(tmp_path):
    """Each removes the file of the other when it starts; both go on writing."""

    class Other(Regression):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                (tmp_path / "lightning_logs" / "version_5" / "metrics.csv").unlink(missing_ok=True)
            self.log(f"new_{self.current_epoch}", time.monotonic())

    logger = CSVLogger(tmp_path, version=5, flush_logs_every_n_steps=1)
    make_trainer(logger=logger, log_every_n_steps=1, max_epochs=3).fit(Other(), make_loader())
    with open(tmp_path / "lightning_logs" / "version_5" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert int(rows[-1]["step"]) == 8 and {"new_1", "new_2", "train_loss"} <= rows[0].keys()
