"""Ending by the clock, and accumulation that changes with the epoch."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import Callback, GradientAccumulationScheduler, Timer
from fulmen.callbacks.timer import parse_duration
from fulmen.utilities.errors import MisconfigurationException


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("00:00:00:05", 5),
        ("0:00:01:05", 65),
        ("12:00:00:00", 12 * 86400),
        ({"hours": 1, "seconds": 0.5}, 3600.5),
        (timedelta(minutes=2), 120),
    ],
)
def test_every_notation_is_a_length_of_time(value, seconds):
    assert parse_duration(value).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "05", "00:00:05", "0:0:0:5", "-1:00:00:00", "a:00:00:00", "00:00:00:05.5"])
def test_other_text_is_refused(text):
    with pytest.raises(MisconfigurationException, match="`limit='.*DD:HH:MM:SS"):
        parse_duration(text, "limit")


@pytest.mark.parametrize("value", [None, 5, 1.5, [1], {"second": 5}])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match="timedelta"):
        parse_duration(value)


def test_time_that_is_over_before_training_means_no_training(fit):
    assert fit(Timer(timedelta(0)), max_epochs=2).global_step == 0


class Late(Callback):
    """Uses up the time of a timer after some batches."""

    def __init__(self, timer, batches):
        self.timer, self.batches = timer, batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.batches - 1:
            self.timer._offset = 1000


@pytest.mark.parametrize(("interval", "steps"), [("step", 2), ("epoch", 4)])
def test_training_ends_after_the_batch_or_epoch(fit, interval, steps):
    timer = Timer("00:00:01:00", interval)
    assert fit([Late(timer, batches=2), timer]).global_step == steps


def test_time_is_told_when_it_is_over(fit, caplog):
    with caplog.at_level("INFO", logger="fulmen"):
        fit(Timer(timedelta(0), verbose=False))
        assert "Time limit reached" not in caplog.text
        fit(Timer(timedelta(0)))
    assert "Time limit reached. Elapsed time is 0:00:00." in caplog.text


def test_max_time_of_the_trainer_is_a_timer(fit):
    trainer = fit([], max_time={"seconds": 0})
    assert [type(c) for c in trainer.callbacks] == [Timer]
    assert trainer.global_step == 0


def test_without_duration_it_only_measures(fit):
    before, timer = time.monotonic(), Timer()
    fit(timer, max_epochs=1)
    assert before <= timer.start_time() <= timer.end_time() <= time.monotonic()
    assert 0 < timer.time_elapsed("validate") < timer.time_elapsed("train") == timer.time_elapsed()
    assert timer.time_elapsed("test") == 0
    assert timer.time_remaining() is timer.start_time("test") is timer.end_time("predict") is None


@pytest.mark.parametrize("duration", ["00:00:00:05", {"seconds": 5}, timedelta(seconds=5)])
def test_duration_may_be_written_in_three_ways(duration):
    assert Timer(duration).time_remaining() == 5


def test_wrong_arguments():
    with pytest.raises(MisconfigurationException, match="DD:HH:MM:SS"):
        Timer("1:2:3")
    with pytest.raises(TypeError, match="Timer"):
        Timer(5)
    with pytest.raises(MisconfigurationException, match="interval='batch'"):
        Timer(interval="batch")


def test_resumed_run_has_the_rest_of_the_time():
    timer = Timer({"seconds": 5})
    timer.load_state_dict({"time_elapsed": {"train": 3.0, "validate": 1.0}})
    assert (timer.time_elapsed(), timer.time_remaining()) == (3.0, 2.0)
    stages = {"train": 3.0, "sanity_check": 0, "validate": 0, "test": 0, "predict": 0}
    assert timer.state_dict() == {"time_elapsed": stages}


class Steps(Callback):
    """Notes (epoch, batch, optimizer steps so far)."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, trainer.global_step))


def test_accumulation_begins_with_its_epoch(fit):
    steps = Steps()
    trainer = fit([GradientAccumulationScheduler({1: 2}), steps], max_epochs=2)
    assert steps.seen == [(0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 3, 4), (1, 0, 4), (1, 1, 5), (1, 2, 5), (1, 3, 6)]
    assert trainer.accumulate_grad_batches == 2


def test_accumulation_from_the_first_epoch_on(fit):
    assert fit(GradientAccumulationScheduler({0: 4}), max_epochs=2).global_step == 2


def test_a_trainer_can_be_used_twice(fit, scripted_model):
    trainer = fit(GradientAccumulationScheduler({1: 2}), max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(scripted_model())
    assert trainer.current_epoch == 3


def test_window_of_an_epoch():
    callback = GradientAccumulationScheduler({4: 2, 2: 3})
    assert [callback.get_accumulate_grad_batches(epoch) for epoch in range(6)] == [1, 1, 3, 3, 2, 2]
    assert callback.epochs == [0, 2, 4]
    assert callback.going_to_accumulate_grad_batches()
    assert not GradientAccumulationScheduler({3: 1}).going_to_accumulate_grad_batches()


def test_given_schedule_is_not_changed():
    given = {4: 2}
    assert GradientAccumulationScheduler(given).scheduling == {0: 1, 4: 2}
    assert given == {4: 2}


@pytest.mark.parametrize("schedule", [{-1: 2}, {"a": 1}, {1.5: 2}, {1: 0}, {1: "x"}])
def test_schedule_is_checked(schedule):
    with pytest.raises(MisconfigurationException, match="should be an int greater than"):
        GradientAccumulationScheduler(schedule)


def test_schedule_must_not_be_empty():
    with pytest.raises(TypeError, match="nothing"):
        GradientAccumulationScheduler({})


def test_what_it_cannot_be_combined_with(fit, scripted_model):
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        fit(GradientAccumulationScheduler({1: 2}), accumulate_grad_batches=2)
    model = scripted_model()
    model.automatic_optimization = False
    with pytest.raises(RuntimeError, match="manual"):
        fit(GradientAccumulationScheduler({1: 2}), model)


def test_module_that_replaces_optimizer_hooks_is_warned(fit, scripted_model):
    class Model(scripted_model):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="optimizer_zero_grad"):
        fit(GradientAccumulationScheduler({1: 2}), Model(), max_epochs=1)


def test_the_sanity_check_is_validation(tmp_path):
    timer = Timer()
    trainer = make_trainer(callbacks=[timer], limit_train_batches=0, num_sanity_val_steps=1)
    trainer.fit(Regression(), make_loader(), make_loader())
    assert timer.time_elapsed("validate") > 0
    assert timer.time_elapsed("sanity_check") == 0


@pytest.mark.parametrize("ask", ["start_time", "end_time", "time_elapsed", "time_remaining"])
def test_times_are_those_of_stages_that_exist(ask):
    assert getattr(Timer("00:00:01:00"), ask)("test") in (None, 0, 60)
    with pytest.raises(ValueError, match="training"):
        getattr(Timer("00:00:01:00"), ask)("training")
