"""A public method that a subclass overrides is called where the trainer would call ours."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen import callbacks
from fulmen.plugins import MixedPrecision
from fulmen.profilers import PassThroughProfiler


def test_a_subclass_of_mixed_precision_chooses_its_autocast():
    class Own(MixedPrecision):
        def autocast_context_manager(self):
            return nullcontext()

    seen = []

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(self(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    for plugin in (Own("bf16-mixed", "cpu"), MixedPrecision("bf16-mixed", "cpu")):
        make_trainer(plugins=plugin, max_steps=1).fit(Model(), make_loader())
    assert seen == [torch.float32, torch.bfloat16]


def test_a_subclass_of_the_timer_may_measure_from_another_time():
    class Earlier(callbacks.Timer):
        def start_time(self, stage="train"):
            start = super().start_time(stage)
            return None if start is None else start - 7200

    trainer = make_trainer(callbacks=Earlier(duration={"hours": 1}), max_epochs=5)
    trainer.fit(Regression(), make_loader())
    assert trainer.global_step == 1 and trainer.callbacks[0].time_elapsed() > 7200
    assert callbacks.Timer().time_elapsed() == 0


def test_a_subclass_of_the_profiler_that_measures_nothing_is_asked():
    class Counting(PassThroughProfiler):
        def __init__(self):
            super().__init__()
            self.started, self.stopped = [], []

        def start(self, action_name):
            self.started.append(action_name)

        def stop(self, action_name):
            self.stopped.append(action_name)

    profiler = Counting()
    make_trainer(profiler=profiler).fit(Regression(), make_loader())
    assert "run_training_batch" in profiler.started and sorted(profiler.started) == sorted(profiler.stopped)
    assert not PassThroughProfiler.active


@pytest.mark.parametrize("trigger", [{"monitor": "val_loss", "save_top_k": 2}, {"every_n_train_steps": 1}, {}])
def test_files_of_checkpoints_are_named_saved_and_judged_by_what_a_subclass_says(tmp_path, trigger):
    class Own(callbacks.ModelCheckpoint):
        called: set = set()

        def format_checkpoint_name(self, metrics, filename=None, ver=None, prefix=None):
            self.called.add("name")
            return super().format_checkpoint_name(metrics, f"own-{{step}}-{len(self.best_k_models)}", ver, prefix)

        def _save_checkpoint(self, trainer, filepath):
            self.called.add("save")
            super()._save_checkpoint(trainer, filepath)

        def check_monitor_top_k(self, trainer, current=None):
            self.called.add("judge")
            return super().check_monitor_top_k(trainer, current)

        def file_exists(self, filepath, trainer):
            self.called.add("exists")
            return super().file_exists(filepath, trainer)

    Own.called = set()
    callback = Own(tmp_path, **trigger)
    make_trainer(max_epochs=2, callbacks=callback, enable_checkpointing=True).fit(
        Regression(), make_loader(), make_loader()
    )
    assert Own.called >= {"name", "save", "exists"} | ({"judge"} if "monitor" in trigger else set())
    assert all(path.name.startswith("own-step=") for path in tmp_path.iterdir())
