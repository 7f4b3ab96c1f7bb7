"""What the caller of a run in other processes is told when it fails: the error, and its callbacks."""

import os
import pickle
import signal
import sys

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import fulmen as pl
from fulmen.engine.process_launcher import add_base_class

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")


class Hears(pl.Callback):
    def __init__(self):
        self.heard = []

    def on_exception(self, trainer, pl_module, exception):
        self.heard.append((os.getpid(), exception))
        trainer.save_checkpoint("mine.ckpt")


class HearsData(pl.LightningDataModule):
    heard = None

    def train_dataloader(self):
        return make_loader()

    def on_exception(self, exception):
        self.heard = exception


class Breaks(Regression):
    """In the second batch, as it is told to."""

    def __init__(self, how=None):
        super().__init__()
        self.how = how

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            if isinstance(self.how, BaseException):
                raise self.how
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_the_caller_gets_the_error_as_both_kinds_and_its_callbacks_hear(start, tmp_path):
    model, hears, data = Breaks(KeyError("no such column")), Hears(), HearsData()
    saves = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer(devices=2, strategy=f"ddp_{start}", callbacks=[hears, saves], enable_checkpointing=True)
    before = model.layer.weight.detach().clone()
    with pytest.warns(match="No checkpoint is written to 'mine.ckpt'"), pytest.raises(KeyError) as raised:
        trainer.fit(model, datamodule=data)
    error = raised.value
    assert isinstance(error, ProcessRaisedException) and error.error_index == 1 and error.error_pid != os.getpid()
    assert "no such column" in str(error) and "of rank 1" in str(error.__cause__)
    assert "in training_step" in error.msg
    # Here once; what was noted in the processes stays there.
    assert hears.heard == [(os.getpid(), error)] and data.heard is error
    # What they saved stays: the weights here are those from before the run.
    assert torch.equal(model.layer.weight, before)
    for name in ("on_exception.ckpt", "mine.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["global_step"] == 1 and not torch.equal(saved["state_dict"]["layer.weight"], before)


def test_a_process_that_is_killed_is_an_error_of_both_kinds():
    hears = Hears()
    with pytest.warns(match="No checkpoint"), pytest.raises(RuntimeError) as raised:
        make_trainer(devices=2, strategy="ddp_fork", callbacks=hears).fit(Breaks(), make_loader())
    assert isinstance(raised.value, ProcessExitedException)
    assert raised.value.exit_code == -signal.SIGKILL and raised.value.error_index == 1
    assert [error for _, error in hears.heard] == [raised.value]


class Own(ValueError):
    def __init__(self, message, code):
        super().__init__(message)
        self.code = code

    def __reduce__(self):
        return Own, (self.args[0], self.code)


def test_an_error_of_two_types_keeps_what_it_was():
    error = add_base_class(Own("text", 3), ProcessRaisedException, "trace", 1, 2)
    assert isinstance(error, Own) and isinstance(error, ProcessRaisedException)
    assert str(error) == "text" and error.code == 3 and error.error_pid == 2
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Own and again.code == 3


@pytest.mark.parametrize("error", [OSError(2, "no such file"), SystemExit(3), KeyboardInterrupt()])
def test_an_error_that_cannot_have_two_types_stays_itself(error):
    assert add_base_class(error, ProcessRaisedException, "trace", 1, 2) is error
