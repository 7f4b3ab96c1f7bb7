"""Learning rates, device statistics and speed on their way to the loggers; losses that jump."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from support import ManualRegression, Regression, make_loader, make_trainer
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import StepLR

from fulmen.callbacks import (
    Callback,
    DeviceStatsMonitor,
    GradientNorm,
    LearningRateMonitor,
    SpikeDetection,
    ThroughputMonitor,
)
from fulmen.callbacks.monitors import TrainingSpikeException
from fulmen.loggers import Logger
from fulmen.utilities.errors import MisconfigurationException


class Memory(Logger):
    """A logger that keeps (step, metrics)."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def about(self, word):
        return [(step, metrics) for step, metrics in self.rows if any(word in name for name in metrics)]


@pytest.fixture
def watch(fit, scripted_model):
    """`watch(configure, **arguments of the monitor)` gives the monitor and the rows it logged."""

    def run(configure, trainer=None, manual=False, **arguments):
        class Model(scripted_model):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = not manual

            def training_step(self, batch, batch_idx):
                if not manual:
                    return super().training_step(batch, batch_idx)
                self.manual_backward(self.layer(batch[0]).sum())
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()

            def configure_optimizers(self):
                return configure(self.layer.weight, self.layer.bias)

        logger, callback = Memory(), LearningRateMonitor(**arguments)
        trainer = fit(
            callback, Model(), **{"logger": logger, "max_epochs": 2, "log_every_n_steps": 2, **(trainer or {})}
        )
        assert set(callback.lrs) <= set(trainer.callback_metrics)
        return callback, [row for row in logger.rows if not {"train_loss", "val_loss"} & set(row[1])]

    return run


def one(weight, bias):
    return SGD([weight, bias], lr=0.1)


def groups(weight, bias):
    return SGD([{"params": [weight]}, {"params": [bias], "lr": 0.5}], lr=0.1)


def named(weight, bias):
    optimizer = SGD(
        [{"params": [weight], "name": "w"}, {"params": [bias], "name": "b", "lr": 0.5}],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.01,
    )
    return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "name": "xx"}]


def test_optimizer_without_scheduler_is_logged_at_steps_and_epochs(watch):
    callback, rows = watch(one)
    assert rows == [(step, {"lr-SGD": 0.1}) for step in (0, 1, 3, 4, 5, 7)]
    assert callback.lrs == {"lr-SGD": [0.1] * 6}


@pytest.mark.parametrize(("interval", "steps"), [("step", [1, 3, 5, 7]), ("epoch", [0, 4])])
def test_interval(watch, interval, steps):
    _, rows = watch(one, logging_interval=interval)
    assert [step for step, _ in rows] == steps


def test_scheduler_is_logged_at_its_own_interval(watch):
    _, rows = watch(named)
    assert rows == [(0, {"xx/w": 0.1, "xx/b": 0.5}), (4, {"xx/w": 0.05, "xx/b": 0.25})]

    def per_step(weight, bias):
        optimizer = Adam([weight, bias], lr=0.1)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}]

    callback, rows = watch(per_step)
    assert [step for step, _ in rows] == [1, 3, 5, 7]
    assert callback.lrs["lr-Adam"] == [0.1 * 0.5**n for n in (1, 3, 5, 7)]


def test_momentum_and_weight_decay(watch):
    callback, rows = watch(named, log_momentum=True, log_weight_decay=True)
    assert rows[0][1] == {
        "xx/w": 0.1,
        "xx/w-momentum": 0.9,
        "xx/w-weight_decay": 0.01,
        "xx/b": 0.5,
        "xx/b-momentum": 0.9,
        "xx/b-weight_decay": 0.01,
    }
    assert callback.last_momentum_values == {"xx/w-momentum": 0.9, "xx/b-momentum": 0.9}
    assert callback.last_weight_decay_values == {"xx/w-weight_decay": 0.01, "xx/b-weight_decay": 0.01}
    _, rows = watch(lambda w, b: Adam([w, b], lr=0.1, betas=(0.8, 0.9)), log_momentum=True)
    assert rows[0][1]["lr-Adam-momentum"] == 0.8


def test_optimizer_without_momentum_logs_zero_and_warns(watch):
    with pytest.warns(RuntimeWarning, match="momentum"):
        _, rows = watch(lambda w, b: Adagrad([w, b], lr=0.1), log_momentum=True)
    assert rows[0][1] == {"lr-Adagrad": 0.1, "lr-Adagrad-momentum": 0}


def test_names_of_groups(watch):
    assert list(watch(groups)[0].lrs) == ["lr-SGD/pg1", "lr-SGD/pg2"]
    assert list(watch(lambda w, b: SGD([{"params": [w, b], "name": "all"}], lr=0.1))[0].lrs) == ["lr-SGD/all"]
    mixed = [{"name": "w"}, {}]
    callback, _ = watch(lambda w, b: SGD([{"params": [w], **mixed[0]}, {"params": [b], **mixed[1]}], lr=0.1))
    assert list(callback.lrs) == ["lr-SGD/w", "lr-SGD/pg2"]


def test_two_groups_of_one_name_are_an_error(watch):
    with pytest.raises(MisconfigurationException, match="duplicated parameter group names"):
        watch(lambda w, b: SGD([{"params": [w], "name": "x"}, {"params": [b], "name": "x"}], lr=0.1))


def test_names_of_several_optimizers(watch):
    callback, _ = watch(lambda w, b: [SGD([w], lr=0.1), SGD([b], lr=0.2), Adam([b], lr=0.3)], manual=True)
    assert {name: values[0] for name, values in callback.lrs.items()} == {
        "lr-SGD": 0.1,
        "lr-SGD-1": 0.2,
        "lr-Adam": 0.3,
    }

    def second_is_scheduled(weight, bias):
        first, second = SGD([weight], lr=0.1), SGD([bias], lr=0.2)
        return [first, second], [StepLR(second, 1)]

    callback, rows = watch(second_is_scheduled, manual=True)
    assert rows[:2] == [(0, {"lr-SGD": 0.2, "lr-SGD-1": 0.1}), (1, {"lr-SGD-1": 0.1})]


def test_group_added_while_training(watch):
    def growing(weight, bias):
        class Growing(SGD):
            def step(self, closure=None):
                if len(self.param_groups) == 1:
                    self.add_param_group({"params": [bias], "lr": 0.3})
                return super().step(closure)

        return Growing([weight], lr=0.1)

    callback, _ = watch(growing, logging_interval="epoch")
    assert callback.lrs == {"lr-Growing/pg1": [0.1, 0.1], "lr-Growing/pg2": [0.3]}


def test_run_without_optimizer_logs_nothing(watch):
    assert watch(lambda w, b: None)[0].lrs == {}


@pytest.mark.parametrize("callback", [LearningRateMonitor(), DeviceStatsMonitor()])
def test_monitors_need_a_logger(fit, callback):
    with pytest.raises(MisconfigurationException, match="`Trainer` that has no logger"):
        fit(callback, logger=False)


def test_interval_is_checked():
    with pytest.raises(MisconfigurationException, match="must be 'step', 'epoch'"):
        LearningRateMonitor("steps")


def test_load_of_the_cpu(fit):
    pytest.importorskip("psutil")
    logger = Memory()
    fit(DeviceStatsMonitor(), logger=logger, log_every_n_steps=2, max_epochs=1)
    found = logger.about("DeviceStatsMonitor")
    hooks = [(step, next(iter(metrics)).split(".")[1].split("/")[0]) for step, metrics in found]
    train = [(step, f"on_train_batch_{when}") for step in (1, 3) for when in ("start", "end")]
    # Evaluation counts its own batches: the second of two is due.
    assert hooks == [*train, *[(3, f"on_validation_batch_{when}") for when in ("start", "end")]]
    assert {name.split("/")[1] for name in found[0][1]} == {"cpu_percent", "cpu_vm_percent", "cpu_swap_percent"}


def test_load_of_the_cpu_can_be_left_out(fit):
    logger = Memory()
    fit(DeviceStatsMonitor(cpu_stats=False), logger=logger, log_every_n_steps=1, max_epochs=1)
    assert not logger.about("DeviceStatsMonitor")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_gpu(fit):
    logger = Memory()
    fit(
        DeviceStatsMonitor(cpu_stats=True),
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
        accelerator="gpu",
        devices=1,
    )
    names = {name.split("/")[1] for name in logger.about("DeviceStatsMonitor")[0][1]}
    assert {"allocated_bytes.all.current", "cpu_percent"} <= names


RATES = {"train/device/batches_per_sec", "train/device/samples_per_sec"}
TOTALS = {"train/time", "train/batches", "train/samples"}


@pytest.fixture
def measure(fit, scripted_model):
    """`measure(**arguments)` gives the rows a `ThroughputMonitor` logged and the trainer; batches have two samples."""

    def run(model=None, window_size=2, length_fn=None, **trainer):
        monitor = ThroughputMonitor(lambda batch: 2, length_fn, window_size=window_size)
        given = {"logger": Memory(), "max_epochs": 1, "log_every_n_steps": 2, "limit_val_batches": 0, **trainer}
        trainer = fit(monitor, model or scripted_model(), **given)
        return trainer.logger.about("/samples") if trainer.logger else [], trainer

    return run


def test_rates_come_when_the_window_is_full_and_a_log_is_due(measure):
    rows, _ = measure(window_size=3)
    assert [step for step, _ in rows] == [1, 3]
    assert set(rows[0][1]) == {*TOTALS, "epoch"}
    assert set(rows[1][1]) == {*TOTALS, *RATES, "epoch"}
    last = rows[1][1]
    assert (last["train/batches"], last["train/samples"]) == (4, 8)
    assert last["train/device/samples_per_sec"] == pytest.approx(2 * last["train/device/batches_per_sec"])


def test_items_and_flops_are_counted_if_they_are_known(measure, scripted_model):
    model = scripted_model()
    model.flops_per_batch = 100
    rows, _ = measure(model, length_fn=lambda batch: 7)
    last = rows[-1][1]
    assert last["train/lengths"] == 28
    assert last["train/device/items_per_sec"] == pytest.approx(7 * last["train/device/batches_per_sec"])
    assert last["train/device/flops_per_sec"] == pytest.approx(100 * last["train/device/batches_per_sec"])
    with pytest.warns(UserWarning, match="flops_per_batch"):
        measure()


def test_accumulation_logs_where_an_optimizer_steps(measure):
    rows, _ = measure(accumulate_grad_batches=3, log_every_n_steps=1)
    assert [(step, metrics["train/batches"]) for step, metrics in rows] == [(0, 3), (1, 4)]


def test_each_validation_counts_anew_and_is_no_time_of_training(measure, scripted_model):
    class SlowToValidate(scripted_model):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.05)

    rows, _ = measure(
        SlowToValidate(), limit_val_batches=2, num_sanity_val_steps=1, val_check_interval=2, log_every_n_steps=1
    )
    validations = [(step, row["validate/batches"]) for step, row in rows if "validate/batches" in row]
    assert validations == [(1, 1), (2, 2), (3, 1), (4, 2)]
    assert rows[-3][1]["train/batches"] == 4
    assert rows[-1][1]["validate/time"] >= 0.1 > rows[-3][1]["train/time"]


def test_evaluation_and_prediction_have_their_own_rows(measure, scripted_model):
    _, trainer = measure()
    trainer.logger.rows.clear()
    trainer.predict(scripted_model(), scripted_model().train_dataloader())
    rows = trainer.logger.about("predict/device/batches_per_sec")
    assert [(step, row["predict/batches"]) for step, row in rows] == [(2, 2), (4, 4)]


@pytest.mark.parametrize("trainer", [{"logger": False}, {"log_every_n_steps": 0}])
def test_without_a_log_nothing_is_measured(measure, trainer):
    assert measure(**trainer)[0] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_times_its_batches_while_the_host_runs_ahead(fit, scripted_model):
    class Busy(scripted_model):
        def training_step(self, batch, batch_idx):
            torch.cuda._sleep(100_000_000)
            return super().training_step(batch, batch_idx)

    class Host(Callback):
        seen = []

        def on_train_batch_start(self, *args):
            self.seen.append(time.perf_counter())

    host, logger = Host(), Memory()
    fit(
        [ThroughputMonitor(lambda batch: 1, window_size=2), host], Busy(), logger=logger, max_epochs=2,
        limit_val_batches=0, log_every_n_steps=4, accelerator="gpu", devices=1,
    )  # fmt: skip
    (_, first), (_, second) = logger.about("train/time")
    on_device = second["train/time"] - first["train/time"]
    assert on_device > 2 * (host.seen[-1] - host.seen[-4])  # four batches, handed out without waiting
    assert second["train/device/batches_per_sec"] == pytest.approx(4 / on_device, rel=0.2)


@pytest.fixture
def train_on(fit, scripted_model):
    """`train_on(losses, **arguments)` gives the `SpikeDetection` of a run with these losses."""

    def run(losses, epochs=1, callback=None, **arguments):
        class Model(scripted_model):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * 0 + losses[batch_idx]

        callback = callback or SpikeDetection(**arguments)
        fit(callback, Model(), max_epochs=epochs, limit_train_batches=len(losses), limit_val_batches=0)
        return callback

    return run


CALM = [
    ((1.0, 1.0, 1.0, 2.9), {}),
    ((9.0, 1.0, 1.0, 1.0), {"epochs": 2}),  # the first batch of an epoch is not judged
    ((1.0, 1.0, 10.0, 1.0), {"warmup": 3}),
    ((10.0, 10.0, 10.0, -100.0), {}),
    ((1.0, 1.0, 1.0, 10.0), {"mode": "max"}),
    ((0.1, 0.1, 0.1, 0.5), {"atol": 0.5}),
    ((1.0, 1.0, 1.0, 1.5), {"atol": 0.4}),
    ((1.0, 1.0, math.nan, -math.inf), {"finite_only": False}),
    ((math.nan, 1.0, 1.0, 1.0), {}),
    ((8.0, 8.0, 1.0, 1.0), {"window": 2}),
]
SPIKES = [
    ((1.0, 1.0, 1.0, 3.0), {}, 3),
    ((1.0, 10.0, 1.0, 1.0), {}, 1),
    ((9.0, 1.0, 1.0, 1.0), {"epochs": 2, "warmup": 0}, 0),
    ((10.0, 10.0, -11.0, 1.0), {"mode": "max"}, 2),
    ((1.0, 1.0, 1.0, 1.5), {"atol": 0.5, "rtol": None}, 3),
    ((1.0, 1.0, 1.0, math.nan), {}, 3),
    ((1.0, 1.0, 1.0, -math.inf), {}, 3),
    ((1.0, 1.0, 1.0, math.inf), {"finite_only": False}, 3),
    ((1.0, math.nan, 1.0, 5.0), {"finite_only": False}, 3),
    ((8.0, 1.0, 1.0, 3.5), {"window": 2}, 3),
]


@pytest.mark.parametrize(("losses", "arguments"), CALM)
def test_losses_that_are_no_spike(train_on, losses, arguments):
    assert train_on(losses, **arguments).bad_batches == []


@pytest.mark.parametrize(("losses", "arguments", "batch"), SPIKES)
def test_losses_that_jump(train_on, tmp_path, losses, arguments, batch):
    with pytest.raises(TrainingSpikeException, match=f"Training spike detected in batch {batch}: ") as error:
        train_on(losses, **arguments)
    assert error.value.batch_idx == batch
    assert json.loads((tmp_path / "skip_batches.json").read_text()) == [batch - 1, batch]


def test_the_list_of_bad_batches_grows_where_it_is_told_to(train_on, tmp_path):
    callback = SpikeDetection(exclude_batches_path=tmp_path / "deep" / "er")
    for _ in range(2):
        with pytest.raises(TrainingSpikeException, match="deep"):
            train_on((1.0, 1.0, 10.0), callback=callback)
    assert json.loads((tmp_path / "deep" / "er" / "skip_batches.json").read_text()) == [1, 2, 1, 2]


def test_the_mean_is_of_the_last_finite_losses(train_on):
    callback = train_on((8.0, 1.0, math.nan, 2.0), window=2, warmup=4)
    assert (callback.running_mean, callback.last_val) == (1.5, 2.0)
    assert math.isnan(SpikeDetection().running_mean)


def test_mode_of_spikes_is_checked():
    with pytest.raises(ValueError, match="mode='auto'"):
        SpikeDetection("auto")


# ---------------------------------------------------------------------- GradientNorm


class Norms(Callback):
    """The norms by hand, of complete gradients before clipping; and how often norms were computed by the trainer."""

    def __init__(self):
        self.by_hand, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.by_hand.append(torch.cat([p.grad.flatten().double() for p in parameters]).norm().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        names = [name for name in trainer.callback_metrics if name.startswith("grad_norm")]
        if trainer.fit_loop.optimization.stepped:
            self.logged += [trainer.callback_metrics[name].item() for name in names]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "arguments", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
def test_gradient_norm_is_logged_before_clipping_unscaled_and_of_the_whole_window(arguments, precision):
    norms = Norms()
    trainer = make_trainer(
        callbacks=[GradientNorm(), norms], accumulate_grad_batches=2, precision=precision, max_epochs=2, **arguments
    )
    trainer.fit(Regression(), make_loader(20))
    assert len(norms.logged) == len(norms.by_hand) == 6
    assert norms.logged == pytest.approx(norms.by_hand, rel=1e-2 if precision == "bf16-true" else 1e-5, nan_ok=True)


def test_clipping_by_norm_and_logging_the_norm_is_one_pass_over_the_gradients(monkeypatch):
    passes = []
    total = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: passes.append("clip") or total(*args))
    monkeypatch.setattr("fulmen.engine.precision.total_norm", lambda *args: passes.append("norm"))
    make_trainer(callbacks=[GradientNorm()], gradient_clip_val=0.1).fit(Regression(), make_loader())
    assert passes == ["clip"] * 3


def test_gradient_norms_of_several_optimizers_and_of_manual_clipping():
    class Clipped(ManualRegression):
        def on_train_batch_end(self, *_):
            assert self.trainer.callback_metrics["grad_norm"].item() == self.norms[-1] > 0.1

    make_trainer(callbacks=[GradientNorm(prog_bar=True)]).fit(Clipped(clip=0.1), make_loader())

    class Two(Regression):
        def training_step(self, batch, batch_idx):
            yield self.loss(batch)
            yield self.loss(batch)

        def configure_optimizers(self):
            return [torch.optim.SGD([part], lr=0.1) for part in (self.layer.weight, self.layer.bias)]

    trainer = make_trainer(callbacks=[GradientNorm("norm")])
    trainer.fit(Two(), make_loader())
    assert {"norm/0", "norm/1"} <= trainer.callback_metrics.keys()
