"""Callbacks that send numbers about the run itself to the loggers: learning rates, and what the devices report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from fulmen.callbacks.callback import Callback
from fulmen.engine.accelerators import CPUAccelerator
from fulmen.utilities.errors import MisconfigurationException, explain, suggestion
from fulmen.utilities.optional import require
from fulmen.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import STEP_OUTPUT


class LearningRateMonitor(Callback):
    """Logs the learning rate of every parameter group, under the name of its scheduler or ``lr-<OptimizerClass>``.

    Further optimizers of the same class get ``-1``, ``-2``, …; several groups of one optimizer get ``/pg1``, ``/pg2``, …,
    or their own name (key "name" of the group). The values are in ``trainer.callback_metrics`` too.

    Args:
        logging_interval: "step" or "epoch"; None follows each scheduler's own interval, and logs optimizers without a
            scheduler at both.
        log_momentum: also log ``<name>-momentum`` (for Adam and its kin, the first beta).
        log_weight_decay: also log ``<name>-weight_decay``.

    ``lrs`` keeps every value that was logged, per name.
    """

    def __init__(
        self, logging_interval: str | None = None, log_momentum: bool = False, log_weight_decay: bool = False
    ) -> None:
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(
                f"`LearningRateMonitor(logging_interval={logging_interval!r})` is not known. Use 'step', 'epoch' or "
                f"None.{suggestion(str(logging_interval), ('step', 'epoch'))}"
            )
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        # Name without the group, optimizer, and the interval its scheduler has, if there is one.
        self._watched: list[tuple[str, Optimizer, str | None]] = []

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        _require_logger(self, trainer)
        self._watched = _named_optimizers(trainer)
        groups = [(base, name) for base, optimizer, _ in self._watched for name in _group_names(base, optimizer)]
        self.lrs = {name: [] for _, name in groups}
        self.last_momentum_values = {f"{name}-momentum": None for _, name in groups}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for _, name in groups}
        optimizers = [optimizer for _, optimizer, _ in self._watched]
        if self.log_momentum and not all({"momentum", "betas"} & set(o.defaults) for o in optimizers):
            rank_zero_warn(
                "`LearningRateMonitor(log_momentum=True)`: not all optimizers have a momentum. 0 is logged for the others.",
                category=RuntimeWarning,
            )

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.logging_interval != "epoch" and _log_due(trainer):
            self._log(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        metrics: dict[str, float] = {}
        for base, optimizer, own_interval in self._watched:
            if self.logging_interval is not None or own_interval in (None, interval):
                self._collect(base, optimizer, metrics)
        if metrics:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            trainer.log_to_loggers(metrics, step=trainer.fit_loop.progress.log_step)

    def _collect(self, base: str, optimizer: Optimizer, metrics: dict[str, float]) -> None:
        for name, group in zip(_group_names(base, optimizer), optimizer.param_groups):
            if name not in self.lrs:  # a group was added: the first one takes the values logged before with it
                self.lrs[name] = self.lrs.pop(base, [])
            metrics[name] = _number(group["lr"])
            self.lrs[name].append(metrics[name])
            if self.log_momentum:
                key = f"{name}-momentum"
                momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                metrics[key] = self.last_momentum_values[key] = _number(momentum)
            if self.log_weight_decay:
                key = f"{name}-weight_decay"
                metrics[key] = self.last_weight_decay_values[key] = _number(group.get("weight_decay", 0))


class DeviceStatsMonitor(Callback):
    """Logs what the accelerator reports, before and after batches: memory on GPUs, load on the CPU (with `psutil`).

    The keys are ``DeviceStatsMonitor.<hook>/<name>``.

    Args:
        cpu_stats: log the load of the host as well; None does so only if the run is on the CPU, False not even then.
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate", "test"):
            return
        _require_logger(self, trainer)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if self._cpu_stats or (self._cpu_stats is None and on_cpu):
            require("psutil", "to log the load of the CPU (`DeviceStatsMonitor(cpu_stats=False)` does without)")

    def _log(self, trainer: Trainer, hook: str) -> None:
        if not _log_due(trainer):
            return
        device = trainer.strategy.root_device
        stats: dict[str, float] = {}
        if device.type != "cpu" or self._cpu_stats is not False:
            stats.update(trainer.accelerator.get_device_stats(device))
        if device.type != "cpu" and self._cpu_stats:
            stats.update(CPUAccelerator().get_device_stats("cpu"))
        metrics = {f"{type(self).__qualname__}.{hook}/{name}": value for name, value in stats.items()}
        if metrics:
            trainer.log_to_loggers(metrics, step=trainer.fit_loop.progress.log_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._log(trainer, "on_train_batch_start")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._log(trainer, "on_train_batch_end")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._log(trainer, "on_validation_batch_start")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._log(trainer, "on_validation_batch_end")

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._log(trainer, "on_test_batch_start")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._log(trainer, "on_test_batch_end")


def _require_logger(callback: Callback, trainer: Trainer) -> None:
    if not trainer.loggers:
        raise MisconfigurationException(
            explain(
                what=f"`{type(callback).__name__}` is used with a `Trainer` that has no logger.",
                why="All it does is to send numbers to loggers.",
                fix="Pass `Trainer(logger=True)` or a logger, or remove the callback.",
            )
        )


def _log_due(trainer: Trainer) -> bool:
    """Do the loggers get the values of the current training batch? During evaluation: of the one before it."""
    every = trainer.log_every_n_steps
    return every > 0 and (trainer.fit_loop.progress.log_step + 1) % every == 0


def _number(value: Any) -> float:
    # sync: only for optimizers that keep their options in device tensors (`capturable=True`)
    return value.item() if isinstance(value, torch.Tensor) else value


def _named_optimizers(trainer: Trainer) -> list[tuple[str, Optimizer, str | None]]:
    """Those with a scheduler, in the order of the schedulers, then the others; names are made different by ``-1``, …"""
    configs = trainer.lr_scheduler_configs
    found = [(config.name, config.scheduler.optimizer, config.interval) for config in configs]
    scheduled = [optimizer for _, optimizer, _ in found]
    found += [(None, opt, None) for opt in trainer.optimizers if not any(opt is other for other in scheduled)]
    seen: dict[str, int] = {}
    named = []
    for name, optimizer, interval in found:
        if not all("lr" in group for group in optimizer.param_groups):  # the stand-in of a run without optimizer
            continue
        base = name or f"lr-{type(optimizer).__name__}"
        count = seen[base] = seen.get(base, -1) + 1
        named.append((f"{base}-{count}" if count else base, optimizer, interval))
    return named


def _group_names(base: str, optimizer: Optimizer) -> list[str]:
    """``base`` alone, or with the name or number of each parameter group."""
    groups = optimizer.param_groups
    if len(groups) == 1 and "name" not in groups[0]:
        return [base]
    names = [str(group.get("name", f"pg{number}")) for number, group in enumerate(groups, start=1)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise MisconfigurationException(
            explain(
                what=f"Several parameter groups of `{base}` have the same name: {repeated}.",
                why="`LearningRateMonitor` logs each group under its name.",
                fix="Give every group of one optimizer another `name`, or none.",
            )
        )
    return [f"{base}/{name}" for name in names]
