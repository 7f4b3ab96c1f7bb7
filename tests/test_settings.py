"""What the Trainer's arguments mean, and what is said about the wrong ones."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from math import inf, nan
from pathlib import Path

import pytest
import torch

from fulmen import Trainer, settings
from fulmen.utilities.errors import MisconfigurationException

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
MCE = MisconfigurationException


def check(**given):
    return settings.check(**{**DEFAULTS, **given})


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("limit_train_batches", -1, MCE, "neither a number of batches nor a fraction"),
        ("limit_val_batches", -0.5, MCE, "[0.0, 1.0] or an int"),
        ("limit_test_batches", 1.5, MCE, "limit_test_batches=10"),
        ("limit_predict_batches", nan, MCE, "nan"),
        ("limit_train_batches", "all", TypeError, "'all'` is a str"),
        ("overfit_batches", -1, MCE, "overfit_batches=-1"),
        ("overfit_batches", 1.5, MCE, "a tenth"),
        ("overfit_batches", None, TypeError, "NoneType"),
        ("fast_dev_run", -1, MCE, "not a valid configuration"),
        ("fast_dev_run", "yes", TypeError, "should be an integer"),
        ("max_epochs", -2, MCE, "`max_epochs=-2` is too small"),
        ("max_epochs", "5", TypeError, "'5'` is a str"),
        ("max_epochs", 2.5, TypeError, "should be an integer"),
        ("max_steps", -2, MCE, "non-negative integer or -1"),
        ("max_steps", None, TypeError, "max_steps"),
        ("min_epochs", "1", TypeError, "min_epochs"),
        ("min_steps", 0.5, TypeError, "min_steps"),
        ("max_time", "1:00:00", MCE, "DD:HH:MM:SS"),
        ("max_time", "", MCE, "max_time=''"),
        ("max_time", 5, TypeError, "timedelta"),
        ("max_time", {"weks": 1}, TypeError, "weks"),
        ("val_check_interval", -1, MCE, "val_check_interval=-1"),
        ("val_check_interval", 1.5, MCE, "val_check_interval=1.5"),
        ("val_check_interval", 0, MCE, "limit_val_batches=0"),
        ("val_check_interval", "soon", MCE, "DD:HH:MM:SS"),
        ("check_val_every_n_epoch", 1.5, MCE, "should be an integer"),
        ("check_val_every_n_epoch", "2", MCE, "should be an integer"),
        ("check_val_every_n_epoch", 0, MCE, ">= 1"),
        ("num_sanity_val_steps", "all", TypeError, "num_sanity_val_steps"),
        ("reload_dataloaders_every_n_epochs", -1, MCE, ">= 0"),
        ("reload_dataloaders_every_n_epochs", 1.5, MCE, "should be an integer"),
        ("reload_dataloaders_every_n_epochs", None, MCE, "NoneType"),
        ("accumulate_grad_batches", 0, ValueError, ">= 1"),
        ("accumulate_grad_batches", -5, ValueError, "accumulate_grad_batches=-5"),
        ("accumulate_grad_batches", {0: 2}, TypeError, "GradientAccumulationScheduler(scheduling={0: 2})"),
        ("accumulate_grad_batches", None, TypeError, "should be an integer"),
        ("gradient_clip_val", "0.5", TypeError, "int or a float"),
        ("gradient_clip_algorithm", "nrm", MCE, "Did you mean `norm`?"),
        ("gradient_clip_algorithm", 3, MCE, "['value', 'norm']"),
        ("log_every_n_steps", "10", TypeError, "log_every_n_steps"),
        ("default_root_dir", 5, TypeError, "a string or a path"),
        ("model_registry", "me/model", MCE, "external model registry service"),
    ],
)
def test_wrong_values_are_refused_with_help(name, value, error, words):
    with pytest.raises(error) as caught:
        check(**{name: value})
    assert type(caught.value) is error
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_epochs": None, "min_epochs": None, "max_steps": -1, "min_steps": None, "max_time": None}),
        ({}, {"limit_train_batches": 1.0, "limit_predict_batches": 1.0, "overfit_batches": 0.0, "fast_dev_run": False}),
        ({}, {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "num_sanity_val_steps": 2}),
        ({}, {"log_every_n_steps": 50, "logger": True, "enable_checkpointing": True, "enable_progress_bar": True}),
        ({}, {"accumulate_grad_batches": 1, "gradient_clip_val": None, "gradient_clip_algorithm": None}),
        ({"limit_val_batches": 2.0}, {"limit_val_batches": 2}),
        ({"limit_val_batches": 1}, {"limit_val_batches": 1}),
        ({"limit_val_batches": False}, {"limit_val_batches": 0}),
        ({"overfit_batches": 3}, {"limit_train_batches": 3, "limit_val_batches": 3, "limit_test_batches": 1.0}),
        ({"overfit_batches": 0.5, "limit_train_batches": 7}, {"limit_train_batches": 0.5}),
        ({"max_steps": 1e5, "max_epochs": inf}, {"max_steps": 100000, "max_epochs": -1}),
        ({"max_time": "01:02:03:04"}, {"max_time": timedelta(days=1, hours=2, minutes=3, seconds=4)}),
        ({"val_check_interval": 3}, {"val_check_interval": 3, "val_check_time_s": None}),
        ({"val_check_interval": 2.0}, {"val_check_interval": 2}),
        ({"val_check_interval": "00:00:01:00"}, {"val_check_interval": 1.0, "val_check_time_s": 60.0}),
        ({"val_check_interval": {"minutes": 2}}, {"val_check_time_s": 120.0}),
        ({"check_val_every_n_epoch": None}, {"check_val_every_n_epoch": None, "val_check_interval": 1.0}),
        ({"check_val_every_n_epoch": None, "val_check_interval": timedelta(seconds=1)}, {"val_check_time_s": 1.0}),
        ({"num_sanity_val_steps": -1}, {"num_sanity_val_steps": inf}),
        ({"num_sanity_val_steps": -5}, {"num_sanity_val_steps": 0}),
        ({"gradient_clip_algorithm": "VALUE", "gradient_clip_val": -1}, {"gradient_clip_algorithm": "value"}),
        ({"log_every_n_steps": -5}, {"log_every_n_steps": -5}),
        ({"deterministic": True}, {"benchmark": False}),
        ({"deterministic": "warn", "benchmark": None}, {"deterministic": "warn", "benchmark": False}),
        ({"default_root_dir": Path("runs")}, {"default_root_dir": "runs"}),
        ({"fast_dev_run": 0}, {"fast_dev_run": 0, "max_steps": -1}),
    ],
)
def test_values_are_normalised(given, expected):
    found = vars(check(**given))
    assert {name: found[name] for name in expected} == expected
    for name, value in expected.items():
        assert type(value) in (type(found[name]), str)


def test_the_root_directory_is_where_the_run_was_started(tmp_path):
    assert check().default_root_dir == os.getcwd() == str(tmp_path)


def test_a_fraction_needs_an_epoch():
    with pytest.raises(MCE, match="counted across epochs"):
        check(check_val_every_n_epoch=None, val_check_interval=0.5)
    assert check(check_val_every_n_epoch=None, val_check_interval=3).val_check_interval == 3


@pytest.mark.parametrize(("value", "kept", "count"), [(True, True, 1), (1, True, 1), (7, 7, 7)])
def test_a_development_run_replaces_limits_and_schedule(value, kept, count):
    found = check(
        fast_dev_run=value, max_epochs=9, val_check_interval=3, check_val_every_n_epoch=2, limit_val_batches=0.5
    )
    assert found.fast_dev_run is kept
    assert [found.limit_train_batches, found.limit_val_batches, found.limit_test_batches] == [count] * 3
    assert (found.max_steps, found.max_epochs, found.num_sanity_val_steps) == (count, 1, 0)
    assert (found.val_check_interval, found.check_val_every_n_epoch) == (1.0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_checkpointing", True),
        ("logger", True),
        ("enable_progress_bar", True),
        ("enable_model_summary", True),
        ("log_every_n_steps", 1),
        ("num_sanity_val_steps", 1),
        ("fast_dev_run", True),
        ("detect_anomaly", True),
        ("profiler", "simple"),
    ],
)
def test_barebones_refuses_what_it_leaves_out(name, value):
    with pytest.raises(ValueError, match=rf"barebones=True, {name}={value!r}"):
        check(barebones=True, **{name: value})


def test_barebones_switches_off_what_was_not_asked_for():
    found = check(barebones=True, enable_checkpointing=False, log_every_n_steps=0)
    assert not (found.logger or found.enable_checkpointing or found.enable_progress_bar or found.enable_model_summary)
    assert found.log_every_n_steps == found.num_sanity_val_steps == 0


def test_doubtful_switches_are_warned_about():
    with pytest.warns(UserWarning, match="not be reproducible"):
        check(deterministic=True, benchmark=True)
    with pytest.warns(UserWarning, match="Did you mean `warn`"):
        check(deterministic="wran")


@pytest.fixture
def torch_flags():
    before = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before[0]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before[1] is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before[1]


def test_torch_flags_are_set_only_when_asked_for(torch_flags):
    settings.apply_torch_flags(None, None)
    assert not torch.are_deterministic_algorithms_enabled()
    settings.apply_torch_flags("warn", True)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    settings.apply_torch_flags(False, False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark


def test_environment_presets_arguments(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_ACCELERATOR", "cpu")
    monkeypatch.setenv("PL_TRAINER_LOGGER", "False")
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "")
    assert Trainer(enable_progress_bar=False).max_epochs == 7
    assert Trainer(max_epochs=2).max_epochs == 2
    assert Trainer().max_steps == -1 and Trainer().loggers == []


def test_positional_arguments_are_taken_in_order():
    assert Trainer("cpu", logger=False).accelerator.__class__.__name__ == "CPUAccelerator"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpus", 'accelerator="gpu", devices='),
        ("auto_lr_find", "Tuner(trainer).lr_find(model)"),
        ("resume_from_checkpoint", "trainer.fit(model, ckpt_path=...)"),
        ("max_epoch", "Did you mean `max_epochs`?"),
        ("limit_train_batch", "Did you mean `limit_train_batches`?"),
    ],
)
def test_unknown_arguments_name_the_one_that_was_meant(name, words):
    with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
        Trainer(**{name: 1})
    assert words in str(caught.value)
