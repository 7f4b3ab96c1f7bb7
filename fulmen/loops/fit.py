"""The story of training. Start reading at `FitLoop.run`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

from fulmen.checkpoint.lightning_format import LOG_STEP_PENDING, as_attributes, to_loops
from fulmen.checkpoint.snapshot import progress_state_dict
from fulmen.data import loaders as loader_tools
from fulmen.data.combined import CombinedLoader
from fulmen.data.feed import Feed
from fulmen.engine.precision import MixedPrecision
from fulmen.loops import cadence, checks, preemption
from fulmen.loops.dataloading import build_fetch_profiler, build_transfer, prepare_train_loaders
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.join import Join, join_training
from fulmen.loops.loop import Loop
from fulmen.loops.optimize import Optimization, optimization_for
from fulmen.loops.progress import Position, Progress
from fulmen.loops.resume_state import Memory
from fulmen.loops.shortfall import ShortLoaderMonitor
from fulmen.metrics.reduce import close_epoch, report_train_epoch
from fulmen.optimizers import Schedulers
from fulmen.profilers.profiler import measured
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning
from fulmen.utilities.introspection import takes_argument
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import isolate_rng
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from fulmen.loops.hook_plan import HookPlan
    from fulmen.trainer import Trainer

SKIP_EPOCH = -1


def _counters(fit_loop: FitLoop) -> Any:
    """What the API's loops count, made from `progress` when it is asked for."""
    trainer = fit_loop.trainer
    progress = progress_state_dict(trainer) if trainer.lightning_module is not None else fit_loop.progress.state_dict()
    counters = as_attributes(to_loops(progress)["fit_loop"])
    loop, batches = counters.epoch_loop, counters.epoch_loop.batch_progress
    loop.batch_idx, loop.total_batch_idx = batches.current.ready - 1, batches.total.ready - 1
    loop.global_step, loop.val_loop = fit_loop.progress.steps, fit_loop.val_loop
    return counters


class FitLoop(Loop):
    """Training from the first epoch to the last.

    Owns the counters (`progress`), the batches (`feed`) and the validation inside training (`val_loop`).
    """

    lasting = (
        "max_epochs", "min_epochs", "max_steps", "min_steps", "progress", "val_loop", "num_batches", "automatic",
        "validated_at",
    )  # fmt: skip

    def __init__(self, trainer: Trainer, max_epochs: int | None, min_epochs: int | None) -> None:
        self.trainer = trainer
        self.max_epochs, self.min_epochs = max_epochs, min_epochs
        self.max_steps = -1
        self.min_steps: int | None = None
        self.progress = Progress()
        self.val_loop = EvaluationLoop(trainer, RunningStage.VALIDATING, inside_fit=True)
        self.feed: Feed | None = None
        self.loaders: CombinedLoader | None = None
        self.given_loaders: Any = None
        self.num_batches: float = inf
        self.join = Join(trainer)  # what ranks with fewer batches do
        self.iterator_feed = False  # does the step pull batches itself?
        self.shortfall = ShortLoaderMonitor()
        self.hooks: HookPlan
        self.optimization: Optimization
        self.schedulers: Schedulers
        self.automatic = False  # does the next run go on by itself?
        self.resumed = False  # the first epoch continues where a checkpoint was taken
        self.memory = Memory(self)  # what that checkpoint knows, and what the next one is told
        self.loaded_at_epoch: int | None = None
        self.announced_epoch = -1  # the samplers know of
        self.validated_at = -1  # batches before the last validation
        self._validated_at_s = 0.0
        self._said_to_continue = False

    # Counters under the names of the API, to be read: `epoch_loop.batch_progress.current.ready` and the like.
    epoch_loop = property(lambda self: _counters(self).epoch_loop)
    epoch_progress = property(lambda self: _counters(self).epoch_progress)

    # ------------------------------------------------------------------ the story

    def run(self) -> None:
        """All of training."""
        self.memory.starts.clear()
        self.memory.note_start()
        self.shortfall = ShortLoaderMonitor()
        with isolate_rng():
            self.sanity_check()
        self.hooks = self.trainer.hooks
        self.trainer.book.enter_scope("train")
        if self.loaders is None:  # else `estimated_stepping_batches` was asked for in `configure_optimizers`
            self.load_data()
        elif self.resumed and self.trainer.limit_train_batches != 0:
            self.memory.open_feed()
        configs = self.trainer.lr_scheduler_configs if self.trainer.lightning_module.automatic_optimization else []
        self.schedulers = Schedulers(configs, self.trainer.lightning_module.lr_scheduler_step)
        if self.resumed:
            kept = self.memory.content.get("schedulers")
            self.schedulers.load_state(kept, self.trainer.optimizers, self.progress.steps)
        self.memory.finish_epoch()
        if self.resumed:  # what was logged shall be there to read if nothing is left to do
            self.memory.restore()
            self.memory.rewind()
            if self.progress.position == Position.EPOCH_START:
                self.memory.stop_if_told()
        if self.trainer.limit_train_batches == 0 or self.finished():
            return
        self.prepare()
        if self.resumed:
            self.memory.restore()
            self.memory.rewind()
        self.hooks.on_train_start()
        self.memory.note_start()
        while not self.finished():
            self.run_epoch()
        self.shortfall.after_training(self)
        self.hooks.on_train_end()
        preemption.mark_finished(self.trainer)

    def run_epoch(self) -> None:
        """One pass over the training batches."""
        self.open_epoch()
        assert self.feed is not None
        for batch, batch_idx, _ in self.feed:
            try:
                if not self.run_batch(batch, batch_idx):
                    break
            except StopIteration:
                self.shortfall.handle_stop_iteration(self)
                break
            if self.validation_due():
                self.validate()
            self.finish_batch()
            if self.stop_due():
                break
            self.progress.position = Position.IN_BATCH
        else:
            self.shortfall.after_batches(self)
        self.close_epoch()
        self.shortfall.after_epoch(self)

    def run_batch(self, batch: Any, batch_idx: int) -> bool:
        """One batch. False when the module asked to skip the rest of the epoch."""
        hooks, book, progress = self.hooks, self.trainer.book, self.progress
        progress.is_last_batch = self.feed.is_last  # type: ignore[union-attr]
        if batch is None:
            return self.skip_batch(batch_idx)
        book.open_batch(batch)
        interval = self.trainer.log_every_n_steps
        book.logging_due = interval > 0 and (progress.log_step + 1) % interval == 0
        if self.join.uneven:
            self.join.before_batch()
        given = batch
        if self.iterator_feed:  # hooks get the batch that was pulled last
            batch = self.feed.batch  # type: ignore[union-attr]
        if hooks.on_train_batch_start(batch, batch_idx) == SKIP_EPOCH:
            return self.skip_epoch()
        outputs = self.optimization.run(given, batch_idx)
        if book.distributed:
            self.join.reduce("step")
        if self.iterator_feed:
            feed: Any = self.feed
            batch, batch_idx, progress.is_last_batch = feed.batch, feed.batch_idx, feed.is_last
        if self.schedulers.any:
            self.trainer.book.hook = "lr_scheduler_step"  # nothing may be logged there
            stepped = self.optimization.stepped
            idle = self.optimization.idle() if stepped else ()
            self.schedulers.after_batch(progress.epochs + 1, stepped, progress.is_last_batch, idle)
        progress.finish_batch()
        hooks.on_train_batch_end(outputs, batch, batch_idx)
        if book.distributed:
            self.join.reduce("end")
        book.close_batch()
        due = book.logging_due or self.trainer.should_stop or self.trainer.fast_dev_run
        if due and self.optimization.stepped:
            # sync: the step metrics go to the loggers, in one transfer from the device
            self.trainer.report(book.step_metrics(), step=progress.log_step, with_epoch=True)
        return True

    # ------------------------------------------------------------------ before

    def sanity_check(self) -> None:
        """A few validation batches before training, so that a mistake there does not cost an epoch."""
        trainer = self.trainer
        mid_epoch = self.resumed and self.progress.position not in (Position.EPOCH_START, Position.EPOCH_END)
        if not trainer.enable_validation or trainer.num_sanity_val_steps == 0 or mid_epoch:
            return
        position = self.progress.position
        trainer.stage = RunningStage.SANITY_CHECKING
        trainer.hooks.on_sanity_check_start()
        self.val_loop.run()
        trainer.hooks.on_sanity_check_end()
        trainer.book.clear()
        self.val_loop.forget_counts()
        self.progress.position = position
        trainer.stage = RunningStage.TRAINING

    def resume(self, progress: dict[str, Any], content: dict[str, Any], loader_states: Any = None) -> None:
        """Continues from a checkpoint: its counters, our chapter of it, and the states of loaders that have one."""
        self.progress.load_state_dict(progress)
        self.resumed, self.memory = True, Memory(self, {**content, "progress": progress}, loader_states)
        self.memory.begin()
        if self.progress.position in LOG_STEP_PENDING and self.memory.stepped:
            self.progress.log_step -= 1  # the file counts it, `finish_batch` will again
        if self.progress.position == Position.EPOCH_END:  # that epoch counts
            self.memory.epoch_ended = self.progress.is_last_batch
            self.progress.epochs += 1
            self.progress.open_epoch()
            self.progress.position = Position.EPOCH_START

    def load_data(self) -> None:
        """Asks for the training loaders, now and whenever they are to be reloaded."""
        trainer = self.trainer
        if trainer.limit_train_batches == 0:
            return
        source = trainer.sources.source_of("train")
        self.given_loaders = source.request_loaders()
        trainer.strategy.barrier("train_dataloader()")
        self.loaders = prepare_train_loaders(trainer, self.given_loaders, source.display_name)
        self.iterator_feed = takes_argument(trainer.lightning_module.training_step, "dataloader_iter", explicit=True)
        trainer.book.size_required = self.iterator_feed
        counted = self.iterator_feed or all(map(loader_tools.length_is_certain, self.loaders.flattened))
        self.join, self.num_batches = join_training(trainer, self.loaders.num_batches(), counted, self.iterator_feed)
        profile = build_fetch_profiler(trainer, "[_TrainingEpochLoop].train_dataloader_next")
        self.feed = self.join.build_feed(self.loaders, build_transfer(trainer), profile)
        loader_tools.set_epoch(self.loaders, self.progress.epochs)
        self.announced_epoch = self.progress.epochs
        if self.resumed:
            self.memory.open_feed()
        else:  # what is opened once more when its epoch begins shall draw nothing here
            with isolate_rng() if self.progress.epochs else nullcontext():
                self.feed.open_iterators(self.progress.epochs)
        self.loaded_at_epoch = self.progress.epochs
        self.set_validation_interval()

    def set_validation_interval(self) -> None:
        """`val_check_interval` in batches, now that the length of an epoch is known."""
        trainer = self.trainer
        interval = trainer.val_check_interval
        if trainer.val_check_time_s is not None:
            trainer.val_check_batch = inf
            return
        if isinstance(interval, float) and self.num_batches == inf and interval != 1.0:
            what = f"`val_check_interval={interval}` is a fraction of an epoch, and the training loader has no length."
            raise MisconfigurationException(f"{what} Use 1.0 (at the end), or an int to count batches.")
        trainer.val_check_batch = cadence.validation_interval(interval, self.num_batches)
        too_long = isinstance(interval, int) and interval > self.num_batches
        if too_long and trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0:
            what = (
                f"`val_check_interval={interval}` must be less than or equal to the number of training batches of an "
                f"epoch ({self.num_batches})."
            )
            fix = "Use a smaller value, or `check_val_every_n_epoch=None` to count batches across epochs."
            raise ValueError(f"{what} The counter starts again at each epoch, so validation would never run. {fix}")
        if trainer.loggers and not trainer.fast_dev_run and self.num_batches < trainer.log_every_n_steps:
            what = (
                f"The number of training batches ({self.num_batches}) is smaller than the logging interval "
                f"`Trainer(log_every_n_steps={trainer.log_every_n_steps})`:"
            )
            rank_zero_warn(f"{what} few steps are logged, or none. Use a smaller value.", category=PossibleUserWarning)

    def prepare(self) -> None:
        """Everything bound once, before the first batch."""
        trainer = self.trainer
        module = trainer.lightning_module
        if self.validation_epoch() and not self.val_loop.loaded:
            trainer.stage = RunningStage.VALIDATING
            self.val_loop.load_data()
            trainer.stage = RunningStage.TRAINING
        checks.monitors(trainer)
        in_eval = sum(not m.training for m in module.modules())
        if in_eval:
            what = f"{in_eval} of the modules are in eval mode at the start of training, and stay so."
            rank_zero_warn(f"{what} Call `.train()` on those that should learn.", category=PossibleUserWarning)
        self.optimization = optimization_for(trainer, self.hooks, self.progress)
        if trainer.profiler.active:
            for part, method, action in ((self, "run_epoch", "epoch"), (self.optimization, "run", "batch")):
                plain = getattr(type(part), method).__get__(part)
                setattr(part, method, measured(trainer.profiler, f"run_training_{action}", plain))
        self.memory.restore_validation()
        self._validated_at_s = time.monotonic()
        self._said_to_continue = False

    # ------------------------------------------------------------------ epochs

    def finished(self) -> bool:
        """Whether training is over, with the reason said."""
        progress = self.progress
        if self.num_batches == 0:
            rank_zero_info("`Trainer.fit` stopped: No training batches.")
            return True
        if self.max_steps != -1 and progress.steps >= self.max_steps:
            rank_zero_info(f"`Trainer.fit` stopped: `max_steps={self.max_steps!r}` reached.")
            return True
        if self.max_epochs is not None and self.max_epochs != -1 and progress.epochs >= self.max_epochs:
            rank_zero_info(f"`Trainer.fit` stopped: `max_epochs={self.max_epochs!r}` reached.")
            return True
        if stopped := self.trainer.should_stop and self.may_stop():
            callbacks = [c for c in self.trainer.early_stopping_callbacks if c.stopping_reason_message]
            # With `verbose`, they have said why.
            told = [f"`{type(c).__name__}`." if c.verbose else str(c.stopping_reason_message) for c in callbacks]
            rank_zero_info(f"`Trainer.fit` stopped: {' '.join(told) or '`trainer.should_stop` was set.'}")
        return stopped

    def may_stop(self) -> bool:
        """Whether `should_stop` may already end training: `min_epochs` and `min_steps` are met."""
        progress = self.progress
        allowed = cadence.early_stop_allowed(progress.epochs, progress.steps, self.min_epochs, self.min_steps)
        if not allowed and not self._said_to_continue:
            self._said_to_continue = True
            rank_zero_info(
                f"The trainer was signaled to stop, but `min_epochs={self.min_epochs!r}` and "
                f"`min_steps={self.min_steps!r}` are not met yet. Training will continue until then."
            )
        return allowed

    def open_epoch(self) -> None:
        """Fresh loaders if due, the samplers' epoch, `on_train_epoch_start`, and an open feed."""
        trainer, progress = self.trainer, self.progress
        every = trainer.reload_dataloaders_every_n_epochs
        if every and self.loaded_at_epoch is not None and progress.epochs - self.loaded_at_epoch >= every:
            self.load_data()
        assert self.feed is not None
        if self.announced_epoch != progress.epochs:
            loader_tools.set_epoch(self.loaders, progress.epochs)
            self.announced_epoch = progress.epochs
        self.hooks = trainer.compile_hooks()
        self.optimization.open_epoch(self.hooks)
        self.schedulers.open_epoch()
        resumed = self.resumed
        if resumed:  # `on_train_start` is no part of a run that was not stopped
            self.memory.restore()
            self.memory.rewind()
        if resumed and progress.position != Position.EPOCH_START:
            self.resumed = False
            self.pick_up()
            return
        progress.open_epoch()
        self.feed.first_batch_idx = 0
        self.hooks.on_train_epoch_start()
        if resumed:
            self.memory.settle_feed()
            self.resumed = False
        elif progress.epochs > 0:  # else it was opened with the loaders
            self.feed.open_iterators(progress.epochs)
        progress.position = Position.IN_BATCH

    def pick_up(self) -> None:
        """Continues inside an epoch, from the position the checkpoint was taken at."""
        progress, position, memory = self.progress, self.progress.position, self.memory
        self.schedulers.open_epoch()
        self.schedulers.load_state(memory.content.get("schedulers"), self.trainer.optimizers, progress.steps)
        memory.stop_if_told()
        if position != Position.IN_BATCH:
            progress.position = Position.BATCH_DONE
            self.optimization.stepped = memory.stepped
            if memory.stepped and memory.content.get("logging_due"):
                self.trainer.report(self.trainer.book.step_metrics(), step=progress.log_step, with_epoch=True)
            if position == Position.VALIDATED:
                self.validated_at = progress.batches
            elif position == Position.VALIDATING or self.validation_due():
                self.validate()
            self.finish_batch()
        if self.stop_due():
            self.feed.mark_exhausted()  # type: ignore[union-attr]
        progress.position = Position.IN_BATCH

    def close_epoch(self) -> None:
        """`on_train_epoch_end`, schedulers that watch a metric, and the metrics of the epoch."""
        trainer, progress, book = self.trainer, self.progress, self.trainer.book
        self.join.close_epoch()
        book.close_batch()
        if self.validated_at != progress.batches:  # else what validation logged is newer
            book.update_metric_dicts()
        progress.position = Position.EPOCH_END
        close_epoch(trainer, self.hooks.on_train_epoch_end)
        report_train_epoch(self, progress.is_last_batch)
        progress.epochs += 1
        progress.position = Position.EPOCH_START

    # ------------------------------------------------------------------ batches

    def skip_batch(self, batch_idx: int) -> bool:
        """The loader gave None: no step, and of the hooks only `on_train_batch_end`."""
        rank_zero_warn("The training loader gave None instead of a batch: it is passed over.")
        progress, self.optimization.stepped = self.progress, False
        self.schedulers.after_batch(progress.epochs + 1, stepped=False, is_last_batch=progress.is_last_batch)
        progress.finish_batch()
        self.hooks.on_train_batch_end(None, None, batch_idx)
        return True

    def skip_epoch(self) -> bool:
        """`on_train_batch_start` returned -1: this counts as the last batch of the epoch, without a step."""
        self.progress.is_last_batch = True
        self.schedulers.after_batch(self.progress.epochs + 1, stepped=False, is_last_batch=True)
        return False

    def finish_batch(self) -> None:
        """The end of a batch, after validation if there was one."""
        progress = self.progress
        if self.trainer.signals.pending is not None:
            preemption.after_step(self)
        if self.optimization.stepped:
            if self.schedulers.any:
                self.schedulers.watch("step", progress.epochs + 1, self.trainer.book)
            progress.log_step += 1

    def stop_due(self) -> bool:
        """Whether the epoch ends before its last batch."""
        if self.max_steps != -1 and self.progress.steps >= self.max_steps:
            return True
        return self.trainer.should_stop and self.may_stop()

    # ------------------------------------------------------------------ validation

    def validation_epoch(self) -> bool:
        """Whether this epoch validates at all."""
        trainer = self.trainer
        return trainer.enable_validation and cadence.validation_epoch_due(
            self.progress.epochs, trainer.check_val_every_n_epoch
        )

    def validation_due(self) -> bool:
        """Whether validation runs after this batch. The first line answers for nearly every batch."""
        trainer, progress = self.trainer, self.progress
        every = trainer.val_check_batch
        count = progress.batches if trainer.check_val_every_n_epoch is None else progress.batch
        special = progress.is_last_batch or trainer.should_stop or trainer.val_check_time_s is not None
        if not special and (every == inf or count % every):
            return False
        if not self.validation_epoch():
            return False
        if trainer.val_check_time_s is not None:
            return time.monotonic() - self._validated_at_s >= trainer.val_check_time_s
        if trainer.should_stop and self.may_stop():
            return True
        if self.iterator_feed and progress.is_last_batch:
            return True
        if every == inf:
            return progress.is_last_batch
        # Of an epoch that is shorter than promised, the end stands for the rest of it.
        missed = progress.is_last_batch and progress.batch < self.num_batches < inf and trainer.check_val_every_n_epoch
        return count % every == 0 or bool(missed and self.num_batches // every > count // every)

    def validate(self) -> None:
        """A validation run in the middle of training; the position says so, for whoever resumes from here."""
        trainer, progress = self.trainer, self.progress
        self.memory.note_validation()
        progress.position = Position.VALIDATING
        trainer.stage = RunningStage.VALIDATING
        trainer.book.update_metric_dicts()
        scope = trainer.book.scope
        if self.optimization.stepped:
            # an open accumulation window keeps its gradients
            trainer.mode_hook("on_validation_model_zero_grad", trainer.lightning_module.zero_grad)
        self.val_loop.run()
        trainer.book.restore_scope(scope)
        trainer.stage = RunningStage.TRAINING
        progress.position = Position.VALIDATED  # set by `on_validation_end` already, unless there was nothing to do
        self.validated_at = progress.batches
        self._validated_at_s = time.monotonic()

    # ------------------------------------------------------------------ after

    def teardown(self) -> None:
        """Ends the workers of training and validation, and says how many steps the loss scaler left out."""
        if self.feed is not None:
            self.feed.close_loaders()
        self.val_loop.teardown()
        precision = self.trainer.strategy.precision_plugin
        skips, steps = precision.skip_counts() if isinstance(precision, MixedPrecision) else (0, 0)
        if skips:
            what = f"The loss scaler skipped {skips} of {steps} optimizer steps: their gradients were not finite."
            rank_zero_info(f"{what} Learning-rate schedulers did not advance with them.")
