"""Trial runs in the middle of a run: loops of their own, after which everything is as it was.

Whoever searches for something (a learning rate, a batch size) opens `Trials` through `Trainer.open_trials`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.checkpoint.in_memory import capture_run
from fulmen.data import loaders as loader_tools
from fulmen.data.loader_capture import LoaderCapture
from fulmen.data.loader_state import dataset_and_batch_size
from fulmen.loggers.logger import DummyLogger
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.fit import FitLoop
from fulmen.loops.predict import PredictionLoop
from fulmen.loops.progress import Position, StopConditions
from fulmen.metrics.logbook import LogBook
from fulmen.profilers.profiler import PassThroughProfiler
from fulmen.utilities.capture import Restore, capture_attributes
from fulmen.utilities.seed import isolate_rng
from fulmen.utilities.types import LRSchedulerConfig, RunningStage, TrainerFn

if TYPE_CHECKING:
    from fulmen.callbacks.callback import Callback
    from fulmen.trainer import Trainer

# Where the trainer has the loop of each verb.
LOOPS = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}


class TrialEnd(StopConditions):
    """A trial ends after so many optimizer steps, when it is told to stop, or when there are no batches."""

    def __init__(self, loop: TrialLoop, num_steps: float) -> None:
        super().__init__(loop)
        self.last_step = loop.progress.steps + num_steps
        self._epochs = loop.progress.epochs  # and batches, when it was asked last
        self._batches = -1

    def is_over(self) -> bool:
        progress = self.loop.progress
        used_up = progress.epochs > self._epochs and progress.batches == self._batches
        self._epochs = progress.epochs
        self._batches = progress.batches
        return used_up or self.loop.num_batches == 0 or self.ends_epoch()

    def ends_epoch(self) -> bool:
        return self.trainer.should_stop or self.loop.progress.steps >= self.last_step

    def is_allowed(self) -> bool:
        return True


class TrialLoop(FitLoop):
    """Training from where the run stands; counters, batches and schedules are its own.

    Arguments:
        num_steps: of the optimizer, after which it ends, whatever the limits of the run say.
    """

    def __init__(self, trainer: Trainer, num_steps: float) -> None:
        run = trainer.fit_loop
        super().__init__(trainer, run.max_epochs, None)
        self.max_steps = run.max_steps
        self.progress = replace(run.progress, batch=0, is_last_batch=False, position=Position.EPOCH_START)
        self.stopping = TrialEnd(self, num_steps)

    def teardown(self) -> None:
        """Ends the workers of training and validation."""
        if self.feed is not None:
            self.feed.close_loaders()
        self.val_loop.teardown()


class IdleSchedule(LRScheduler):
    """Stands for a scheduler of the run, for those who ask the module for it: its steps change nothing."""

    def __init__(self, optimizer: Optimizer) -> None:
        # Not the constructor of the base, which makes a step and wraps that of the optimizer.
        self.optimizer = optimizer
        self.last_epoch = 0
        self.base_lrs = self.get_lr()

    def get_lr(self) -> list[Any]:
        return [group["lr"] for group in self.optimizer.param_groups]

    get_last_lr = get_lr

    def step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


class Trials:
    """The trial runs of one search; what one has changed, the next one finds."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loaders = LoaderCapture()
        self.num_samples: float = inf  # in the dataset that the last trial read; infinite if not known
        self._run = vars(trainer)[LOOPS[trainer.state.fn]]  # type: ignore[index]
        self._reloads: list[Restore] = []

    @property
    def interrupted(self) -> bool:
        """Was the process told to end? The run does so at its next step, and no more trials should run."""
        return self.trainer.signals.pending is not None

    def run_loop(self, num_steps: float = inf) -> FitLoop | EvaluationLoop:
        """One trial of the verb that runs: for fit, so many optimizer steps; else what the limits allow."""
        trainer = self.trainer
        verb = trainer.state.fn
        assert verb is not None
        loop = self._make_loop(verb, num_steps)
        vars(trainer)[LOOPS[verb]] = loop
        trainer.book.clear()
        try:
            if isinstance(loop, FitLoop):
                with torch.enable_grad():
                    loop.begin_run()
                    loop.run()
            else:
                loop.run()
        finally:
            if loop.loaders is not None:
                sizes = [dataset_and_batch_size(loader)[0] for loader in loop.loaders.flattened]
                self.num_samples = max((size for size in sizes if size is not None), default=inf)
            loop.teardown()
        return loop

    def reload_afterwards(self, now: bool) -> None:
        """When the trials are over, the run asks for its loaders again, as what they are made from has changed.

        Arguments:
            now: also if it has asked for none yet, which it would do when it begins.
        """
        if now or self._run.loaders is not None:
            self._reloads.append(partial(_reload_loaders, self._run))

    def close_trials(self) -> None:
        """Everything was put back."""
        for reload in self._reloads:
            reload()

    def _make_loop(self, verb: TrainerFn, num_steps: float) -> FitLoop | EvaluationLoop:
        if verb == TrainerFn.FITTING:
            return TrialLoop(self.trainer, num_steps)
        if verb == TrainerFn.PREDICTING:
            prediction = PredictionLoop(self.trainer)
            prediction.return_predictions = False
            return prediction
        evaluation = EvaluationLoop(self.trainer, RunningStage(verb.value))
        evaluation.verbose = False
        return evaluation


@contextmanager
def open_trials(
    trainer: Trainer, callbacks: Sequence[Callback], limits: Mapping[str, int | float]
) -> Generator[Trials]:
    """Inside, trials can be run; afterwards, and after an exception, the run is as it was.

    Weights, optimizers, random numbers and loaders are put back, the trainer has its own loops, counters, callbacks,
    loggers, metrics and profiler again. Signals wait until then.

    Arguments:
        callbacks: those of the trials, in the place of the run's.
        limits: `limit_train_batches` and the like for the trials.
    """
    run = trainer.fit_loop
    trials = Trials(trainer)
    with ExitStack() as leaving:
        leaving.enter_context(isolate_rng())
        leaving.callback(trials.close_trials)
        leaving.enter_context(trainer.signals.postpone_exit())
        if run.loaders is not None:
            leaving.callback(loader_tools.set_epoch, run.loaders, run.announced_epoch)
        leaving.callback(capture_run(trainer))
        leaving.callback(_capture_bindings(trainer))
        leaving.callback(_refresh_module, trainer)
        leaving.callback(capture_attributes(trainer))
        leaving.callback(trials.loaders.restore_loaders)
        _prepare_trainer(trainer, trials, callbacks, limits)
        yield trials


def _prepare_trainer(
    trainer: Trainer, trials: Trials, callbacks: Sequence[Callback], limits: Mapping[str, int | float]
) -> None:
    """Lets the trainer be one for trials: nobody listens, nothing is written down."""
    verb = trainer.state.fn
    assert verb is not None
    stage = RunningStage.TRAINING if verb == TrainerFn.FITTING else RunningStage(verb.value)
    vars(trainer).update(
        callbacks=list(callbacks),
        book=LogBook(),
        profiler=PassThroughProfiler(),
        sources=trainer.sources.watched_by(trials.loaders.add_loaders),
        state=replace(trainer.state, stage=stage),
        should_stop=False,
        log_every_n_steps=0,
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    trainer.lr_scheduler_configs[:] = [
        LRSchedulerConfig(IdleSchedule(trainer.optimizers[0]), config.name, config.interval, config.frequency)
        for config in trainer.lr_scheduler_configs
    ]
    _refresh_module(trainer)
    trainer.book.connect(
        trainer.lightning_module, has_loggers=bool(trainer.loggers), distributed=trainer.world_size > 1
    )
    trainer.compile_hooks()


def _refresh_module(trainer: Trainer) -> None:
    """The module, and all in it, log to the logbook that the trainer has now."""
    trainer.lightning_module.trainer = trainer


def _capture_bindings(trainer: Trainer) -> Restore:
    """Remember what stepping and going backward calls, and the schedulers."""
    strategy = trainer.strategy
    run_backward = strategy.run_backward
    optimizers = [capture_attributes(optimizer) for optimizer in trainer.lightning_optimizers]
    configs = trainer.lr_scheduler_configs
    schedulers = list(configs)

    def restore_bindings() -> None:
        strategy.use_backward(run_backward)
        for restore in optimizers:
            restore()
        configs[:] = schedulers

    return restore_bindings


def _reload_loaders(loop: FitLoop | EvaluationLoop) -> None:
    if loop.loaders is not None and loop.feed is not None:
        loop.feed.close_loaders()
    loop.drop_loaders()
    loop.load_data()
    if isinstance(loop, EvaluationLoop):
        loop.open_feed()
    elif loop.trainer.enable_validation:
        loop.val_loop.drop_loaders()
        loop.val_loop.load_data()
