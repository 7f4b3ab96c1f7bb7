"""The private side of loops under the names of the API: counters that write through, loaders' sources, what was logged."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fulmen.checkpoint.lightning_format import as_attributes, from_loops, to_loops
from fulmen.compat.grades import refuse_private
from fulmen.data.sources import Source
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.fit import FitLoop
from fulmen.loops.progress import Position
from fulmen.utilities.introspection import alias_property, parameters_of

if TYPE_CHECKING:
    from fulmen.metrics.entries import Entry
    from fulmen.trainer import Trainer

PHASES = ("ready", "started", "processed", "completed")


class CounterView:
    """The phases of one counter. Setting `completed` sets the counter of the run; other phases follow its position.

    Arguments:
        read: gives the numbers of all phases.
        advance: moves the counter of the run by a number.
        decisive: the phases that may be set.
    """

    def __init__(
        self,
        read: Callable[[], Any],
        advance: Callable[[int], None] | None = None,
        decisive: tuple[str, ...] = ("completed",),
    ) -> None:
        vars(self).update(_read=read, _advance=advance, _decisive=decisive)

    def __getattr__(self, name: str) -> int:
        if name.startswith("_") or name not in self.state_dict():
            raise AttributeError(f"This counter has no phase {name!r}, only {[*self.state_dict()]}.", name=name)
        return self.state_dict()[name]

    def __setattr__(self, name: str, value: int) -> None:
        difference = value - self.__getattr__(name)
        if name in vars(self)["_decisive"] and vars(self)["_advance"] is not None:
            vars(self)["_advance"](difference)

    def state_dict(self) -> dict[str, int]:
        """The numbers by phase."""
        numbers = vars(vars(self)["_read"]())
        return {phase: numbers[phase] for phase in PHASES if phase in numbers}

    def reset(self) -> None:
        """The counter is zero."""
        self.completed = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.state_dict()})"


class ProgressView:
    """A counter over the whole run, `total`, and one over the part of it that runs, `current`."""

    def __init__(self, total: CounterView, current: CounterView, shared: bool) -> None:
        self.total = total
        self.current = current
        self._shared = shared  # are both the same number of the run?

    def increment_ready(self) -> None:
        """Follows from the position of the run."""

    increment_started = increment_processed = increment_ready

    def increment_completed(self) -> None:
        """One more is done."""
        self.increment_by(1)

    def increment_by(self, n: int) -> None:
        """So many more are done."""
        self.total.completed += n
        if not self._shared:
            self.current.completed += n

    def reset(self) -> None:
        """Both are zero."""
        self.total.reset()
        self.current.reset()

    def reset_on_run(self) -> None:
        """Another part of the run begins."""
        if not self._shared:
            self.current.reset()

    def reset_on_restart(self) -> None:
        """A resumed run sees to that."""

    def state_dict(self) -> dict[str, Any]:
        """All numbers, in plain types."""
        return {"total": self.total.state_dict(), "current": self.current.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the numbers of what is done."""
        for tracker, numbers in ((self.total, state_dict["total"]), (self.current, state_dict["current"])):
            tracker.completed = numbers["completed"]


class BatchProgressView(ProgressView):
    """The counter of training batches."""

    def __init__(self, loop: FitLoop) -> None:
        self._loop = loop
        read = _reader(loop, "epoch_loop.batch_progress")
        total = CounterView(lambda: read().total, lambda n: _advance(loop, "batches", n))
        super().__init__(total, CounterView(lambda: read().current, lambda n: _advance(loop, "batch", n)), False)

    is_last_batch: bool = alias_property("_loop.progress.is_last_batch", "Is it the last one of the epoch?")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_last_batch": self.is_last_batch}


def _reader(loop: FitLoop, path: str) -> Callable[[], Any]:
    """Gives the part at a path of what the API's loops count."""

    def read() -> Any:
        found = loop.resume_state.api_counters()
        for part in path.split("."):
            found = vars(found)[part]
        return found

    return read


def _advance(loop: FitLoop, name: str, n: int) -> None:
    loop.progress.load_state_dict({name: vars(loop.progress)[name] + n})


def shared_progress(loop: FitLoop, path: str, name: str, decisive: tuple[str, ...] = ("completed",)) -> ProgressView:
    """A counter of the API's that is one number of `Progress`, in total and current."""
    read = _reader(loop, path)
    move = lambda n: _advance(loop, name, n)  # noqa: E731
    total = CounterView(lambda: read().total, move, decisive)
    return ProgressView(total, CounterView(lambda: read().current, move, decisive), True)


class TrainingEpochLoop:
    """An epoch of training as the API has it, a loop of its own; here it is the `FitLoop` that knows all of it."""

    def __init__(self, loop: FitLoop) -> None:
        self._loop = loop
        self.trainer = loop.trainer
        self.batch_progress = BatchProgressView(loop)
        manual = shared_progress(loop, "epoch_loop.manual_optimization.optim_step_progress", "steps")
        automatic = shared_progress(loop, "epoch_loop.automatic_optimization.optim_progress.optimizer.step", "steps")
        optimizer = SimpleNamespace(step=automatic)
        self.manual_optimization = SimpleNamespace(optim_step_progress=manual)
        self.automatic_optimization = SimpleNamespace(optim_progress=SimpleNamespace(optimizer=optimizer))

    val_loop: EvaluationLoop = alias_property("_loop.val_loop", "Validation inside fit.")
    max_steps: int = alias_property("_loop.max_steps", "Training ends after so many optimizer steps; -1 is no limit.")
    min_steps: int | None = alias_property("_loop.min_steps", "Training does not stop early before so many steps.")
    global_step: int = alias_property("_loop.progress.steps", "Optimizer steps made.")
    _batches_that_stepped: int = alias_property("_loop.progress.log_step", "The x axis of loggers.")
    scheduler_progress = property(lambda self: _reader(self._loop, "epoch_loop.scheduler_progress")())
    batch_idx = property(lambda self: self.batch_progress.current.ready - 1, doc="Of the batch at work, in its epoch.")
    total_batch_idx = property(lambda self: self.batch_progress.total.ready - 1, doc="Of all batches at work.")
    restarting = property(lambda self: self._loop.resume_state.pending, doc="Is a resumed epoch not entered yet?")
    _results = property(lambda self: ResultsView(self.trainer))

    @property
    def _is_training_done(self) -> bool:
        progress = self._loop.progress
        over = self.max_steps != -1 and progress.steps >= self.max_steps
        return over or progress.is_last_batch

    @property
    def _is_validation_done(self) -> bool:
        return not self._loop.validation.is_due() or self._loop.validation.is_done()

    @property
    def done(self) -> bool:
        """Is the epoch over?"""
        return (self._is_training_done and self._is_validation_done) or self._loop.stopping.ends_epoch()

    def _accumulated_batches_reached(self) -> bool:
        return self.batch_progress.current.ready % self.trainer.accumulate_grad_batches == 0

    def _num_ready_batches_reached(self) -> bool:
        return self._loop.progress.is_last_batch or self.batch_progress.current.ready >= self._loop.num_batches

    def _should_accumulate(self) -> bool:
        """Do the gradients of the batch at work wait for later batches?"""
        return not (self._accumulated_batches_reached() or self._num_ready_batches_reached())

    def _should_check_val_epoch(self) -> bool:
        return self._loop.validation.is_epoch_due()

    @property
    def _should_check_val_fx(self) -> Callable[..., bool]:
        """Is validation due after this batch? Another function may be put here, which the run then asks."""
        return lambda *_: self._loop.validation.is_due()

    @_should_check_val_fx.setter
    def _should_check_val_fx(self, function: Callable[..., bool]) -> None:
        takes_feed = bool(parameters_of(function))
        loop = self._loop
        vars(loop.validation)["is_due"] = lambda: bool(function(loop.feed) if takes_feed else function())

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        """Steps the schedulers whose turn it is.

        Arguments:
            interval: "step" or "epoch".
            update_plateau_schedulers: those that watch a metric, or the others.
        """
        loop = self._loop
        epoch = loop.progress.epochs + 1
        if update_plateau_schedulers:
            loop.schedulers.watch(interval, epoch, self.trainer.book)
        else:
            loop.schedulers.after_batch(epoch, stepped=interval == "step", is_last_batch=interval == "epoch")

    def reset(self) -> None:
        """The epoch begins with its first batch."""
        self._loop.progress.open_epoch()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            key.removeprefix("epoch_loop."): value
            for key, value in fit_loop_state(self._loop).items()
            if key.startswith("epoch_loop.")
        }

    def __getattr__(self, name: str) -> Any:
        refuse_private("trainer.fit_loop.epoch_loop", name)


def fit_loop_state(loop: FitLoop) -> dict[str, Any]:
    """What a checkpoint holds of training, in the form of the API."""
    loaded = loop.trainer.lightning_module is not None
    state: dict[str, Any] = to_loops(loop.resume_state.saved_progress() if loaded else loop.progress.state_dict())[
        "fit_loop"
    ]
    return state


def load_fit_loop_state(loop: FitLoop, state_dict: dict[str, Any]) -> None:
    """Continues with the counters that `fit_loop_state` gave."""
    loop.progress.load_state_dict(from_loops({"fit_loop": state_dict}))


def reset_fit_loop(loop: FitLoop) -> None:
    """The next run begins with the first batch of an epoch."""
    loop.progress.open_epoch()
    loop.progress.position = Position.EPOCH_START


def evaluation_progress(loop: EvaluationLoop) -> Any:
    """How many batches were evaluated in the whole run."""
    seen = sum(loop.batches_seen.values())
    phases = dict.fromkeys(PHASES, seen)
    return as_attributes({"batch_progress": {"total": phases, "current": phases}}).batch_progress


class SourceView:
    """Who gives the loaders of one kind."""

    def __init__(self, trainer: Trainer, kind: str) -> None:
        self._trainer = trainer
        self._kind = kind

    @property
    def _source(self) -> Source | None:
        try:
            return self._trainer.sources.source_of(self._kind)
        except KeyError:  # no run has begun
            return None

    @property
    def name(self) -> str:
        """Of the hook."""
        return f"{self._kind}_dataloader"

    @property
    def instance(self) -> Any:
        """The loaders that were given, or the module or datamodule that is asked."""
        source = self._source
        if source is None:
            return None
        return source.owner if source.argument is None else source.argument

    def is_defined(self) -> bool:
        """Are there loaders?"""
        return self._source is not None and self._source.is_defined()

    def is_module(self) -> bool:
        """Does a module or datamodule give them?"""
        return self._source is not None and self._source.argument is None

    def dataloader(self) -> Any:
        """The loaders; a hook is called."""
        if self._source is None:
            raise TypeError(f"Nobody gives a `{self.name}` yet: no run has begun.")
        return self._source.request_loaders()


class ResultsView:
    """What is logged in the loop that runs."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    batch: Any = alias_property("_trainer.book.batch", "The batch at work.")
    batch_size: int | None = alias_property("_trainer.book.batch_size", "Its size, if that was given or looked up.")
    dataloader_idx: int | None = alias_property("_trainer.book.dataloader_idx", "Which loader it is from, of several.")

    @property
    def result_metrics(self) -> list[Entry]:
        """The entries, with their values."""
        return list(self._trainer.book.scope.entries.values())

    def valid_items(self) -> list[tuple[str, Entry]]:
        """The entries that have a value, by name."""
        return [(entry.name, entry) for entry in self.result_metrics if not entry.empty]

    def metrics(self, on_step: bool) -> dict[str, dict[str, Any]]:
        """Values under "callback", "log" and "pbar", of this step or over the epoch."""
        found: dict[str, dict[str, Any]] = {"callback": {}, "log": {}, "pbar": {}}
        for _, entry in self.valid_items():
            shown = entry.on_step if on_step else entry.on_epoch
            value = (entry.newest if on_step else entry.epoch_value()) if shown else None
            if value is None:
                continue
            name = entry.step_name if on_step else entry.epoch_name
            found["callback"].update({name: value, entry.callback_name: value})
            found["log"].update({name: value} if entry.to_logger else {})
            found["pbar"].update({name: value} if entry.options.prog_bar else {})
        return found

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Forgets the values."""
        self._trainer.book.scope.reset()

    def cpu(self) -> ResultsView:
        """Frees the device of what was logged last."""
        self._trainer.book.metric_dicts.move_to_cpu()
        return self

    def __getattr__(self, name: str) -> Any:
        refuse_private("trainer._results", name)
