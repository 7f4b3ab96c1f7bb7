"""What took part in a run can be pickled and copied afterwards, and the copies run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from ranks import run_ranks
from support import ManualRegression, Regression, make_loader, make_trainer

import fulmen as pl
from fulmen import callbacks


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Manual(ManualRegression):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch


class Measured(Regression):
    def __init__(self):
        super().__init__()
        self.metric = pytest.importorskip("torchmetrics").MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric(loss.detach())
        self.log("mean", self.metric, on_step=True, on_epoch=True)
        return loss


def many_callbacks(folder):
    return [
        callbacks.ModelCheckpoint(folder, monitor="val_loss"), callbacks.EarlyStopping("val_loss"),
        callbacks.LearningRateMonitor(), callbacks.EMAWeightAveraging(), callbacks.Timer(), callbacks.NonFiniteGuard(),
    ]  # fmt: skip


KINDS = {
    "tqdm": (Regression, lambda path: {"callbacks": callbacks.TQDMProgressBar(), "enable_progress_bar": True}),
    "rich": (Regression, lambda path: {"callbacks": callbacks.RichProgressBar(), "enable_progress_bar": True}),
    "tensorboard": (Regression, lambda path: {"logger": pl.loggers.TensorBoardLogger(path)}),
    "csv": (Regression, lambda path: {"logger": pl.loggers.CSVLogger(path)}),
    "manual": (Manual, lambda path: {"profiler": "simple"}),
    "pytorch profiler": (Regression, lambda path: {"profiler": pl.profilers.PyTorchProfiler(path)}),
    "metric": (Measured, lambda path: {"precision": "bf16-mixed", "gradient_clip_val": 1.0}),
    "callbacks": (Regression, lambda path: {
        "callbacks": many_callbacks(path), "enable_checkpointing": True, "logger": pl.loggers.CSVLogger(path)
    }),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_trainer_and_its_parts_can_be_pickled_and_copied_after_a_run_and_run_again(tmp_path, name):
    kind, arguments = KINDS[name]
    trainer, model, data = make_trainer(max_epochs=2, **arguments(str(tmp_path))), kind(), Data()
    trainer.fit(model, datamodule=data)
    for verb in ("validate", "test", "predict"):
        getattr(trainer, verb)(model, datamodule=data)
    steps, metrics = trainer.global_step, trainer.callback_metrics
    for part in (data, model, trainer.strategy, trainer.fit_loop, *trainer.callbacks, *trainer.loggers):
        pickle.loads(pickle.dumps(part))
        copy.deepcopy(part)
    for again in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
        assert again.global_step == steps and again.callback_metrics.keys() == metrics.keys()
        assert again.fit_loop.trainer is again and again.fit_loop.val_loop.trainer is again
        assert again.max_epochs == 2 and again.train_dataloader is None
        again.fit_loop.max_epochs = 3
        again.fit(kind(), datamodule=Data())
        assert (again.current_epoch, again.global_step) == (3, steps + steps // 2)
        assert trainer.global_step == steps


def test_a_copy_of_a_wrapped_optimizer_is_one_of_a_copy():
    class Copying(Regression):
        def on_train_end(self):
            self.copies = [copy.deepcopy(self.optimizers()), pickle.loads(pickle.dumps(self.optimizers()))]

    model = Copying()
    make_trainer().fit(model, make_loader())
    for wrapped in (*model.copies, copy.deepcopy(model.optimizers())):
        assert isinstance(wrapped, torch.optim.SGD) and type(wrapped).__name__ == "LightningSGD"
        assert wrapped.param_groups[0]["lr"] == 0.1 and wrapped.optimizer.param_groups is wrapped.param_groups
        weight = wrapped.param_groups[0]["params"][0]
        assert weight is not model.layer.weight and torch.equal(weight, model.layer.weight)
        weight.grad = torch.ones_like(weight)
        wrapped.step()
        assert torch.allclose(weight, model.layer.weight - 0.1)


def test_loggers_are_a_list_also_without_any():
    assert pl.LightningModule().loggers == []
    trainer = make_trainer()
    for nobody in (None, [], ()):
        trainer.loggers = nobody
        assert trainer.loggers == [] and trainer.logger is None
    trainer.fit(Regression(), make_loader())
    trainer.logger = logger = pl.loggers.CSVLogger("unused")
    assert trainer.loggers == [logger]
    trainer.loggers = (logger, logger)
    assert trainer.loggers == [logger, logger] and trainer.logger is logger
    trainer.logger = None
    assert trainer.loggers == []


def pickle_on_a_rank() -> tuple[int, int]:
    trainer, model = make_trainer(devices=2, strategy="ddp"), Regression()
    trainer.fit(model, make_loader(batch_size=2))
    again = pickle.loads(pickle.dumps(trainer))
    return again.global_step, copy.deepcopy(trainer).world_size


@pytest.mark.slow
def test_each_of_two_processes_can_pickle_and_copy_its_trainer():
    assert run_ranks(2, pickle_on_a_rank) == [(3, 2), (3, 2)]
