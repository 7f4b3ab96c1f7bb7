"""What `configure_optimizers` may return, and how optimizers behave that the trainer wraps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

import fulmen as pl

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step")


def trained(answer: Any, manual: bool = False, **arguments: Any) -> pl.Trainer:
    """The trainer after one epoch of two batches with a module whose `configure_optimizers` returns `answer(self)`."""

    class Model(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return answer(self)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if manual else loss

    trainer = make_trainer(**{"limit_val_batches": 0, **arguments})
    trainer.fit(Model(), make_loader(8))
    return trainer


def sgd(self) -> torch.optim.SGD:
    return torch.optim.SGD(self.parameters(), lr=0.1)


def both(self):
    optimizer = sgd(self)
    return optimizer, StepLR(optimizer, 1)


def as_dict(self):
    optimizer, scheduler = both(self)
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def as_dict_of_dicts(self):
    optimizer, scheduler = both(self)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "mine"}}


def as_lists(self):
    optimizer, scheduler = both(self)
    return [optimizer], [scheduler]


def as_lists_with_dict(self):
    optimizer, scheduler = both(self)
    return [optimizer], [{"scheduler": scheduler, "frequency": 3}]


def as_list_and_one(self):
    optimizer, scheduler = both(self)
    return [optimizer], scheduler


def two_schedulers(self):
    optimizer, scheduler = both(self)
    return [optimizer], [scheduler, {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}]


SHAPES = [
    pytest.param(sgd, [], id="an optimizer"),
    pytest.param(lambda self: [sgd(self)], [], id="a list"),
    pytest.param(lambda self: (sgd(self),), [], id="a tuple"),
    pytest.param(lambda self: {"optimizer": sgd(self)}, [], id="a dict"),
    pytest.param(lambda self: {"optimizer": sgd(self), "lr_scheduler": None}, [], id="a dict with None"),
    pytest.param(as_dict, [("epoch", 1, None)], id="a dict with a scheduler"),
    pytest.param(as_dict_of_dicts, [("step", 1, "mine")], id="a dict with a dict"),
    pytest.param(as_lists, [("epoch", 1, None)], id="two lists"),
    pytest.param(as_lists_with_dict, [("epoch", 3, None)], id="two lists with a dict"),
    pytest.param(as_list_and_one, [("epoch", 1, None)], id="a list and a scheduler"),
    pytest.param(two_schedulers, [("epoch", 1, None), ("step", 1, None)], id="two schedulers"),
    pytest.param(lambda self: [as_dict(self)], [("epoch", 1, None)], id="a list of dicts"),
    pytest.param(lambda self: ([sgd(self)], []), [], id="no scheduler in the list"),
]


@pytest.mark.parametrize(("answer", "schedulers"), SHAPES)
def test_accepted_shapes(answer, schedulers):
    trainer = trained(answer)
    assert [type(o) for o in trainer.optimizers] == [torch.optim.SGD]
    assert [(c.interval, c.frequency, c.name) for c in trainer.lr_scheduler_configs] == schedulers
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda self: [sgd(self), sgd(self)],
        lambda self: ([sgd(self), sgd(self)], []),
        lambda self: ({"optimizer": sgd(self)}, {"optimizer": sgd(self)}),
    ],
)
def test_several_optimizers_in_manual_optimization(answer):
    assert len(trained(answer, manual=True).optimizers) == 2


def test_plateau_takes_its_monitor_from_either_level():
    def outer(self):
        optimizer = sgd(self)
        return {"optimizer": optimizer, "lr_scheduler": ReduceLROnPlateau(optimizer), "monitor": "train_loss"}

    def inner(self):
        optimizer = sgd(self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "train_loss"},
        }

    for answer in (outer, inner):
        (config,) = trained(answer).lr_scheduler_configs
        assert config.monitor == "train_loss" and config.reduce_on_plateau and config.strict
        assert config.scheduler.last_epoch == 1


def test_any_scheduler_may_be_stepped_with_a_metric():
    seen = []

    class Mine(LambdaLR):
        def step(self, metric=None):
            if metric is not None:
                seen.append(float(metric))
            super().step()

    def answer(self):
        optimizer = sgd(self)
        scheduler = Mine(optimizer, lambda epoch: 1.0)
        return [optimizer], [{"scheduler": scheduler, "monitor": "train_loss", "reduce_on_plateau": True}]

    trainer = trained(answer)
    assert seen == [pytest.approx(float(trainer.callback_metrics["train_loss"]))]


def test_one_cycle_per_epoch_is_pointed_out_if_it_was_written_down():
    def explicit(self):
        optimizer = sgd(self)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.1, total_steps=10)}]

    with pytest.warns(RuntimeWarning, match="OneCycleLR"):
        trained(explicit)


def test_keys_without_meaning_in_manual_optimization_are_pointed_out():
    def answer(self):
        optimizer, scheduler = both(self)
        return [optimizer], [{"scheduler": scheduler, "monitor": "x", "name": "kept"}]

    with pytest.warns(RuntimeWarning, match="monitor"):
        trainer = trained(answer, manual=True)
    assert trainer.lr_scheduler_configs[0].name == "kept"


def test_things_that_quack_like_an_optimizer_are_optimizers():
    class Duck:
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters), "lr": 0.1}]
            self.state, self.defaults, self.steps = {}, {}, 0

        def step(self, closure=None):
            closure()
            self.steps += 1

        def zero_grad(self): ...
        def state_dict(self):
            return {}

        def load_state_dict(self, state): ...

    trainer = trained(lambda self: Duck(self.parameters()))
    assert trainer.optimizers[0].steps == 2


def test_configure_optimizers_is_asked_in_every_fit():
    model, trainer = Regression(), make_trainer(limit_val_batches=0)
    trainer.fit(model, make_loader())
    first = trainer.optimizers[0]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, make_loader())
    assert trainer.optimizers[0] is not first


def test_optimizers_and_schedulers_as_the_module_sees_them():
    seen: list[Any] = []

    class Model(Regression):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.automatic_optimization, self.count = False, count

        def configure_optimizers(self):
            optimizers = [sgd(self) for _ in range(self.count)]
            return optimizers, [StepLR(o, 1) for o in optimizers[: self.count - 1]]

        def training_step(self, batch, batch_idx):
            seen.append((self.optimizers(), self.lr_schedulers(), self.optimizers(use_pl_optimizer=False)))

    for count in (1, 2, 3):
        make_trainer(limit_val_batches=0, limit_train_batches=1).fit(Model(count), make_loader())
    (one, none, raw), (two, scheduler, _), (_, schedulers, _) = seen
    assert isinstance(one, torch.optim.SGD) and none is None and one.optimizer is raw
    assert isinstance(two, list) and len(two) == 2
    assert isinstance(scheduler, StepLR) and [type(s) for s in schedulers] == [StepLR, StepLR]


def test_a_wrapped_optimizer_reads_and_writes_like_the_one_inside():
    class Model(Regression):
        def on_train_epoch_end(self):
            wrapped, raw = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            assert type(wrapped).__name__ == "LightningSGD" and isinstance(wrapped, torch.optim.SGD)
            wrapped.param_groups[0]["lr"] = 0.5
            assert raw.param_groups[0]["lr"] == 0.5
            assert wrapped.state_dict() == raw.state_dict() and wrapped.defaults is raw.defaults
            wrapped.load_state_dict(copy.deepcopy(raw.state_dict()))
            assert wrapped.param_groups is raw.param_groups
            raw.note = "kept"
            assert wrapped.note == "kept"
            wrapped.zero_grad()
            assert self.layer.weight.grad is None
            with pytest.raises(AttributeError):
                _ = wrapped.nothing

    make_trainer(limit_val_batches=0).fit(Model(), make_loader())


def test_schedulers_built_on_the_wrapped_optimizer_count_its_steps(recwarn):
    """torch warns about schedulers stepped before the optimizer; here they are stepped after it."""
    trained(as_dict_of_dicts)
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


class Plain(torch.optim.Optimizer):
    """Gradient descent whose `step` is made in one of the ways that are found outside of `torch.optim`."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.steps = 0

    def descend(self):
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)


class WithoutClosure(Plain):
    def step(self):
        self.descend()


class AnotherName(Plain):
    def step(self, fn=None):
        fn()
        self.descend()


class WithoutGradients(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        closure()
        self.descend()


class InInferenceMode(WithoutClosure):
    @torch.no_grad()
    def step(self, closure):
        closure()
        self.descend()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", [WithoutClosure, AnotherName, WithoutGradients, InInferenceMode])
@pytest.mark.parametrize("manual", [False, True])
def test_steps_of_any_signature_are_those_of_sgd(kind, window, manual):
    def weights(make):
        class Model(Regression):
            def training_step(self, batch, batch_idx):
                loss = self.loss(batch)
                if manual:
                    optimizer = self.optimizers()
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()
                return loss

            def configure_optimizers(self):
                return make(self.parameters())

        torch.manual_seed(0)
        model = Model()
        model.automatic_optimization = not manual
        trainer = make_trainer(limit_val_batches=0, accumulate_grad_batches=1 if manual else window)
        trainer.fit(model, make_loader())
        return model.layer.weight.detach()

    expected = weights(lambda params: torch.optim.SGD(params, lr=0.1))
    torch.testing.assert_close(weights(kind), expected, rtol=0, atol=1e-6)


def test_what_a_method_writes_through_the_wrapper_belongs_to_the_optimizer():
    class Model(Regression):
        def on_train_epoch_end(self):
            wrapped, raw = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            state = copy.deepcopy(wrapped.state_dict())
            state["param_groups"][0]["lr"] = 0.5
            wrapped.load_state_dict(state)
            wrapped.steps = 7
            assert wrapped.param_groups is raw.param_groups and raw.param_groups[0]["lr"] == 0.5 and raw.steps == 7
            wrapped.descend()
            assert wrapped.steps == raw.steps == 8

        def configure_optimizers(self):
            return WithoutClosure(self.parameters())

    make_trainer(limit_val_batches=0).fit(Model(), make_loader())


def test_an_optimizer_of_other_parameters_is_named():
    class Model(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    with pytest.warns(UserWarning, match="None of the parameters in the optimizers.*belongs to `Model`"):
        make_trainer(limit_val_batches=0).fit(Model(), make_loader())
