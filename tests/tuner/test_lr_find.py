"""`Tuner.lr_find` and `LearningRateFinder`: the losses are those of a loop written by hand, and nothing stays of the search."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from itertools import chain, repeat

import numpy
import pytest
import torch
from searches import Searched, random_states
from support import ManualRegression, Regression, make_loader, make_trainer
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import LearningRateFinder, ModelCheckpoint
from fulmen.callbacks.lr_finder import RateSweep
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.tuner import Tuner
from fulmen.tuner.lr_finder import _LRFinder
from fulmen.utilities.errors import MisconfigurationException


def rates_by_hand(mode: str, begin: float, end: float, count: int) -> list[float]:
    parts = [(step + 1) / count for step in range(1, count)]
    if mode == "linear":
        return [begin, *(begin + part * (end - begin) for part in parts)]
    return [begin, *(begin * (end / begin) ** part for part in parts)]


def sweep_by_hand(
    model: Regression, optimizer: torch.optim.Optimizer, batches: Iterator, rates: list[float], threshold: float | None,
    window: int = 1,
) -> list[float]:  # fmt: skip
    """The search as a loop without a framework."""
    mean = 0.0
    best = math.inf
    losses: list[float] = []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for _ in range(window):
            loss = model.loss(next(batches)) / window
            loss.backward()
        optimizer.step()
        mean = 0.98 * mean + (1 - 0.98) * loss.item()
        losses.append(mean / (1 - 0.98 ** (step + 2)))
        if threshold is not None and step > 0 and losses[-1] > threshold * best:
            break
        best = min(best, losses[-1])
    return losses


CASES = [
    ({}, 1),
    ({"mode": "linear", "num_training": 30}, 1),
    ({"min_lr": 1e-4, "max_lr": 100.0, "num_training": 40}, 1),
    ({"min_lr": 1e-4, "max_lr": 100.0, "num_training": 40, "early_stop_threshold": None}, 1),
    ({"num_training": 25}, 2),
]


@pytest.mark.parametrize(("arguments", "window"), CASES)
def test_the_losses_are_those_of_a_loop_written_by_hand(arguments, window):
    torch.manual_seed(3)
    model = Regression()
    twin = Regression()
    twin.load_state_dict(model.state_dict())
    trainer = make_trainer(accumulate_grad_batches=window)
    curve = Tuner(trainer).lr_find(model, make_loader(24), **arguments)
    count = arguments.get("num_training", 100)
    rates = rates_by_hand(
        arguments.get("mode", "exponential"), arguments.get("min_lr", 1e-8), arguments.get("max_lr", 1), count
    )
    batches = chain.from_iterable(repeat(list(make_loader(24))))
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    threshold = arguments.get("early_stop_threshold", 4.0)
    losses = sweep_by_hand(twin, optimizer, batches, rates, threshold, window)
    assert curve.results == {"lr": rates[: len(losses)], "loss": losses}
    assert curve._total_batch_idx == window * len(losses) - 1
    if "max_lr" in arguments:
        assert (len(losses) < count) is (threshold is not None)  # it diverges


def test_manual_optimization_is_swept_too():
    torch.manual_seed(3)
    model = ManualRegression()
    model.training_step = lambda batch, batch_idx: step_manually(model, batch)
    twin = Regression()
    twin.load_state_dict(model.state_dict())
    curve = Tuner(make_trainer()).lr_find(model, make_loader(24), num_training=20)
    batches = chain.from_iterable(repeat(list(make_loader(24))))
    rates = rates_by_hand("exponential", 1e-8, 1, 20)
    losses = sweep_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=1.0), batches, rates, 4.0)
    assert curve.results == {"lr": rates, "loss": losses}


def step_manually(model: ManualRegression, batch) -> torch.Tensor:
    optimizer = model.optimizers()
    optimizer.zero_grad()
    loss = model.loss(batch)
    model.manual_backward(loss)
    optimizer.step()
    return loss


def test_the_suggestion_is_where_the_loss_falls_fastest(caplog):
    curve = _LRFinder("exponential", lr_min=1e-6, lr_max=1e-1, num_training=20)
    rates = torch.linspace(0, 2 * math.pi, 1000)
    curve.results = {"lr": rates.tolist(), "loss": torch.sin(rates).tolist()}
    assert curve.suggestion(skip_begin=2, skip_end=2) == pytest.approx(math.pi, rel=1e-2)
    curve.results = {"lr": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "loss": [9.0, 8.0, 8.0, 3.0, 2.9, 0.5]}
    assert curve.suggestion(0, 0) == 4.0  # slopes: -1, -0.5, -2.5, -2.55, -1.25, -2.4
    assert curve.suggestion(0, 2) == 4.0
    assert curve.suggestion(4, 0) == 5.0
    curve.results["loss"] = [9.0, 8.0, math.nan, 3.0, 2.9, 2.9]  # passed over: -1, -1.5, -0.9, -0.05, 0
    assert curve.suggestion(0, 0) == 2.0
    for skip_begin, skip_end in ((5, 0), (0, 5), (10, 1)):
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            assert curve.suggestion(skip_begin, skip_end) is None
        assert "Failed to compute suggestion for learning rate: of 6 losses" in caplog.text


def test_a_plot_has_the_curve_and_a_point(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    curve = Tuner(make_trainer()).lr_find(Regression(), make_loader(24), num_training=20)
    figure = curve.plot(suggest=True)
    (axes,) = figure.axes
    line, point = axes.lines
    assert list(line.get_xdata()) == curve.results["lr"] and list(line.get_ydata()) == curve.results["loss"]
    assert (point.get_xdata()[0], point.get_color()) == (curve.suggestion(), "red")
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "Learning rate", "Loss")
    own, own_axes = plt.subplots()
    linear = _LRFinder("linear", 0.0, 1.0, 3)
    linear.results = {"lr": [0.0, 0.5, 1.0], "loss": [3.0, 2.0, 1.0]}
    assert linear.plot(ax=own_axes) is own and own_axes.get_xscale() == "linear"
    plt.close("all")


# ---------------------------------------------------------------------- nothing stays


def test_a_fit_after_the_search_is_that_without_one(tmp_path):
    """Same batches, weights, rows and files; only the learning rate would be another, and is not updated here."""

    def train(search: bool) -> tuple:
        folder = tmp_path / str(search)
        pl.seed_everything(7, verbose=False)
        model = Searched()
        loggers = [CSVLogger(folder, flush_logs_every_n_steps=1), TensorBoardLogger(folder, name="tb")]
        trainer = make_trainer(
            default_root_dir=folder, max_epochs=2, logger=loggers, enable_checkpointing=True, log_every_n_steps=5
        )
        if search:
            curve = Tuner(trainer).lr_find(model, update_attr=False, num_training=50, early_stop_threshold=None)
            assert len(curve.results["lr"]) == 50 and not folder.exists()
            model.seen.clear()
        trainer.fit(model)
        files = sorted(
            os.path.relpath(os.path.join(place, name), folder).partition("events.out")[0]
            for place, _, names in os.walk(folder)
            for name in names
        )
        rows = (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text()
        weights = {name: value.tolist() for name, value in model.state_dict().items()}
        return model.seen, weights, float(model.calls), rows, files, random_states(), trainer.callback_metrics

    assert train(search=True) == train(search=False)


def test_a_finder_in_the_trainer_trains_with_what_it_found():
    def train(lr: float, *callbacks: pl.Callback) -> tuple:
        pl.seed_everything(7, verbose=False)
        model = Searched(lr)
        trainer = make_trainer(max_epochs=2, callbacks=list(callbacks))
        trainer.fit(model)
        return {name: value.tolist() for name, value in model.state_dict().items()}, model, random_states()

    finder = LearningRateFinder(num_training_steps=60, early_stop_threshold=None)
    weights, model, random_after = train(0.1, finder)
    found = finder.optimal_lr.suggestion()
    assert model.lr == found != 0.1
    plain, twin, random_plain = train(found)
    assert weights == plain and random_after == random_plain  # the schedule begins with it, too
    assert model.seen[-20:] == twin.seen


@pytest.mark.parametrize("fails", [False, True])
def test_a_search_between_epochs_leaves_everything_as_it_was(compare_around, fails, tmp_path):
    class Fails(Searched):
        def training_step(self, batch, batch_idx):
            if fails and isinstance(self.trainer.callbacks[0], RateSweep) and batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    Compared = compare_around(LearningRateFinder)

    class AtEpochs(Compared):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch in (0, 2):
                try:
                    self.lr_find(trainer, pl_module)
                except ZeroDivisionError:
                    assert fails

    finders = [AtEpochs(num_training_steps=25, update_attr=False, early_stop_threshold=None)]

    def train(*callbacks: pl.Callback) -> tuple:
        pl.seed_everything(3, verbose=False)
        model = Fails()
        trainer = make_trainer(
            max_epochs=3,
            callbacks=[*callbacks, ModelCheckpoint(tmp_path)],
            num_sanity_val_steps=2,
            enable_checkpointing=True,
        )
        trainer.fit(model)
        return {name: value.tolist() for name, value in model.state_dict().items()}, random_states(), model.seen[-10:]

    assert train(*finders) == train()
    assert len(finders[0].notes) == 2
    for before, after in finders[0].notes:
        assert before == after


def test_a_search_that_fails_leaves_trainer_and_module_as_they_were(tmp_path, trainer):
    class Fails(Searched):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 13:
                raise ZeroDivisionError("thirteen")
            return super().training_step(batch, batch_idx)

    model = Fails()
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    before = random_states()
    callbacks = trainer.callbacks
    with pytest.raises(ZeroDivisionError, match="thirteen"):
        Tuner(trainer).lr_find(model, early_stop_threshold=None)
    assert trainer.callbacks is callbacks and not os.listdir(tmp_path)
    assert (model.lr, trainer.global_step, trainer.current_epoch) == (0.1, 0, 0)
    assert random_states() == before
    assert {name: value.tolist() for name, value in model.state_dict().items()} == weights
    model.seen.clear()
    assert len(Tuner(trainer).lr_find(model, num_training=12).results["lr"]) == 12


@pytest.mark.parametrize("inside", [False, True])
def test_ctrl_c_ends_the_search_with_everything_as_it_was(tmp_path, inside):
    class Pressed(Searched):
        def on_train_batch_end(self, *args):
            if len(self.seen) == 13:
                os.kill(os.getpid(), signal.SIGINT)

    class AtEpoch(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            super().lr_find(trainer, pl_module)

    model = Pressed()
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    finder = AtEpoch(early_stop_threshold=None)
    trainer = make_trainer(default_root_dir=tmp_path, callbacks=[finder] if inside else None)
    before = random_states()
    with pytest.raises(SystemExit) as ended:
        if inside:
            trainer.fit(model)
        else:
            Tuner(trainer).lr_find(model, early_stop_threshold=None)
    assert ended.value.code == 130
    assert model.lr == 0.1 and not os.listdir(tmp_path)
    if inside:  # the search is given up, and the run ends after its next step
        assert (finder.optimal_lr, trainer.global_step, len(model.seen)) == (None, 1, 15)
    else:
        assert {name: value.tolist() for name, value in model.state_dict().items()} == weights
        assert random_states() == before and trainer.callbacks == []


def test_searching_again_gives_the_same_numbers():
    pl.seed_everything(1, verbose=False)
    model = Searched()
    tuner = Tuner(make_trainer())
    first, second, third = (tuner.lr_find(model, num_training=40, max_lr=0.1).results for _ in range(3))
    assert first == second == third and len(first["lr"]) > 10


def test_the_states_that_hooks_keep_are_put_back():
    class KeepsCount(Searched):
        count = 0

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["count"] = self.count
            assert {"state_dict", "optimizer_states", "epoch", "global_step", "callbacks"} <= checkpoint.keys()

        def on_load_checkpoint(self, checkpoint):
            self.count = checkpoint["count"]

    class Data(pl.LightningDataModule):
        given = 0

        def train_dataloader(self):
            return make_loader()

        def on_before_batch_transfer(self, batch, dataloader_idx):
            self.given += 1
            return batch

        def state_dict(self):
            return {"given": self.given}

        def load_state_dict(self, state_dict):
            self.given = state_dict["given"]

    model = KeepsCount()
    data = Data()
    Tuner(make_trainer()).lr_find(model, datamodule=data, num_training=15)
    assert (model.count, data.given, len(model.seen)) == (0, 0, 15)


class CountingLoader:
    """A loader that continues where it was, as some do; `opened` is how often it was begun."""

    def __init__(self) -> None:
        self.batches = list(make_loader())
        self.at = 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("kind", ["own generator", "persistent workers", "stateful"])
def test_the_loader_that_was_passed_gives_what_it_would_have_given(kind):
    def train(search: bool) -> list:
        pl.seed_everything(5, verbose=False)
        model = Searched()
        data = make_loader().dataset
        if kind == "own generator":
            loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(9))
        elif kind == "persistent workers":
            loader = DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True)
        else:
            loader = CountingLoader()
        callbacks = [SearchesAtEpochs(num_training_steps=7, update_attr=False)] if search else []
        make_trainer(max_epochs=2, callbacks=callbacks).fit(model, loader)
        return model.seen[-3:], random_states()

    class SearchesAtEpochs(LearningRateFinder):
        def on_train_epoch_start(self, trainer, pl_module):
            if kind != "stateful":  # there is one place that it can be at
                self.lr_find(trainer, pl_module)

    assert train(search=True) == train(search=False)


def test_what_can_be_read_once_is_warned_of():
    with pytest.warns(UserWarning, match="`generator` are lost for the run after them: it can be read only once"):
        curve = Tuner(make_trainer()).lr_find(Regression(), (batch for batch in list(make_loader(80))))
    assert len(curve.results["lr"]) == 20  # and it ends there


# ---------------------------------------------------------------------- what is set


def test_the_suggestion_goes_where_the_rate_is(trainer):
    class InHparams(Regression):
        """Has `lr` in `hparams` only."""

    class Renamed(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.speed = 0.5

    class Data(pl.LightningDataModule):
        learning_rate = 3.0

        def train_dataloader(self):
            return make_loader()

    tuner = Tuner(trainer)
    arguments = {"train_dataloaders": make_loader(), "num_training": 30}
    model = InHparams()
    curve = tuner.lr_find(model, **arguments)
    assert model.hparams.lr == curve.suggestion() != 0.1
    renamed = Renamed()
    curve = tuner.lr_find(renamed, **arguments, attr_name="speed")
    assert (renamed.speed, renamed.hparams.lr) == (curve.suggestion(), 0.1)
    both = Searched()
    both.learning_rate = 0.7
    curve = tuner.lr_find(both, **arguments)
    assert (both.lr, both.learning_rate) == (curve.suggestion(), 0.7)  # the first name counts
    looked = Searched()
    assert tuner.lr_find(looked, **arguments, update_attr=False).suggestion() is not None
    assert looked.lr == 0.1
    data = Data()
    elsewhere = Searched()
    del elsewhere.lr
    elsewhere.configure_optimizers = lambda: torch.optim.SGD(elsewhere.parameters(), lr=0.1)
    curve = tuner.lr_find(elsewhere, datamodule=data, num_training=30)
    assert data.learning_rate == curve.suggestion()


def test_optimizer_and_schedules_continue_with_it():
    class Scheduled(Searched):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(
                [{"params": [p], "lr": lr} for p, lr in zip(self.parameters(), (1, 2, 3, 4, 5, 6))]
            )
            constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.5)
            return [optimizer], [{"scheduler": constant, "interval": "step"}]

        def on_train_batch_end(self, *args):
            if self.trainer.callbacks and isinstance(self.trainer.callbacks[0], LearningRateFinder):
                self.rates.append({group["lr"] for group in self.optimizers().param_groups})

        rates: list = []

    finder = LearningRateFinder(num_training_steps=40)
    model = Scheduled()
    make_trainer(callbacks=[finder], limit_train_batches=3).fit(model)
    found = finder.optimal_lr.suggestion()
    assert model.rates == [{found}, {0.5 * found}, {0.5 * found}] or model.rates == [{found}] + [{0.5 * found}] * 2


def test_too_few_or_no_finite_losses_leave_the_rate_alone(caplog, trainer):
    class Broken(Searched):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    class Sometimes(Searched):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 5 == 0 else loss

    model = Broken()
    with caplog.at_level(logging.ERROR):
        curve = Tuner(trainer).lr_find(model)
    assert "Failed to compute suggestion for learning rate: of 1 losses, 0 are finite" in caplog.text
    assert model.lr == 0.1 and curve.suggestion() is None and all(map(math.isnan, curve.results["loss"]))
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    short = Searched()
    assert Tuner(trainer).lr_find(short, num_training=1).suggestion() is None and short.lr == 0.1
    curve = Tuner(trainer).lr_find(Sometimes(), num_training=30, early_stop_threshold=None)
    assert [math.isnan(loss) for loss in curve.results["loss"]] == [at % 5 == 0 for at in range(30)]
    assert curve.suggestion() is not None


def test_negative_losses_do_not_end_the_search(trainer):
    class Negative(Searched):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.01 - 5.0

    assert len(Tuner(trainer).lr_find(Negative(), num_training=30).results["lr"]) == 30


def test_limits_of_the_trainer_do_not_shorten_the_search():
    trainer = make_trainer(max_epochs=1, max_steps=2, limit_train_batches=3)
    model = Searched()
    curve = Tuner(trainer).lr_find(model, num_training=20, early_stop_threshold=None)
    assert len(curve.results["lr"]) == 20 and (trainer.max_epochs, trainer.max_steps) == (1, 2)
    open_ended = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    Tuner(open_ended).lr_find(model, num_training=3, update_attr=False)
    assert open_ended.max_epochs is None


def test_a_development_run_skips_the_search(tmp_path):
    trainer = make_trainer(fast_dev_run=True)
    with pytest.warns(UserWarning, match="Skipping learning rate finder since `fast_dev_run` is enabled."):
        assert Tuner(trainer).lr_find(Searched()) is None
    finder = LearningRateFinder()
    trainer = make_trainer(fast_dev_run=True, callbacks=[finder])
    with pytest.warns(UserWarning, match="Skipping learning rate finder"):
        trainer.fit(Searched())
    assert finder.optimal_lr is None and trainer.global_step == 1


def test_a_bar_shows_the_search_where_the_run_has_one(capsys):
    trainer = make_trainer(enable_progress_bar=True)
    Tuner(trainer).lr_find(Searched(), num_training=12, early_stop_threshold=None, update_attr=False)
    assert "Finding best initial lr: 100%" in capsys.readouterr().err
    Tuner(make_trainer()).lr_find(Searched(), num_training=12, update_attr=False)
    assert "Finding" not in capsys.readouterr().err


# ---------------------------------------------------------------------- what is refused


def test_wrong_arguments_are_refused_before_anything_runs(trainer):
    tuner = Tuner(trainer)
    model = Searched()
    loader = make_loader()
    wrong = [
        (
            ValueError,
            "`mode` should be either of .* 'exponentail'.*Did you mean `exponential`",
            {"mode": "exponentail"},
        ),
        (ValueError, "`num_training_steps=0` must be at least 1", {"num_training": 0}),
        (ValueError, "`min_lr=1` and `max_lr=0.1` are no range", {"min_lr": 1, "max_lr": 0.1}),
        (ValueError, "`min_lr=0` and", {"min_lr": 0}),
        (ValueError, "`early_stop_threshold=0` is no factor", {"early_stop_threshold": 0}),
        (MisconfigurationException, "method='fit' is the only valid configuration", {"method": "test"}),
        (
            MisconfigurationException,
            "consider setting `train_dataloaders` and `val_dataloaders`",
            {"dataloaders": loader},
        ),
        (AttributeError, "`attr_name='speed'` was given.*could not find this as a field", {"attr_name": "speed"}),
        (
            MisconfigurationException,
            "received loaders and a datamodule",
            {"train_dataloaders": loader, "datamodule": Data()},
        ),
    ]
    for kind, match, arguments in wrong:
        with pytest.raises(kind, match=match):
            tuner.lr_find(model, **arguments)
    assert model.seen == [] and trainer.callbacks == [] and model.lr == 0.1
    with pytest.raises(TypeError, match=r"Tuner\(trainer=...\)` received"):
        Tuner(model)  # type: ignore[arg-type]


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()


def test_modules_that_cannot_be_searched_are_refused(trainer):
    class NoRate(Regression):
        def __init__(self) -> None:
            super().__init__()
            del self.hparams["lr"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Several(Searched):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    class NoOptimizer(Searched):
        def configure_optimizers(self):
            return None

    class Lazy(Searched):
        def __init__(self) -> None:
            super().__init__()
            self.late = torch.nn.LazyLinear(3)

        def configure_optimizers(self):
            return torch.optim.SGD(self.layers.parameters(), lr=0.1)

    tuner = Tuner(trainer)
    with pytest.raises(AttributeError, match=r"should have one of these fields: \('lr', 'learning_rate'\)"):
        tuner.lr_find(NoRate(), make_loader())
    with pytest.raises(MisconfigurationException, match="returned 2 optimizers.*only works with single optimizer"):
        tuner.lr_find(Several())
    with pytest.raises(MisconfigurationException, match="no learning rate to search for"):
        tuner.lr_find(NoOptimizer())
    with pytest.raises(MisconfigurationException, match=r"'late.weight'.*get their shape in the first step"):
        tuner.lr_find(Lazy())
    configured = make_trainer(callbacks=[LearningRateFinder()])
    with pytest.raises(ValueError, match="Trainer is already configured with a `LearningRateFinder` callback"):
        Tuner(configured).lr_find(Searched())


def test_the_rates_rise_in_order_and_stay_in_their_range():
    for mode in ("linear", "exponential"):
        rates = numpy.array(_LRFinder(mode, 1e-8, 1.0, 100).rates())
        assert len(rates) == 100 and rates[0] == 1e-8 and rates[-1] == 1.0 and (numpy.diff(rates) > 0).all()
    with pytest.raises(ValueError, match="`mode` should be either of"):
        _LRFinder("cubic", 1e-8, 1.0, 100)


def test_the_dataset_may_be_an_iterable_without_length(trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(torch.ones(12, 4), torch.ones(12, 1)))

    curve = Tuner(trainer).lr_find(Searched(), DataLoader(Stream(), batch_size=4), num_training=20)
    assert len(curve.results["loss"]) == 20
