"""Validate and test: which mode, which loaders, which results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*eval mode",
    "ignore:.*shuffl",
    "ignore:Total length of",
    "ignore:.*zero",
    "ignore:.*validation_step",
    "ignore:.*returned `None`",
)

VERBS = {"validate": "validation", "test": "test"}


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: child.training for name, child in module.named_modules() if name}


class Frozen(Regression):
    """A model of which one part was put into eval mode by hand, as one does with a pretrained BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.other = nn.BatchNorm1d(4)
        self.norm.eval()

    def forward(self, x):
        return self.layer(self.other(self.norm(x)))


# ---------------------------------------------------------------------- train and eval mode


def test_validation_in_fit_restores_the_mode_of_every_submodule():
    seen: list[Any] = []

    class Model(Frozen):
        def training_step(self, batch, batch_idx):
            seen.append(modes(self))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not any(modes(self).values()) and not self.training
            return super().validation_step(batch, batch_idx)

        def on_validation_end(self):
            assert not self.training, "the mode is restored after the last hook"

    model = Model()
    make_trainer(max_epochs=2, num_sanity_val_steps=1).fit(model, make_loader(), make_loader())
    expected = {"layer": True, "norm": False, "other": True}
    assert seen == [expected] * 6
    assert modes(model) == expected and model.training
    assert torch.equal(model.norm.running_mean, torch.zeros(4))
    assert not torch.equal(model.other.running_mean, torch.zeros(4))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_verbs_restore_it_as_well(verb):
    model = Frozen()
    before = modes(model)
    getattr(make_trainer(), verb)(model, make_loader())
    assert modes(model) == before
    model.eval()
    getattr(make_trainer(), verb)(model, make_loader())
    assert not model.training and not any(modes(model).values())


def test_mode_changed_during_validation_is_put_back():
    class Model(Frozen):
        def on_validation_epoch_end(self):
            self.norm.train()

    model = Model()
    make_trainer().fit(model, make_loader(), make_loader())
    assert not model.norm.training


def test_mode_hooks_may_be_replaced():
    seen = []

    class Model(Frozen):
        def on_validation_model_eval(self):
            self.layer.eval()

        def on_validation_model_train(self):
            self.layer.train()
            self.norm.train()

        def validation_step(self, batch, batch_idx):
            seen.append(modes(self))

    model = Model()
    make_trainer().fit(model, make_loader(), make_loader(4))
    assert seen == [{"layer": False, "norm": False, "other": True}]
    assert modes(model) == {"layer": True, "norm": True, "other": True}


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_nothing_is_recorded_for_backward(verb, inference_mode):
    """Validation inside fit is under `no_grad` always: tensors made there may be needed in training."""
    seen = []

    class Model(Regression):
        def _look(self, *_: Any) -> None:
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

        validation_step = test_step = predict_step = _look
        on_validation_start = on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _look

        def test_dataloader(self):
            self._look()
            return make_loader()

        predict_dataloader = test_dataloader

        def train_dataloader(self):
            return make_loader(4)

        val_dataloader = train_dataloader

    getattr(make_trainer(inference_mode=inference_mode), verb)(Model())
    assert set(seen) == {(False, inference_mode and verb != "fit")}
    assert torch.is_grad_enabled()


def test_gradients_may_be_switched_on_inside_a_validation_step():
    class Model(Regression):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                self(x).sum().backward()
            self.log("slope", x.grad.abs().sum())

    trainer = make_trainer()
    trainer.fit(Model(), make_loader(), make_loader())
    assert trainer.callback_metrics["slope"] > 0
    (results,) = make_trainer(inference_mode=False).validate(Model(), make_loader(), verbose=False)
    assert results["slope"] > 0


# ---------------------------------------------------------------------- loaders


@pytest.mark.parametrize(("verb", "infix"), VERBS.items())
def test_several_loaders_come_one_after_the_other_with_their_index(verb, infix):
    seen = []

    class Model(Regression):
        pass

    def step(self, batch, batch_idx, dataloader_idx):
        seen.append((dataloader_idx, batch_idx))
        return batch_idx

    def start(self, batch, batch_idx, dataloader_idx=0):
        seen.append(("start", dataloader_idx, batch_idx))

    def end(self, outputs, batch, batch_idx, dataloader_idx=0):
        seen.append(("end", dataloader_idx, outputs))

    setattr(Model, f"{infix}_step", step)
    setattr(Model, f"on_{infix}_batch_start", start)
    setattr(Model, f"on_{infix}_batch_end", end)
    trainer = make_trainer()
    results = getattr(trainer, verb)(Model(), [make_loader(8), make_loader(4)], verbose=False)
    places = [(0, 0), (0, 1), (1, 0)]
    assert seen == [event for place in places for event in (("start", *place), place, ("end", *place))]
    assert results == [{}, {}]
    assert len(getattr(trainer, f"{infix if verb == 'test' else 'val'}_dataloaders")) == 2


def test_loaders_in_a_dict_keep_their_order_and_an_empty_one_is_skipped():
    seen = []

    class Model(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            seen.append(dataloader_idx)
            self.log("n", 1.0, reduce_fx="sum")

    loaders = {"a": make_loader(8), "b": make_loader(0), "c": make_loader(4)}
    trainer = make_trainer()
    results = trainer.validate(Model(), loaders, verbose=False)
    assert seen == [0, 0, 2]
    assert results == [{"n/dataloader_idx_0": 2.0}, {}, {"n/dataloader_idx_2": 1.0}]
    assert trainer.num_val_batches == [2, 0, 1]
    assert trainer.val_dataloaders == loaders


def test_a_combined_loader_in_another_mode_gives_one_batch_of_all():
    from fulmen.utilities import CombinedLoader

    seen = []

    class Model(Regression):
        def validation_step(self, batch, batch_idx):
            seen.append((batch_idx, sorted(batch)))

    loader = CombinedLoader({"a": make_loader(8), "b": make_loader(12)}, "max_size_cycle")
    make_trainer().validate(Model(), loader, verbose=False)
    assert seen == [(i, ["a", "b"]) for i in range(3)]


@pytest.mark.parametrize("name", ["validation_step", "on_validation_batch_start", "on_validation_batch_end"])
def test_methods_must_fit_the_number_of_loaders(name):
    class None_(Regression):
        pass

    class Required(Regression):
        pass

    if name == "on_validation_batch_end":
        setattr(None_, name, lambda self, outputs, batch, batch_idx: None)

        def required(self, outputs, batch, batch_idx, dataloader_idx): ...
    else:
        setattr(None_, name, lambda self, batch, batch_idx: None)

        def required(self, batch, batch_idx, dataloader_idx): ...

    setattr(Required, name, required)
    two = [make_loader(4), make_loader(4)]
    if name != "validation_step":
        step = lambda self, batch, batch_idx, dataloader_idx=0: None  # noqa: E731
        None_.validation_step = Required.validation_step = step
    with pytest.raises(RuntimeError, match="dataloader_idx"):
        make_trainer().validate(None_(), two)
    with pytest.raises(RuntimeError, match="dataloader_idx"):
        make_trainer().validate(Required(), make_loader(4))
    make_trainer().validate(Required(), two)


def test_nothing_to_evaluate_gives_no_results():
    assert make_trainer(limit_test_batches=0).test(Regression(), make_loader()) == []
    assert make_trainer().test(Regression(), make_loader(0)) == []


def test_loaders_of_the_module_or_of_a_datamodule():
    class Data(pl.LightningDataModule):
        def val_dataloader(self):
            return make_loader(4)

    class Model(Regression):
        def val_dataloader(self):
            return make_loader(8)

    trainer = make_trainer()
    trainer.validate(Model())
    assert trainer.num_val_batches == [2]
    trainer.validate(Model(), datamodule=Data())
    assert trainer.num_val_batches == [1]
    trainer.validate(Model(), Data())
    assert trainer.num_val_batches == [1]


# ---------------------------------------------------------------------- what is returned and printed


def test_results_are_printed_unless_told_not_to(capsys):
    model = Regression()
    make_trainer().validate(model, make_loader())
    printed = capsys.readouterr().out
    assert "val_loss" in printed and "DataLoader 0" in printed
    make_trainer().validate(model, make_loader(), verbose=False)
    assert "val_loss" not in capsys.readouterr().out


def test_validation_in_fit_prints_nothing(capsys):
    make_trainer().fit(Regression(), make_loader(), make_loader())
    assert "val_loss" not in capsys.readouterr().out


def test_without_a_model_the_best_checkpoint_of_the_run_before_is_loaded():
    trainer = make_trainer(enable_checkpointing=True)
    model = Regression()
    trainer.fit(model, make_loader())
    (trained,) = trainer.test(model, make_loader(), verbose=False)
    torch.nn.init.zeros_(model.layer.weight)
    (changed,) = trainer.test(model, make_loader(), verbose=False)
    with pytest.warns(UserWarning, match="best"):
        (loaded,) = trainer.test(dataloaders=make_loader(), verbose=False)
    assert loaded == trained != changed
    with pytest.raises(ValueError, match="best"):
        plain = make_trainer()
        plain.fit(model, make_loader())
        plain.test(dataloaders=make_loader())


def test_validation_gives_the_mean_over_all_samples():
    """Batches of 5, 5 and 2 samples: the mean over samples, not over batches."""
    model = Regression()
    (results,) = make_trainer().validate(model, make_loader(12, batch_size=5), verbose=False)
    (whole,) = make_trainer().validate(model, make_loader(12, batch_size=12), verbose=False)
    assert results["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-6)


def test_the_state_says_what_runs():
    seen = {}

    class Model(Regression):
        def _look(self) -> dict[str, Any]:
            t = self.trainer
            flags = ("training", "validating", "testing", "predicting", "sanity_checking", "evaluating")
            return {"fn": str(t.state.fn.value), "on": [flag for flag in flags if getattr(t, flag)]}

        def training_step(self, batch, batch_idx):
            seen["train"] = self._look()
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["sanity" if self.trainer.sanity_checking else f"val in {self.trainer.state.fn.value}"] = self._look()

        def test_step(self, batch, batch_idx):
            seen["test"] = self._look()

        def predict_step(self, batch, batch_idx):
            seen["predict"] = self._look()
            return batch_idx

    model, trainer = Model(), make_trainer(num_sanity_val_steps=1)
    trainer.fit(model, make_loader(4), make_loader(4))
    trainer.validate(model, make_loader(4))
    trainer.test(model, make_loader(4))
    trainer.predict(model, make_loader(4))
    assert seen == {
        "train": {"fn": "fit", "on": ["training"]},
        "sanity": {"fn": "fit", "on": ["sanity_checking", "evaluating"]},
        "val in fit": {"fn": "fit", "on": ["validating", "evaluating"]},
        "val in validate": {"fn": "validate", "on": ["validating", "evaluating"]},
        "test": {"fn": "test", "on": ["testing", "evaluating"]},
        "predict": {"fn": "predict", "on": ["predicting"]},
    }
    assert trainer.state.status == "finished" and trainer.state.stage is None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("verb", "error", "words"),
    [("validate", MisconfigurationException, "validation_step"), ("test", MisconfigurationException, "test_step")],
)
def test_the_step_must_be_defined(verb, error, words):
    class Empty(pl.LightningModule):
        def configure_optimizers(self):
            return None

    with pytest.raises(error, match=words):
        getattr(make_trainer(), verb)(Empty(), make_loader())


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_loaders_must_come_from_somewhere(verb):
    with pytest.raises(MisconfigurationException, match="dataloader"):
        getattr(make_trainer(), verb)(Regression())
    with pytest.raises(TypeError):
        getattr(make_trainer(), verb)(Regression(), 3)
    with pytest.raises(MisconfigurationException, match="datamodule"):
        getattr(make_trainer(), verb)(Regression(), make_loader(), datamodule=pl.LightningDataModule())


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_the_model_must_be_one(verb):
    with pytest.raises(TypeError, match="LightningModule"):
        getattr(make_trainer(), verb)(nn.Linear(4, 1), make_loader())
    if verb != "fit":
        with pytest.raises(TypeError):
            getattr(make_trainer(), verb)(dataloaders=make_loader())
