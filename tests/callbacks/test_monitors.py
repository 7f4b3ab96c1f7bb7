"""Learning rates and device statistics on their way to the loggers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import StepLR

from fulmen.callbacks import DeviceStatsMonitor, LearningRateMonitor
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
    with pytest.raises(MisconfigurationException, match="same"):
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
    with pytest.raises(MisconfigurationException, match="logger"):
        fit(callback, logger=False)


def test_interval_is_checked():
    with pytest.raises(MisconfigurationException, match="Did you mean `step`"):
        LearningRateMonitor("steps")


def test_load_of_the_cpu(fit):
    pytest.importorskip("psutil")
    logger = Memory()
    fit(DeviceStatsMonitor(), logger=logger, log_every_n_steps=2, max_epochs=1)
    found = logger.about("DeviceStatsMonitor")
    hooks = [(step, next(iter(metrics)).split(".")[1].split("/")[0]) for step, metrics in found]
    train = [(step, f"on_train_batch_{when}") for step in (1, 3) for when in ("start", "end")]
    assert hooks == [*train, *[(3, f"on_validation_batch_{when}") for _ in range(2) for when in ("start", "end")]]
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
