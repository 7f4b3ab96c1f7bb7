"""The counters of training and the point it has reached, what is due there, and what loops keep when copied."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import LightningEnum

if TYPE_CHECKING:
    from fulmen.data.combined import CombinedLoader
    from fulmen.loops.fit import FitLoop


class Position(LightningEnum):
    """The point of an epoch at which a checkpoint was taken; `ResumeState` continues from each of them."""

    EPOCH_START = "EPOCH_START"  # until `on_train_epoch_start` has run: the epoch runs from its first batch
    IN_BATCH = "IN_BATCH"  # from the end of a batch to the step of the next: that one does not count, it is done again
    BATCH_DONE = "BATCH_DONE"  # from the step to the end of `on_train_batch_end`: next batch; validation may be due
    VALIDATING = "VALIDATING"  # while validating: validate again, then the next batch
    VALIDATED = "VALIDATED"  # from `on_validation_end`: next batch, no second validation
    EPOCH_END = "EPOCH_END"  # during `on_train_epoch_end`: the epoch counts, the next one starts


@dataclass
class Progress:
    """Counters of one training run; plain integers, owned by `FitLoop`."""

    epochs: int = 0  # finished
    batch: int = 0  # finished in this epoch
    batches: int = 0  # finished in all epochs
    steps: int = 0  # optimizer steps in all epochs: `trainer.global_step`
    log_step: int = 0  # x axis of the loggers: batches at which an optimizer stepped
    position: Position = Position.EPOCH_START
    is_last_batch: bool = False

    def open_epoch(self) -> None:
        self.batch = 0
        self.is_last_batch = False

    def finish_batch(self) -> None:
        self.batch += 1
        self.batches += 1
        self.position = Position.BATCH_DONE

    def finish_epoch(self) -> None:
        self.epochs += 1
        self.position = Position.EPOCH_START

    @contextmanager
    def as_of_last_epoch(self) -> Generator[None]:
        """For what still belongs to the epoch that was finished last."""
        self.epochs -= 1
        try:
            yield
        finally:
            self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that the file loads with `weights_only=True`."""
        return {**asdict(self), "position": self.position.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name == "position":
                self.position = Position(value)
            elif name in self.__dataclass_fields__:
                setattr(self, name, value)


class Loop:
    """A loop whose copies are as it was made, but for the attributes in `lasting`.

    What a run binds (hooks, feeds, loaders) cannot be pickled, and the next run binds its own.
    """

    lasting: ClassVar[tuple[str, ...]] = ()
    given_loaders: Iterable[Any] | None = None  # as the user gave them
    loaders: CombinedLoader | None = None
    loaded_at_epoch: int | None = None
    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._made_with = args, kwargs
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in (*self.lasting, "_made_with")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        args, kwargs = state["_made_with"]
        type(self).__init__(self, *args, **kwargs)
        vars(self).update(state)

    def begin_run(self) -> None:
        """Called before `run`."""

    def run(self) -> Any:
        """The whole loop. Returns what the verb does."""
        raise NotImplementedError

    def teardown(self) -> None:
        """After the run: ends what runs beside it."""

    def drop_loaders(self) -> None:
        """The next run asks for loaders of its own."""
        self.loaders = None
        self.loaded_at_epoch = None


class ApiCounters:
    """A part of what the API's fit loop counts, made when it is asked for; something else may be put in its place."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, loop: FitLoop, owner: type | None = None) -> Any:
        return getattr(loop.resume_state.api_counters(), self.name)


# ---------------------------------------------------------------------- what is due


class ValidationSchedule:
    """When training is interrupted for validation."""

    def __init__(self, loop: FitLoop) -> None:
        self.loop = loop
        self.trainer = loop.trainer
        self.interval: float = inf  # `val_check_interval` in batches
        self._validated_at = -1  # batches before the last validation
        self._validated_at_s = 0.0

    def set_interval(self) -> None:
        """Takes over `val_check_interval`, now that the length of an epoch is known.

        Raises:
            MisconfigurationException: for a fraction of an epoch that has no length.
            ValueError: for more batches than an epoch has.
        """
        trainer = self.trainer
        num_batches = self.loop.num_batches
        interval = trainer.val_check_interval
        if trainer.val_check_time_s is not None:
            self.interval = inf
            return
        if isinstance(interval, float) and num_batches == inf and interval != 1.0:
            what = f"`val_check_interval={interval}` is a fraction of an epoch, and the training loader has no length."
            raise MisconfigurationException(f"{what} Use 1.0 (at the end), or an int to count batches.")
        self.interval = validation_interval(interval, num_batches)
        too_long = isinstance(interval, int) and interval > num_batches
        if too_long and trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0:
            what = (
                f"`val_check_interval={interval}` must be less than or equal to the number of training batches of an "
                f"epoch ({num_batches})."
            )
            fix = "Use a smaller value, or `check_val_every_n_epoch=None` to count batches across epochs."
            raise ValueError(f"{what} The counter starts again at each epoch, so validation would never run. {fix}")
        if trainer.loggers and not trainer.fast_dev_run and num_batches < trainer.log_every_n_steps:
            what = (
                f"The number of training batches ({num_batches}) is smaller than the logging interval "
                f"`Trainer(log_every_n_steps={trainer.log_every_n_steps})`:"
            )
            rank_zero_warn(f"{what} few steps are logged, or none. Use a smaller value.", category=PossibleUserWarning)

    def start_clock(self) -> None:
        """For `val_check_interval` as a time."""
        self._validated_at_s = time.monotonic()

    def note_done(self) -> None:
        """After a validation."""
        self._validated_at = self.loop.progress.batches
        self.start_clock()

    def is_done(self) -> bool:
        """Did validation run after the last batch?"""
        return self._validated_at == self.loop.progress.batches

    def is_epoch_due(self) -> bool:
        """Whether this epoch validates at all; `check_val_every_n_epoch=None` means batches are counted across epochs."""
        every = self.trainer.check_val_every_n_epoch
        return self.trainer.enable_validation and (every is None or (self.loop.progress.epochs + 1) % every == 0)

    def is_due(self) -> bool:
        """Whether validation runs after this batch. The first lines answer for nearly every batch."""
        trainer = self.trainer
        progress = self.loop.progress
        every = self.interval
        count = progress.batches if trainer.check_val_every_n_epoch is None else progress.batch
        special = progress.is_last_batch or trainer.should_stop or trainer.val_check_time_s is not None
        if not special and (every == inf or count % every):
            return False
        return self.is_epoch_due() and self._is_batch_due(count)

    def _is_batch_due(self, count: int) -> bool:
        """Whether validation runs after this batch, the `count`-th, of an epoch that validates."""
        progress = self.loop.progress
        if self.trainer.val_check_time_s is not None:
            return time.monotonic() - self._validated_at_s >= self.trainer.val_check_time_s
        if self.trainer.should_stop and self.loop.stopping.is_allowed():
            return True
        if self.interval == inf or (self.loop.iterator_feed and progress.is_last_batch):
            return progress.is_last_batch
        return count % self.interval == 0 or self._ends_early(count)

    def _ends_early(self, count: int) -> bool:
        """Of an epoch that is shorter than promised, the end stands for the rest of it."""
        progress = self.loop.progress
        promised = self.loop.num_batches
        short = progress.is_last_batch and progress.batch < promised < inf and self.trainer.check_val_every_n_epoch
        return bool(short and promised // self.interval > count // self.interval)


class StopConditions:
    """When training ends: after so many epochs or steps, or because `should_stop` was set."""

    def __init__(self, loop: FitLoop) -> None:
        self.loop = loop
        self.trainer = loop.trainer
        self._said_to_continue = False

    def begin_run(self) -> None:
        """What was said in the run before may be said again."""
        self._said_to_continue = False

    def is_over(self) -> bool:
        """Whether training is over, with the reason said."""
        reason = self._limit_reached() or self._stop_reason()
        if reason:
            rank_zero_info(f"`Trainer.fit` stopped: {reason}")
        return bool(reason)

    def ends_epoch(self) -> bool:
        """Whether the epoch ends before its last batch."""
        loop = self.loop
        if loop.max_steps != -1 and loop.progress.steps >= loop.max_steps:
            return True
        return self.trainer.should_stop and self.is_allowed()

    def is_allowed(self) -> bool:
        """Whether `should_stop` may already end training: `min_epochs` and `min_steps` are met."""
        loop = self.loop
        progress = loop.progress
        enough_epochs = not loop.min_epochs or progress.epochs >= loop.min_epochs
        allowed = enough_epochs and (not loop.min_steps or progress.steps >= loop.min_steps)
        if not allowed and not self._said_to_continue:
            self._said_to_continue = True
            rank_zero_info(
                f"The trainer was signaled to stop, but `min_epochs={loop.min_epochs!r}` and "
                f"`min_steps={loop.min_steps!r}` are not met yet. Training will continue until then."
            )
        return allowed

    def _limit_reached(self) -> str:
        loop = self.loop
        progress = loop.progress
        if loop.num_batches == 0:
            return "No training batches."
        if loop.max_steps != -1 and progress.steps >= loop.max_steps:
            return f"`max_steps={loop.max_steps!r}` reached."
        if loop.max_epochs is not None and loop.max_epochs != -1 and progress.epochs >= loop.max_epochs:
            return f"`max_epochs={loop.max_epochs!r}` reached."
        return ""

    def _stop_reason(self) -> str:
        trainer = self.trainer
        if not trainer.should_stop or not self.is_allowed():
            return ""
        callbacks = [c for c in trainer.early_stopping_callbacks if c.stopping_reason_message]
        # With `verbose`, they have said why.
        told = [f"`{type(c).__name__}`." if c.verbose else str(c.stopping_reason_message) for c in callbacks]
        return " ".join(told) or "`trainer.should_stop` was set."


def validation_interval(interval: int | float, num_batches: float) -> float:
    """`val_check_interval` in batches: ints as they are, fractions of the epoch rounded down, but at least one.

    0 is accepted where nothing is trained or validated, and means never.
    """
    if isinstance(interval, int):
        return interval or inf
    return inf if num_batches == inf else max(1, int(num_batches * interval))


def steps_per_epoch(num_batches: float, accumulate: int) -> float:
    """Optimizer steps in an epoch: full accumulation windows and a shorter last one."""
    return inf if num_batches == inf else -(-int(num_batches) // accumulate)
