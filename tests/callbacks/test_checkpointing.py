"""Which files are written, when, and what they are called."""

from __future__ import annotations

import logging
import os
import re
import signal
import warnings
from datetime import timedelta
from math import inf, nan
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen
from fulmen.callbacks import Callback, Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.plugins import TorchCheckpointIO
from fulmen.utilities.errors import MisconfigurationException


class Recording(ModelCheckpoint):
    """Keeps what was written and removed, with the stage it happened in."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.events = []

    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        self.events.append(("save", Path(filepath).name, trainer.state.stage.value))

    def _remove_checkpoint(self, trainer, filepath):
        super()._remove_checkpoint(trainer, filepath)
        self.events.append(("remove", Path(filepath).name))

    @property
    def saved(self):
        return [event[1] for event in self.events if event[0] == "save"]


# arguments of the callback, files left after 5 epochs of 4 batches with val_loss 3, 1, 2, 0.5, 4
FILES_LEFT = [
    ({}, ["epoch=4-step=20"]),
    ({"monitor": "val_loss"}, ["epoch=3-step=16"]),
    ({"monitor": "val_loss", "save_top_k": 2}, ["epoch=1-step=8", "epoch=3-step=16"]),
    ({"monitor": "val_loss", "save_top_k": -1}, [f"epoch={n}-step={4 * n + 4}" for n in range(5)]),
    ({"monitor": "val_loss", "mode": "max"}, ["epoch=4-step=20"]),
    ({"save_top_k": 0}, []),
    ({"save_top_k": -1}, [f"epoch={n}-step={4 * n + 4}" for n in range(5)]),
    ({"monitor": "val_loss", "filename": "{epoch}-{val_loss:.2f}"}, ["epoch=3-val_loss=0.50"]),
    (
        {"monitor": "val_loss", "filename": "ep{epoch:02d}-{val_loss:.3f}", "auto_insert_metric_name": False},
        ["ep03-0.500"],
    ),
    ({"monitor": "val_loss", "filename": "{epoch}-{val/acc:.2f}"}, ["epoch=3-val/acc=0.50"]),
    ({"monitor": "val_loss", "filename": "{epoch}-{nope:.2f}"}, ["epoch=3-nope=0.00"]),
    ({"monitor": "val_loss", "filename": "best", "save_top_k": 2}, ["best", "best-v1"]),
    ({"monitor": "val_loss", "filename": "best", "enable_version_counter": False}, ["best"]),
    ({"monitor": "val_loss", "save_last": True}, ["epoch=3-step=16", "last"]),
    ({"monitor": "val_loss", "save_last": "link"}, ["epoch=3-step=16", "last"]),
    ({"save_top_k": 0, "save_last": True}, ["last"]),
    ({"every_n_epochs": 0, "save_last": True}, ["last"]),
    ({"every_n_epochs": 0}, []),
    ({"every_n_epochs": 2, "save_top_k": -1}, ["epoch=1-step=8", "epoch=3-step=16"]),
    ({"every_n_train_steps": 3, "save_top_k": -1}, [f"epoch={(n - 1) // 4}-step={n}" for n in (3, 6, 9, 12, 15, 18)]),
    ({"train_time_interval": timedelta(hours=1)}, []),
]


@pytest.mark.parametrize(("arguments", "expected"), FILES_LEFT, ids=lambda value: str(value)[:60])
def test_files_left_after_a_run(fit, files, tmp_path, arguments, expected):
    fit(ModelCheckpoint(**arguments))
    found = files() if (tmp_path / "checkpoints").exists() else []
    assert found == sorted(f"{name}.ckpt" for name in expected)


def test_what_the_callback_says_about_its_files(fit, tmp_path):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)
    trainer = fit(callback)
    folder = tmp_path / "checkpoints"
    assert callback.dirpath == str(folder)
    assert callback.best_model_path == str(folder / "epoch=3-step=16.ckpt")
    assert callback.best_model_score == callback.current_score == 0.5
    assert callback.kth_best_model_path == str(folder / "epoch=1-step=8.ckpt")
    assert callback.kth_value == 1.0
    assert {os.path.basename(path): score.item() for path, score in callback.best_k_models.items()} == {
        "epoch=1-step=8.ckpt": 1.0,
        "epoch=3-step=16.ckpt": 0.5,
    }
    assert callback.last_model_path == str(folder / "last.ckpt")
    assert trainer.checkpoint_callback is callback
    # last.ckpt follows other saves: it is of the last epoch that was among the best
    assert torch.load(callback.last_model_path, weights_only=True)["epoch"] == 3


def test_last_without_others_is_written_at_the_end(fit, tmp_path):
    fit(ModelCheckpoint(save_top_k=0, save_last=True))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 20


def test_link_is_relative_and_follows_the_newest_file(fit, tmp_path):
    fit(ModelCheckpoint(save_last="link", monitor="val_loss"))
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "epoch=3-step=16.ckpt"


def test_link_replaces_a_folder_and_needs_a_local_path(fit, tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    fit(ModelCheckpoint(tmp_path, save_last="link", filename="m", enable_version_counter=False), max_epochs=1)
    assert (tmp_path / "last.ckpt").is_symlink()
    with pytest.raises(ValueError, match="memory://"):
        ModelCheckpoint("memory://somewhere", save_last="link").setup(fit(Callback(), max_epochs=0), None, "fit")


def test_old_file_is_removed_after_the_new_one_is_there(fit):
    callback = Recording(monitor="val_loss", save_last=True, filename="{epoch}")
    fit(callback, max_epochs=2)
    assert callback.events == [
        ("save", "epoch=0.ckpt", "train"),
        ("save", "last.ckpt", "train"),
        ("save", "epoch=1.ckpt", "train"),
        ("remove", "epoch=0.ckpt"),
        ("save", "last.ckpt", "train"),
    ]


@pytest.mark.skipif(os.name != "posix", reason="other systems cannot flush a folder")
def test_content_and_name_of_the_new_file_are_on_the_disk_before_the_old_one_goes(fit, monkeypatch):
    seen = []

    def watched(name):
        real = getattr(os, name)

        def call(what, *rest, **more):
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            seen.append((name, re.sub(r"^\.(.*)\.[^.]*\.tmp$", r"new \1", os.path.basename(path))))
            return real(what, *rest, **more)

        monkeypatch.setattr(os, name, call)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs to see which file is open")
    callback = ModelCheckpoint(filename="{epoch}")
    for name in ("fsync", "replace", "remove"):
        watched(name)
    fit(callback, max_epochs=2)
    assert [event for event in seen if event[0] != "remove" or not event[1].startswith("new ")] == [
        ("fsync", "new epoch=0.ckpt"), ("replace", "new epoch=0.ckpt"), ("fsync", "checkpoints"),
        ("fsync", "new epoch=1.ckpt"), ("replace", "new epoch=1.ckpt"), ("fsync", "checkpoints"),
        ("remove", "epoch=0.ckpt"),
    ]  # fmt: skip


# script of val_loss, arguments, epochs whose checkpoint is left
BEST = [
    ((nan, 1.0, nan, 0.5, nan), {}, [3]),
    ((nan, nan, nan, 3.0, nan), {"save_top_k": 2}, [1, 3]),
    ((nan, nan, 3.0, nan), {"mode": "max"}, [2]),
    ((1.0, 1.0, 1.0), {}, [0]),
    ((1.0, 1.0, 1.0), {"mode": "max", "save_top_k": 2}, [0, 1]),
    ((-inf, 1.0), {}, [0]),
]


@pytest.mark.parametrize(("script", "arguments", "epochs"), BEST)
def test_what_is_best(fit, files, scripted_model, script, arguments, epochs):
    callback = ModelCheckpoint(monitor="val_loss", filename="{epoch}", **arguments)
    fit(callback, scripted_model(script))
    assert files() == [f"epoch={epoch}.ckpt" for epoch in epochs]


def test_nan_counts_as_the_worst_score(fit, scripted_model):
    callback = ModelCheckpoint(monitor="val_loss", save_top_k=3)
    fit(callback, scripted_model((nan, 1.0)), max_epochs=2)
    assert callback.best_model_score == 1.0
    assert sorted(score.item() for score in callback.best_k_models.values()) == [1.0, inf]


# arguments of the callback, of the trainer, names saved in order with the stage
MOMENTS = [
    ({}, {"max_epochs": 1}, ["epoch=0-step=4 train"]),
    ({"save_on_train_epoch_end": False}, {"max_epochs": 1}, ["epoch=0-step=4 validate"]),
    ({}, {"val_check_interval": 2, "max_epochs": 1}, ["epoch=0-step=2 validate", "epoch=0-step=4 validate"]),
    ({}, {"check_val_every_n_epoch": 2, "max_epochs": 3}, ["epoch=1-step=8 validate"]),
    ({}, {"val_check_interval": "00:00:00:00", "max_epochs": 1}, [f"epoch=0-step={n} validate" for n in (1, 2, 3, 4)]),
    ({}, {"limit_val_batches": 0, "max_epochs": 1}, ["epoch=0-step=4 train"]),
    ({"every_n_train_steps": 4}, {"max_epochs": 1}, ["epoch=0-step=4 train"]),
    (
        {"every_n_train_steps": 1},
        {"max_epochs": 1, "accumulate_grad_batches": 2},
        ["epoch=0-step=1 train", "epoch=0-step=2 train"],
    ),
    ({"train_time_interval": timedelta(0)}, {"max_epochs": 1}, [f"epoch=0-step={n} train" for n in (1, 2, 3, 4)]),
    ({}, {"max_steps": 6}, ["epoch=0-step=4 train", "epoch=1-step=6 train"]),
    # with a monitor, what comes too early waits for validation
    ({"every_n_train_steps": 4, "monitor": "val_loss"}, {"max_epochs": 1}, ["epoch=0-step=4 validate"]),
    (
        {"every_n_train_steps": 2, "monitor": "val_loss", "save_on_train_epoch_end": False},
        {"max_epochs": 2},
        ["epoch=0-step=4 validate", "epoch=1-step=6 train", "epoch=1-step=8 validate"],
    ),
    (
        {"every_n_train_steps": 2, "monitor": "val_loss"},
        {"max_epochs": 1, "val_check_interval": 2},
        ["epoch=0-step=2 validate", "epoch=0-step=4 validate"],
    ),
    (
        {"every_n_train_steps": 2, "monitor": "train_loss", "save_on_train_epoch_end": False},
        {"max_epochs": 1},
        ["epoch=0-step=2 train", "epoch=0-step=4 validate"],
    ),
    (
        {"every_n_train_steps": 2, "monitor": "val_loss"},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        ["epoch=1-step=8 validate"],
    ),
    ({}, {"fast_dev_run": True}, []),
]


@pytest.mark.parametrize(("arguments", "given", "expected"), MOMENTS, ids=lambda value: str(value)[:70])
def test_when_files_are_written(fit, recwarn, arguments, given, expected):
    callback = Recording(save_top_k=-1, **arguments)
    fit(callback, **given)
    assert not [warning for warning in recwarn if "ModelCheckpoint" in str(warning.message)]
    assert [f"{e[1].removesuffix('.ckpt')} {e[2]}" for e in callback.events] == expected


def test_a_step_before_validation_is_scored_with_that_validation(fit):
    callback = ModelCheckpoint(monitor="val_loss", every_n_train_steps=4, save_top_k=-1)
    fit(callback, max_epochs=2)
    scores = {os.path.basename(path): score.item() for path, score in callback.best_k_models.items()}
    assert scores == {"epoch=0-step=4.ckpt": 3.0, "epoch=1-step=8.ckpt": 1.0}


def test_a_value_of_the_training_epoch_can_be_monitored_by_steps(fit, scripted_model):
    class Model(scripted_model):
        def on_train_epoch_end(self):
            self.log("epoch_value", float(self.current_epoch))

    callback = Recording(monitor="epoch_value", every_n_train_steps=2, save_top_k=-1)
    fit(callback, Model(), max_epochs=1)
    assert callback.events == [("save", "epoch=0-step=4.ckpt", "train")]


def test_a_value_logged_at_the_end_of_the_epoch_is_seen_by_the_monitor(fit, scripted_model):
    class Model(scripted_model):
        def on_train_epoch_end(self):
            self.log("epoch_value", -float(self.current_epoch))

    callback = ModelCheckpoint(monitor="epoch_value")
    fit(callback, Model(), max_epochs=3)
    assert callback.best_model_score == -2.0


def test_misspelt_monitor_is_an_error_with_a_suggestion_once_validation_has_run(fit):
    with pytest.raises(MisconfigurationException, match=r"vloss.*Did you mean `val_loss`"):
        fit(ModelCheckpoint(monitor="vloss"), max_epochs=1)


def test_missing_monitor_without_validation_warns_once(fit, files, tmp_path, recwarn):
    fit(ModelCheckpoint(monitor="vloss"), max_epochs=3, limit_val_batches=0)
    assert len([w for w in recwarn if "vloss" in str(w.message)]) == 1
    assert not (tmp_path / "checkpoints").exists()


def test_loggers_hear_of_every_file_before_the_old_one_goes(fit, tmp_path):
    class Listening(CSVLogger):
        heard = []

        def after_save_checkpoint(self, checkpoint_callback):
            self.heard.append(sorted(os.listdir(checkpoint_callback.dirpath)))

    logger = Listening(tmp_path)
    fit(ModelCheckpoint(filename="{epoch}"), logger=logger, max_epochs=2)
    assert logger.heard == [["epoch=0.ckpt"], ["epoch=0.ckpt", "epoch=1.ckpt"]]


FOLDERS = [
    (lambda d: True, "lightning_logs/version_0/checkpoints"),
    (lambda d: False, "checkpoints"),
    (lambda d: CSVLogger(d / "logs"), "logs/lightning_logs/version_0/checkpoints"),
    (lambda d: CSVLogger(d / "logs", "n", "v1"), "logs/n/v1/checkpoints"),
    (lambda d: TensorBoardLogger(d / "logs", name="", version=3, sub_dir="sub"), "logs/version_3/checkpoints"),
    (lambda d: [CSVLogger(d / "logs"), CSVLogger(d / "other")], "logs/lightning_logs/version_0/checkpoints"),
]


@pytest.mark.parametrize(("make_logger", "folder"), FOLDERS)
def test_folder_comes_from_the_first_logger(fit, tmp_path, make_logger, folder):
    callback = ModelCheckpoint()
    fit(callback, logger=make_logger(tmp_path), max_epochs=1)
    assert os.path.samefile(callback.dirpath, tmp_path / folder)


def test_local_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ModelCheckpoint("~/x").dirpath == os.path.realpath(tmp_path / "x")
    assert ModelCheckpoint(Path("a/../b")).dirpath == os.path.realpath(tmp_path / "b")
    assert ModelCheckpoint("s3://bucket/x").dirpath == "s3://bucket/x"


def test_reused_folder_keeps_the_files_of_the_first_run(fit, files, tmp_path):
    fit(ModelCheckpoint(tmp_path, filename="m", save_last=True), max_epochs=1)
    with pytest.warns(UserWarning, match="not empty"):
        fit(ModelCheckpoint(tmp_path, filename="m", save_last=True), max_epochs=1)
    assert files(tmp_path) == ["last-v1.ckpt", "last.ckpt", "m-v1.ckpt", "m.ckpt"]


def test_class_attributes_change_the_names(fit, files):
    class Mine(ModelCheckpoint):
        CHECKPOINT_NAME_LAST = "{epoch}-newest"
        CHECKPOINT_JOIN_CHAR = "_"
        CHECKPOINT_EQUALS_CHAR = ""
        FILE_EXTENSION = ".pt"
        STARTING_VERSION = 5

    fit(Mine(save_last=True, save_top_k=-1), max_epochs=2)
    # a `last` with another name replaces the one before
    assert files() == ["epoch0_step4.pt", "epoch1-newest.pt", "epoch1_step8.pt"]
    assert Mine(filename="m").format_checkpoint_name({}, ver=5) == "m_v5.pt"


METRICS = {"epoch": 3, "step": 7, "val_loss": torch.tensor(0.126), "val/acc": 0.5, "a.b": 4}
NAMES = [
    ({}, {}, "epoch=3-step=7.ckpt"),
    ({"filename": "{epoch:02d}-{val_loss:.2f}"}, {}, "epoch=03-val_loss=0.13.ckpt"),
    ({"filename": "{missing}-{missing:d}-{missing:.3f}"}, {}, "missing=0-missing=0-missing=0.000.ckpt"),
    ({"filename": "{val/acc:.1f}", "auto_insert_metric_name": False}, {}, "0.5.ckpt"),
    ({"filename": "{a.b}_{epoch}_{epochs}"}, {}, "a.b=4_epoch=3_epochs=0.ckpt"),
    ({"filename": "plain"}, {"ver": 3}, "plain-v3.ckpt"),
    ({"filename": "plain"}, {"prefix": "pre"}, "pre-plain.ckpt"),
    ({"filename": "plain"}, {"filename": "{step}"}, "step=7.ckpt"),
    ({"filename": ""}, {}, "epoch=3-step=7.ckpt"),
]


@pytest.mark.parametrize(("arguments", "how", "expected"), NAMES)
def test_names(arguments, how, expected):
    assert ModelCheckpoint(**arguments).format_checkpoint_name(METRICS, **how) == expected
    in_folder = ModelCheckpoint("/somewhere", **arguments).format_checkpoint_name(METRICS, **how)
    assert in_folder == os.path.join(os.path.realpath("/somewhere"), expected)


def test_user_may_log_epoch_and_step(fit, files, scripted_model):
    class Model(scripted_model):
        def on_train_epoch_end(self):
            self.log("step", 100.0 + self.current_epoch)

    fit(ModelCheckpoint(monitor="step", mode="max"), Model(), max_epochs=2)
    assert files() == ["epoch=1-step=101.ckpt"]


WRONG = [
    ({"save_top_k": -2}, "save_top_k=-2"),
    ({"save_top_k": 3}, "save_top_k=3"),
    ({"every_n_train_steps": -1}, "0 "),
    ({"every_n_epochs": -1}, "0 "),
    ({"every_n_train_steps": 1, "every_n_epochs": 1}, "second `ModelCheckpoint`"),
    ({"every_n_train_steps": 1, "train_time_interval": timedelta(1)}, "second `ModelCheckpoint`"),
    ({"mode": "auto"}, "mode='auto'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        ModelCheckpoint(**arguments)


def test_one_trigger_switches_the_others_off():
    assert ModelCheckpoint().every_n_epochs == 1
    assert ModelCheckpoint(every_n_train_steps=5).every_n_epochs == 0
    assert ModelCheckpoint(train_time_interval=timedelta(1)).every_n_epochs == 0


def test_state_key_names_what_makes_two_callbacks_different():
    assert ModelCheckpoint(monitor="a", every_n_epochs=2).state_key == (
        "ModelCheckpoint{'monitor': 'a', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 2, "
        "'train_time_interval': None}"
    )


def test_state_round_trip(tmp_path):
    before = ModelCheckpoint(tmp_path, monitor="a")
    before.best_model_path, before.best_model_score = "best", torch.tensor(1.0)
    before.best_k_models = {"best": torch.tensor(1.0), "kth": torch.tensor(2.0)}
    before.kth_best_model_path, before.kth_value, before.last_model_path = "kth", torch.tensor(2.0), "last"
    after = ModelCheckpoint(tmp_path, monitor="a")
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()


def test_state_of_another_folder_gives_only_the_best_path(tmp_path):
    before = ModelCheckpoint(tmp_path / "one", monitor="a")
    before.best_model_path, before.last_model_path, before.best_model_score = "best", "last", torch.tensor(1.0)
    after = ModelCheckpoint(tmp_path / "two", monitor="a")
    with pytest.warns(UserWarning, match="best_model_path"):
        after.load_state_dict(before.state_dict())
    assert (after.best_model_path, after.last_model_path, after.best_model_score) == ("best", "", None)


def test_resumed_run_goes_on_with_the_list_of_the_best(fit, files, tmp_path):
    arguments = {"dirpath": tmp_path / "checkpoints", "monitor": "val_loss", "save_top_k": 2}
    first = ModelCheckpoint(**arguments)
    fit(first, max_epochs=3)
    assert files() == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    second = ModelCheckpoint(**arguments)
    fit(second, max_epochs=5, ckpt_path=tmp_path / "checkpoints" / "epoch=2-step=12.ckpt")
    # the file that was resumed from stays, although it is not among the best any more
    assert files() == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "epoch=3-step=16.ckpt"]
    assert sorted(map(os.path.basename, second.best_k_models)) == ["epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"]


def test_resumed_run_may_keep_fewer_files(fit, files, tmp_path):
    fit(ModelCheckpoint(monitor="val_loss", save_top_k=3), max_epochs=2)
    second = ModelCheckpoint(monitor="val_loss", save_top_k=1)
    fit(second, ckpt_path=tmp_path / "checkpoints" / "epoch=1-step=8.ckpt")
    assert second.best_model_score == 0.5
    assert files() == ["epoch=1-step=8.ckpt", "epoch=3-step=16.ckpt"]


def test_files_outside_of_the_folder_are_never_removed(fit, tmp_path):
    elsewhere = tmp_path / "elsewhere.ckpt"
    elsewhere.touch()
    callback = ModelCheckpoint(tmp_path / "checkpoints")
    callback.best_model_path = str(elsewhere)
    fit(callback, max_epochs=1)
    assert elsewhere.exists()


def test_weights_only_leaves_the_optimizer_out(fit, tmp_path):
    fit(ModelCheckpoint(tmp_path, filename="w", save_weights_only=True), max_epochs=1)
    content = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert "state_dict" in content
    assert "optimizer_states" not in content


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]),
        ({"save_last": True}, ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]),
        ({"monitor": "val_loss"}, ["epoch=0-step=4.ckpt", "epoch=1-step=6.ckpt"]),
        ({"save_top_k": 0}, ["epoch=1-step=6.ckpt"]),
    ],
)
def test_exception_writes_one_more_file(fit, files, scripted_model, arguments, expected):
    with pytest.raises(ZeroDivisionError):
        fit(ModelCheckpoint(save_on_exception=True, **arguments), breaking(scripted_model))
    assert files() == expected


def breaking(scripted_model):
    class Breaking(scripted_model):
        def training_step(self, batch, batch_idx):
            if self.global_step == 6:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    return Breaking()


def test_verbose_tells_every_decision(fit, scripted_model, caplog):
    with caplog.at_level(logging.INFO, logger="fulmen"):
        fit(ModelCheckpoint(monitor="val_loss", verbose=True), scripted_model((1.0, 3.0)), max_epochs=2)
    texts = [record.getMessage() for record in caplog.records]
    assert any("'val_loss' reached 1.00000 (best 1.00000), saving model to" in text for text in texts)
    assert "Epoch 1, global step 8: 'val_loss' was not in top 1" in texts


def test_list_of_the_best_as_yaml(fit, tmp_path):
    yaml = pytest.importorskip("yaml")
    callback = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    fit(callback)
    callback.best_k_models["infinite"] = torch.tensor(-inf)
    callback.to_yaml()
    expected = {path: score.item() for path, score in callback.best_k_models.items()}
    assert yaml.safe_load((tmp_path / "best_k_models.yaml").read_text()) == expected
    callback.best_k_models.clear()
    callback.to_yaml(tmp_path / "deeper" / "list.yaml")
    assert yaml.safe_load((tmp_path / "deeper" / "list.yaml").read_text()) == {}


def test_checkpoints_come_last_and_monitor():
    assert issubclass(ModelCheckpoint, Checkpoint)
    assert Checkpoint.monitors
    assert not Callback.monitors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("filename", ["x", "{epoch}/x"])
def test_the_next_start_removes_what_a_killed_save_left(fit, files, tmp_path, filename):
    class Dies(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            super().save_checkpoint({**checkpoint, "deadly": Deadly()}, path)

    if (child := os.fork()) == 0:
        try:
            fit(ModelCheckpoint(filename=filename), plugins=Dies())
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    [left] = files()
    assert left.endswith(".tmp")
    fit(ModelCheckpoint(filename=filename), max_epochs=1)
    assert files() == [f"{filename.format(epoch='epoch=0')}.ckpt"]


class Deadly:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_remote_folder(fit):
    fsspec = pytest.importorskip("fsspec")
    callback = ModelCheckpoint("memory://checkpoints", monitor="val_loss", save_last=True)
    fit(callback)
    names = [os.path.basename(path) for path in fsspec.filesystem("memory").ls("/checkpoints", detail=False)]
    assert sorted(names) == ["epoch=3-step=16.ckpt", "last.ckpt"]


def test_on_exception_checkpoint_is_written_and_removed_by_the_next_good_run(fit, scripted_model, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    assert callback.ckpt_path == str(tmp_path / "on_exception.ckpt")
    with pytest.raises(ZeroDivisionError):
        fit(callback, breaking(scripted_model))
    assert torch.load(callback.ckpt_path, weights_only=True)["global_step"] == 6
    fulmen.Trainer(callbacks=callback, logger=False, enable_progress_bar=False).validate(
        scripted_model(), verbose=False
    )
    assert os.path.exists(callback.ckpt_path)  # looking at what there is does not end the run
    trainer = fit(callback, max_epochs=2)  # resumes from the file without being told
    assert trainer.global_step == 8
    assert not os.path.exists(callback.ckpt_path)
    with pytest.raises(ValueError, match="names no file"):
        OnExceptionCheckpoint(tmp_path, filename="")


def test_an_exception_outside_of_training_keeps_the_file_of_the_run_that_broke(fit, scripted_model, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fit(callback, breaking(scripted_model))
    before = Path(callback.ckpt_path).read_bytes()

    class Misspelt(type(scripted_model())):
        def setup(self, stage):
            raise NameError("trainig")

    for verb in ("fit", "validate"):
        with pytest.raises(NameError):
            trainer = fulmen.Trainer(callbacks=callback, logger=False, enable_progress_bar=False, max_epochs=2)
            getattr(trainer, verb)(Misspelt())
    assert Path(callback.ckpt_path).read_bytes() == before


def test_a_resumed_run_writes_no_file_while_gradients_wait_for_a_step(fit, files, tmp_path):
    """A step counts as new in a new process, but half of the next window has been trained already."""
    arguments = {"every_n_train_steps": 2, "save_top_k": -1, "dirpath": tmp_path}
    fit(ModelCheckpoint(**arguments), max_epochs=1, accumulate_grad_batches=2)
    resumed = Recording(**arguments)
    fit(resumed, max_epochs=2, accumulate_grad_batches=2, ckpt_path=tmp_path / "epoch=0-step=2.ckpt")
    assert [event[1] for event in resumed.events] == ["epoch=1-step=4.ckpt"]


def test_a_save_by_the_clock_comes_after_its_interval(fit, monkeypatch):
    """Counted from the start of training, then from the last save; the clock is turned on by 20 s in each batch."""
    now = [1000.0]
    monkeypatch.setattr("fulmen.callbacks.save_schedule.time.monotonic", lambda: now[0])

    class Turns(Callback):
        def on_train_batch_start(self, *args):
            now[0] += 20

    callback = Recording(save_top_k=-1, train_time_interval=timedelta(seconds=50))
    now[0] += 500  # setting up does not count
    fit([Turns(), callback], max_epochs=2)
    assert callback.saved == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt"]
    callback = Recording(save_top_k=-1, train_time_interval=timedelta(seconds=50))
    fit([Turns(), callback], max_epochs=1, accumulate_grad_batches=2)
    assert callback.saved == ["epoch=0-step=2.ckpt"]  # due at the third batch, whose window is open


def test_default_checkpoint_is_added(fit, files):
    trainer = fit([], enable_checkpointing=True, max_epochs=1)
    assert type(trainer.checkpoint_callback) is ModelCheckpoint
    assert files() == ["epoch=0-step=4.ckpt"]
    assert isinstance(trainer, fulmen.Trainer)


def test_a_folder_with_files_of_another_run_is_named(tmp_path):
    def warnings_of(folder, ckpt_path=None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(callbacks=[ModelCheckpoint(folder)], enable_checkpointing=True, max_epochs=2)
            trainer.fit(Regression(), make_loader(), ckpt_path=ckpt_path)
        return [str(one.message) for one in caught if "is not empty" in str(one.message)], trainer

    told, trainer = warnings_of(tmp_path / "one")
    assert told == []
    path = trainer.checkpoint_callback.best_model_path
    assert warnings_of(tmp_path / "one", path)[0] == warnings_of(tmp_path / "one", "auto")[0] == []
    assert len(warnings_of(tmp_path / "one")[0]) == 1
    assert warnings_of(tmp_path / "two", "auto")[0] == []
    assert len(warnings_of(tmp_path / "two", path)[0]) == 1
