"""Private attributes of live objects: each of the table is there in a run, and writes through where it says so."""

from __future__ import annotations

import subprocess
import sys
import types
from functools import reduce

import pytest
import torch

import fulmen
from fulmen.compat.internals import GRADES, attach_views
from fulmen.compat.private_names import PLACES


@pytest.fixture(autouse=True, scope="module")
def views():
    attach_views()
    attach_views()  # a second time changes nothing


class Model(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(6, 4), batch_size=2)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2)


def make_trainer(tmp_path, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return fulmen.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **given)


class Asks(fulmen.Callback):
    """Calls a function at a hook, and keeps what it returns."""

    def __init__(self, **questions):
        self.answers = {name: [] for name in questions}
        for name, question in questions.items():
            setattr(self, name, self.asker(name, question))

    def asker(self, name, question):
        return lambda trainer, *_: self.answers[name].append(question(trainer))


def read_path(trainer, path):
    roots = {
        "trainer": trainer, "ModelCheckpoint": fulmen.callbacks.ModelCheckpoint(),
        "LightningOptimizer": trainer.lightning_optimizers[0],
    }  # fmt: skip
    first, *rest = path.split(".")
    return reduce(getattr, rest, roots[first])


def test_every_attribute_of_the_table_is_so(tmp_path):
    live = {name: grade.grade for name, grade in GRADES.items() if name not in PLACES}
    wrong = {}

    def look(trainer):
        for name, grade in live.items():
            try:
                read_path(trainer, name)
                found = "there"
            except AttributeError as error:
                found = str(error)
            if (found == "there") == (grade == "absent") or (grade == "absent" and GRADES[name].note not in found):
                wrong[name] = found

    make_trainer(tmp_path, Asks(on_train_batch_end=look), max_steps=1, num_sanity_val_steps=1).fit(Model())
    assert wrong == {} and len(live) > 100


def test_counters_are_those_of_the_run(tmp_path):
    def count(trainer):
        loop = trainer.fit_loop.epoch_loop
        assert loop is trainer.fit_loop.epoch_loop and loop.trainer is trainer
        progress = loop.batch_progress
        return (
            loop.batch_idx, loop.total_batch_idx, loop.global_step, loop._batches_that_stepped,
            progress.current.ready, progress.total.ready, progress.is_last_batch,
            trainer.fit_loop.epoch_progress.current.processed, loop.automatic_optimization.optim_progress.optimizer.step.total.completed,
        )  # fmt: skip

    asks = Asks(on_train_batch_end=count)
    make_trainer(tmp_path, asks).fit(Model())
    # as Lightning counts at this hook, where the batch is processed and not completed
    assert asks.answers["on_train_batch_end"] == [
        (0, 0, 1, 0, 1, 1, False, 0, 1), (1, 1, 2, 1, 2, 2, False, 0, 2), (2, 2, 3, 2, 3, 3, True, 0, 3),
        (0, 3, 4, 3, 1, 4, False, 1, 4), (1, 4, 5, 4, 2, 5, False, 1, 5), (2, 5, 6, 5, 3, 6, True, 1, 6),
    ]  # fmt: skip


def test_counters_write_through(tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=5)
    progress = trainer.fit_loop.epoch_progress
    progress.current.processed = 3
    assert trainer.current_epoch == 3
    progress.current.completed = 3
    progress.current.ready = progress.current.started = 3
    assert trainer.current_epoch == 3
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = 40
    loop.manual_optimization.optim_step_progress.total.completed += 7
    loop.manual_optimization.optim_step_progress.increment_ready()
    loop.manual_optimization.optim_step_progress.increment_completed()
    assert (trainer.global_step, loop.global_step, trainer.progress.log_step) == (8, 8, 40)
    loop.batch_progress.increment_completed()
    assert (trainer.progress.batch, trainer.progress.batches) == (1, 1)
    loop.max_steps = 100
    assert trainer.max_steps == 100
    with pytest.raises(AttributeError, match="'finished'"):
        progress.current.finished  # noqa: B018
    state = trainer.fit_loop.state_dict()
    again = make_trainer(tmp_path)
    again.fit_loop.load_state_dict(state)
    assert (again.current_epoch, again.global_step) == (3, 8)
    again.fit_loop.epoch_progress.reset()
    again.fit_loop.epoch_loop.reset()
    again.fit_loop.reset()
    assert again.current_epoch == 0
    trainer.fit(Model())  # two epochs are left
    assert trainer.current_epoch == 5 and trainer.global_step == 8 + 6


def test_manual_steps_are_counted_by_whoever_makes_them(tmp_path):
    class Manual(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()._optimizer  # past the Trainer
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).mean())
            optimizer.step()
            self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_completed()

    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Manual())
    assert trainer.global_step == 3


def test_validation_is_due_when_a_function_of_others_says_so(tmp_path):
    validated = Asks(on_validation_start=lambda trainer: trainer.global_step)
    trainer = make_trainer(tmp_path, validated, num_sanity_val_steps=0, max_epochs=1)
    asked = []

    def second_batch(self, data_fetcher):
        asked.append((data_fetcher is self.trainer.fit_loop._data_fetcher, self._should_check_val_epoch()))
        return self.batch_idx == 1

    loop = trainer.fit_loop.epoch_loop
    assert loop._should_check_val_fx(None) is False
    loop._should_check_val_fx = types.MethodType(second_batch, loop)
    trainer.fit(Model())
    assert asked == [(True, True)] * 3 and validated.answers["on_validation_start"] == [2]


def test_windows_of_accumulation_are_seen(tmp_path):
    asks = Asks(on_train_batch_end=lambda trainer: trainer.fit_loop._should_accumulate())
    make_trainer(tmp_path, asks, accumulate_grad_batches=2, max_epochs=1).fit(Model())
    assert asks.answers["on_train_batch_end"] == [True, False, False]  # the last batch ends the window


def test_connectors_show_the_machine_and_the_data(tmp_path):
    trainer = make_trainer(tmp_path)
    machine = trainer._accelerator_connector
    assert machine.strategy is trainer.strategy and machine.accelerator is trainer.accelerator
    assert machine.is_distributed is False and machine.sync_batchnorm is False
    assert (machine._devices_flag, machine._accelerator_flag, machine._precision_flag) == (1, "cpu", "32-true")
    machine.use_distributed_sampler = False
    assert trainer.use_distributed_sampler is False
    loop = trainer.fit_loop
    assert not loop._data_source.is_defined() and loop._data_source.instance is None
    model = Model()
    trainer.strategy.connect(model)
    trainer._data_connector.attach_data(model)
    assert len(trainer._data_connector._train_dataloader_source.dataloader()) == 3
    assert trainer.estimated_stepping_batches == 6
    assert loop._data_source.is_module() and loop.epoch_loop.val_loop._data_source.is_defined()
    assert trainer.validate_loop._data_source.instance is model
    assert not trainer.predict_loop._data_source.is_defined()
    loader = model.train_dataloader()
    trainer._data_connector.attach_data(model, train_dataloaders=loader)
    assert loop._data_source.instance is loader and not loop._data_source.is_module()
    loop._combined_loader = None
    loop.setup_data()
    assert loop._combined_loader.flattened == [loader] and loop.max_batches == 3
    selector = trainer._data_connector._datahook_selector
    assert selector.get_instance("on_after_batch_transfer") is model
    with pytest.raises(AttributeError, match="use_distributed_sampler=..."):
        trainer._data_connector._resolve_sampler(loader)
    with pytest.raises(AttributeError, match="Did you mean `attach_data`"):
        trainer._data_connector.atach_data(model)


def test_checkpoints_are_dumped_and_restored_in_steps(tmp_path):
    dumped = Asks(on_train_end=lambda trainer: trainer._checkpoint_connector.dump_checkpoint())
    trainer = make_trainer(tmp_path, dumped)
    trainer.fit(model := Model())
    (checkpoint,) = dumped.answers["on_train_end"]
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 6) and len(checkpoint["optimizer_states"]) == 1
    connector = trainer._checkpoint_connector
    assert "optimizer_states" not in connector.dump_checkpoint(weights_only=True)
    connector.save_checkpoint(path := tmp_path / "a.ckpt")
    first = connector.hpc_save_path(tmp_path)
    assert first == str(tmp_path / "hpc_ckpt_1.ckpt") and connector._hpc_resume_path is None
    for n in (2, 10):
        (tmp_path / f"hpc_ckpt_{n}.ckpt").touch()
    assert connector._hpc_resume_path == str(tmp_path / "hpc_ckpt_10.ckpt")
    assert connector.hpc_save_path(tmp_path) == str(tmp_path / "hpc_ckpt_11.ckpt")
    fit = fulmen.utilities.types.TrainerFn.FITTING
    assert connector._select_ckpt_path(fit, str(path), model_provided=True, model_connected=True) == str(path)
    trained = model.layer.weight.detach().clone()
    torch.nn.init.zeros_(model.layer.weight)
    connector.resume_start(path, weights_only=False)
    assert connector._loaded_checkpoint["global_step"] == 6
    connector.restore_model()
    connector.resume_end()
    assert torch.equal(model.layer.weight, trained) and connector._loaded_checkpoint == {}
    assert connector._get_loops_state_dict() == checkpoint["loops"]
    with pytest.raises(AttributeError, match="`restore_model` restores them"):
        connector.restore_callbacks()


def test_callbacks_and_signals_are_reached(tmp_path):
    class Brings(Model):
        def configure_callbacks(self):
            return [Asks()]

    checkpoint = fulmen.callbacks.ModelCheckpoint(dirpath=tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(Brings())
    trainer._callback_connector._attach_model_callbacks()
    trainer._callback_connector._attach_model_logging_functions()
    (asks,) = trainer.callbacks
    assert trainer._callback_connector._reorder_callbacks([checkpoint, asks]) == [asks, checkpoint]
    trainer._signal_connector.received_sigterm = True
    assert trainer.received_sigterm is True
    trainer._signal_connector.register_signal_handlers()
    trainer._signal_connector.teardown()


def test_what_is_logged_is_read_and_sent(tmp_path):
    logger = fulmen.loggers.CSVLogger(tmp_path)

    def look(trainer):
        view = trainer._logger_connector
        results = trainer._results
        assert set(view.callback_metrics) == {"loss"} and view.metrics["pbar"].keys() == {"loss"}
        assert view.logged_metrics["loss"] == results.metrics(True)["log"]["loss"]
        assert [name for name, _ in results.valid_items()] == ["loss"] and results.batch is not None
        return view.should_update_logs

    asks = Asks(on_train_batch_end=look)
    trainer = make_trainer(tmp_path, asks, logger=logger, log_every_n_steps=2, max_epochs=1, limit_val_batches=0)
    assert trainer._results is None
    trainer.fit(Model())
    assert asks.answers["on_train_batch_end"] == [False, True, False]
    trainer._logger_connector.log_metrics({"extra": torch.tensor(2.0)}, step=9)
    logger.save()
    assert logger.experiment.metrics_file_path.endswith("metrics.csv")
    with open(logger.experiment.metrics_file_path) as file:
        header, *rows = file.read().splitlines()
    assert [row.split(",") for row in rows][-1][header.split(",").index("extra")] == "2.0"
    trainer._logger_connector.reset_metrics()
    assert trainer.callback_metrics == {}


def test_the_loop_that_runs_is_found(tmp_path):
    asks = Asks(
        on_train_batch_start=lambda trainer: trainer._active_loop is trainer.fit_loop,
        on_validation_batch_start=lambda trainer: trainer._active_loop is trainer.fit_loop.epoch_loop.val_loop,
        on_test_batch_start=lambda trainer: trainer._evaluation_loop is trainer.test_loop,
    )
    trainer = make_trainer(tmp_path, asks, limit_train_batches=1, max_epochs=1, num_sanity_val_steps=0)
    assert trainer._active_loop is None
    with pytest.raises(RuntimeError, match="not evaluating"):
        trainer._evaluation_loop  # noqa: B018
    model = Model()
    trainer.fit(model)
    model.test_step = model.validation_step
    trainer.test(model, model.val_dataloader())
    assert asks.answers == {
        "on_train_batch_start": [True], "on_validation_batch_start": [True, True], "on_test_batch_start": [True, True],
    }  # fmt: skip
    assert trainer.test_loop.num_dataloaders == 1


def test_subclasses_of_model_checkpoint_decide_what_is_saved(tmp_path):
    class Late(fulmen.callbacks.ModelCheckpoint):
        def _save_topk_checkpoint(self, trainer, monitor_candidates):
            assert monitor_candidates.keys() >= {"epoch", "step", "loss"}
            if trainer.current_epoch >= 1:
                super()._save_topk_checkpoint(trainer, monitor_candidates)

    class Never(fulmen.callbacks.ModelCheckpoint):
        def _should_skip_saving_checkpoint(self, trainer):
            return True

    def save_now(trainer):
        callback = trainer.checkpoint_callbacks[0]
        callback._save_topk_checkpoint(trainer, trainer.callback_metrics)
        path = callback._get_metric_interpolated_filepath_name(callback._monitor_candidates(trainer), trainer)
        return path, callback._should_save_on_train_epoch_end(trainer)

    late = Late(dirpath=tmp_path / "late", monitor="loss", save_top_k=-1, save_last=True, filename="{epoch}")
    never = Never(dirpath=tmp_path / "never")
    now = fulmen.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "now", monitor="loss", filename="{step}", every_n_epochs=9
    )
    asks = Asks(on_train_end=save_now)
    make_trainer(tmp_path, now, asks, late, never, enable_checkpointing=True, limit_val_batches=0).fit(Model())
    assert sorted(path.name for path in (tmp_path / "late").iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
    assert not (tmp_path / "never").exists() or not list((tmp_path / "never").iterdir())
    assert [path.name for path in (tmp_path / "now").iterdir()] == ["step=0.ckpt"]
    assert asks.answers["on_train_end"] == [(str(tmp_path / "now" / "step=6.ckpt"), True)]


def test_the_rank_is_the_same_for_lightning_utilities():
    code = """
import sys
import fulmen
assert not hasattr(fulmen.Trainer, "_checkpoint_connector")  # nothing is there before it is asked for
from lightning_utilities.core import rank_zero
from fulmen.compat.internals import attach_views
attach_views()
assert rank_zero.rank_zero_only is fulmen.utilities.rank_zero_only
heard = []
before = rank_zero.rank_zero_only(heard.append)
fulmen.utilities.rank_zero_only.rank = 1
before("other ranks say nothing")
rank_zero.rank_zero_info("nor here")
assert heard == []
"""
    pytest.importorskip("lightning_utilities")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)
