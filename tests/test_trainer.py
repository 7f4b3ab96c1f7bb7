"""The Trainer as users read it: who is called around a run and when, what its properties say, how runs follow each other."""

from __future__ import annotations

import os
import pickle
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import EarlyStopping, ModelCheckpoint, Timer
from fulmen.loggers import CSVLogger
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:.*log_every_n_steps", "ignore:.*not empty")

VERBS = ("fit", "validate", "test", "predict")


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader(8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


# ---------------------------------------------------------------------- around a run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_configures_and_sets_up_and_tears_down_in_the_same_order(verb):
    events: list[str] = []

    class Module(Regression):
        def configure_callbacks(self):
            events.append("module callbacks")
            return []

        def prepare_data(self):
            events.append("module prepare_data")

        def setup(self, stage):
            events.append(f"module setup {stage.value if hasattr(stage, 'value') else stage}")

        def configure_model(self):
            events.append("module configure_model")

        def teardown(self, stage):
            events.append("module teardown")

    class DataModule(Data):
        def prepare_data(self):
            events.append("data prepare_data")

        def setup(self, stage):
            assert self.trainer is trainer
            events.append(f"data setup {stage.value if hasattr(stage, 'value') else stage}")

        def teardown(self, stage):
            events.append("data teardown")

    class Callback(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            assert stage == verb
            events.append("callback setup")

        def teardown(self, trainer, pl_module, stage):
            events.append("callback teardown")

    trainer = make_trainer(callbacks=[Callback()], limit_val_batches=1)
    getattr(trainer, verb)(Module(), datamodule=DataModule())
    assert events == [
        "module callbacks", "data prepare_data", "module prepare_data", f"data setup {verb}", "callback setup",
        f"module setup {verb}", "module configure_model", "data teardown", "callback teardown", "module teardown",
    ]  # fmt: skip


def test_on_fit_start_comes_before_optimizer_states_and_hyper_parameters(tmp_path):
    """Both arrive after it: a callback may still change what they apply to."""
    seen: list[Any] = []

    class Adam(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.1)

        def on_fit_start(self):
            seen.append((len(self.trainer.optimizers[0].state), (Path(self.logger.log_dir) / "hparams.yaml").exists()))

        def on_train_start(self):
            seen.append((len(self.trainer.optimizers[0].state), (Path(self.logger.log_dir) / "hparams.yaml").exists()))

    trainer = make_trainer()
    trainer.fit(Adam.__base__(), make_loader())
    model = Adam
    first = make_trainer(logger=CSVLogger(tmp_path))
    first.fit(model(), make_loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    seen.clear()
    second = make_trainer(logger=CSVLogger(tmp_path), max_epochs=2)
    second.fit(model(), make_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert seen == [(0, False), (2, True)]


def test_callbacks_of_the_module_replace_those_of_their_class_in_every_verb():
    class Model(Regression):
        def configure_callbacks(self):
            return [EarlyStopping("train_loss", patience=7), Timer()]

    given = EarlyStopping("val_loss")
    trainer = make_trainer(callbacks=[given, ModelCheckpoint()], enable_checkpointing=True)
    trainer.validate(Model(), make_loader())
    assert given not in trainer.callbacks
    assert [type(c).__name__ for c in trainer.callbacks] == ["EarlyStopping", "Timer", "ModelCheckpoint"]
    assert trainer.early_stopping_callback.patience == 7
    trainer.fit(Model(), make_loader())
    assert [type(c).__name__ for c in trainer.callbacks] == ["EarlyStopping", "Timer", "ModelCheckpoint"]


def test_callbacks_may_be_added_between_and_during_runs():
    calls = []

    class Late(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            calls.append((trainer.current_epoch, batch_idx))

    class Adds(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.callbacks.append(Late())

    trainer = make_trainer(max_epochs=2)
    trainer.callbacks.append(Adds())
    trainer.fit(Regression(), make_loader(8))
    assert calls == [(1, 0), (1, 1)]


def test_hooks_set_on_an_instance_are_called():
    calls = []
    model, callback = Regression(), pl.Callback()
    model.on_train_start = lambda: calls.append("module")
    callback.on_train_start = lambda trainer, pl_module: calls.append("callback")
    make_trainer(callbacks=[callback]).fit(model, make_loader())
    assert calls == ["callback", "module"]


def test_hooks_of_other_modules_inside_are_not_called():
    calls = []

    class Inner(Regression):
        def on_train_start(self):
            calls.append("inner")

    class Outer(Regression):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def training_step(self, batch, batch_idx):
            assert self.inner.trainer is self.trainer
            self.inner.log("inner", 1.0)
            return super().training_step(batch, batch_idx)

    trainer = make_trainer()
    trainer.fit(Outer(), make_loader())
    assert calls == []
    assert trainer.callback_metrics["inner"] == 1.0


def test_a_datamodule_wins_over_the_modules_loaders_and_transfer_hooks():
    calls = []

    class Model(Regression):
        def train_dataloader(self):
            raise AssertionError

        def on_after_batch_transfer(self, batch, dataloader_idx):
            calls.append("module")
            return batch

    class DataModule(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            calls.append("data")
            return batch

    with pytest.warns(UserWarning, match="on_after_batch_transfer"):
        make_trainer(limit_val_batches=0).fit(Model(), datamodule=DataModule())
    assert calls == ["data", "data"]


# ---------------------------------------------------------------------- what properties say


def test_counters_during_and_after_a_run():
    seen = []

    class Model(Regression):
        def on_train_epoch_start(self):
            seen.append(("start", self.current_epoch, self.global_step))

        def on_train_epoch_end(self):
            seen.append(("end", self.current_epoch, self.global_step))

        def on_train_end(self):
            seen.append(("over", self.current_epoch, self.global_step))

    trainer = make_trainer(max_epochs=2)
    model = Model()
    assert (trainer.current_epoch, trainer.global_step, model.current_epoch) == (0, 0, 0)
    trainer.fit(model, make_loader())
    assert seen == [("start", 0, 0), ("end", 0, 3), ("start", 1, 3), ("end", 1, 6), ("over", 2, 6)]
    assert (model.current_epoch, model.global_step) == (2, 6)


def test_numbers_of_batches_before_and_after():
    trainer = make_trainer(limit_test_batches=2, limit_predict_batches=0.5)
    assert trainer.num_training_batches == inf
    assert trainer.num_val_batches == trainer.num_test_batches == trainer.num_predict_batches == []
    assert trainer.train_dataloader is None and trainer.val_dataloaders is None and trainer.test_dataloaders is None
    model = Regression()
    train, val, test, predict = (make_loader(n) for n in (16, 8, 16, 16))
    trainer.fit(model, train, val)
    assert (trainer.num_training_batches, trainer.num_val_batches) == (4, [2])
    assert trainer.train_dataloader is train and trainer.val_dataloaders is val
    trainer.test(model, test, verbose=False)
    trainer.predict(model, predict)
    assert (trainer.num_test_batches, trainer.num_predict_batches) == ([2], [2])


def test_loaders_keep_their_nesting():
    trainer = make_trainer()
    nested = {"a": make_loader(), "b": [make_loader(), make_loader()]}

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["a"]) + self.loss(batch["b"][1])

    trainer.fit(Model(), nested)
    assert trainer.train_dataloader == nested


def test_hardware_of_one_cpu():
    trainer = make_trainer()
    assert trainer.global_rank == trainer.local_rank == trainer.node_rank == 0
    assert trainer.world_size == trainer.num_devices == trainer.num_nodes == 1
    assert trainer.is_global_zero and trainer.device_ids == [0]
    assert trainer.strategy.root_device == torch.device("cpu")
    assert type(trainer.strategy).__name__ == "SingleDeviceStrategy"
    assert trainer.precision == "32-true" and trainer.scaler is None
    assert trainer.distributed_sampler_kwargs is None
    assert trainer.lightning_module is None


def test_log_dir_is_that_of_the_first_logger(tmp_path):
    assert make_trainer(default_root_dir=tmp_path).log_dir == str(tmp_path)
    trainer = make_trainer(logger=[CSVLogger(tmp_path, "one"), CSVLogger(tmp_path, "two")])
    assert trainer.log_dir == str(tmp_path / "one" / "version_0")
    assert trainer.logger is trainer.loggers[0] and len(trainer.loggers) == 2
    trainer.logger = None
    assert trainer.loggers == []


def test_callbacks_are_found_by_kind():
    stop, save = EarlyStopping("train_loss"), ModelCheckpoint()
    trainer = make_trainer(callbacks=[save, stop], enable_checkpointing=True)
    assert trainer.checkpoint_callback is save and trainer.checkpoint_callbacks == [save]
    assert trainer.early_stopping_callback is stop and trainer.early_stopping_callbacks == [stop]
    assert trainer.progress_bar_callback is None
    assert trainer.callbacks == [stop, save]


def test_default_callbacks_stand_behind_the_users_and_checkpoints_last():
    class Mine(pl.Callback): ...

    trainer = pl.Trainer(accelerator="cpu", callbacks=[Mine()], max_time="00:01:00:00", logger=False)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names[0] == "Mine" and names[1] == "Timer" and names[-1] == "ModelCheckpoint"
    assert "ProgressBar" in names[2] and "ModelSummary" in names[3]


def test_the_module_knows_its_trainer_until_it_is_copied():
    model = Regression()
    with pytest.raises(RuntimeError, match="attached"):
        _ = model.trainer
    trainer = make_trainer()
    trainer.fit(model, make_loader())
    assert model.trainer is trainer and model.logger is None and model.loggers == []
    copy = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="attached"):
        _ = copy.trainer
    assert torch.equal(copy.layer.weight, model.layer.weight)


def test_limits_that_users_read_are_plain_numbers():
    trainer = make_trainer(limit_train_batches=3, overfit_batches=0.0, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert (trainer.limit_train_batches, trainer.limit_val_batches, trainer.overfit_batches) == (3, 1.0, 0.0)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (2, 0.5)
    assert (trainer.max_epochs, trainer.max_steps, trainer.min_epochs, trainer.min_steps) == (1, -1, None, None)
    assert (trainer.log_every_n_steps, trainer.check_val_every_n_epoch, trainer.num_sanity_val_steps) == (50, 1, 0)


def test_enable_validation_needs_step_loader_and_batches():
    seen = []

    class Model(Regression):
        def on_fit_start(self):
            seen.append(self.trainer.enable_validation)

    class Without(Model):
        validation_step = None

    make_trainer().fit(Model(), make_loader(), make_loader())
    make_trainer().fit(Model(), make_loader())
    make_trainer(limit_val_batches=0).fit(Model(), make_loader(), make_loader())
    make_trainer().fit(Without(), make_loader(), make_loader())
    assert seen == [True, False, False, False]


def test_a_path_set_on_the_trainer_is_used_until_a_call_brings_its_own(tmp_path):
    model = Regression()
    trainer = make_trainer()
    trainer.fit(model, make_loader())
    for name in ("a", "b"):
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    weight = model.layer.weight.clone()

    def loads(**arguments: Any) -> bool:
        torch.nn.init.zeros_(model.layer.weight)
        trainer.validate(model, make_loader(), verbose=False, **arguments)
        return torch.equal(model.layer.weight, weight)

    trainer.ckpt_path = tmp_path / "a.ckpt"
    assert loads() and loads()
    with pytest.warns(UserWarning, match="ckpt_path"):
        assert loads(ckpt_path=tmp_path / "b.ckpt")
    assert trainer.ckpt_path == tmp_path / "b.ckpt"
    assert not loads()


# ---------------------------------------------------------------------- one run after the other


def test_fit_test_and_predict_with_one_trainer():
    trainer, model = make_trainer(max_epochs=2), Regression()
    trainer.fit(model, make_loader(), make_loader())
    before = model.layer.weight.clone()
    (tested,) = trainer.test(model, make_loader(), verbose=False)
    assert trainer.global_step == 6 and trainer.current_epoch == 2
    assert trainer.callback_metrics == {"test_loss": tested["test_loss"]}
    assert len(trainer.predict(model, make_loader())) == 3
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, make_loader())
    assert trainer.current_epoch == 3
    assert not torch.equal(before, model.layer.weight)


def test_two_models_with_one_trainer():
    trainer = make_trainer()
    one, other = Regression(), Regression()
    trainer.fit(one, make_loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, make_loader())
    assert trainer.lightning_module is other
    assert trainer.global_step == 6
    assert not torch.equal(other.layer.weight, one.layer.weight)


def test_one_model_with_two_trainers():
    model = Regression()
    one, other = make_trainer(), make_trainer()
    one.fit(model, make_loader())
    other.fit(model, make_loader())
    assert model.trainer is other
    assert one.global_step == other.global_step == 3


def test_evaluation_inside_a_run_of_another_trainer():
    """A callback may evaluate the model with a trainer of its own in the middle of training."""
    results = []

    class Evaluates(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            inner = make_trainer(inference_mode=False)
            results.extend(inner.validate(Regression(), make_loader(), verbose=False))
            assert pl_module.trainer is trainer

    trainer = make_trainer(callbacks=[Evaluates()], max_epochs=2)
    trainer.fit(Regression(), make_loader(), make_loader())
    assert len(results) == 2 and trainer.global_step == 6


def test_the_datamodule_of_a_run_is_on_the_trainer():
    trainer, data = make_trainer(), Data()
    trainer.fit(Regression(), data)
    assert trainer.datamodule is data and data.trainer is trainer
    trainer.validate(Regression(), make_loader(12), verbose=False)
    assert trainer.num_val_batches == [3], "the loader of the call, not of the run before"


def test_without_a_validation_loader_it_only_trains():
    trainer = make_trainer()
    with pytest.warns(UserWarning, match="val"):
        trainer.fit(Regression(), make_loader())
    assert trainer.global_step == 3 and "val_loss" not in trainer.callback_metrics


def test_a_compiled_module_is_accepted():
    model = Regression()
    compiled = torch.compile(model, backend="eager")
    trainer = make_trainer(limit_val_batches=0)
    trainer.fit(compiled, make_loader())
    assert trainer.lightning_module is model
    assert trainer.global_step == 3


def test_the_working_directory_gets_files_only_if_something_writes(tmp_path):
    make_trainer().fit(Regression(), make_loader())
    assert os.listdir(tmp_path) == []
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Regression(), make_loader())
    assert os.listdir(tmp_path) == ["lightning_logs"]
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.relative_to(tmp_path).as_posix() == "lightning_logs/version_0/checkpoints/epoch=0-step=3.ckpt"


def test_a_subclass_may_pass_its_arguments_on():
    class Mine(pl.Trainer):
        def __init__(self, extra: int = 1, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.extra = extra

    trainer = Mine(extra=2, max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert (trainer.extra, trainer.max_epochs) == (2, 3)


def test_equal_state_keys_are_refused():
    with pytest.raises(RuntimeError, match="state"):
        make_trainer(callbacks=[Timer(), Timer()])


def test_hyper_parameters_of_module_and_datamodule_may_not_clash(tmp_path):
    class DataModule(Data):
        def __init__(self, lr=3.0):
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(RuntimeError, match="lr"):
        make_trainer(logger=CSVLogger(tmp_path)).fit(Regression(lr=0.1), datamodule=DataModule())


def test_no_loader_names_what_to_write():
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        make_trainer().fit(Regression())


def test_init_module_makes_modules_in_the_dtype_of_the_run():
    trainer = make_trainer(precision="64-true")
    with trainer.init_module():
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.dtype is torch.float64
    assert torch.get_default_dtype() is torch.float32


def test_print_is_for_one_process(capsys):
    make_trainer().print("words", 1, sep="-")
    assert capsys.readouterr().out == "words-1\n"
