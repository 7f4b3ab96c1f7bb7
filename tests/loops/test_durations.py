"""How long training goes on, how much data it sees, and when it validates."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from math import inf
from typing import Any

import pytest
import torch
from support import Regression, Storyteller, make_loader, make_trainer
from torch.utils.data import DataLoader, IterableDataset

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*validation_step", "ignore:Total length of", "ignore:.*zero-length", "ignore:.*max_epochs",
    "ignore:.*shuffl", "ignore:.*barebones", "ignore:.*log_every_n_steps",
)  # fmt: skip
BATCHES = 4


class Story(Storyteller):
    """Asks to stop after so many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = 0
        self.stop_at: int | None = None

    def training_step(self, batch, batch_idx):
        self.trained += 1
        if self.trained == self.stop_at:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class Unsized(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self):
        return iter([(torch.ones(4), torch.ones(1))] * self.samples)


def unsized(batches: int = BATCHES) -> DataLoader:
    return DataLoader(Unsized(4 * batches), batch_size=4)


def fit(*, val: bool = True, stop_at: int | None = None, loader: Any = None, **arguments: Any):
    """(what happened, the trainer) of a run with 4 training and 2 validation batches."""
    model = Story()
    model.stop_at = stop_at
    trainer = make_trainer(**arguments)
    trainer.fit(model, make_loader(4 * BATCHES) if loader is None else loader, make_loader(8) if val else None)
    return model.story, trainer


# ---------------------------------------------------------------------- where training ends

ENDS = [
    pytest.param({"max_epochs": 2}, "t0 t1 t2 t3 v | t0 t1 t2 t3 v |", 2, 8, id="max_epochs"),
    pytest.param({"max_steps": 2, "max_epochs": None}, "t0 t1 |", 1, 2, id="max_steps in an epoch: no validation"),
    pytest.param({"max_steps": 4, "max_epochs": None}, "t0 t1 t2 t3 v |", 1, 4, id="max_steps at the end of an epoch"),
    pytest.param({"max_steps": 6, "max_epochs": 9}, "t0 t1 t2 t3 v | t0 t1 |", 2, 6, id="max_steps comes first"),
    pytest.param({"max_steps": 60, "max_epochs": 1}, "t0 t1 t2 t3 v |", 1, 4, id="max_epochs comes first"),
    pytest.param({"max_steps": 2, "accumulate_grad_batches": 2, "max_epochs": 9}, "t0 t1 t2 t3 v |", 1, 2, id="window"),
    pytest.param({"max_epochs": -1, "stop_at": 6}, "t0 t1 t2 t3 v | t0 t1 v |", 2, 6, id="should_stop validates"),
    pytest.param({"stop_at": 2, "max_epochs": 9, "min_epochs": 2}, "t0 t1 t2 t3 v | t0 t1 t2 t3 v |", 2, 8, id="min_epochs"),
    pytest.param({"stop_at": 2, "max_epochs": 9, "min_steps": 6}, "t0 t1 t2 t3 v | t0 t1 v |", 2, 6, id="min_steps"),
    pytest.param({"stop_at": 1, "max_epochs": 9, "min_steps": 2}, "t0 t1 t2 t3 v |", 1, 4, id="min_steps implies min_epochs=1"),
    pytest.param({"stop_at": 2, "max_epochs": 9, "min_epochs": 1}, "t0 t1 t2 t3 v |", 1, 4, id="min_epochs=1"),
    pytest.param({"max_epochs": 0}, "", 0, 0, id="no epoch"),
    pytest.param({"max_steps": 0}, "", 0, 0, id="no step"),
    pytest.param({"limit_train_batches": 0, "max_epochs": 2}, "", 0, 0, id="no batch"),
    pytest.param({"max_time": "00:00:00:00"}, "", 0, 0, id="no time"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "story", "epochs", "steps"), ENDS)
def test_where_training_ends(arguments, story, epochs, steps):
    told, trainer = fit(**arguments)
    assert told == story
    assert (trainer.current_epoch, trainer.global_step) == (epochs, steps)
    assert trainer.state.finished and trainer.state.stage is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_epochs": 1}, "`Trainer.fit` stopped: `max_epochs=1` reached."),
        ({"max_steps": 2}, "`Trainer.fit` stopped: `max_steps=2` reached."),
        ({"stop_at": 1, "max_epochs": 3, "min_epochs": 2}, "The trainer was signaled to stop, but `min_epochs=2`"),
    ],
)
def test_the_reason_is_said(caplog, arguments, message):
    caplog.set_level(logging.INFO)
    for name in ("fulmen", "lightning.pytorch"):
        logging.getLogger(name).propagate = True
    fit(**arguments)
    assert sum(message in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("max_time", ["00:00:00:01", timedelta(seconds=1), {"seconds": 1}])
def test_max_time_ends_training_between_two_batches(max_time):
    class Slow(Story):
        def training_step(self, batch, batch_idx):
            time.sleep(0.4)
            return super().training_step(batch, batch_idx)

    model = Slow()
    trainer = make_trainer(max_time=max_time, max_epochs=None)
    trainer.fit(model, make_loader(4 * BATCHES))
    assert 1 <= trainer.global_step < BATCHES


def test_should_stop_is_forgotten_by_the_next_fit():
    model = Story()
    model.stop_at = 2
    trainer = make_trainer(max_epochs=3)
    trainer.fit(model, make_loader(16))
    assert model.trained == 2
    trainer.fit(model, make_loader(16))
    assert model.trained == 2 + 8
    assert trainer.current_epoch == 3


def test_max_epochs_left_open():
    with pytest.warns(UserWarning, match="1000"):
        _, trainer = fit(max_epochs=None, limit_train_batches=1, stop_at=1)
    assert trainer.max_epochs == 1000
    for arguments in ({"max_steps": 1}, {"max_time": {"hours": 1}, "stop_at": 1}):
        _, trainer = fit(max_epochs=None, **arguments)
        assert trainer.max_epochs == -1


def test_more_epochs_may_be_asked_for_while_training():
    class Goes(Story):
        def on_train_epoch_start(self):
            if self.current_epoch == 0:
                self.trainer.fit_loop.max_epochs = 2

    model = Goes()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, make_loader(4 * BATCHES))
    assert trainer.current_epoch == 2


def test_setup_and_sanity_check_happen_even_if_there_is_nothing_to_train():
    for arguments in ({"max_epochs": 0}, {"limit_train_batches": 0}):
        events = []

        class Model(Story):
            def setup(self, stage, events=events):
                events.append("setup")

            def on_train_start(self, events=events):
                events.append("train")

            def teardown(self, stage, events=events):
                events.append("teardown")

        model = Model()
        trainer = make_trainer(**{"max_epochs": 1, "num_sanity_val_steps": 1, **arguments})
        trainer.fit(model, make_loader(), make_loader())
        assert events == ["setup", "teardown"]
        assert model.story == "s"


# ---------------------------------------------------------------------- when it validates

SCHEDULES = [
    pytest.param({}, "t0 t1 t2 t3 v | t0 t1 t2 t3 v |", id="once per epoch"),
    pytest.param({"val_check_interval": 1.0}, "t0 t1 t2 t3 v | t0 t1 t2 t3 v |", id="1.0"),
    pytest.param({"val_check_interval": 1}, "t0 v t1 v t2 v t3 v | t0 v t1 v t2 v t3 v |", id="1"),
    pytest.param({"val_check_interval": 2}, "t0 t1 v t2 t3 v | t0 t1 v t2 t3 v |", id="2"),
    pytest.param({"val_check_interval": 3}, "t0 t1 t2 v t3 | t0 t1 t2 v t3 |", id="3"),
    pytest.param({"val_check_interval": 0.5}, "t0 t1 v t2 t3 v | t0 t1 v t2 t3 v |", id="0.5"),
    pytest.param({"val_check_interval": 0.8}, "t0 t1 t2 v t3 | t0 t1 t2 v t3 |", id="0.8 is rounded down"),
    pytest.param({"val_check_interval": 0.1}, "t0 v t1 v t2 v t3 v | t0 v t1 v t2 v t3 v |", id="0.1 is at least one"),
    pytest.param({"check_val_every_n_epoch": 2}, "t0 t1 t2 t3 | t0 t1 t2 t3 v |", id="every second epoch"),
    pytest.param(
        {"check_val_every_n_epoch": None, "val_check_interval": 3}, "t0 t1 t2 v t3 | t0 t1 v t2 t3 |", id="across epochs"
    ),
    pytest.param({"check_val_every_n_epoch": None, "val_check_interval": 5}, "t0 t1 t2 t3 | t0 v t1 t2 t3 |", id="5 > 4"),
    pytest.param({"limit_val_batches": 0}, "t0 t1 t2 t3 | t0 t1 t2 t3 |", id="never"),
    pytest.param({"val_check_interval": 2, "accumulate_grad_batches": 4}, "t0 t1 v t2 t3 v | t0 t1 v t2 t3 v |", id="batches, not steps"),
    pytest.param({"limit_train_batches": 2}, "t0 t1 v | t0 t1 v |", id="a shorter epoch"),
    pytest.param({"limit_train_batches": 0.5, "val_check_interval": 0.5}, "t0 v t1 v | t0 v t1 v |", id="half of a half"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "story"), SCHEDULES)
def test_when_it_validates(arguments, story):
    assert fit(max_epochs=2, **arguments)[0] == story


@pytest.mark.parametrize(
    ("arguments", "story"),
    [
        ({}, "t0 t1 t2 t3 v | t0 t1 t2 t3 v |"),
        ({"val_check_interval": 2}, "t0 t1 v t2 t3 v | t0 t1 v t2 t3 v |"),
        ({"val_check_interval": 3}, "t0 t1 t2 v t3 | t0 t1 t2 v t3 |"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, "t0 t1 t2 v t3 | t0 t1 v t2 t3 |"),
    ],
)
def test_when_it_validates_if_the_length_is_not_known(arguments, story):
    told, trainer = fit(max_epochs=2, loader=unsized(), **arguments)
    assert told == story
    assert trainer.num_training_batches == inf


def test_a_limit_is_the_length_of_a_loader_without_one():
    told, trainer = fit(loader=unsized(), limit_train_batches=3, val_check_interval=0.5)
    assert told == "t0 v t1 v t2 v |"
    assert trainer.num_training_batches == 3


def test_validation_by_the_clock():
    """Every 0.2 seconds since training began or the last validation ended, looked at after each batch."""

    class Slow(Story):
        def training_step(self, batch, batch_idx):
            time.sleep(0.25 if batch_idx in (1, 3) else 0.0)
            return super().training_step(batch, batch_idx)

    model = Slow()
    trainer = make_trainer(val_check_interval=timedelta(seconds=0.2), max_epochs=2)
    trainer.fit(model, make_loader(16), make_loader(4))
    assert model.story == "t0 t1 v t2 t3 v | t0 t1 v t2 t3 v |"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"val_check_interval": 5}, ValueError),
        ({"val_check_interval": 0.5, "loader": unsized()}, MisconfigurationException),
        ({"limit_train_batches": 0.5, "loader": unsized()}, MisconfigurationException),
        ({"limit_train_batches": 0.1}, MisconfigurationException),
        ({"limit_val_batches": 0.1}, MisconfigurationException),
    ],
    ids=["too long", "fraction of what", "limit of what", "no train batch", "no val batch"],
)
def test_schedules_that_cannot_be(arguments, error):
    with pytest.raises(error):
        fit(**arguments)


def test_a_long_interval_is_fine_without_validation():
    assert fit(val_check_interval=5, limit_val_batches=0)[0] == "t0 t1 t2 t3 |"


# ---------------------------------------------------------------------- sanity check


@pytest.mark.parametrize(("steps", "batches"), [(0, 0), (1, 1), (2, 2), (3, 2), (-1, 2)])
def test_the_sanity_check_looks_at_a_few_batches_of_each_loader(steps, batches):
    seen = []

    class Model(Story):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if self.trainer.sanity_checking:
                seen.append((dataloader_idx, batch_idx))

    trainer = make_trainer(num_sanity_val_steps=steps)
    trainer.fit(Model(), make_loader(), [make_loader(8), make_loader(8)])
    assert seen == [(loader, batch) for loader in range(2) for batch in range(batches)]
    assert trainer.num_val_batches == [2, 2]
    assert trainer.num_sanity_val_batches == [min(2, inf if steps == -1 else steps)] * 2


def test_the_sanity_check_draws_no_random_numbers():
    def drawn(steps):
        torch.manual_seed(0)
        model = Story()
        draws = []
        model.on_train_start = lambda: draws.append(torch.rand(()))
        model.on_validation_batch_start = lambda *args, **kwargs: torch.rand(3)
        make_trainer(num_sanity_val_steps=steps).fit(model, make_loader(), make_loader(8, shuffle=True))
        return draws[0]

    assert torch.equal(drawn(0), drawn(2))


# ---------------------------------------------------------------------- how much data


@pytest.mark.parametrize(
    ("limit", "seen"), [(1, 1), (3, 3), (99, 4), (1.0, 4), (0.5, 2), (0.3, 1), (2.0, 2), (None, 4)]
)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_limits(verb, limit, seen):
    counted = []

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            counted.append(batch_idx)
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            counted.append(batch_idx)

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            counted.append(batch_idx)
            return batch_idx

    name = {"fit": "train", "validate": "val"}.get(verb, verb)
    trainer = make_trainer(**{f"limit_{name}_batches": limit})
    getattr(trainer, verb)(Model(), make_loader(16))
    assert counted == list(range(seen))


def test_limits_may_be_changed_between_runs():
    trainer = make_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(Story(), make_loader(16))
    trainer.limit_train_batches = 3
    trainer.fit_loop.max_epochs = 2
    model = Story()
    trainer.fit(model, make_loader(16))
    assert model.story == "t0 t1 t2 |"


@pytest.mark.parametrize(("amount", "batches"), [(1, 1), (2, 2), (0.5, 2)])
def test_overfitting_takes_the_same_first_batches_in_every_epoch(amount, batches):
    seen: dict[str, list[torch.Tensor]] = {"train": [], "val": []}

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            seen["train"].append(batch[0])
            return self.loss(batch)

        def validation_step(self, batch, batch_idx):
            seen["val"].append(batch[0])

    train, val = make_loader(16, shuffle=True), make_loader(16, seed=2)
    trainer = make_trainer(overfit_batches=amount, max_epochs=2)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(Model(), train, val)
    for kind, loader in (("train", make_loader(16)), ("val", val)):
        first = [batch[0] for batch in loader][:batches]
        assert len(seen[kind]) == 2 * batches
        assert all(torch.equal(a, b) for a, b in zip(seen[kind], first * 2)), kind


@pytest.mark.parametrize(("value", "batches"), [(True, 1), (1, 1), (3, 3)])
def test_fast_dev_run_is_a_short_run_without_traces(tmp_path, value, batches):
    from fulmen.callbacks import EarlyStopping, ModelCheckpoint
    from fulmen.loggers import CSVLogger

    model = Story()
    trainer = pl.Trainer(
        fast_dev_run=value, logger=CSVLogger(tmp_path), max_epochs=7, val_check_interval=2, accelerator="cpu",
        callbacks=[ModelCheckpoint(monitor="val_loss"), EarlyStopping("nope")], default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model, make_loader(16), make_loader(16))
    assert model.story == " ".join(f"t{i}" for i in range(batches)) + " v |"
    assert trainer.fast_dev_run == value and trainer.max_steps == batches and trainer.max_epochs == 1
    assert type(trainer.logger).__name__ == "DummyLogger"
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.csv"))
    assert len(trainer.predict(model, make_loader(16))) == batches


def test_barebones_trains_and_validates_and_nothing_else(tmp_path):
    model = Story()
    trainer = pl.Trainer(barebones=True, max_epochs=2, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(model, make_loader(16), make_loader(8))
    assert model.story == "t0 t1 t2 t3 v | t0 t1 t2 t3 v |"
    assert trainer.callbacks == [] and trainer.loggers == [] and trainer.callback_metrics == {}
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------- reloading


@pytest.mark.parametrize(
    ("every", "epochs", "train", "val"),
    [(0, 4, [0], [0]), (1, 4, [0, 1, 2, 3], [0, 1, 2, 3]), (2, 5, [0, 2, 4], [0, 2, 4]), (3, 5, [0, 3], [0, 3])],
)
def test_loaders_are_asked_for_again_every_so_many_epochs(every, epochs, train, val):
    asked: dict[str, list[int]] = {"train": [], "val": []}

    class Model(Story):
        def train_dataloader(self):
            asked["train"].append(self.current_epoch)
            return make_loader(4 + 4 * self.current_epoch)

        def val_dataloader(self):
            asked["val"].append(self.current_epoch)
            return make_loader(4)

    model = Model()
    trainer = make_trainer(reload_dataloaders_every_n_epochs=every, max_epochs=epochs)
    trainer.fit(model)
    assert asked == {"train": train, "val": val}
    sizes = [1 + max(e for e in train if e <= epoch) for epoch in range(epochs)]
    assert model.story == " ".join(" ".join(f"t{i}" for i in range(size)) + " v |" for size in sizes)


def test_the_sanity_check_counts_as_the_first_load():
    asked = []

    class Model(Story):
        def val_dataloader(self):
            asked.append((self.current_epoch, self.trainer.sanity_checking))
            return make_loader(4)

    trainer = make_trainer(reload_dataloaders_every_n_epochs=1, max_epochs=3, num_sanity_val_steps=1)
    trainer.fit(Model(), make_loader())
    assert asked == [(0, True), (1, False), (2, False)]


@pytest.mark.parametrize(
    ("validates_every", "reloads_every", "expected"),
    [
        (1, 2, [(0, True), (2, False), (4, False)]),
        (2, 2, [(0, True), (1, False), (3, False), (5, False)]),
        (2, 3, [(0, True), (1, False), (5, False)]),
        (3, 3, [(0, True), (2, False), (5, False)]),
    ],
)
def test_the_first_validation_reloads_what_the_sanity_check_loaded_if_not_every_epoch_validates(
    validates_every, reloads_every, expected
):
    asked = []

    class Model(Regression):
        def val_dataloader(self):
            asked.append((self.current_epoch, self.trainer.sanity_checking))
            return make_loader(4)

    counts = {"check_val_every_n_epoch": validates_every, "reload_dataloaders_every_n_epochs": reloads_every}
    make_trainer(max_epochs=6, num_sanity_val_steps=1, **counts).fit(Model(), make_loader(4))
    assert asked == expected


@pytest.mark.parametrize("schedule", [{0: 2}, {0: 1, 2: 4}, {1: 3}])
@pytest.mark.parametrize("max_steps", [-1, 7])
def test_estimated_stepping_batches_with_a_scheduled_accumulation_are_those_that_are_made(schedule, max_steps):
    found = []

    class Model(Regression):
        def configure_optimizers(self):
            found.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    schedules = [pl.callbacks.GradientAccumulationScheduler(schedule)]
    trainer = make_trainer(max_epochs=5, max_steps=max_steps, callbacks=schedules, limit_val_batches=0)
    trainer.fit(Model(), make_loader(16))
    assert found == [trainer.global_step]


# ---------------------------------------------------------------------- samplers


def test_samplers_are_told_the_epoch():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    dataset = make_loader().dataset
    fit(loader=DataLoader(dataset, batch_size=4, sampler=Sampler(dataset)), max_epochs=3)
    assert list(dict.fromkeys(Sampler.epochs)) == [0, 1, 2]


# ---------------------------------------------------------------------- what is known about the length


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": None, "max_steps": 5}, 5),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_epochs": 3, "max_steps": 50}, 12),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.25}, 3),
        ({"max_epochs": -1, "max_steps": -1}, inf),
    ],
)
def test_estimated_stepping_batches_inside_configure_optimizers(arguments, expected):
    found = []

    class Model(Story):
        stop_at = 1

        def configure_optimizers(self):
            found.append(self.trainer.num_training_batches)
            found.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

        def on_train_batch_start(self, batch, batch_idx):
            self.trainer.should_stop = True

    trainer = make_trainer(**arguments)
    trainer.fit(Model(), make_loader(16))
    assert found == [inf, expected]


def test_a_loader_loaded_for_the_estimate_is_not_asked_for_again():
    asked = []

    class Model(Story):
        def train_dataloader(self):
            asked.append(1)
            return make_loader(16)

        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 4
            return super().configure_optimizers()

    make_trainer().fit(Model())
    assert asked == [1]


def test_is_last_batch_is_true_in_the_last_batch_only():
    seen = []

    class Model(Story):
        def training_step(self, batch, batch_idx):
            seen.append(self.trainer.is_last_batch)
            return super().training_step(batch, batch_idx)

    for loader in (make_loader(12), unsized(3)):
        seen.clear()
        make_trainer(max_epochs=2).fit(Model(), loader)
        assert seen == [False, False, True] * 2
