"""What is particular to `TQDMProgressBar`."""

from __future__ import annotations

import contextlib
import io
import re
import sys

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import TQDMProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fit(bar, terminal=None, **given):
    with contextlib.redirect_stdout(terminal or sys.stdout):
        trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, **given)
        trainer.fit(Regression(), make_loader(20), make_loader(8))
    return terminal


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0.000"),
        (1.0, "1.000"),
        (1, "1"),
        (0.123456, "0.123"),
        (10.0, "10.00"),
        (-1.5, "-1.50"),
        (123456.0, "1.23e+5"),
        (1e-7, "1e-7"),
        ("0.5", "0.500"),
        ("abc", "abc"),
    ],
)
def test_numbers_keep_their_width(number, text):
    from fulmen.callbacks.tqdm_bar import Tqdm

    assert Tqdm.format_num(number) == text


@pytest.mark.parametrize(
    ("environment", "given", "rate"),
    [
        ({}, 1, 1),
        ({"TQDM_MINITERS": "10"}, 1, 10),
        ({"TQDM_MINITERS": "10"}, 30, 30),
        ({"TQDM_MINITERS": "10"}, 0, 0),
        ({"COLAB_GPU": "1"}, 1, 20),
        ({"COLAB_GPU": "1"}, 3, 3),
    ],
)
def test_the_rate_depends_on_where_it_runs(monkeypatch, environment, given, rate):
    for name in ("TQDM_MINITERS", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert TQDMProgressBar(refresh_rate=given).refresh_rate == rate


def test_the_rate_is_a_least_number_of_batches():
    text = fit(TQDMProgressBar(refresh_rate=1000), Terminal()).getvalue()
    assert set(re.findall(r"Epoch 0.* (\d)/5 ", text.replace("\r", "\n"))) == {"0", "5"}


def test_bars_can_be_made_differently():
    class Bar(TQDMProgressBar):
        def init_train_tqdm(self):
            bar = super().init_train_tqdm()
            bar.unit = "step"
            bar.bar_format = "{desc} done {n_fmt} of {total_fmt}"
            return bar

    assert "Epoch 0:  done 5 of 5" in fit(Bar(), Terminal()).getvalue()


@pytest.mark.parametrize("terminal", [None, Terminal()])
def test_bars_can_be_configured_in_hooks(terminal):
    class Bar(TQDMProgressBar):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            self.train_progress_bar.set_description("learning")

        def on_validation_start(self, trainer, pl_module):
            super().on_validation_start(trainer, pl_module)
            self.val_progress_bar.set_description("checking")

    bar = Bar()
    fit(bar, terminal)
    if terminal is not None:
        assert "learning: 100%" in terminal.getvalue()
    mine = object()
    bar.test_progress_bar = mine
    assert bar.test_progress_bar is mine


def test_bars_leave_room_above():
    bar = TQDMProgressBar(process_position=2)
    fit(bar, Terminal())
    assert bar.process_position == 2
    assert bar.train_progress_bar.pos == -4 and bar.val_progress_bar.pos == -5


@pytest.mark.parametrize("leave", [False, True])
def test_finished_epochs_stay_if_asked_to(leave):
    text = fit(TQDMProgressBar(leave=leave), Terminal(), max_epochs=3, limit_val_batches=0).getvalue()
    lines = [line.rpartition("\r")[2] for line in text.split("\n") if line]
    kept = [line[:7] for line in lines if line.startswith("Epoch")]
    assert kept == (["Epoch 0", "Epoch 1", "Epoch 2"] if leave else ["Epoch 2"])
