"""When does training end early?"""

from __future__ import annotations

import logging
from math import inf, nan

import pytest
import torch

from fulmen.callbacks import EarlyStopping
from fulmen.callbacks.early_stopping import EarlyStoppingReason as Reason
from fulmen.utilities.errors import MisconfigurationException

LOSSES = (3.0, 1.0, 2.0, 0.95, 4.0, 5.0, 6.0, 7.0)

# values of `val_loss` by epoch, arguments, epochs trained, why, wait_count
RULES = [
    pytest.param(LOSSES, {}, 7, Reason.PATIENCE_EXHAUSTED, 3, id="patience 3"),
    pytest.param(LOSSES, {"patience": 1}, 3, Reason.PATIENCE_EXHAUSTED, 1, id="patience 1"),
    pytest.param(LOSSES, {"patience": 0}, 3, Reason.PATIENCE_EXHAUSTED, 1, id="patience 0 is 1"),
    pytest.param(LOSSES, {"patience": 9}, 8, Reason.NOT_STOPPED, 4, id="patience never used up"),
    pytest.param(LOSSES, {"divergence_threshold": 2.5}, 1, Reason.DIVERGENCE_THRESHOLD, 0, id="diverges"),
    pytest.param(LOSSES, {"stopping_threshold": 1.5}, 2, Reason.STOPPING_THRESHOLD, 0, id="good enough"),
    pytest.param(
        (1.0, 2.0, 3.0), {"mode": "max", "stopping_threshold": 2.0}, 3, Reason.STOPPING_THRESHOLD, 0, id="max"
    ),
    pytest.param((1.0, 0.5, 3.0), {"mode": "max", "divergence_threshold": 0.6}, 2, Reason.DIVERGENCE_THRESHOLD, 0),
    pytest.param((1.0, nan, 1.0), {}, 2, Reason.NON_FINITE_METRIC, 0, id="nan"),
    pytest.param((1.0, inf, 1.0), {}, 2, Reason.NON_FINITE_METRIC, 0, id="infinite"),
    pytest.param((1.0, -inf, 1.0), {}, 2, Reason.NON_FINITE_METRIC, 0, id="infinitely good"),
    pytest.param((1.0, nan, 1.0, 1.0, 1.0), {"check_finite": False}, 4, Reason.PATIENCE_EXHAUSTED, 3, id="nan allowed"),
    pytest.param((1.0, 0.95, 0.9, 0.85, 0.8), {"min_delta": 0.1}, 5, Reason.NOT_STOPPED, 1, id="small steps"),
    pytest.param(
        (1.0, 1.05, 1.1, 1.15), {"min_delta": 0.1, "mode": "max", "patience": 2}, 3, Reason.PATIENCE_EXHAUSTED, 2
    ),
    pytest.param((1.0, 1.05, 1.1, 1.15), {"min_delta": -0.1, "patience": 2}, 4, Reason.NOT_STOPPED, 0, id="tolerant"),
]


@pytest.mark.parametrize(("losses", "arguments", "epochs", "reason", "waited"), RULES)
def test_rules(fit, scripted_model, losses, arguments, epochs, reason, waited):
    callback = EarlyStopping(monitor="val_loss", **arguments)
    trainer = fit(callback, scripted_model(losses), max_epochs=len(losses))
    assert trainer.current_epoch == epochs
    assert callback.stopping_reason is reason
    assert callback.wait_count == waited
    assert callback.stopped_epoch == (0 if reason is Reason.NOT_STOPPED else epochs - 1)
    assert bool(callback.stopping_reason_message) is (reason is not Reason.NOT_STOPPED)


def test_a_value_that_ends_training_is_not_the_best_one(fit, scripted_model):
    callback = EarlyStopping("val_loss", stopping_threshold=1.5)
    fit(callback, scripted_model(LOSSES))
    assert callback.best_score == 3.0


def test_validation_that_is_not_once_per_epoch_is_checked_where_it_happens(fit, scripted_model):
    callback = EarlyStopping("val_loss", patience=2)
    assert fit(callback, scripted_model((1.0, 2.0, 3.0)), val_check_interval=2).current_epoch == 2

    callback = EarlyStopping("val_loss", patience=2)
    trainer = fit(callback, scripted_model((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)), check_val_every_n_epoch=2, max_epochs=6)
    assert (trainer.current_epoch, callback.wait_count) == (6, 2)


def test_min_epochs_are_completed(fit, scripted_model):
    callback = EarlyStopping("val_loss", patience=1)
    trainer = fit(callback, scripted_model(LOSSES), min_epochs=6, max_epochs=8)
    assert (trainer.current_epoch, callback.wait_count, callback.stopped_epoch) == (6, 2, 5)


def test_misspelt_monitor_is_an_error_with_a_suggestion(fit):
    with pytest.raises(RuntimeError, match=r"valloss.*Did you mean `val_loss`"):
        fit(EarlyStopping("valloss"))


def test_missing_monitor_can_be_ignored(fit, recwarn):
    assert fit(EarlyStopping("valloss", strict=False), max_epochs=2).current_epoch == 2
    assert not [w for w in recwarn if "EarlyStopping" in str(w.message)]
    with pytest.warns(RuntimeWarning, match="valloss"):
        fit(EarlyStopping("valloss", strict=False, verbose=True), max_epochs=1)


def test_fast_dev_run_does_not_look(fit):
    callback = EarlyStopping("nobody logs this")
    fit(callback, fast_dev_run=True)
    assert callback.wait_count == 0


def test_sanity_check_is_not_an_epoch(fit, scripted_model):
    callback = EarlyStopping("val_loss", patience=1)
    trainer = fit(callback, scripted_model((2.0, 2.0)), num_sanity_val_steps=1, check_val_every_n_epoch=2, max_epochs=2)
    assert (trainer.current_epoch, callback.wait_count) == (2, 0)


def test_verbose_tells_improvements_and_the_end(fit, scripted_model, caplog):
    with caplog.at_level(logging.INFO, logger="fulmen"):
        fit(EarlyStopping("val_loss", patience=1, verbose=True), scripted_model((3.0, 1.0, 2.0)))
    texts = [record.getMessage() for record in caplog.records if "`val_loss`" in record.getMessage()]
    assert len(texts) == 3
    assert "2.000" in texts[1]
    assert "did not improve" in texts[2]


def test_state_goes_on_where_it_was():
    before = EarlyStopping("val_loss", patience=5)
    before.wait_count, before.stopped_epoch, before.best_score = 2, 7, torch.tensor(0.25)
    before.stopping_reason, before.stopping_reason_message = Reason.STOPPING_THRESHOLD, "enough"
    after = EarlyStopping("val_loss", patience=1)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == {**before.state_dict(), "patience": 1}
    assert after.patience == 1  # the one the script says
    assert after.stopping_reason is Reason.STOPPING_THRESHOLD


def test_state_of_older_files_has_no_reason():
    callback = EarlyStopping("a")
    callback.load_state_dict({"wait_count": 1, "stopped_epoch": 2, "best_score": torch.tensor(1.0), "patience": 3})
    assert callback.stopping_reason is Reason.NOT_STOPPED


def test_two_monitors_have_two_states():
    assert EarlyStopping("a").state_key == "EarlyStopping{'monitor': 'a', 'mode': 'min'}"
    assert EarlyStopping("a").state_key != EarlyStopping("b").state_key


def test_min_delta_is_signed_by_the_mode():
    assert EarlyStopping("a", min_delta=0.1).min_delta == -0.1
    assert EarlyStopping("a", min_delta=0.1, mode="max").min_delta == 0.1
    assert EarlyStopping("a").monitor_op is torch.lt
    with pytest.raises(MisconfigurationException, match="mode='auto'"):
        EarlyStopping("a", mode="auto")
