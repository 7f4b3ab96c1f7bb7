"""Callbacks that look at the run itself: learning rates, devices, speed, and whether the loss explodes."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.optim import Optimizer

from fulmen.callbacks.callback import Callback
from fulmen.engine.accelerators import Accelerator, CPUAccelerator
from fulmen.module import LightningModule
from fulmen.storage.filesystem import atomic_write, ensure_dir
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.throughput import Throughput, get_available_flops
from fulmen.utilities.types import GradClipAlgorithmType

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class LearningRateMonitor(Callback):
    """Logs the learning rate of every parameter group.

    A value is named after its scheduler, or ``lr-<OptimizerClass>`` without one. Further optimizers of a class get ``-1``,
    ``-2``, …; several groups of one optimizer get ``/pg1``, ``/pg2``, …, or their key ``"name"``. The values are in
    ``trainer.callback_metrics`` too, and the attribute ``lrs`` keeps all of them.

    Args:
        logging_interval: ``"step"`` or ``"epoch"``; None follows each scheduler's own interval, or takes both without one.
        log_momentum: also log ``<name>-momentum``: for Adam and its kin the first beta.
        log_weight_decay: also log ``<name>-weight_decay``.

    Raises:
        MisconfigurationException: ``logging_interval`` is not known, the trainer has no logger, or two groups of an
            optimizer have the same name.

    Examples:
        >>> LearningRateMonitor(logging_interval="epoch").lrs
        {}
    """

    def __init__(self, logging_interval: str | None = None, log_momentum: bool = False,
                 log_weight_decay: bool = False) -> None:  # fmt: skip
        if logging_interval not in (None, "step", "epoch"):
            raise MisconfigurationException(f"`{logging_interval=}` must be 'step', 'epoch' or None.")
        self.logging_interval = logging_interval
        self.log_momentum = log_momentum
        self.log_weight_decay = log_weight_decay
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._watched: list[tuple[str, Optimizer, str | None]] = []  # name, optimizer, its scheduler's interval

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        _require_logger(self, trainer)
        self._watched = _named_optimizers(trainer)
        names = [name for base, optimizer, _ in self._watched for name in _group_names(base, optimizer)]
        self.lrs = {name: [] for name in names}
        self.last_momentum_values = {f"{name}-momentum": None for name in names}
        self.last_weight_decay_values = {f"{name}-weight_decay": None for name in names}
        if self.log_momentum and not all({"momentum", "betas"} & opt.defaults.keys() for _, opt, _ in self._watched):
            what = "`log_momentum=True`, but some optimizers do not have momentum: for these 0 is logged."
            rank_zero_warn(what, category=RuntimeWarning)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.logging_interval != "epoch" and _log_due(trainer):
            self._log_rates(trainer, "step")

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self.logging_interval != "step":
            self._log_rates(trainer, "epoch")

    def _log_rates(self, trainer: Trainer, interval: str) -> None:
        metrics: dict[str, float] = {}
        for base, optimizer, own_interval in self._watched:
            if self.logging_interval is None and own_interval not in (None, interval):
                continue
            for name, group in zip(_group_names(base, optimizer), optimizer.param_groups):
                if name not in self.lrs:  # a group was added: the first one takes the values logged before with it
                    self.lrs[name] = self.lrs.pop(base, [])
                # sync: only for optimizers that keep their options in device tensors (`capturable=True`)
                metrics[name] = float(group["lr"])
                self.lrs[name].append(metrics[name])
                if self.log_momentum:
                    key = f"{name}-momentum"
                    value = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                    metrics[key] = self.last_momentum_values[key] = float(value)
                if self.log_weight_decay:
                    key = f"{name}-weight_decay"
                    value = group.get("weight_decay", 0)
                    metrics[key] = self.last_weight_decay_values[key] = float(value)
        if metrics:
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
            trainer.log_to_loggers(metrics)


def _logs_stats(hook: str) -> Callable[..., None]:
    """The method of `DeviceStatsMonitor` for one hook."""

    position = 3 if hook.endswith("_end") else 2  # of `batch_idx` in the arguments behind `trainer`

    def log(self: DeviceStatsMonitor, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not _log_due(trainer, args[position]):
            return
        stats = [source.get_device_stats(trainer.strategy.root_device) for source in self._sources]
        prefix = f"{type(self).__qualname__}.{hook}/"
        if metrics := {prefix + name: value for found in stats for name, value in found.items()}:
            trainer.log_to_loggers(metrics)

    return log


class GradientNorm(Callback):
    """Logs the L2 norm of the gradients that each optimizer steps with.

    It is the norm over the whole accumulation window, unscaled, before clipping. Clipping by norm computes it anyway; then
    that number is taken and no pass over the gradients is added. It stays on its device until a logger reads it.

    Args:
        name: what it is logged as; with several optimizers, ``/0``, ``/1``, … is appended.
        prog_bar: also show it in the progress bar.

    Examples:
        >>> GradientNorm(prog_bar=True).name
        'grad_norm'
    """

    def __init__(self, name: str = "grad_norm", prog_bar: bool = False) -> None:
        self.name = name
        self.prog_bar = prog_bar
        self._norms: dict[int, torch.Tensor | None] = {}  # by the id of an optimizer; None: clipping will say

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        by_norm = trainer.gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM)
        own = overrides_method(pl_module, "configure_gradient_clipping", LightningModule)
        norm = pl_module._clipped_norms.pop(id(optimizer), None)  # manual optimization has clipped already
        if norm is None and not (trainer.gradient_clip_val and by_norm and not own):
            norm = trainer.precision_plugin.gradient_norm(optimizer)
        self._norms[id(optimizer)] = norm

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for index, optimizer in enumerate(trainer.optimizers) if self._norms else ():
            norm = self._norms.pop(id(optimizer), None)
            norm = pl_module._clipped_norms.pop(id(optimizer), norm)
            if norm is not None:
                suffix = f"/{index}" if len(trainer.optimizers) > 1 else ""
                pl_module.log(self.name + suffix, norm, prog_bar=self.prog_bar)


class DeviceStatsMonitor(Callback):
    """Logs what the device reports around batches: memory on GPUs, load on the CPU.

    Args:
        cpu_stats: log the load of the host's CPU as well (needs ``psutil``); None does so only if the run is on the CPU,
            False not even then.

    Raises:
        MisconfigurationException: the trainer has no logger.
        ModuleNotFoundError: ``psutil`` is needed and not installed.

    Examples:
        >>> monitor = DeviceStatsMonitor(cpu_stats=False)
    """

    def __init__(self, cpu_stats: bool | None = None) -> None:
        self._cpu_stats = cpu_stats
        self._sources: list[Accelerator] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate", "test"):
            return
        _require_logger(self, trainer)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        self._sources = [] if on_cpu else [trainer.accelerator]
        if self._cpu_stats or (self._cpu_stats is None and on_cpu):
            import_optional("psutil", "to log the load of the CPU (`DeviceStatsMonitor(cpu_stats=False)` does without)")
            self._sources.append(trainer.accelerator if on_cpu else CPUAccelerator())

    on_train_batch_start = _logs_stats("on_train_batch_start")
    on_train_batch_end = _logs_stats("on_train_batch_end")
    on_validation_batch_start = _logs_stats("on_validation_batch_start")
    on_validation_batch_end = _logs_stats("on_validation_batch_end")
    on_test_batch_start = _logs_stats("on_test_batch_start")
    on_test_batch_end = _logs_stats("on_test_batch_end")


# Seconds on the host, or an event of CUDA.
Timestamp: TypeAlias = "float | torch.cuda.Event"


class _StageThroughput:
    """The batches of one stage: ``waiting`` until a row is due, then in ``throughput``."""

    def __init__(self, throughput: Throughput, start: Timestamp, num_batches: int) -> None:
        self.throughput = throughput
        self.batch_start = start
        self.num_batches = num_batches  # of all passes: the x axis of evaluations
        self.waiting: list[tuple[Any, Any, dict[str, int]]] = []  # start, end, counts
        self.totals: dict[str, Any] = {"time": 0.0}

    def restart_clock(self, now: Timestamp) -> None:
        """What came since the last batch does not count."""
        self.batch_start = now

    def add_batch(self, end: Timestamp, counts: dict[str, int]) -> None:
        """A batch is done, and the next one begins."""
        self.waiting.append((self.batch_start, end, counts))
        self.batch_start = end
        self.num_batches += 1

    def compute_metrics(self, flops: int | None) -> dict[str, float]:
        """The metrics up to the last batch."""
        if isinstance(self.batch_start, torch.cuda.Event):
            self.batch_start.synchronize()  # sync: only when a row is due
        for start, end, counts in self.waiting:
            seconds = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            self.totals["time"] += max(seconds, 1e-9)  # must grow, whatever the resolution of the clock
            self.totals.update({name: self.totals.get(name, 0) + count for name, count in counts.items()})
            self.throughput.update(**self.totals, flops=flops)
        self.waiting.clear()
        return self.throughput.compute()


class ThroughputMonitor(Callback):
    """Logs batches, samples and FLOPs per second, as ``<stage>/device/samples_per_sec`` and the like (see `Throughput`).

    Training is counted without the validation inside. A row comes every ``log_every_n_steps``; only then the host waits for
    CUDA, which itself notes when each batch is done. For FLOPs, set ``flops_per_batch`` in the module.

    Args:
        batch_size_fn: gives the number of samples of a batch.
        length_fn: gives the length of a batch's items, such as its number of tokens; None logs none.
        **kwargs: ``window_size`` (batches the rates are taken over) and ``separator``, for `Throughput`.

    Examples:
        >>> monitor = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=20)
    """

    def __init__(self, batch_size_fn: Callable[[Any], int], length_fn: Callable[[Any], int] | None = None,
                 **kwargs: Any) -> None:  # fmt: skip
        self.batch_size_fn = batch_size_fn
        self.length_fn = length_fn
        self.kwargs = kwargs
        self.available_flops: int | None = None
        self._throughputs: dict[str, _StageThroughput] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        dtype = trainer.precision_plugin.dtype
        self.available_flops = get_available_flops(trainer.strategy.root_device, dtype)
        self._throughputs = {}
        if not hasattr(pl_module, "flops_per_batch"):
            rank_zero_warn("`ThroughputMonitor` logs no FLOPs, because the LightningModule has no `flops_per_batch`.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stage = trainer.stage.value
        before = self._throughputs[stage].num_batches if stage in self._throughputs else 0
        throughput = Throughput(self.available_flops, trainer.world_size, **self.kwargs)
        self._throughputs[stage] = _StageThroughput(throughput, _take_timestamp(trainer), before)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if "train" in self._throughputs:
            self._throughputs["train"].restart_clock(_take_timestamp(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
                           batch_idx: int, *_: Any, **__: Any) -> None:  # fmt: skip
        every = trainer.log_every_n_steps
        training = trainer.training
        stage = trainer.stage.value
        if not trainer.loggers or every == 0 or trainer.sanity_checking:
            return
        counts = {"batches": 1, "samples": self.batch_size_fn(batch)}
        if self.length_fn is not None:
            counts["lengths"] = self.length_fn(batch)
        pace = self._throughputs[stage]
        pace.add_batch(_take_timestamp(trainer), counts)
        if _log_due(trainer, batch_idx) and (not training or trainer.optimization.stepped):
            metrics = pace.compute_metrics(getattr(pl_module, "flops_per_batch", None))
            metrics = {f"{stage}{pace.throughput.separator}{name}": value for name, value in metrics.items()}
            step = trainer.progress.log_step if training else pace.num_batches
            trainer.log_to_loggers(metrics, step, with_epoch=training)

    on_validation_start = on_test_start = on_predict_start = on_train_start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = on_train_batch_end


def _take_timestamp(trainer: Trainer) -> Timestamp:
    """Now, as seconds on the host, or as an event that CUDA reaches when the work before it is done."""
    if trainer.strategy.root_device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class TrainingSpikeException(RuntimeError):
    """The loss jumped in this batch; raised by `SpikeDetection` on all ranks."""

    def __init__(self, batch_idx: int, details: str) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}: {details}")
        self.batch_idx = batch_idx


class SpikeDetection(Callback):
    """Ends training when the loss jumps, and notes that batch and the one before.

    A spike is worse than the mean of the last ``window`` finite losses, by ``atol`` or more and by ``rtol`` times that mean
    or more. One rank stops all. The rule needs each loss as a number, so every batch waits for the device once.

    Args:
        mode: ``"min"`` if a larger loss is worse, ``"max"`` if a smaller one is.
        window: how many of the last finite losses the mean is taken over.
        warmup: batches at the start of each epoch that are not judged.
        atol: least absolute distance from the mean; None leaves this bound out.
        rtol: least distance as a multiple of the mean; None leaves this bound out.
        exclude_batches_path: folder for ``skip_batches.json``, the numbers of those batches; by default the working folder.
        finite_only: NaN and infinity are spikes, too.

    Raises:
        ValueError: ``mode`` is neither ``"min"`` nor ``"max"``.
        TrainingSpikeException: in a run, at a spike.

    Examples:
        >>> SpikeDetection(window=20).running_mean
        nan
    """

    _changeable = "window"

    def __init__(
        self, mode: str = "min", window: int = 10, warmup: int = 1, atol: float | None = None, rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None, finite_only: bool = True,
    ) -> None:  # fmt: skip
        if mode not in ("min", "max"):
            raise ValueError(f"`SpikeDetection(mode={mode!r})` is not known. Use 'min' or 'max'.")
        self.mode = mode
        self.warmup = warmup
        self.atol = atol
        self.rtol = rtol
        self.finite_only = finite_only
        self.exclude_batches_path = exclude_batches_path
        self._window = window
        self.bad_batches: list[int] = []  # of all runs: it is the content of the file
        self._forget_run()

    def _forget_run(self) -> None:
        self.last_val = 0.0
        self._recent: deque[float] = deque(maxlen=self._window)

    @property
    def state_key(self) -> str:
        # Not the plain name: under that one other frameworks expect a state of another form.
        return self._generate_state_key(window=self._window)

    def state_dict(self) -> dict[str, Any]:
        return {"bad_batches": self.bad_batches, "last_val": self.last_val, "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad_batches = list(state_dict["bad_batches"])
        self.last_val = state_dict["last_val"]
        self._recent.extend(state_dict["recent"])

    @property
    def running_mean(self) -> float:
        """The mean of the last finite losses; NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:  # fmt: skip
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        value = math.nan if loss is None else float(loss)  # sync: training goes on only if the number is good
        spike = loss is not None and batch_idx >= self.warmup and self._is_far(value)
        if trainer.strategy.reduce_boolean_decision(spike, all=False):
            path = self._note_spike(batch_idx, writes=trainer.is_global_zero)
            details = f"the loss is {value} after a mean of {self.running_mean}; batches to skip are in `{path}`."
            raise TrainingSpikeException(batch_idx, details)
        self.last_val = value
        if math.isfinite(value):
            self._recent.append(value)

    def _is_far(self, value: float) -> bool:
        """Is it worse than the mean by both distances, or no finite number?"""
        mean = self.running_mean
        worse_by = value - mean if self.mode == "min" else mean - value
        far = worse_by > 0 and worse_by >= (self.atol or 0) and worse_by >= abs(mean) * (self.rtol or 0)
        return far or (self.finite_only and not math.isfinite(value))

    def _note_spike(self, batch_idx: int, writes: bool) -> str:
        """Adds this batch and the one before to those to skip. Returns the path of the file that lists them."""
        self.bad_batches += [batch_idx - 1, batch_idx]
        path = os.path.join(self.exclude_batches_path or os.getcwd(), "skip_batches.json")
        if writes:
            ensure_dir(os.path.dirname(path))
            atomic_write(path, json.dumps(self.bad_batches, indent=4).encode())
        return path


def _require_logger(callback: Callback, trainer: Trainer) -> None:
    if not trainer.loggers:
        what = f"`{type(callback).__name__}` cannot be used with a `Trainer` that has no logger."
        fix = "Pass a logger, or `Trainer(logger=True)` instead of `Trainer(logger=False)`, or remove the callback."
        raise MisconfigurationException(f"{what} {fix}")


def _log_due(trainer: Trainer, batch_idx: int = 0) -> bool:
    """Do the loggers get values of this batch? In training steps are counted, in evaluation batches of the loader."""
    every = trainer.log_every_n_steps
    count = trainer.progress.log_step if trainer.training else batch_idx
    return every > 0 and (count + 1) % every == 0 and not trainer.sanity_checking


def _named_optimizers(trainer: Trainer) -> list[tuple[str, Optimizer, str | None]]:
    """Those with a scheduler, in the order of the schedulers, then the others; names are made different by ``-1``, …"""
    configs = trainer.lr_scheduler_configs
    found: list[tuple[str | None, Optimizer, str | None]] = [
        (c.name, c.scheduler.optimizer, c.interval) for c in configs
    ]
    found += [(None, opt, None) for opt in trainer.optimizers if not any(opt is other for _, other, _ in found)]
    seen: dict[str, int] = {}
    named: list[tuple[str, Optimizer, str | None]] = []
    for name, optimizer, interval in found:
        if all("lr" in group for group in optimizer.param_groups):  # else the stand-in of a run without optimizer
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
        what = f"`LearningRateMonitor`: `{base}` has duplicated parameter group names: {repeated}."
        raise MisconfigurationException(f"{what} Give every group of one optimizer another `name`, or none.")
    return [f"{base}/{name}" for name in names]
