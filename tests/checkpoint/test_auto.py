"""`ckpt_path="auto"`: the same command goes on where the newest good checkpoint of its run is."""

from __future__ import annotations

import csv
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from fulmen.checkpoint import auto
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.storage.atomic import temporary_name
from fulmen.storage.checkpoint_io import DamagedCheckpointError, TorchCheckpointIO

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*starts again", "ignore:.*is not empty", "ignore:.*same callbacks", "ignore:.*fewer than"
)


class Breaks(Regression):
    """Fails in the training step of that number; counts those it makes."""

    def __init__(self, at: int = 1000) -> None:
        super().__init__()
        self.at, self.made = at, 0

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.at:
            raise ValueError("broken")
        self.made += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.trainer.current_epoch))  # the first epoch is best


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_folder_between_its_two_renames_is_found(tmp_path):
    """A sharded checkpoint whose process died after it had moved the old one away."""
    (tmp_path / "deep" / "x.ckpt").mkdir(parents=True)
    if (child := os.fork()) == 0:
        try:
            new = temporary_name(str(tmp_path / "deep" / "x.ckpt"))
            os.mkdir(new)
            os.rename(tmp_path / "deep" / "x.ckpt", f"{new}.old")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert auto.list_checkpoints([tmp_path]) == [str(tmp_path / "deep" / "x.ckpt")]
    assert os.listdir(tmp_path / "deep") == ["x.ckpt"]


def command(folder, breaks_at=1000, callbacks=None, epochs=3, **kwargs):
    """What a scheduler would start again and again; six steps an epoch."""
    torch.manual_seed(0)
    model = Breaks(breaks_at)
    saver = [ModelCheckpoint(folder, every_n_train_steps=2)] if callbacks is None else callbacks
    kwargs = {"default_root_dir": folder, **kwargs}
    trainer = make_trainer(callbacks=saver, enable_checkpointing=True, max_epochs=epochs, **kwargs)
    try:
        trainer.fit(model, make_loader(22), make_loader(8), ckpt_path="auto")
    except ValueError as error:
        assert str(error) == "broken"
    return model, trainer


def write(folder, name, steps, age=0, **content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": steps, "optimizer_states": [], **content}, path)
    os.utime(path, (1000 - age, 1000 - age))
    return str(path)


def newest(*folders):
    return auto.find_latest_checkpoint(auto.list_checkpoints(map(str, folders)), TorchCheckpointIO().load_checkpoint)


def test_a_run_starts_goes_on_and_is_over(tmp_path, caplog):
    model, trainer = command(tmp_path, breaks_at=5)
    assert (model.made, trainer.global_step, trainer.ckpt_path) == (5, 5, None)
    assert f"starts anew: there is no checkpoint in {tmp_path}" in caplog.text
    model, trainer = command(tmp_path, breaks_at=15)
    assert (model.made, trainer.global_step) == (11, 15)  # from step 4
    assert "epoch=0-step=4.ckpt" in caplog.text
    model, trainer = command(tmp_path)
    assert (model.made, trainer.global_step) == (4, 18)  # from step 14
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model, trainer = command(tmp_path)
    assert (model.made, trainer.global_step, trainer.state.status) == (0, 18, "finished")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert command(tmp_path, epochs=4)[0].made == 6


def test_a_run_whose_best_checkpoint_is_old_is_over_all_the_same(tmp_path):
    def best():
        return [ModelCheckpoint(tmp_path, monitor="val_loss")]

    assert command(tmp_path, callbacks=best())[0].made == 18
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=6.ckpt", "finished.ckpt"]
    assert command(tmp_path, callbacks=best())[0].made == 0
    model, _ = command(tmp_path, callbacks=[*best(), ModelCheckpoint(tmp_path, filename="every")], epochs=4)
    assert model.made == 6 and not (tmp_path / "finished.ckpt").exists()


def test_the_file_of_a_broken_run_is_a_candidate(tmp_path):
    saver = [OnExceptionCheckpoint(tmp_path / "broken")]
    assert command(tmp_path, breaks_at=4, callbacks=saver)[0].made == 4
    assert command(tmp_path, callbacks=saver)[0].made == 14


def test_steps_count_more_than_age(tmp_path):
    old = write(tmp_path, "last.ckpt", 9, age=100)
    write(tmp_path, "preempted.ckpt", 7)
    assert newest(tmp_path) == old
    young = write(tmp_path / "val", "acc=0.5.ckpt", 9, age=50)  # a name with a slash makes a folder
    assert newest(tmp_path) == young
    assert newest(tmp_path / "none") is None


def test_what_is_damaged_is_passed_over_by_name(tmp_path):
    good = write(tmp_path, "a.ckpt", 1)
    cut = write(tmp_path, "b.ckpt", 2)
    os.truncate(cut, os.path.getsize(cut) - 50)
    flipped = write(tmp_path, "c.ckpt", 3, state_dict={"w": torch.zeros(1000)})
    content = bytearray(Path(flipped).read_bytes())
    content[content.index(bytes(3000)) + 100] ^= 1
    Path(flipped).write_bytes(content)
    (tmp_path / "d.ckpt").write_bytes(b"")
    (tmp_path / ".hidden.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning) as said:
        assert newest(tmp_path) == good
    assert len([w for w in said if "Passed over" in str(w.message)]) == 3
    os.remove(good)
    message = "None of the run's 3 .* Move them away to start anew"
    with pytest.warns(UserWarning, match="Passed over"), pytest.raises(DamagedCheckpointError, match=message):
        newest(tmp_path)


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({"global_step": 5, "state_dict": {}}, tmp_path / "weights.ckpt")
    assert newest(tmp_path) is None


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_no_code_of_a_candidate_is_run(tmp_path, capsys):
    write(tmp_path, "evil.ckpt", 5, evil=Evil())
    with pytest.raises(pickle.UnpicklingError, match="loading classes can run any code"):
        newest(tmp_path)
    assert "run" not in capsys.readouterr().out


def test_loggers_go_on_in_the_version_that_has_checkpoints(tmp_path):
    def loggers():
        return [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]

    def saver():
        return [ModelCheckpoint(every_n_train_steps=2)]

    for breaks_at, made in ((1, 1), (5, 5), (1000, 14)):  # the first one breaks before anything is saved
        model, trainer = command(tmp_path, breaks_at, saver(), logger=loggers())
        assert model.made == made
        assert {logger.version for logger in trainer.loggers} == {0 if breaks_at == 1 else 1}
    assert command(tmp_path, callbacks=saver(), logger=loggers())[0].made == 0
    assert sorted(os.listdir(tmp_path / "lightning_logs")) == ["version_0", "version_1"]


def test_the_rows_of_all_attempts_are_in_one_file(tmp_path):
    for breaks_at in (5, 15, 1000, 1000):
        saver = [ModelCheckpoint(every_n_train_steps=2)]
        command(tmp_path, breaks_at, saver, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == list(range(18))


def test_files_may_have_another_ending(tmp_path):
    class Other(ModelCheckpoint):
        FILE_EXTENSION = ".pt"

    command(tmp_path, breaks_at=5, callbacks=[Other(tmp_path, every_n_train_steps=2)])
    assert command(tmp_path, callbacks=[Other(tmp_path, every_n_train_steps=2)])[0].made == 14


def test_without_a_logger_it_is_the_default_folder(tmp_path):
    saver = [ModelCheckpoint(every_n_train_steps=2)]
    command(tmp_path, breaks_at=5, callbacks=saver)
    assert command(tmp_path, callbacks=[ModelCheckpoint(every_n_train_steps=2)])[0].made == 14


def test_a_requeued_job_looks_at_its_own_file_too(tmp_path):
    """The plug-in says that this is SLURM; nothing else may take a file from the root folder."""
    command(tmp_path / "run", breaks_at=5)
    saved = torch.load(tmp_path / "run" / "epoch=0-step=4.ckpt", weights_only=True)
    saved["global_step"] = 100
    torch.save(saved, tmp_path / "hpc_ckpt_3.ckpt")
    kwargs = {"callbacks": [ModelCheckpoint(tmp_path / "run")], "epochs": 1, "default_root_dir": tmp_path}
    assert command(tmp_path, **kwargs)[1].ckpt_path.endswith("epoch=0-step=4.ckpt")
    kwargs["callbacks"] = [ModelCheckpoint(tmp_path / "run")]
    assert command(tmp_path, plugins=[SLURMEnvironment()], **kwargs)[1].ckpt_path.endswith("hpc_ckpt_3.ckpt")


def test_only_training_is_resumed(tmp_path):
    with pytest.raises(ValueError, match="only `fit` resumes"):
        make_trainer().validate(Regression(), make_loader(), ckpt_path="auto")
    trainer = make_trainer(fast_dev_run=True, default_root_dir=tmp_path)
    trainer.fit(Regression(), make_loader(), ckpt_path="auto")
    assert trainer.global_step == 1
