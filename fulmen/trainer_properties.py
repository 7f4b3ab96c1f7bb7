"""What users read from a `Trainer`: where it runs, how far it is, what was logged, and its parts by kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import inf
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.checkpointing import Checkpoint
from fulmen.callbacks.early_stopping import EarlyStopping
from fulmen.callbacks.progress_bar import ProgressBar
from fulmen.callbacks.timer import GradientAccumulationScheduler
from fulmen.defaults import run_dir
from fulmen.loops.dataloading import loaders_as_given
from fulmen.loops.progress import steps_per_epoch
from fulmen.module import LightningModule
from fulmen.storage.filesystem import is_remote
from fulmen.utilities.introspection import alias_property, overrides_method
from fulmen.utilities.rank_zero import rank_zero_info
from fulmen.utilities.types import GradClipAlgorithmType, RunningStage, TrainerFn, TrainerState, TrainerStatus

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen.callbacks.callback import Callback
    from fulmen.data.sources import Sources
    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.precision import Precision
    from fulmen.engine.strategy import Strategy
    from fulmen.loggers.logger import Logger
    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.loops.fit import FitLoop
    from fulmen.loops.optimize import Optimization
    from fulmen.loops.predict import PredictionLoop
    from fulmen.loops.progress import Progress, ValidationSchedule
    from fulmen.loops.resume_state import ResumeState
    from fulmen.loops.signals import Signals
    from fulmen.metrics.logbook import LogBook
    from fulmen.settings import Settings
    from fulmen.utilities.types import LRSchedulerConfig, PrecisionName


def _first_callback(kind: type, doc: str) -> Any:
    """A property: the first callback of a kind, or None."""
    return property(lambda self: next((c for c in self.callbacks if isinstance(c, kind)), None), doc=doc)


def _callbacks_of_kind(kind: type, doc: str) -> Any:
    """A property: all callbacks of a kind."""
    return property(lambda self: [c for c in self.callbacks if isinstance(c, kind)], doc=doc)


def _stage_flag(stage: RunningStage, doc: str) -> Any:
    """A property: whether that stage runs; setting it to True makes it run."""

    def enter_stage(self: TrainerProperties, on: bool) -> None:
        self.state.stage = stage if on else None

    return property(lambda self: self.state.stage == stage, enter_stage, doc=doc)


class TrainerProperties:
    """The readable side of `Trainer`.

    Annotations beside a forwarding property are for readers and type checkers; tests/typing compares them with the
    attribute that is forwarded to.
    """

    # Parts, made by the constructor of `Trainer`.
    state: TrainerState
    strategy: Strategy
    fit_loop: FitLoop
    validate_loop: EvaluationLoop
    test_loop: EvaluationLoop
    predict_loop: PredictionLoop
    callbacks: list[Callback]
    book: LogBook
    signals: Signals
    sources: Sources
    _loggers: list[Logger]
    _log_dir: str | None
    _num_nodes: int

    def _keep_settings(self, checked: Settings) -> None:
        """The arguments that users read, and may change between and during runs."""
        self.accumulate_grad_batches: int = checked.accumulate_grad_batches
        self.barebones: bool = checked.barebones
        self.check_val_every_n_epoch: int | None = checked.check_val_every_n_epoch
        self.detect_anomaly: bool = checked.detect_anomaly
        self.enable_autolog_hparams: bool = checked.enable_autolog_hparams
        self.fast_dev_run: int | bool = checked.fast_dev_run
        self.gradient_clip_algorithm: GradClipAlgorithmType | None = checked.gradient_clip_algorithm
        self.gradient_clip_val: int | float | None = checked.gradient_clip_val
        self.inference_mode: bool = checked.inference_mode
        self.limit_predict_batches: int | float = checked.limit_predict_batches
        self.limit_test_batches: int | float = checked.limit_test_batches
        self.limit_train_batches: int | float = checked.limit_train_batches
        self.limit_val_batches: int | float = checked.limit_val_batches
        self.log_every_n_steps: int = checked.log_every_n_steps
        self.num_sanity_val_steps: int | float = checked.num_sanity_val_steps
        self.overfit_batches: int | float = checked.overfit_batches
        self.reload_dataloaders_every_n_epochs: int = checked.reload_dataloaders_every_n_epochs
        self.strict_resume: bool = checked.strict_resume
        self.use_distributed_sampler: bool = checked.use_distributed_sampler
        self.val_check_interval: int | float = checked.val_check_interval
        self.val_check_time_s: float | None = checked.val_check_time_s
        self._default_root_dir: str = checked.default_root_dir

    # ------------------------------------------------------------------ where it runs

    global_rank: int = alias_property("strategy.global_rank", "Index of this process over all nodes.")
    local_rank: int = alias_property("strategy.local_rank", "Index of this process on its node.")
    node_rank: int = alias_property("strategy.node_rank", "Index of this node.")
    world_size: int = alias_property("strategy.world_size", "Number of processes over all nodes.")
    is_global_zero: bool = alias_property("strategy.is_global_zero", "Whether this process speaks for all.")
    accelerator: Accelerator = alias_property("strategy.accelerator", "What kind of device is used.")
    precision_plugin: Precision = alias_property("strategy.precision_plugin", "In which numbers the model computes.")
    precision: PrecisionName = alias_property("strategy.precision_plugin.precision", "The precision by its full name.")

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of ``precision="16-mixed"``, None with others."""
        return self.precision_plugin.scaler

    @property
    def num_nodes(self) -> int:
        """How many machines take part."""
        return getattr(self.strategy, "num_nodes", self._num_nodes)

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices on this node."""
        devices = getattr(self.strategy, "parallel_devices", None) or [self.strategy.root_device]
        return [device.index if device.index is not None else i for i, device in enumerate(devices)]

    @property
    def num_devices(self) -> int:
        """Devices per node."""
        return len(self.device_ids)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """Arguments a distributed sampler would get: "num_replicas" and "rank"; None on one device."""
        return getattr(self.strategy, "distributed_sampler_kwargs", None)

    # ------------------------------------------------------------------ what is trained, with what

    lightning_module: LightningModule = alias_property(
        "strategy.lightning_module", "The module that is run, never wrapped; None before the first run."
    )
    model: torch.nn.Module | None = alias_property(
        "strategy.model", "The module as it is called, wrapped if the strategy wraps."
    )
    optimizers: list[Optimizer] = alias_property("strategy.optimizers", "The optimizers of this run.")
    lr_scheduler_configs: list[LRSchedulerConfig] = alias_property(
        "strategy.lr_scheduler_configs", "The schedulers of this run, with their settings."
    )

    @property
    def train_dataloader(self) -> Iterable[Any] | None:
        """The training loaders, nested as they were given; None before they are made."""
        return loaders_as_given(self.fit_loop)

    @property
    def val_dataloaders(self) -> Iterable[Any] | None:
        """The validation loaders, nested as they were given; None before they are made."""
        return loaders_as_given(self.fit_loop.val_loop) or loaders_as_given(self.validate_loop)

    @property
    def test_dataloaders(self) -> Iterable[Any] | None:
        """The test loaders, nested as they were given; None before they are made."""
        return loaders_as_given(self.test_loop)

    @property
    def predict_dataloaders(self) -> Iterable[Any] | None:
        """The predict loaders, nested as they were given; None before they are made."""
        return loaders_as_given(self.predict_loop)

    @property
    def first_train_loader(self) -> Iterable[Any] | None:
        """The first of the training loaders, as it is read; None before they are made."""
        loaders = self.fit_loop.loaders
        return next(iter(loaders.flattened), None) if loaders is not None else None

    # ------------------------------------------------------------------ how far it is

    max_epochs: int | None = alias_property("fit_loop.max_epochs", "Stop after this many epochs; -1 means no limit.")
    min_epochs: int | None = alias_property("fit_loop.min_epochs", "Do not stop early before this many epochs.")
    max_steps: int = alias_property("fit_loop.max_steps", "Stop after this many optimizer steps; -1 means no limit.")
    min_steps: int | None = alias_property("fit_loop.min_steps", "Do not stop early before this many optimizer steps.")
    current_epoch: int = alias_property("fit_loop.progress.epochs", "Epochs finished.")
    global_step: int = alias_property("fit_loop.progress.steps", "Optimizer steps made.")
    is_last_batch: bool = alias_property(
        "fit_loop.progress.is_last_batch", "Whether this is the last batch of the epoch."
    )
    num_training_batches: float = alias_property(
        "fit_loop.num_batches", "Training batches per epoch; inf before they are known."
    )
    num_predict_batches: list[float] = alias_property("predict_loop.max_batches", "Batches of each predict loader.")
    num_test_batches: list[float] = alias_property("test_loop.max_batches", "Batches of each test loader.")
    callback_metrics: dict[str, Tensor] = alias_property(
        "book.callback_metrics", "Newest value per logged name, as tensors."
    )
    logged_metrics: dict[str, Tensor] = alias_property(
        "book.logged_metrics", "Newest value per name that goes to loggers, as tensors."
    )
    progress_bar_metrics: dict[str, float] = alias_property(
        "book.progress_bar_metrics", "Newest value per name of the progress bar, as numbers."
    )
    received_sigterm: bool = alias_property("signals.received_sigterm", "Whether the process was told to end.")
    stage: RunningStage = alias_property(
        "state.stage", "What is running: training, validation inside it, the sanity check, ...; None between runs."
    )
    val_check_batch: float = alias_property("fit_loop.validation.interval", "Batches from one validation to the next.")
    training: bool = _stage_flag(
        RunningStage.TRAINING, "Whether a training batch is at work; False while fit validates."
    )
    validating: bool = _stage_flag(RunningStage.VALIDATING, "Whether validation runs, inside fit or alone.")
    testing: bool = _stage_flag(RunningStage.TESTING, "Whether testing runs.")
    predicting: bool = _stage_flag(RunningStage.PREDICTING, "Whether prediction runs.")
    sanity_checking: bool = _stage_flag(RunningStage.SANITY_CHECKING, "Whether the validation before training runs.")

    resume_state: ResumeState = alias_property(
        "fit_loop.resume_state", "What checkpoints hold to continue inside an epoch."
    )
    validation_schedule: ValidationSchedule = alias_property(
        "fit_loop.validation", "When training is interrupted to validate."
    )

    @property
    def progress(self) -> Progress:
        """The counters of training."""
        return self.fit_loop.progress

    @property
    def optimization(self) -> Optimization:
        """Forward, backward and step of this run."""
        return self.fit_loop.optimization

    @property
    def evaluating(self) -> bool:
        """Whether validation, testing or the sanity check runs."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last run ended with an exception."""
        return self.state.status == TrainerStatus.INTERRUPTED

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader."""
        loop = self.validate_loop if self.state.fn == TrainerFn.VALIDATING else self.fit_loop.val_loop
        return list(loop.max_batches)

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Batches of each validation loader the sanity check looks at."""
        return [min(self.num_sanity_val_steps, n) for n in self.fit_loop.val_loop.max_batches]

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps fit will make; loads the training loader if that is needed to know."""
        if self.max_epochs == -1:
            return inf if self.max_steps == -1 else self.max_steps
        if self.fit_loop.loaders is None and self.lightning_module is not None:
            rank_zero_info("Loading `train_dataloader` to estimate number of stepping batches.")
            self.fit_loop.load_data()
        if self.num_training_batches == inf:
            return self.max_steps
        schedules = [c for c in self.callbacks if isinstance(c, GradientAccumulationScheduler)]
        window = schedules[0].get_accumulate_grad_batches if schedules else lambda _: self.accumulate_grad_batches
        epochs = range(max(self.max_epochs or 0, 1))
        total = sum(steps_per_epoch(self.num_training_batches, window(epoch)) for epoch in epochs)
        return min(total, self.max_steps) if self.max_steps != -1 else total

    @property
    def enable_validation(self) -> bool:
        """Whether there is something to validate with."""
        return (
            self.lightning_module is not None
            and self.sources.source_of("val").is_defined()
            and overrides_method(self.lightning_module, "validation_step", LightningModule)
            and self.limit_val_batches > 0
        )

    # ------------------------------------------------------------------ files, loggers and callbacks

    @property
    def default_root_dir(self) -> str:
        """Where files go unless something says otherwise."""
        root = self._default_root_dir
        return root if is_remote(root) else os.path.normpath(os.path.expanduser(root))

    @property
    def log_dir(self) -> str | None:
        """The directory of the first logger, or the root directory; in other processes what it is on rank 0."""
        if not self.is_global_zero and self._log_dir is not None:
            return self._log_dir
        return run_dir(self.loggers[0]) if self.loggers else self.default_root_dir

    @property
    def loggers(self) -> list[Logger]:
        """All loggers; an empty list without any."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: Iterable[Logger] | None) -> None:
        self._loggers = list(loggers or [])

    @property
    def logger(self) -> Logger | None:
        """The first logger."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    @property
    def ckpt_path(self) -> str | os.PathLike[str] | None:
        """The checkpoint that was loaded last. Set before a call, it is what the call loads."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, ckpt_path: str | os.PathLike[str] | None) -> None:
        self._ckpt_path = ckpt_path
        self._ckpt_path_by_user = bool(ckpt_path)

    checkpoint_callback: Checkpoint | None = _first_callback(Checkpoint, "The first checkpoint callback.")
    checkpoint_callbacks: list[Checkpoint] = _callbacks_of_kind(Checkpoint, "All checkpoint callbacks.")
    early_stopping_callback: EarlyStopping | None = _first_callback(EarlyStopping, "The first `EarlyStopping`.")
    early_stopping_callbacks: list[EarlyStopping] = _callbacks_of_kind(EarlyStopping, "All `EarlyStopping` callbacks.")
    progress_bar_callback: ProgressBar | None = _first_callback(ProgressBar, "The progress bar.")
