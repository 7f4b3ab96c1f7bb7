"""Validate and test: the same story as training, without gradients and steps."""

from __future__ import annotations

from inspect import Parameter, signature
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from fulmen.data.combined import CombinedLoader
from fulmen.data.feed import Feed, IteratorFeed
from fulmen.data.loaders import length_is_certain, set_epoch
from fulmen.loops.dataloading import bind_step, build_fetch_profiler, build_transfer, prepare_loaders
from fulmen.loops.join import EvaluationJoin, Join
from fulmen.loops.progress import Loop, Position
from fulmen.loops.shortfall import ShortLoaderMonitor
from fulmen.metrics.reduce import close_epoch
from fulmen.metrics.tables import print_results
from fulmen.utilities.introspection import is_overridden, num_positional, takes_argument
from fulmen.utilities.modules import capture_modes, modules_in_eval
from fulmen.utilities.seed import isolate_rng
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.loops.hook_plan import HookPlan
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class StageNames(NamedTuple):
    """How things of a stage are called: `on_{infix}_start`, `limit_{kind}_batches`."""

    infix: str
    kind: str
    step: str


STAGES = {
    RunningStage.VALIDATING: StageNames("validation", "val", "validation_step"),
    RunningStage.TESTING: StageNames("test", "test", "test_step"),
    RunningStage.PREDICTING: StageNames("predict", "predict", "predict_step"),
}


class EvaluationLoop(Loop):
    """One pass over the loaders of validation or test; `PredictionLoop` is the same story with other results.

    Arguments:
        stage: VALIDATING, TESTING or PREDICTING; decides which hooks, loaders and step are used.
        inside_fit: validation during training: always `no_grad`, nothing printed.
    """

    lasting: ClassVar[tuple[str, ...]] = ("verbose", "max_batches", "batches_seen")

    def __init__(self, trainer: Trainer, stage: RunningStage, inside_fit: bool = False) -> None:
        self.trainer = trainer
        self.stage = stage
        self.inside_fit = inside_fit
        self.infix, self.kind, self.step_name = STAGES[stage]
        self.verbose = True
        self.loaders: CombinedLoader | None = None
        self.feed: Any = None
        self.iterator_feed = False  # does the step pull batches itself?
        self.fed_step: Callable[..., Any] | None = None  # the step that this was asked of
        self.bound_for: tuple[HookPlan, Callable[..., Any], bool] | None = None  # what was bound for the batches
        self.max_batches: list[float] = []
        self.max_batches_of_ranks: list[list[float]] = []
        self.join = Join(trainer)  # what ranks with fewer batches do
        self.loaded_at_epoch: int | None = None
        self.frozen: list[str] | None = None  # while all modules are in eval mode: those that stay so afterwards
        self.shortfall = ShortLoaderMonitor()
        self.batches_seen: dict[int, int] = {}  # per loader, over the whole run: the x axis of step metrics

    runs_shadow_hooks = True  # may hooks of a batch be called for one of another rank?
    show_results = staticmethod(print_results)
    inference_mode = True  # may it run under `torch.inference_mode`, if the Trainer allows?

    # ------------------------------------------------------------------ the story

    def run(self) -> Any:
        """All loaders. Returns the epoch metrics, one dict per loader."""
        trainer = self.trainer
        inference = self.inference_mode and trainer.inference_mode and not self.inside_fit
        with torch.inference_mode(inference and not trainer.strategy.forbids_inference_tensors), torch.no_grad():
            self.load_data()
            if self.nothing_to_do():
                return []
            try:
                self.open_run()
                for batch, batch_idx, dataloader_idx in self.feed:
                    if dataloader_idx != self.dataloader_idx:
                        self.next_loader(dataloader_idx)
                    self.join.before_batch(batch, batch_idx, dataloader_idx)
                    self.run_batch(batch, batch_idx, dataloader_idx)
                    if trainer.signals.pending is not None:
                        trainer.signals.exit_after_evaluation_batch(self, batch_idx, dataloader_idx)
                self.shortfall.warn_short_loaders(
                    trainer.sources.source_of(self.kind).display_name, self.loaders, self.feed.shortfalls
                )
                return self.close_run()
            except BaseException as error:
                if self.frozen is not None:  # whoever catches it trains on, and not in eval mode
                    self.restore_modes()
                if isinstance(error, RuntimeError) and (told := self.missed_gradients(error)):
                    raise RuntimeError(told) from error
                raise

    def missed_gradients(self, error: RuntimeError) -> str | None:
        """What autograd's error means here: the code asks for gradients, and they are switched off."""
        text = str(error)
        if not any(words in text.lower() for words in ("does not require grad", "inference tensor", "inference mode")):
            return None
        name = f"`{type(self.trainer.lightning_module).__name__}.{self.step_name}`"
        what = f"{name} asks autograd for gradients, which are switched off while {self.infix} runs ({text})."
        if torch.is_inference_mode_enabled():
            fix = "Use `Trainer(inference_mode=False)`, and compute inside of `with torch.enable_grad():`."
            return f"{what} `torch.inference_mode` is on, which `torch.enable_grad()` alone does not end. {fix}"
        return f"{what} `torch.no_grad` is on. Compute inside of `with torch.enable_grad():`."

    def run_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """One batch."""
        book = self.trainer.book
        book.open_batch(batch, book.logging_due)
        place = (batch, batch_idx, dataloader_idx) if self.several else (batch, batch_idx)
        if self.iterator_feed:  # hooks get the batch that was pulled last
            self.on_batch_start(self.feed.batch, *place[1:])
        else:
            self.on_batch_start(*place)
        if book.distributed:
            self.join.after_batch_start()
        book.hook = self.step_name
        if self.context is None:
            outputs = self.step(*place)
        else:
            with self.context():
                outputs = self.step(*place)
        if self.iterator_feed:
            place = (self.feed.batch, self.feed.batch_idx, *place[2:])
        if book.distributed:
            self.join.reduce_metrics("step")
        self.on_batch_end(outputs, *place)
        if book.distributed:
            self.join.reduce_metrics("end")
        book.close_batch()
        self.handle_outputs(outputs, dataloader_idx)

    # ------------------------------------------------------------------ before

    def load_data(self) -> None:
        """Asks for the loaders, unless they are still good."""
        trainer = self.trainer
        every = trainer.reload_dataloaders_every_n_epochs if self.inside_fit else 0
        epoch = trainer.fit_loop.progress.epochs
        due = every and self.loaded_at_epoch is not None and epoch - self.loaded_at_epoch >= every
        if (self.loaders is not None and not due) or self.batch_limit == 0:
            self.apply_limits()
            return
        source = trainer.sources.source_of(self.kind)
        self.given_loaders = source.request_loaders()
        trainer.strategy.barrier(f"{self.kind}_dataloader()")
        combined = self.given_loaders
        if not isinstance(combined, CombinedLoader):
            combined = CombinedLoader(combined, "sequential")
        self.check_mode(combined.mode)
        self.loaders = prepare_loaders(trainer, combined, source.display_name, self.kind, self.batch_limit)
        # With `check_val_every_n_epoch` above 1, those of the sanity check are not kept for the first validation.
        kept = not trainer.sanity_checking or trainer.check_val_every_n_epoch in (None, 1)
        self.loaded_at_epoch = epoch if kept else epoch - every
        self.max_batches = list(self.loaders.loader_lengths())
        self.max_batches_of_ranks = trainer.strategy.exchange_objects(self.promised_batches(self.loaders))
        self.apply_limits()

    def promised_batches(self, loaders: CombinedLoader) -> list[float]:
        """Batches of each loader that is evaluated by itself; infinite where other ranks cannot count on them."""
        in_turn = loaders.mode == "sequential"
        counts = self.max_batches if in_turn else [loaders.num_batches()]
        if self.trainer.world_size == 1:
            return counts
        certain = [length_is_certain(loader) for loader in loaders.flattened]
        certain = certain if in_turn else [all(certain)]
        return [count if sure else inf for count, sure in zip(counts, certain)]

    def check_mode(self, mode: str) -> None:
        """Any way of combining loaders will do."""

    @property
    def batch_limit(self) -> int | float:
        trainer = self.trainer
        if self.kind == "val":
            return trainer.limit_val_batches
        return trainer.limit_test_batches if self.kind == "test" else trainer.limit_predict_batches

    def apply_limits(self) -> None:
        """The sanity check looks at the first batches only."""
        if self.loaders is not None:
            self.loaders.limits = self.num_batches

    def limited_batches(self, counts: list[float]) -> list[float]:
        """So many batches of each loader are seen, if it has `counts`."""
        most = self.trainer.num_sanity_val_steps if self.trainer.sanity_checking else inf
        return [min(most, count) for count in counts]

    @property
    def num_batches(self) -> list[float]:
        """Batches per loader that this run will see."""
        return self.limited_batches(self.max_batches)

    def nothing_to_do(self) -> bool:
        return self.loaders is None or sum(self.num_batches) == 0 == sum(map(sum, self.max_batches_of_ranks))

    def open_run(self) -> None:
        """Iterators, signatures, eval mode and the first hooks."""
        trainer = self.trainer
        module = trainer.lightning_module
        self.open_feed()
        self.hooks = trainer.compile_hooks().evaluation_hooks(self.infix)
        self.restore_modes = capture_modes(module)
        self.frozen = modules_in_eval(module)
        self.scope_before = trainer.book.enter_scope(trainer.stage.value)
        trainer.book.scope.reset()
        self.dataloader_idx = 0
        trainer.book.dataloader_idx = None
        trainer.mode_hook(f"on_{self.infix}_model_eval", module.eval)
        self.hooks.start()
        self.hooks.epoch_start()
        self.bind_batch()  # after those hooks, which may give the module another step
        if self.inside_fit:
            trainer.strategy.use_rank_zero_buffers()  # last of all: a hook may have put an average in their place
        trainer.book.dataloader_idx = 0 if self.several else None

    def open_feed(self) -> None:
        """The batches of this run, and what ranks with fewer of them do."""
        trainer = self.trainer
        assert self.loaders is not None
        self.several = len(self.loaders.flattened) > 1 and self.loaders.mode == "sequential"
        step = getattr(trainer.lightning_module, self.step_name)
        if step != self.fed_step:
            self.iterator_feed = takes_argument(step, "dataloader_iter", explicit=True)
            self.fed_step = step
        profile = build_fetch_profiler(trainer, f"[_{type(self).__name__}].{self.kind}_next")
        self.feed = (IteratorFeed if self.iterator_feed else Feed)(self.loaders, build_transfer(trainer), profile)
        for loader in self.loaders.flattened:
            set_epoch(loader, trainer.current_epoch)
        self.feed.open_iterators()
        if len(self.max_batches_of_ranks) > 1:
            self.join = EvaluationJoin(self, [self.limited_batches(counts) for counts in self.max_batches_of_ranks])

    def bind_batch(self) -> None:
        """What is called for each batch, once it is known to take what it is given; bound anew if that has changed."""
        step = getattr(self.trainer.lightning_module, self.step_name)
        bound_for = (self.trainer.hooks, step, self.several)
        if bound_for == self.bound_for:
            return
        names = [f"on_{self.infix}_batch_start", f"on_{self.infix}_batch_end"]
        if not self.iterator_feed:
            names.insert(0, self.step_name)
        check_loader_argument(self.trainer.lightning_module, self.several, names)
        arguments = ("batch", "batch_idx", "dataloader_idx") if self.several else ("batch", "batch_idx")
        self.step = bind_step(self.trainer, self.step_name, arguments)
        self.context = self.trainer.strategy.step_context(self.step_name)
        self.on_batch_start = self.hooks.batch_start
        self.on_batch_end = self.hooks.batch_end
        self.bound_for = bound_for  # last of all: what was refused is looked at again

    # ------------------------------------------------------------------ between and after

    def next_loader(self, dataloader_idx: int) -> None:
        """The metrics of the loader that is done are complete; the next one begins."""
        book = self.trainer.book
        while self.dataloader_idx < dataloader_idx:
            book.finalize_loader(self.dataloader_idx)
            self.join.close_loader(self.dataloader_idx)
            self.dataloader_idx += 1
        book.dataloader_idx = dataloader_idx

    def skip_output(self) -> None:
        """After a batch that only other ranks have."""

    def collect_remaining(self) -> None:
        """After a loader: all ranks have done what they do together for its batches."""

    def handle_outputs(self, outputs: Any, dataloader_idx: int) -> None:
        """Step metrics go out at every batch, against their own counter."""
        trainer = self.trainer
        if trainer.sanity_checking:
            return
        seen = self.batches_seen.get(dataloader_idx, 0)
        self.batches_seen[dataloader_idx] = seen + 1
        if trainer.book.scope.has_steps and trainer.loggers:
            trainer.report(trainer.book.step_metrics(dataloader_idx if self.several else None), step=seen)

    def close_run(self) -> Any:
        """Epoch hooks, metrics to the loggers, train mode again."""
        trainer = self.trainer
        book = trainer.book
        assert self.loaders is not None
        self.join.close_loaders(self.dataloader_idx)
        if self.inside_fit:
            trainer.strategy.restore_own_buffers()
        book.dataloader_idx = None
        if book.scope.has_steps:
            book.update_metric_dicts()
        close_epoch(trainer, self.hooks.epoch_end)
        values = book.finish_epoch()
        numbers = {} if trainer.sanity_checking else trainer.report(values, with_epoch=True)
        if self.inside_fit:
            trainer.fit_loop.progress.position = Position.VALIDATED
        self.hooks.end()
        trainer.mode_hook(f"on_{self.infix}_model_train", self.restore_modes)
        self.frozen = None
        results = self.per_loader(numbers)
        book.restore_scope(self.scope_before)
        if self.verbose and not self.inside_fit and trainer.is_global_zero:
            self.show_results(results, trainer.stage.value)
        return results

    def per_loader(self, numbers: dict[str, float]) -> list[dict[str, float]]:
        """One dict of plain numbers per loader; values without a loader of their own belong to all."""
        assert self.loaders is not None
        if not self.several:
            return [numbers]
        owner = {entry.epoch_name: entry.dataloader_idx for entry in self.trainer.book.scope.entries.values()}
        count = len(self.loaders.flattened)
        return [{k: v for k, v in numbers.items() if owner.get(k) in (None, i)} for i in range(count)]

    def forget_counts(self) -> None:
        """After the sanity check: it never happened."""
        self.batches_seen.clear()

    def loader_position(self) -> dict[str, Any] | None:
        """Where a checkpoint that is written now has the loaders: between two passes."""
        return None if self.loaders is None else self.loaders.pass_state(0, inside=False)

    def load_state(self, batches_seen: dict[int, int], loader_position: dict[str, Any] | None) -> None:
        """Continues from a checkpoint, once the loaders exist."""
        self.batches_seen.update(batches_seen)
        if loader_position is not None and self.loaders is not None:
            if self.feed is not None:
                self.feed.close_loaders()
            self.loaders.load_pass_state(loader_position)

    def teardown(self) -> None:
        self.frozen = None
        self.fed_step = self.bound_for = None  # the next run may wrap the module anew
        self.shortfall = ShortLoaderMonitor()
        if self.feed is not None:
            self.feed.close_loaders()


def run_sanity_check(loop: EvaluationLoop) -> None:
    """A few validation batches before training, so that a mistake there does not cost an epoch."""
    trainer = loop.trainer
    if not trainer.enable_validation or trainer.num_sanity_val_steps == 0:
        return
    progress = trainer.fit_loop.progress
    position = progress.position
    trainer.stage = RunningStage.SANITY_CHECKING
    with isolate_rng():
        trainer.hooks.on_sanity_check_start()
        loop.run()
        trainer.hooks.on_sanity_check_end()
    trainer.book.clear()
    loop.forget_counts()
    progress.position = position
    trainer.stage = RunningStage.TRAINING


def check_loader_argument(module: LightningModule, several: bool, names: list[str]) -> None:
    """Whether the step and the batch hooks fit the number of loaders.

    Raises:
        RuntimeError: several loaders without a parameter `dataloader_idx`, or one loader and a required one.
    """
    for name in names:
        if not is_overridden(name, module):
            continue
        method = getattr(module, name)
        takes = takes_argument(method, "dataloader_idx") or num_positional(method) >= (4 if "end" in name else 3)
        if several and not takes:
            raise RuntimeError(
                f"There is no `dataloader_idx` argument in `{type(module).__name__}.{name}`, but there are several loaders. "
                f"It could not know which one a batch came from. Write `def {name}(self, ..., batch_idx, dataloader_idx=0)`."
            )
        if not several and requires_loader_index(method):
            raise RuntimeError(
                f"`{type(module).__name__}.{name}` requires `dataloader_idx`, but there is only one loader, "
                "and then it is not passed. Give it a default: `dataloader_idx=0`."
            )


def requires_loader_index(method: Callable[..., Any]) -> bool:
    found = signature(method).parameters.get("dataloader_idx")
    return found is not None and found.default is Parameter.empty
