"""What `self.log` shows, under which names, where, and when."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen.loggers import CSVLogger
from fulmen.loggers.logger import Logger
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:.*log_every_n_steps")


class Records(Logger):
    """A logger that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []
        self.saves = 0

    name, version = "records", 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None:
        self.saves += 1

    def with_key(self, key: str) -> list[tuple[int | None, float]]:
        return [(step, metrics[key]) for step, metrics in self.calls if key in metrics]


class Logs(pl.LightningModule):
    """Trains on nothing; every hook a test names runs a function of the test: `Logs(training_step=lambda self: ...)`."""

    def __init__(self, **hooks: Callable[..., None]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.hooks = hooks
        self.batch_idx = 0

    def run(self, hook: str, batch_idx: int = 0) -> None:
        self.batch_idx = batch_idx
        if hook in self.hooks:
            self.hooks[hook](self)

    def training_step(self, batch, batch_idx):
        self.run("training_step", batch_idx)
        return self.layer(batch[0]).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.dataloader_idx = dataloader_idx
        self.run("validation_step", batch_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.dataloader_idx = dataloader_idx
        self.run("test_step", batch_idx)

    def predict_step(self, batch, batch_idx):
        self.run("predict_step", batch_idx)
        return batch[0]

    def configure_optimizers(self):
        self.run("configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _hook(name: str):
    def hook(self, *args: Any, **kwargs: Any) -> None:
        self.run(name, next((a for a in args if isinstance(a, int)), 0))

    return hook


OTHER_HOOKS = (
    "setup", "teardown", "prepare_data", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad",
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_validation_start", "on_validation_end",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
    "on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end", "on_test_batch_start",
    "on_test_batch_end", "on_predict_start", "on_predict_end", "on_predict_epoch_start", "on_predict_epoch_end",
    "on_predict_batch_start", "on_predict_batch_end",
)  # fmt: skip
for name in OTHER_HOOKS:
    setattr(Logs, name, _hook(name))


def fit(model: pl.LightningModule, *loaders: Any, **arguments: Any) -> pl.Trainer:
    """Four training batches of 4 samples; validation loaders if they are given."""
    trainer = make_trainer(**{"log_every_n_steps": 1, "limit_val_batches": 1.0 if loaders else 0, **arguments})
    trainer.fit(model, make_loader(16), list(loaders) if len(loaders) > 1 else loaders[0] if loaders else None)
    return trainer


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: pytest.approx(float(value)) for name, value in metrics.items()}


# ---------------------------------------------------------------------- names

VALUES = (1.0, 2.0, 3.0, 6.0)  # of the four batches; the mean is 3

# keyword arguments, keys that loggers see, callback_metrics at the end
IN_TRAINING_STEP = [
    pytest.param({}, {"a": 6.0}, {"a": 6.0}, id="defaults"),
    pytest.param({"on_step": True}, {"a": 6.0}, {"a": 6.0}, id="on_step"),
    pytest.param({"on_step": False, "on_epoch": True}, {"a": 3.0}, {"a": 3.0}, id="on_epoch only"),
    pytest.param(
        {"on_epoch": True}, {"a_step": 6.0, "a_epoch": 3.0}, {"a": 3.0, "a_step": 6.0, "a_epoch": 3.0}, id="both"
    ),
    pytest.param({"logger": False}, {}, {"a": 6.0}, id="not to loggers"),
    pytest.param({"prog_bar": True}, {"a": 6.0}, {"a": 6.0}, id="progress bar"),
    pytest.param({"on_step": False, "on_epoch": True, "reduce_fx": "sum"}, {"a": 12.0}, {"a": 12.0}, id="sum"),
    pytest.param({"on_step": False, "on_epoch": True, "reduce_fx": "max"}, {"a": 6.0}, {"a": 6.0}, id="max"),
    pytest.param({"on_step": False, "on_epoch": True, "reduce_fx": "MIN"}, {"a": 1.0}, {"a": 1.0}, id="min"),
    pytest.param({"on_step": False, "on_epoch": True, "reduce_fx": torch.mean}, {"a": 3.0}, {"a": 3.0}, id="mean"),
    pytest.param({"on_step": False, "on_epoch": True, "reduce_fx": sum}, {"a": 12.0}, {"a": 12.0}, id="function"),
]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize(("options", "logged", "callback"), IN_TRAINING_STEP)
def test_names_and_values_of_a_training_step(options, logged, callback, as_tensor):
    def step(self):
        value = VALUES[self.batch_idx]
        self.log("a", torch.tensor(value) if as_tensor else value, **options)

    logger = Records()
    trainer = fit(Logs(training_step=step), logger=logger)
    assert trainer.callback_metrics == numbers(callback)
    assert trainer.logged_metrics == numbers(logged)
    assert all(isinstance(value, torch.Tensor) for value in trainer.callback_metrics.values())
    seen = {key: value for _, metrics in logger.calls for key, value in metrics.items() if key != "epoch"}
    assert seen == numbers(logged)
    bar = numbers(logged) if options.get("prog_bar") else {}
    assert trainer.progress_bar_metrics == bar
    assert all(type(value) is float for value in trainer.progress_bar_metrics.values())


def test_the_worked_example_of_a_whole_epoch():
    model = Logs(
        training_step=lambda self: (
            self.log("train_loss", VALUES[self.batch_idx]),
            self.log("both", VALUES[self.batch_idx], on_step=True, on_epoch=True, prog_bar=True),
        ),
        on_train_epoch_end=lambda self: self.log("ep", 5.0),
        validation_step=lambda self: (self.log("val_loss", 0.5), self.log("val/acc", 0.25)),
    )
    trainer = fit(model, make_loader(), logger=Records())
    assert set(trainer.callback_metrics) == {
        "train_loss", "both", "both_step", "val_loss", "val/acc", "both_epoch", "ep",
    }  # fmt: skip
    assert set(trainer.logged_metrics) == {"train_loss", "both_step", "val_loss", "val/acc", "both_epoch", "ep"}
    assert trainer.progress_bar_metrics == {"both_step": 6.0, "both_epoch": 3.0}
    assert trainer.callback_metrics["both"] == 3.0


def test_the_plain_name_holds_the_step_value_until_the_epoch_is_over():
    seen = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    model = Logs(training_step=lambda self: self.log("a", VALUES[self.batch_idx], on_epoch=True))
    trainer = fit(model, callbacks=[Reads()])
    assert seen == [{"a": value, "a_step": value} for value in VALUES]
    assert trainer.callback_metrics["a"] == 3.0


# ---------------------------------------------------------------------- several evaluation loaders


IN_VALIDATION = [
    pytest.param("validation_step", 1, {}, {"a"}, {"a"}, id="one loader"),
    pytest.param(
        "validation_step", 2, {}, {"a/dataloader_idx_0", "a/dataloader_idx_1"},
        {"a/dataloader_idx_0", "a/dataloader_idx_1"}, id="two loaders",
    ),
    pytest.param(
        "validation_step", 2, {"on_step": True, "on_epoch": True},
        {"a_step/dataloader_idx_0", "a_step/dataloader_idx_1", "a_epoch/dataloader_idx_0", "a_epoch/dataloader_idx_1"},
        {"a_epoch/dataloader_idx_0", "a_epoch/dataloader_idx_1", "a/dataloader_idx_0", "a/dataloader_idx_1"},
        id="two loaders, both",
    ),
    pytest.param("on_validation_epoch_end", 2, {}, {"a"}, {"a"}, id="epoch end"),
    pytest.param("on_validation_batch_end", 1, {}, {"a"}, {"a"}, id="batch end"),
    pytest.param("on_validation_epoch_start", 2, {}, {"a"}, {"a"}, id="epoch start"),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "count", "options", "logged", "callback"), IN_VALIDATION)
def test_names_of_validation(hook, count, options, logged, callback):
    logger = Records()
    model = Logs(**{hook: lambda self: self.log("a", 1.0, **options)})
    trainer = fit(model, *[make_loader(8)] * count, logger=logger)
    assert {key for _, metrics in logger.calls for key in metrics} - {"epoch"} == logged
    assert set(trainer.logged_metrics) == logged
    assert set(trainer.callback_metrics) == callback


def test_each_loader_has_its_own_mean_and_its_own_dict_of_results(capsys):
    model = Logs(
        test_step=lambda self: self.log("a", 10.0 * self.dataloader_idx + self.batch_idx),
        on_test_epoch_end=lambda self: self.log("all", 7.0),
    )
    results = make_trainer().test(model, [make_loader(8), make_loader(12)])
    assert results == [{"a/dataloader_idx_0": 0.5, "all": 7.0}, {"a/dataloader_idx_1": 11.0, "all": 7.0}]
    printed = capsys.readouterr().out
    assert "DataLoader 0" in printed and "DataLoader 1" in printed and "11.0" in printed


def test_the_user_may_make_names_unique():
    def step(self):
        self.log(f"a{self.dataloader_idx}", float(self.dataloader_idx), add_dataloader_idx=False)

    results = make_trainer().validate(Logs(validation_step=step), [make_loader(8), make_loader(4)], verbose=False)
    assert results == [{"a0": 0.0}, {"a1": 1.0}]


def test_one_name_for_two_loaders_is_an_error():
    step = lambda self: self.log("a", 1.0, add_dataloader_idx=False)  # noqa: E731
    with pytest.raises(MisconfigurationException):
        make_trainer().validate(Logs(validation_step=step), [make_loader(8), make_loader(4)], verbose=False)


# ---------------------------------------------------------------------- reduction over the epoch


def test_the_mean_is_weighted_by_the_batch_size_found_in_the_batch():
    """16 samples in batches of 6, 6 and 4."""
    model = Logs(training_step=lambda self: self.log("a", float(self.batch_idx), on_step=False, on_epoch=True))
    trainer = make_trainer()
    trainer.fit(model, make_loader(16, batch_size=6))
    assert trainer.callback_metrics["a"] == pytest.approx((0 * 6 + 1 * 6 + 2 * 4) / 16)


def test_the_batch_size_may_be_given():
    def step(self):
        if self.batch_idx < 2:
            self.log("a", (1.0, 2.0)[self.batch_idx], on_step=False, on_epoch=True, batch_size=(1, 3)[self.batch_idx])

    assert fit(Logs(training_step=step)).callback_metrics["a"] == 1.75


def test_the_batch_size_is_the_first_one_found_depth_first():
    class Words(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"text": "abc", "pair": [torch.tensor(0.0), torch.ones(2)], "x": torch.ones(4)}

    class Model(Logs):
        def training_step(self, batch, batch_idx):
            self.log("a", float(batch_idx), on_step=False, on_epoch=True)
            return self.layer(batch["x"]).mean()

    trainer = make_trainer()
    trainer.fit(Model(), DataLoader(Words(), batch_size=3))
    assert trainer.callback_metrics["a"] == pytest.approx((0 * 3 + 1 * 2) / 5)


class Opaque:
    """A batch that holds no tensor."""

    def __init__(self, x) -> None:
        self.x = x

    def to(self, device):
        return self


def opaque_loader():
    return DataLoader(
        make_loader(8).dataset, batch_size=4, collate_fn=lambda rows: Opaque(torch.stack([r[0] for r in rows]))
    )


class OpaqueModel(Logs):
    def training_step(self, batch, batch_idx):
        self.run("training_step", batch_idx)
        return self.layer(batch.x).mean()


def test_a_batch_without_tensors_needs_no_size_unless_a_mean_asks_for_it():
    model = OpaqueModel(
        training_step=lambda self: (
            self.log("step", 1.0),
            self.log("sum", 1.0, on_step=False, on_epoch=True, reduce_fx="sum"),
            self.log("given", 1.0, on_step=False, on_epoch=True, batch_size=4),
        )
    )
    trainer = make_trainer()
    trainer.fit(model, opaque_loader())
    assert {k: float(v) for k, v in trainer.callback_metrics.items()} == {"step": 1.0, "sum": 2.0, "given": 1.0}


def test_a_batch_without_tensors_and_a_mean_is_an_error_that_asks_for_the_size():
    model = OpaqueModel(training_step=lambda self: self.log("a", 1.0, on_epoch=True))
    with pytest.raises(MisconfigurationException, match="batch_size"):
        make_trainer().fit(model, opaque_loader())


def test_a_name_logged_twice_in_one_step_shows_the_last_and_averages_both():
    def step(self):
        self.log("a", 1.0, on_step=True, on_epoch=True)
        self.log("a", 3.0, on_step=True, on_epoch=True)

    metrics = fit(Logs(training_step=step)).callback_metrics
    assert metrics["a_step"] == 3.0
    assert metrics["a_epoch"] == 2.0


def test_a_value_logged_in_some_batches_only_is_averaged_over_those():
    def step(self):
        if self.batch_idx % 2:
            self.log("a", float(self.batch_idx), on_step=False, on_epoch=True)

    assert fit(Logs(training_step=step)).callback_metrics["a"] == 2.0


def test_every_epoch_starts_from_nothing():
    seen = []
    model = Logs(
        training_step=lambda self: self.log(
            "a", float(self.batch_idx + 10 * self.current_epoch), on_step=False, on_epoch=True
        ),
        on_train_epoch_start=lambda self: self.log("start", float(self.current_epoch)),
    )

    class Reads(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer = fit(model, max_epochs=3, callbacks=[Reads()])
    assert trainer.callback_metrics == {"a": 21.5, "start": 2.0}
    assert seen == [{}, {"a": 1.5, "start": 0.0}, {"a": 11.5, "start": 1.0}]


def test_values_are_kept_as_they_were_when_they_were_logged():
    value = torch.zeros(())

    def step(self):
        value.add_(1)
        self.log("a", value, on_step=True, on_epoch=True)
        value.add_(100)
        value.sub_(100)

    metrics = fit(Logs(training_step=step)).callback_metrics
    value.fill_(50)
    assert metrics["a_step"] == 4.0
    assert metrics["a_epoch"] == 2.5


def test_a_logged_loss_does_not_keep_the_graph():
    class Model(Logs):
        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).mean()
            self.log("a", loss, on_epoch=True)
            return loss

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            assert not any(value.requires_grad for value in trainer.callback_metrics.values())

    fit(Model(), callbacks=[Reads()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_are_added_up_in_long_ones(dtype):
    """4096 + 1 is 4096 in float16: a mean that accumulated there would stand still."""
    model = Logs(
        training_step=lambda self: self.log(
            "a", torch.tensor((4096.0, 1.0, 1.0, 1.0)[self.batch_idx], dtype=dtype), on_step=False, on_epoch=True,
            reduce_fx="sum",
        )
    )  # fmt: skip
    assert fit(model).callback_metrics["a"] == 4099.0


def test_float32_is_added_up_in_float64():
    """In float32, 2**24 + 1 is 2**24."""
    values = torch.tensor([2.0**24, 1.0, 1.0, 2.0])
    options = {"on_step": False, "on_epoch": True, "reduce_fx": "sum"}
    trainer = fit(Logs(training_step=lambda self: self.log("a", values[self.batch_idx], **options)))
    assert trainer.callback_metrics["a"] == 2.0**24 + 4 and trainer.callback_metrics["a"].dtype == torch.float32


@pytest.mark.parametrize(("reduce_fx", "expected"), [("mean", 1025.0), ("sum", 4100.0), ("max", 4096.0)])
def test_numbers_and_tensors_under_one_name_keep_their_digits(reduce_fx, expected):
    def step(self):
        value = (4.0, 4096.0, -1.0, 1.0)[self.batch_idx]
        value = torch.tensor(value, dtype=torch.bfloat16) if self.batch_idx else value
        self.log("a", value, on_step=False, on_epoch=True, reduce_fx=reduce_fx)

    assert fit(Logs(training_step=step)).callback_metrics["a"] == expected


@pytest.mark.filterwarnings("ignore:.*integer", "ignore:.*floating point", "ignore:.*converted")
def test_integers_and_booleans_become_floats():
    model = Logs(
        training_step=lambda self: (
            self.log("int", self.batch_idx, on_step=False, on_epoch=True),
            self.log("long", torch.tensor(self.batch_idx), on_step=False, on_epoch=True),
            self.log("bool", self.batch_idx > 1, on_step=False, on_epoch=True),
            self.log("one element", torch.tensor([[2.0]]), on_step=True),
        )
    )
    metrics = fit(model).callback_metrics
    assert metrics == {"int": 1.5, "long": 1.5, "bool": 0.5, "one element": 2.0}
    assert all(value.is_floating_point() and value.dim() == 0 for value in metrics.values())


# ---------------------------------------------------------------------- torchmetrics


class WithMetrics(Logs):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch, batch_idx):
        self.mean(float(batch_idx % 2))
        self.log("m", self.mean, **self.options)
        return self.layer(batch[0]).mean()


def test_a_metric_object_shows_its_batch_value_and_computes_at_the_end_of_each_epoch():
    epochs = []

    class Reads(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            epochs.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    model = WithMetrics(on_step=True, on_epoch=True)
    trainer = fit(model, max_epochs=3, callbacks=[Reads()])
    assert epochs[1:] == [{"m_step": 1.0, "m": 0.5, "m_epoch": 0.5}] * 2
    assert trainer.callback_metrics == {"m_step": 1.0, "m": 0.5, "m_epoch": 0.5}
    assert model.mean.update_count == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, {"m": 1.0}), ({"on_step": False, "on_epoch": True}, {"m": 0.5})],
    ids=["on_step", "on_epoch"],
)
def test_a_metric_object_follows_on_step_and_on_epoch(options, expected):
    assert fit(WithMetrics(**options)).callback_metrics == expected


def test_a_computed_value_is_a_plain_value_and_the_metric_stays_as_it_is():
    class Model(WithMetrics):
        def training_step(self, batch, batch_idx):
            self.mean.update(float(batch_idx))
            return self.layer(batch[0]).mean()

        def on_train_epoch_end(self):
            self.log("m", self.mean.compute())

    model = Model()
    assert fit(model, max_epochs=2).callback_metrics["m"] == 1.5
    assert model.mean.update_count == 8


def test_a_collection_is_logged_by_its_members_with_their_prefix():
    class Model(Logs):
        def __init__(self):
            super().__init__()
            self.metrics = torchmetrics.MetricCollection(
                {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}, prefix="val_"
            )

        def validation_step(self, batch, batch_idx):
            self.metrics.update(batch[1] + 2, batch[1])
            self.log_dict(self.metrics)

    model = Model()
    trainer = fit(model, make_loader(8), max_epochs=2)
    assert trainer.callback_metrics == {"val_mse": pytest.approx(4.0), "val_mae": pytest.approx(2.0)}
    assert model.metrics["mse"].update_count == 0


def test_one_metric_per_validation_loader():
    class Model(Logs):
        def __init__(self):
            super().__init__()
            self.means = torch.nn.ModuleList([torchmetrics.MeanMetric(), torchmetrics.MeanMetric()])

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.means[dataloader_idx](10.0 * dataloader_idx + batch_idx)
            self.log("m", self.means[dataloader_idx])

    results = make_trainer().validate(Model(), [make_loader(8), make_loader(12)], verbose=False)
    assert results == [{"m/dataloader_idx_0": 0.5}, {"m/dataloader_idx_1": 11.0}]


def test_a_metric_that_is_no_attribute_is_an_error():
    outside = torchmetrics.MeanMetric()

    def step(self):
        outside(1.0)
        self.log("m", outside)

    with pytest.raises(MisconfigurationException, match="attribute"):
        fit(Logs(training_step=step))


@pytest.mark.parametrize("kinds", ["two metrics", "a metric and a number", "a number and a metric"])
def test_one_name_stands_for_one_thing(kinds):
    class Model(Logs):
        def __init__(self):
            super().__init__()
            self.one, self.other = torchmetrics.MeanMetric(), torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.one(1.0)
            self.other(2.0)
            values = {"two metrics": (self.one, self.other), "a metric and a number": (self.one, 1.0)}
            for value in values.get(kinds, (1.0, self.one)):
                self.log("m", value, on_step=False, on_epoch=True)
            return self.layer(batch[0]).mean()

    with pytest.raises(MisconfigurationException, match="twice"):
        fit(Model())


def test_a_metric_may_be_replaced_by_a_new_one():
    class Model(WithMetrics):
        def on_train_epoch_start(self):
            self.mean = torchmetrics.MeanMetric()

    assert fit(Model(on_step=False, on_epoch=True), max_epochs=2).callback_metrics == {"m": 0.5}


def test_a_metric_must_compute_a_tensor():
    class Pair(torchmetrics.MeanMetric):
        def compute(self):
            return {"a": torch.tensor(1.0)}

    class Model(WithMetrics):
        def __init__(self):
            super().__init__(on_step=False, on_epoch=True)
            self.mean = Pair()

        def training_step(self, batch, batch_idx):
            self.mean.update(1.0)
            self.log("m", self.mean, on_step=False, on_epoch=True)
            return self.layer(batch[0]).mean()

    with pytest.raises(ValueError, match="compute"):
        fit(Model())


# ---------------------------------------------------------------------- where it is allowed

STEP_HOOKS = (
    "training_step", "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step",
)  # fmt: skip
EVALUATION_HOOKS = ("validation_step", "on_validation_batch_start", "on_validation_batch_end")
EPOCH_HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_epoch_end",
)  # fmt: skip
FORBIDDEN_HOOKS = (
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_end", "on_validation_end", "configure_optimizers",
    "prepare_data",
)  # fmt: skip


@pytest.mark.parametrize("hook", STEP_HOOKS)
def test_hooks_of_a_training_batch_log_the_step_by_default(hook):
    logger = Records()
    trainer = fit(Logs(**{hook: lambda self: self.log("a", 2.0)}), logger=logger)
    assert trainer.callback_metrics == {"a": 2.0}
    assert len(logger.with_key("a")) == 4
    trainer = fit(Logs(**{hook: lambda self: self.log("a", 2.0, on_epoch=True)}))
    assert set(trainer.callback_metrics) == {"a", "a_step", "a_epoch"}


@pytest.mark.parametrize("hook", EVALUATION_HOOKS)
def test_hooks_of_an_evaluation_batch_log_the_epoch_by_default(hook):
    logger = Records()
    trainer = fit(Logs(**{hook: lambda self: self.log("a", 2.0)}), make_loader(8), logger=logger)
    assert trainer.callback_metrics == {"a": 2.0}
    assert len(logger.with_key("a")) == 1
    logger = Records()
    fit(Logs(**{hook: lambda self: self.log("a", 2.0, on_step=True)}), make_loader(8), logger=logger)
    assert [step for step, _ in logger.with_key("a_step")] == [0, 1]


@pytest.mark.parametrize("hook", EPOCH_HOOKS)
def test_hooks_of_an_epoch_log_the_epoch_only(hook):
    logger = Records()
    trainer = fit(Logs(**{hook: lambda self: self.log("a", 2.0)}), make_loader(8), logger=logger)
    assert trainer.callback_metrics == {"a": 2.0}
    assert len(logger.with_key("a")) == 1
    with pytest.raises(MisconfigurationException, match="on_step"):
        fit(Logs(**{hook: lambda self: self.log("a", 2.0, on_step=True)}), make_loader(8))


@pytest.mark.parametrize("hook", FORBIDDEN_HOOKS)
def test_hooks_outside_of_epochs_forbid_it(hook):
    with pytest.raises(MisconfigurationException, match="You can't `self.log"):
        fit(Logs(**{hook: lambda self: self.log("a", 2.0)}), make_loader(8))


@pytest.mark.parametrize("hook", ["predict_step", "on_predict_start", "on_predict_batch_end", "on_predict_epoch_end"])
def test_predict_forbids_it(hook):
    with pytest.raises(MisconfigurationException):
        make_trainer().predict(Logs(**{hook: lambda self: self.log("a", 2.0)}), make_loader(8))


@pytest.mark.parametrize("hook", ["test_step", "on_test_batch_end", "on_test_epoch_end", "on_test_start"])
def test_test_logs_like_validation(hook):
    results = make_trainer().test(Logs(**{hook: lambda self: self.log("a", 2.0)}), make_loader(8), verbose=False)
    assert results == [{"a": 2.0}]


def test_overridden_parts_of_the_step_may_log():
    class Model(Logs):
        def backward(self, loss, *args, **kwargs):
            self.log("backward", 1.0)
            loss.backward()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            optimizer.step(closure=optimizer_closure)
            self.log("optimizer_step", 1.0)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            self.log("zero_grad", 1.0)
            optimizer.zero_grad()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.log("clipping", 1.0)

    assert set(fit(Model()).callback_metrics) == {"backward", "optimizer_step", "zero_grad", "clipping"}


def test_lr_scheduler_step_may_not_log():
    class Model(Logs):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

        def lr_scheduler_step(self, scheduler, metric):
            self.log("a", 1.0)

    with pytest.raises(MisconfigurationException, match="You can't `self.log"):
        fit(Model())


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_may_not_log(hook):
    class Model(Logs):
        pass

    def transfer(self, batch, dataloader_idx):
        if self.trainer.global_step == 2:
            self.log("a", 1.0)
        return batch

    setattr(Model, hook, transfer)
    with pytest.raises(MisconfigurationException, match="You can't `self.log"):
        fit(Model())


def test_callbacks_log_under_the_rules_of_the_hook_and_share_the_names():
    """The same name from two hooks is two means: the later one wins."""

    class Logging(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.log("a", 10.0, on_step=False, on_epoch=True)
            self.log_dict({"b": 1.0, "c": 2.0})

    trainer = fit(
        Logs(training_step=lambda self: self.log("a", 1.0, on_step=False, on_epoch=True)), callbacks=[Logging()]
    )
    assert trainer.callback_metrics == {"a": 10.0, "b": 1.0, "c": 2.0}


def test_arguments_that_come_to_the_same_are_the_same():
    """What is the default in that hook may be written down or not."""

    def step(self):
        self.log("a", 1.0)
        self.log("a", 3.0, on_epoch=True, on_step=False, logger=True, reduce_fx="avg")

    results = make_trainer(logger=Records()).validate(Logs(validation_step=step), make_loader(), verbose=False)
    assert results == [{"a": 2.0}]


# ---------------------------------------------------------------------- wrong arguments

WRONG = [
    pytest.param(lambda self: self.log("a", [1.0]), ValueError, "cannot be logged", id="list"),
    pytest.param(lambda self: self.log("a", "text"), ValueError, "cannot be logged", id="str"),
    pytest.param(lambda self: self.log("a", {"b": {"c": 1.0}}), ValueError, "cannot be logged", id="nested dict"),
    pytest.param(lambda self: self.log("a", torch.ones(2)), ValueError, r"\.mean\(\)", id="several elements"),
    pytest.param(
        lambda self: self.log("a", 1.0, on_step=False, on_epoch=False), MisconfigurationException, "on_step", id="never"
    ),
    pytest.param(
        lambda self: (self.log("a", 1.0), self.log("a", 1.0, prog_bar=True)), MisconfigurationException,
        "different arguments", id="two ways",
    ),
    pytest.param(
        lambda self: self.log("a", 1.0, on_epoch=True, reduce_fx="median"), MisconfigurationException, "mean",
        id="reduce_fx",
    ),
    pytest.param(
        lambda self: self.log("a/dataloader_idx_0", 1.0), MisconfigurationException, "dataloader_idx", id="name"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("step", "error", "words"), WRONG)
def test_what_cannot_be_logged_is_refused_with_help(step, error, words):
    with pytest.raises(error, match=words):
        fit(Logs(training_step=step))


def test_a_dataloader_iter_step_must_say_the_batch_size():
    class Model(Logs):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.run("training_step")
            return self.layer(batch[0]).mean()

    with pytest.warns(), pytest.raises(MisconfigurationException, match="batch_size"):
        fit(Model(training_step=lambda self: self.log("a", 1.0)))
    trainer = fit(Model(training_step=lambda self: self.log("a", 1.0, batch_size=4)))
    assert trainer.callback_metrics == {"a": 1.0}


@pytest.mark.filterwarnings("default")
def test_logging_where_nobody_listens_warns(monkeypatch):
    from fulmen.utilities.rank_zero import WarningCache

    monkeypatch.setattr("fulmen.module.warn_once", WarningCache().warn)  # it warns once per process
    with pytest.warns(UserWarning):
        Logs().log("a", 1.0)
    with pytest.warns(UserWarning, match="barebones"):
        trainer = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
        trainer.fit(Logs(training_step=lambda self: self.log("barebones", 1.0)), make_loader())
    assert trainer.callback_metrics == {}
    with pytest.warns(UserWarning, match="logger"):
        fit(Logs(training_step=lambda self: self.log("nobody", 1.0, logger=True)), logger=False)


# ---------------------------------------------------------------------- to the loggers, and when


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [2, 5]), (50, []), (0, [])])
def test_step_values_go_out_every_so_many_steps(every, steps):
    logger = Records()
    model = Logs(training_step=lambda self: self.log("a", float(self.batch_idx)))
    fit(model, logger=logger, log_every_n_steps=every, max_epochs=2)
    assert [step for step, _ in logger.with_key("a")] == steps
    assert logger.saves >= len(logger.calls)


def test_the_x_axis_counts_batches_that_stepped():
    """4 batches in windows of 2, twice: the axis has 4 points, and an epoch's value stands at its last step."""
    logger = Records()
    model = Logs(training_step=lambda self: self.log("a", float(self.batch_idx), on_epoch=True))
    trainer = fit(model, logger=logger, accumulate_grad_batches=2, max_epochs=2)
    assert logger.with_key("a_step") == [(0, 1.0), (1, 3.0), (2, 1.0), (3, 3.0)]
    assert logger.with_key("a_epoch") == [(1, 1.5), (3, 1.5)]
    assert trainer.global_step == 4


def test_two_optimizers_count_once_per_batch_on_the_x_axis():
    class Model(Logs):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch[0]).mean())
                optimizer.step()
            self.log("a", 1.0)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    logger = Records()
    trainer = fit(Model(), logger=logger)
    assert [step for step, _ in logger.with_key("a")] == [0, 1, 2, 3]
    assert trainer.global_step == 8


def test_a_metric_called_step_replaces_the_x_axis():
    logger = Records()
    model = Logs(training_step=lambda self: (self.log("a", 1.0), self.log("step", 100.0 + self.batch_idx)))
    fit(model, logger=logger)
    assert logger.calls == [(100 + number, {"a": 1.0}) for number in range(4)], "and there is no epoch beside it"


def test_the_epoch_is_added_to_all_but_the_batches_of_evaluation():
    logger = Records()
    model = Logs(
        training_step=lambda self: self.log("a", 1.0, on_epoch=True),
        validation_step=lambda self: self.log("v", float(self.batch_idx), on_step=True, on_epoch=True),
    )
    fit(model, make_loader(8), logger=logger, max_epochs=2)
    kinds = {"a_step": True, "a_epoch": True, "v_step": False, "v_epoch": True}
    for key, with_epoch in kinds.items():
        assert all(("epoch" in metrics) is with_epoch for _, metrics in logger.calls if key in metrics), key
    # batches of evaluation have an axis of their own, that goes on from epoch to epoch
    assert logger.with_key("v_step") == [(0, 0.0), (1, 1.0), (2, 0.0), (3, 1.0)]
    assert [step for step, _ in logger.with_key("v_epoch")] == [3, 7]
    assert [metrics["epoch"] for _, metrics in logger.calls if "v_epoch" in metrics] == [0, 1]


def test_the_last_step_is_logged_when_training_is_told_to_stop():
    def step(self):
        self.log("a", float(self.batch_idx))
        if self.batch_idx == 2:
            self.trainer.should_stop = True

    logger = Records()
    fit(Logs(training_step=step), logger=logger, log_every_n_steps=50)
    assert logger.with_key("a") == [(2, 2.0)]


def test_training_values_stay_visible_during_validation_and_the_other_way_round():
    seen = []

    class Reads(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

        def on_validation_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    model = Logs(
        training_step=lambda self: self.log("a", float(self.batch_idx), on_epoch=True),
        validation_step=lambda self: self.log("v", float(self.current_epoch)),
    )
    fit(model, make_loader(8), max_epochs=2, callbacks=[Reads()])
    step, epoch = {"a": 3.0, "a_step": 3.0}, {"a_epoch": 1.5}
    assert seen == [step, {**step, "v": 0.0}, {**step, **epoch, "v": 0.0}, {**step, **epoch, "v": 1.0}]


def test_of_one_name_in_training_and_validation_the_newer_value_is_shown():
    """A checkpoint that monitors "loss" at the end of the epoch sees what validation made of it."""
    seen = []

    class Reads(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            views = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
            seen.append([float(view["loss"]) for view in views])

    model = Logs(
        training_step=lambda self: self.log("loss", 1.0, prog_bar=True),
        validation_step=lambda self: self.log("loss", 2.0, prog_bar=True),
    )
    fit(model, make_loader(8), max_epochs=2, callbacks=[Reads()])
    fit(model, make_loader(8), check_val_every_n_epoch=2, callbacks=[Reads()])
    assert seen == [[2.0] * 3, [2.0] * 3, [1.0] * 3]


def test_step_values_of_evaluation_stay_in_the_progress_bar():
    model = Logs(validation_step=lambda self: self.log("v", float(self.batch_idx), on_step=True, prog_bar=True))
    trainer = fit(model, make_loader(8))
    assert trainer.progress_bar_metrics == {"v_step": 1.0, "v_epoch": 0.5}
    assert trainer.callback_metrics == {"v": 0.5, "v_epoch": 0.5}


def test_values_of_evaluation_are_not_there_before_its_end():
    seen = []

    class Reads(pl.Callback):
        def on_validation_batch_end(self, trainer, *_):
            seen.append(dict(trainer.callback_metrics))

    fit(Logs(validation_step=lambda self: self.log("v", 1.0)), make_loader(8), callbacks=[Reads()])
    assert seen == [{}, {}]


def test_the_sanity_check_leaves_no_trace():
    seen, logger = [], Records()

    class Reads(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(set(trainer.callback_metrics))

        def on_train_start(self, trainer, pl_module):
            seen.append((set(trainer.callback_metrics), set(trainer.logged_metrics), set(trainer.progress_bar_metrics)))
            seen.append(list(logger.calls))

    model = Logs(validation_step=lambda self: self.log("v", 1.0, prog_bar=True))
    fit(model, make_loader(8), num_sanity_val_steps=1, logger=logger, callbacks=[Reads()])
    assert seen == [{"v"}, (set(), set(), set()), []]


def test_a_new_call_starts_with_empty_views():
    seen = []

    class Reads(pl.Callback):
        def on_test_start(self, trainer, pl_module):
            seen.append((dict(trainer.callback_metrics), dict(trainer.logged_metrics)))

    model = Logs(training_step=lambda self: self.log("a", 1.0), test_step=lambda self: self.log("t", 1.0))
    trainer = fit(model, callbacks=[Reads()])
    assert trainer.callback_metrics
    trainer.test(model, make_loader(), verbose=False)
    assert seen == [({}, {})]
    assert trainer.callback_metrics == {"t": 1.0}


def test_the_recorded_csv_file(tmp_path: Path):
    logger = CSVLogger(tmp_path)
    model = Logs(
        training_step=lambda self: self.log("train_loss", (1.79, 2.56)[self.batch_idx]),
        validation_step=lambda self: self.log_dict({"val_loss": 3.0, "val/acc": 3.0}),
    )
    trainer = make_trainer(logger=logger, log_every_n_steps=1)
    trainer.fit(model, make_loader(8), make_loader(4))
    rows = list(csv.reader((Path(logger.log_dir) / "metrics.csv").open()))
    assert rows[0] == ["epoch", "step", "train_loss", "val/acc", "val_loss"]
    found = [[float(cell) if cell else None for cell in row] for row in rows[1:]]
    expected = [[0, 0, 1.79, None, None], [0, 1, 2.56, None, None], [0, 1, None, 3.0, 3.0]]
    assert [[cell and pytest.approx(cell) for cell in row] for row in found] == expected


def test_log_dict_is_log_for_each_item():
    model = Logs(training_step=lambda self: self.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, on_epoch=True))
    assert fit(model).callback_metrics == {
        "a": 1.0, "a_step": 1.0, "a_epoch": 1.0, "b": 2.0, "b_step": 2.0, "b_epoch": 2.0,
    }  # fmt: skip


def test_results_are_plain_numbers():
    trainer = make_trainer()
    model = Regression()
    (validated,), (tested,) = trainer.validate(model, make_loader()), trainer.test(model, make_loader())
    assert {k: type(v) for k, v in {**validated, **tested}.items()} == {"val_loss": float, "test_loss": float}
    assert validated["val_loss"] == tested["test_loss"] > 0
