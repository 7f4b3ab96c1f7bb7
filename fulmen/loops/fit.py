"""The story of training. Start reading at `FitLoop.run`."""

from __future__ import annotations

from contextlib import nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

from fulmen.data import loaders as loader_tools
from fulmen.data.combined import CombinedLoader
from fulmen.data.feed import Feed
from fulmen.hooks import nothing
from fulmen.loops import auto_resume, checks
from fulmen.loops.dataloading import build_fetch_profiler, build_transfer, prepare_train_loaders
from fulmen.loops.evaluate import EvaluationLoop, run_sanity_check
from fulmen.loops.join import Join, join_training
from fulmen.loops.optimization_kinds import optimization_for
from fulmen.loops.optimize import NotYetOptimizing, Optimization
from fulmen.loops.progress import ApiCounters, Loop, Position, Progress, StopConditions, ValidationSchedule
from fulmen.loops.resume_state import ResumeState
from fulmen.loops.shortfall import ShortLoaderMonitor
from fulmen.metrics.reduce import close_epoch, report_train_epoch
from fulmen.optimizers import Schedulers
from fulmen.profilers.profiler import measured
from fulmen.utilities.introspection import takes_argument
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.seed import isolate_rng
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from fulmen.loops.hook_plan import HookPlan
    from fulmen.trainer import Trainer

SKIP_EPOCH = -1


class FitLoop(Loop):
    """Training from the first epoch to the last.

    Owns the counters (`progress`), the batches (`feed`) and the validation inside training (`val_loop`).
    """

    lasting = (
        "max_epochs", "min_epochs", "max_steps", "min_steps", "progress", "val_loop", "num_batches", "automatic",
        "validation",
    )  # fmt: skip

    def __init__(self, trainer: Trainer, max_epochs: int | None, min_epochs: int | None) -> None:
        self.trainer = trainer
        self.max_epochs = max_epochs
        self.min_epochs = min_epochs
        self.max_steps = -1
        self.min_steps: int | None = None
        self.progress = Progress()
        self.val_loop = EvaluationLoop(trainer, RunningStage.VALIDATING, inside_fit=True)
        self.feed: Feed | None = None
        self.loaders: CombinedLoader | None = None
        self.num_batches: float = inf
        self.join = Join(trainer)  # what ranks with fewer batches do
        self.iterator_feed = False  # does the step pull batches itself?
        self.shortfall = ShortLoaderMonitor()
        self.hooks: HookPlan
        self.optimization: Optimization = NotYetOptimizing()
        self.schedulers = Schedulers([], nothing)
        self.automatic = False  # does the next run continue by itself, with `ckpt_path="auto"`?
        self.resume_state = ResumeState(self)  # of the checkpoint that the run continues from, and for the next one
        self.validation = ValidationSchedule(self)
        self.stopping = StopConditions(self)
        self.loaded_at_epoch: int | None = None
        self.announced_epoch = -1  # the samplers know of

    # ------------------------------------------------------------------ the story

    def begin_run(self) -> None:
        """Before `run`: the sanity check, unless the run continues inside an epoch."""
        self.shortfall = ShortLoaderMonitor()
        self.resume_state.begin_run()
        if not self.resume_state.is_mid_epoch():
            run_sanity_check(self.val_loop)
        self.hooks = self.trainer.hooks
        self.trainer.book.enter_scope("train")

    def run(self) -> None:
        """All of training."""
        if self.loaders is None or self.reload_due():  # else `configure_optimizers` asked for the number of steps
            self.load_data()
        self.open_loaders()
        if self.trainer.limit_train_batches == 0 or self.stopping.is_over():
            return
        self.start_training()
        while not self.stopping.is_over():
            self.run_epoch()
        self.finish_training()

    def run_epoch(self) -> None:
        """One pass over the training batches."""
        trainer = self.trainer
        book = trainer.book
        self.open_epoch()
        assert self.feed is not None
        for batch, batch_idx, _ in self.feed:
            try:
                if not self.run_batch(batch, batch_idx):
                    break
            except StopIteration:
                self.shortfall.handle_stop_iteration(self)
                break
            if self.optimization.stepped and (book.logging_due or trainer.should_stop or trainer.fast_dev_run):
                # sync: the step metrics go to the loggers, in one transfer from the device
                trainer.report(book.step_metrics(), step=self.progress.log_step, with_epoch=True)
            if self.validation.is_due():
                self.validate()
            self.finish_batch()
            if self.stopping.ends_epoch():
                break
            self.progress.position = Position.IN_BATCH
        else:
            self.shortfall.after_batches(self)
        self.close_epoch()
        self.shortfall.after_epoch(self)

    def run_batch(self, batch: Any, batch_idx: int) -> bool:
        """One batch. False when the module asked to skip the rest of the epoch."""
        hooks = self.hooks
        book = self.trainer.book
        progress = self.progress
        progress.is_last_batch = self.feed.is_last  # type: ignore[union-attr]
        if batch is None:
            return self.skip_batch(batch_idx)
        interval = self.trainer.log_every_n_steps
        book.open_batch(batch, logging_due=interval > 0 and (progress.log_step + 1) % interval == 0)
        if self.join.uneven:
            self.join.before_batch()
        given = batch
        if self.iterator_feed:  # hooks get the batch that was pulled last
            batch = self.feed.batch  # type: ignore[union-attr]
        if hooks.on_train_batch_start(batch, batch_idx) == SKIP_EPOCH:
            return self.skip_epoch()
        outputs = self.optimization.run(given, batch_idx)
        if book.distributed:
            self.join.reduce_metrics("step")
        if self.iterator_feed:
            feed: Any = self.feed
            batch = feed.batch
            batch_idx = feed.batch_idx
            progress.is_last_batch = feed.is_last
        if self.schedulers.any:
            book.hook = "lr_scheduler_step"  # nothing may be logged there
            stepped = self.optimization.stepped
            idle = self.optimization.skipped_optimizers() if stepped else ()
            self.schedulers.after_batch(progress.epochs + 1, stepped, progress.is_last_batch, idle)
        progress.finish_batch()
        hooks.on_train_batch_end(outputs, batch, batch_idx)
        if book.distributed:
            self.join.reduce_metrics("end")
        book.close_batch()
        return True

    # ------------------------------------------------------------------ before

    def open_loaders(self) -> None:
        """Schedulers and loaders are where the run begins."""
        configs = self.trainer.lr_scheduler_configs if self.trainer.lightning_module.automatic_optimization else []
        self.schedulers = Schedulers(configs, self.trainer.lightning_module.lr_scheduler_step)
        self.resume_state.open_loaders()

    def start_training(self) -> None:
        """`on_train_start`, when all is ready."""
        self.prepare_training()
        self.resume_state.before_train_start()
        self.hooks.on_train_start()

    def finish_training(self) -> None:
        """`on_train_end`."""
        self.shortfall.after_training(self)
        self.hooks.on_train_end()
        auto_resume.mark_finished(self.trainer)

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
        if not self.resume_state.pending:  # what is opened once more when its epoch begins shall draw nothing here
            with isolate_rng() if self.progress.epochs else nullcontext():
                self.feed.open_iterators(self.progress.epochs)
        self.note_loading()
        self.validation.set_interval()

    def reload_due(self) -> bool:
        """Whether `reload_dataloaders_every_n_epochs` asks for new loaders in this epoch."""
        every = self.trainer.reload_dataloaders_every_n_epochs
        return bool(every) and self.loaded_at_epoch is not None and self.progress.epochs - self.loaded_at_epoch >= every

    def note_loading(self) -> None:
        """The loaders are those of this epoch."""
        self.loaded_at_epoch = self.progress.epochs

    def prepare_training(self) -> None:
        """Everything bound once, before the first batch."""
        trainer = self.trainer
        if self.validation.is_epoch_due() and self.val_loop.loaders is None:
            trainer.stage = RunningStage.VALIDATING
            self.val_loop.load_data()
            trainer.stage = RunningStage.TRAINING
        checks.check_monitors(trainer)
        checks.hint_at_eval_mode(trainer.lightning_module)
        self.optimization = optimization_for(trainer, self.hooks, self.progress)
        if trainer.profiler.active:
            run_epoch = type(self).run_epoch.__get__(self)
            self.run_epoch = measured(trainer.profiler, "run_training_epoch", run_epoch)  # type: ignore[method-assign]
        epoch_loop: Any = vars(self).get("epoch_loop")
        if hasattr(epoch_loop, "enter_loop"):  # one that the user put there; see `fulmen.compat.loops`
            epoch_loop.enter_loop(self)
        self.validation.start_clock()
        self.stopping.begin_run()

    # ------------------------------------------------------------------ epochs

    def open_epoch(self) -> None:
        """Fresh loaders if due, the samplers' epoch, `on_train_epoch_start`, and an open feed."""
        trainer = self.trainer
        progress = self.progress
        if self.reload_due():
            self.load_data()
        assert self.feed is not None
        if self.announced_epoch != progress.epochs:
            loader_tools.set_epoch(self.loaders, progress.epochs)
            self.announced_epoch = progress.epochs
        self.hooks = trainer.compile_hooks()
        self.optimization.open_epoch(self.hooks)
        self.schedulers.open_epoch()
        if not self.resume_state.enter_epoch():
            self.start_epoch()
            if progress.epochs > 0:  # else it was opened with the loaders
                self.feed.open_iterators(progress.epochs)
        progress.position = Position.IN_BATCH

    def start_epoch(self) -> None:
        """The epoch runs from its first batch."""
        assert self.feed is not None
        self.progress.open_epoch()
        self.feed.first_batch_idx = 0
        self.hooks.on_train_epoch_start()

    def close_epoch(self) -> None:
        """`on_train_epoch_end`, schedulers that watch a metric, and the metrics of the epoch."""
        trainer = self.trainer
        progress = self.progress
        book = trainer.book
        self.join.close_epoch()
        book.close_batch()
        if not self.validation.is_done():  # else what validation logged is newer
            book.update_metric_dicts()
        progress.position = Position.EPOCH_END
        close_epoch(trainer, self.hooks.on_train_epoch_end)
        report_train_epoch(self, progress.is_last_batch)
        progress.finish_epoch()

    # ------------------------------------------------------------------ batches

    def skip_batch(self, batch_idx: int) -> bool:
        """The loader gave None: no step, and of the hooks only `on_train_batch_end`."""
        rank_zero_warn("The training loader gave None instead of a batch: it is passed over.")
        progress = self.progress
        self.optimization.stepped = False
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
            self.trainer.signals.exit_after_step(self)
        if self.optimization.stepped:
            if self.schedulers.any:
                self.schedulers.watch("step", progress.epochs + 1, self.trainer.book)
            progress.log_step += 1

    # ------------------------------------------------------------------ validation

    def validate(self) -> None:
        """A validation run in the middle of training; the position says so, for whoever resumes from here."""
        trainer = self.trainer
        progress = self.progress
        self.resume_state.note_validation()
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
        self.validation.note_done()

    # ------------------------------------------------------------------ after

    epoch_loop = ApiCounters()
    epoch_progress = ApiCounters()

    def teardown(self) -> None:
        """Ends the workers of training and validation, and says how many steps the loss scaler left out."""
        if self.feed is not None:
            self.feed.close_loaders()
        self.val_loop.teardown()
        self.optimization.report_skipped_steps()
