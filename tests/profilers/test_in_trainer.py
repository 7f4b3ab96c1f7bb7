"""Profilers as the Trainer uses them: the names of its actions, and what a run leaves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from fulmen import Callback, LightningModule, Trainer
from fulmen.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("mine"):
            return self(batch).sum()

    def validation_step(self, batch, batch_idx):
        self(batch)

    def test_step(self, batch, batch_idx):
        self(batch)

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def on_train_start(self):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Listens(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pass


def loader():
    return DataLoader(torch.ones(16, 4), batch_size=2)


def trainer_with(profiler, tmp_path, **kwargs):
    return Trainer(
        **{
            "max_epochs": 1, "profiler": profiler, "logger": False, "default_root_dir": tmp_path, "accelerator": "cpu",
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [Listens()], **kwargs,
        }
    )  # fmt: skip


def test_the_trainer_names_its_actions_as_users_know_them(tmp_path):
    profiler = SimpleProfiler()
    trainer = trainer_with(profiler, tmp_path, num_sanity_val_steps=0)
    trainer.fit(Model(), loader(), loader())
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts["mine"] == 8
    assert counts["[LightningModule]Model.on_train_start"] == 1
    assert counts["[Callback]Listens.on_train_batch_end"] == 8
    assert counts["save_checkpoint"] == 1
    assert counts["[_TrainingEpochLoop].train_dataloader_next"] >= 8
    assert counts["[_EvaluationLoop].val_next"] >= 8
    assert counts["run_training_epoch"] == 1
    assert counts["run_training_batch"] == 8
    assert counts["[Strategy]SingleDeviceStrategy.training_step"] == 8
    assert counts["[Strategy]SingleDeviceStrategy.validation_step"] == 8
    assert profiler.current_actions == {}
    trainer.predict(Model(), loader())
    assert len(profiler.recorded_durations["[_PredictionLoop].predict_next"]) >= 8


def test_one_report_per_verb(tmp_path):
    trainer = trainer_with(SimpleProfiler(dirpath=tmp_path / "p", filename="times"), tmp_path)
    model = Model()
    trainer.fit(model, loader(), loader())
    trainer.validate(model, loader(), verbose=False)
    trainer.test(model, loader(), verbose=False)
    trainer.predict(model, loader())
    names = sorted(path.name for path in (tmp_path / "p").iterdir())
    assert names == [f"{stage}-times.txt" for stage in ("fit", "predict", "test", "validate")]
    assert (tmp_path / "p" / "fit-times.txt").read_text().startswith("FIT Profiler Report\n")


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (None, PassThroughProfiler),
        ("simple", SimpleProfiler),
        ("ADVANCED", AdvancedProfiler),
        ("pytorch", PyTorchProfiler),
    ],
)
def test_profilers_have_short_names(tmp_path, given, kind):
    assert type(trainer_with(given, tmp_path).profiler) is kind


def test_the_advanced_profiler_sees_the_user_code(tmp_path):
    trainer_with(AdvancedProfiler(dirpath=tmp_path, filename="f"), tmp_path).fit(Model(), loader())
    report = (tmp_path / "fit-f.txt").read_text()
    assert "Profile stats for: mine\n" in report
    assert "(forward)" in report


def test_the_pytorch_profiler_traces_three_batches_of_the_run(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="f", row_limit=-1)
    trainer_with(profiler, tmp_path).fit(Model(), loader(), loader())
    report = (tmp_path / "fit-f.txt").read_text()
    assert "[pl][profile]mine" in report
    assert "[pl][module]torch.nn.modules.linear.Linear: layer" in report
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == 1


def test_a_short_run_is_recorded_from_its_first_batch(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="f", row_limit=-1)
    trainer = trainer_with(profiler, tmp_path, limit_train_batches=2)
    with pytest.warns(UserWarning, match="too few steps for the default schedule"):
        trainer.fit(Model(), loader())
    assert "[pl][profile]mine" in (tmp_path / "fit-f.txt").read_text()
