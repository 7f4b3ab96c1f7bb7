"""Whatever way a run ends: modes, gradients' flags and averages are as they were; and who asked for the end."""

from __future__ import annotations

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.callbacks import EarlyStopping, EMAWeightAveraging

ENDS = (ValueError("wrong"), KeyboardInterrupt(), SystemExit(3))


class Breaks(Regression):
    """Raises in the hook of this name; one of its layers is in eval mode for good."""

    def __init__(self, where, error):
        super().__init__()
        self.drop, self.frozen = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4)
        self.frozen.eval()
        self.trained_in = set()
        if where is not None:

            def raising(*_):
                raise error

            setattr(self, where, raising)

    def training_step(self, batch, batch_idx):
        self.trained_in.add((self.drop.training, self.frozen.training))
        return super().training_step(batch, batch_idx)


HOOKS = {
    "fit": ("validation_step", "on_validation_start", "on_validation_epoch_end", "on_validation_end"),
    "sanity check": ("validation_step", "on_validation_epoch_start"),
    "validate": ("validation_step", "on_validation_batch_end"),
    "test": ("test_step", "on_test_epoch_end"),
    "predict": ("predict_step", "on_predict_end"),
}


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("verb", "where"), [(verb, hook) for verb, hooks in HOOKS.items() for hook in hooks])
def test_modes_are_put_back(verb, where, error):
    model = Breaks(where, error)
    fits = verb in ("fit", "sanity check")
    trainer = make_trainer(num_sanity_val_steps=int(verb == "sanity check"))
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        if fits:
            trainer.fit(model, make_loader(), make_loader())
        else:
            getattr(trainer, verb)(model, make_loader())
    assert model.training and model.drop.training and not model.frozen.training
    delattr(model, where)
    model.trained_in.clear()
    make_trainer().fit(model, make_loader(), make_loader())
    assert model.trained_in == {(True, False)}


class Toggles(Regression):
    """Manual optimization with two optimizers, of which one is toggled when it breaks."""

    def __init__(self):
        super().__init__()
        self.other, self.fixed = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1).requires_grad_(False)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.toggle_optimizer(second)
        assert [p.requires_grad for p in self.layer.parameters()] == [False, False]
        assert all(p.requires_grad for p in self.other.parameters())
        raise ValueError("while toggled")

    def configure_optimizers(self):
        return [torch.optim.SGD([*m.parameters(), *self.fixed.parameters()], 0.1) for m in (self.layer, self.other)]


def test_an_optimizer_that_is_toggled_when_the_run_breaks_is_untoggled():
    model = Toggles()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="while toggled"):
        make_trainer(limit_val_batches=0).fit(model, make_loader())
    assert [p.requires_grad for p in model.parameters()] == before


def test_one_callback_that_fails_does_not_keep_the_others_from_putting_things_back():
    class Fails(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise RuntimeError("in on_exception")

    class Breaking(Regression):
        weights: list = []

        def on_train_batch_end(self, *_):
            self.weights.append(self.layer.weight.detach().clone())

        def validation_step(self, batch, batch_idx):
            raise ValueError("in validation")

    model = Breaking()
    with pytest.raises(RuntimeError, match="in on_exception"):
        callbacks = [Fails(), EMAWeightAveraging(decay=0.5)]
        make_trainer(callbacks=callbacks).fit(model, make_loader(), make_loader())
    assert torch.equal(model.layer.weight, model.weights[-1])


# ---------------------------------------------------------------------- a caller's switches


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_run_sets_gradients_itself_and_leaves_the_callers_switch(switch):
    class Looks(Regression):
        def training_step(self, batch, batch_idx):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.inside = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    model = Looks()
    before = model.layer.weight.detach().clone()
    with switch():
        make_trainer().fit(model, make_loader(), make_loader())
        assert model.inside == (False, False)
        make_trainer().validate(model, make_loader(), verbose=False)
        assert model.inside == (False, True)
        make_trainer(inference_mode=False).validate(model, make_loader(), verbose=False)
        assert model.inside == (False, False)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (switch is torch.inference_mode)
    assert not torch.equal(before, model.layer.weight)


# ---------------------------------------------------------------------- who asked for the end


class Watched(Regression):
    def __init__(self, values, stop_at=None):
        super().__init__()
        self.values, self.stop_at = values, stop_at

    def validation_step(self, batch, batch_idx):
        self.log("v", float(self.values[self.current_epoch]))
        self.log("w", float(self.current_epoch))

    def on_train_epoch_end(self):
        if self.current_epoch == self.stop_at:
            self.trainer.should_stop = True


WORSE_THEN_BETTER = (1, 2, 3, 4, 0.5, 0.4, 0.3, 0.2)


@pytest.mark.parametrize(
    ("values", "arguments", "monitors", "epochs"),
    [
        (WORSE_THEN_BETTER, {"min_epochs": 5}, ["v"], 8),
        (WORSE_THEN_BETTER, {"min_steps": 14}, ["v"], 8),
        (range(8), {"min_epochs": 5}, ["v"], 5),
        (range(8), {"min_epochs": 5, "check_val_every_n_epoch": 2}, ["v"], 6),
        (WORSE_THEN_BETTER, {"min_epochs": 5}, ["v", "w"], 5),  # one of two still wants to
        (WORSE_THEN_BETTER, {"min_epochs": 5}, ["w", "v"], 5),
        ((1, 2, 3, 4, 4, 4, 0.5, 0.4), {"min_epochs": 5}, ["v"], 5),  # it recovers when it is over
    ],
)
def test_early_stopping_below_the_least_length_is_decided_anew(values, arguments, monitors, epochs):
    stoppers = [EarlyStopping(name, patience=2) for name in monitors]
    trainer = make_trainer(max_epochs=8, callbacks=stoppers, **arguments)
    trainer.fit(Watched(values), make_loader(), make_loader())
    assert trainer.current_epoch == epochs
    if epochs == 8:
        assert stoppers[0].stopped_epoch == 0 and stoppers[0].stopping_reason_message is None


def test_who_sets_should_stop_is_obeyed_as_soon_as_it_may_be():
    trainer = make_trainer(max_epochs=8, min_epochs=5, callbacks=[EarlyStopping("v", patience=2)])
    trainer.fit(Watched(WORSE_THEN_BETTER, stop_at=0), make_loader(), make_loader())
    assert trainer.current_epoch == 5


# ---------------------------------------------------------------------- nothing to train


@pytest.mark.parametrize("arguments", [{"max_steps": 0}, {"max_epochs": 0}, {"limit_val_batches": 0}])
def test_an_interval_of_0_is_accepted_where_nothing_is_validated(arguments):
    model, trainer = Regression(), make_trainer(val_check_interval=0, check_val_every_n_epoch=None, **arguments)
    trainer.fit(model, make_loader(), make_loader())
    assert trainer.global_step == (3 if "limit_val_batches" in arguments else 0)
