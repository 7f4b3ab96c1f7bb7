"""Checkpoints that are stored in a way of the user's own: a `CheckpointIO`, or a strategy with other hooks."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelCheckpoint
from fulmen.engine.strategy_registry import SingleDeviceStrategy
from fulmen.plugins import CheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:.*starts again", "ignore:.*same callbacks", "ignore:.*no validation")


class Shelf(CheckpointIO):
    """A dictionary instead of a disk."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple] = {}
        self.closed = 0

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.kept[os.path.basename(path)] = (checkpoint, storage_options)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return self.kept[os.path.basename(path)][0]

    def remove_checkpoint(self, path):
        del self.kept[os.path.basename(path)]

    def teardown(self):
        self.closed += 1


class Hooks(SingleDeviceStrategy):
    """Told of everything that is stored."""

    def __init__(self, **parts) -> None:
        super().__init__("cpu", **parts)
        self.told: list[str] = []

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        self.told.append(f"save {os.path.basename(filepath)}")
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        self.told.append(f"load {os.path.basename(checkpoint_path)}")
        return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    def remove_checkpoint(self, filepath):
        self.told.append(f"remove {os.path.basename(filepath)}")
        super().remove_checkpoint(filepath)


@pytest.mark.parametrize("how", ["plugin", "strategy"])
def test_everything_that_is_stored_goes_through_the_users_hooks(tmp_path, how):
    shelf = Shelf()
    strategy = Hooks(checkpoint_io=shelf) if how == "strategy" else Hooks()
    plugins = [shelf] if how == "plugin" else None
    saver = ModelCheckpoint(tmp_path, filename="{step}")
    trainer = make_trainer(
        strategy=strategy, plugins=plugins, callbacks=[saver], enable_checkpointing=True, max_epochs=2
    )
    trainer.fit(Regression(), make_loader())
    assert strategy.told == ["save step=3.ckpt", "save step=6.ckpt", "remove step=3.ckpt"]
    assert shelf.closed == 1

    trainer.save_checkpoint("mine", weights_only=True, storage_options={"shelf": 2})
    content, options = shelf.kept["mine"]
    assert options == {"shelf": 2}
    assert not content.keys() & {"optimizer_states", "lr_schedulers", "callbacks", "fulmen"}

    model = Regression()
    trainer.validate(model, make_loader(), ckpt_path="best", verbose=False)
    assert strategy.told[-1] == "load step=6.ckpt"
    assert torch.equal(model.layer.weight, content["state_dict"]["layer.weight"])
    assert not os.listdir(tmp_path)


def test_the_last_checkpoint_of_a_run_that_was_told_to_end_does_too(tmp_path):
    class Model(Regression):
        def training_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    shelf = Shelf()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    trainer = make_trainer(plugins=[shelf], callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(SystemExit):
        trainer.fit(Model(), make_loader())
    assert shelf.kept["preempted.ckpt"][0]["global_step"] == 1 and shelf.closed == 1
