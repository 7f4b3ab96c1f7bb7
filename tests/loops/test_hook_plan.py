"""Hooks that change while a run goes on are the ones that are called, from the next epoch or evaluation on."""

from __future__ import annotations

import pytest
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.strategies import SingleDeviceStrategy


class Tells(pl.Callback):
    """Notes each epoch under a name of its own."""

    def __init__(self, name: str, told: list) -> None:
        self.name, self.told = name, told

    def on_train_epoch_start(self, trainer, pl_module):
        self.told.append((self.name, trainer.current_epoch))


class Between(pl.Callback):
    """Changes something at the end of the first epoch."""

    def __init__(self, change) -> None:
        self.change = change

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            self.change(trainer, pl_module)


def run(change, *callbacks: pl.Callback, model: pl.LightningModule | None = None) -> None:
    trainer = make_trainer(max_epochs=3, callbacks=[*callbacks, Between(change)])
    trainer.fit(model or Regression(), make_loader(), make_loader())


def test_a_callback_that_is_added_removed_or_replaced() -> None:
    told: list = []
    one, two, three = (Tells(name, told) for name in ("one", "two", "three"))
    run(lambda trainer, _: trainer.callbacks.append(two), one)
    assert told == [("one", 0), ("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    told.clear()
    run(lambda trainer, _: trainer.callbacks.remove(one), one)
    assert told == [("one", 0)]
    told.clear()
    run(lambda trainer, _: trainer.callbacks.__setitem__(0, three), one)
    assert told == [("one", 0), ("three", 1), ("three", 2)]


@pytest.mark.parametrize("on_class", [False, True])
def test_a_method_that_the_module_is_given(on_class, monkeypatch) -> None:
    told: list = []

    class Model(Regression):
        pass

    def change(trainer, module):
        if on_class:
            monkeypatch.setattr(Model, "on_train_epoch_start", lambda self: told.append(self.current_epoch))
        else:
            module.on_train_epoch_start = lambda: told.append(module.current_epoch)

    run(change, model=Model())
    assert told == [1, 2]


def test_a_method_of_a_callback_that_is_replaced() -> None:
    told: list = []
    one = Tells("one", told)

    def change(trainer, module):
        one.on_train_epoch_start = lambda trainer, pl_module: told.append("new")

    run(change, one)
    assert told == [("one", 0), "new", "new"]


def test_a_step_of_validation_that_is_replaced_between_epochs_and_by_the_hook_of_its_start() -> None:
    told: list = []

    class Model(Regression):
        def on_validation_start(self):
            if self.current_epoch == 2:
                self.validation_step = lambda batch, batch_idx: told.append(f"start {batch_idx}")

    def change(trainer, module):
        module.validation_step = lambda batch, batch_idx: told.append(batch_idx)

    trainer = make_trainer(max_epochs=3, callbacks=[Between(change)], limit_val_batches=1)
    trainer.fit(Model(), make_loader(), make_loader())
    assert told == [0, "start 0"]


def test_a_step_of_validation_that_begins_to_pull_its_own_batches() -> None:
    told: list = []

    def change(trainer, module):
        def validation_step(dataloader_iter):
            batch, batch_idx, dataloader_idx = next(dataloader_iter)
            told.append((type(batch), batch_idx, dataloader_idx))

        module.validation_step = validation_step

    trainer = make_trainer(max_epochs=2, callbacks=[Between(change)], limit_val_batches=1)
    trainer.fit(Regression(), make_loader(), make_loader())
    assert [row[1:] for row in told] == [(0, 0)]


def test_a_step_that_pulls_its_own_batches_and_comes_from_the_hook_of_the_start_gets_them_next_time() -> None:
    pulls: list = []

    class Model(Regression):
        def on_validation_start(self):
            self.validation_step = validation_step

    def validation_step(dataloader_iter):
        pulls.append(hasattr(dataloader_iter, "__next__"))
        if pulls[-1]:
            next(dataloader_iter)

    trainer = make_trainer(max_epochs=2, limit_val_batches=1)
    trainer.fit(Model(), make_loader(), make_loader())
    assert pulls[-1]


def test_a_step_that_was_refused_is_refused_again() -> None:
    trainer = make_trainer()
    model = Regression()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no `dataloader_idx` argument"):
            trainer.validate(model, [make_loader(), make_loader()], verbose=False)


def test_a_second_run_calls_the_module_as_its_strategy_wraps_it_then() -> None:
    wrapped: list = []

    class Wraps(SingleDeviceStrategy):
        def wrap_step(self, step_name):
            wrapped.append(step_name)
            return super().wrap_step(step_name)

    trainer = make_trainer(strategy=Wraps("cpu"))
    model = Regression()
    for _ in range(2):
        trainer.validate(model, make_loader(), verbose=False)
    assert wrapped == ["validation_step", "validation_step"]
