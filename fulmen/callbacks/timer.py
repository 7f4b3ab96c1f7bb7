"""Callbacks about when: `Timer` ends training by the clock, `GradientAccumulationScheduler` accumulates by epoch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.module import LightningModule
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

_DURATION = re.compile(r"(?P<days>\d+):(?P<hours>\d\d):(?P<minutes>\d\d):(?P<seconds>\d\d)")


def parse_duration(value: str | timedelta | dict[str, Any], name: str = "duration") -> timedelta:
    """The duration as a `timedelta`; error messages call it ``name``. Only an ill-formed string is a misconfiguration."""
    if isinstance(value, timedelta):
        return value
    what = f"`{name}={value!r}` is not a valid duration."
    if isinstance(value, str):
        if match := _DURATION.fullmatch(value.strip()):
            return timedelta(**{unit: int(digits) for unit, digits in match.groupdict().items()})
        raise MisconfigurationException(f"{what} Write DD:HH:MM:SS, '00:12:00:00' for twelve hours.")
    try:
        return timedelta(**value)
    except TypeError as error:
        hint = "Use 'DD:HH:MM:SS', a `datetime.timedelta`, or a dict such as {'hours': 1}."
        raise TypeError(f"{what} {hint}") from error


def _stage_hooks(stage: RunningStage) -> tuple[Callable[..., None], Callable[..., None]]:
    """The methods of `Timer` for the hooks at the start and end of a stage; the sanity check is validation too."""

    def start(self: Timer, *_: Any) -> None:
        self._start[stage.value] = time.monotonic()
        self._end.pop(stage.value, None)

    def end(self: Timer, *_: Any) -> None:
        self._end[stage.value] = time.monotonic()

    return start, end


class Timer(Callback):
    """Measures how long training, validation and testing take, and ends training when its time is over.

    A resumed run has what is left of the time. All ranks stop after the same batch.

    Args:
        duration: ``"DD:HH:MM:SS"``, a `timedelta`, or a dict of its arguments such as ``{"hours": 2}``; None only measures.
        interval: look at the clock after every ``"step"`` or every ``"epoch"``.
        verbose: say that the time is over.

    Raises:
        MisconfigurationException: ``interval`` is neither ``"step"`` nor ``"epoch"``, or ``duration`` cannot be read.

    Examples:
        >>> timer = Timer("00:12:00:00", interval="epoch")
        >>> timer.time_remaining()  # seconds
        43200.0
    """

    def __init__(self, duration: str | timedelta | dict[str, int] | None = None, interval: str = "step",
                 verbose: bool = True) -> None:  # fmt: skip
        if interval not in ("step", "epoch"):
            raise MisconfigurationException(
                f"Unsupported parameter value: `Timer(interval={interval!r})` must be 'step' or 'epoch'."
            )
        self._duration = None if duration is None else parse_duration(duration, "Timer(duration)").total_seconds()
        self._interval = str(interval)
        self._verbose = verbose
        self._forget_run()

    def _forget_run(self) -> None:
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._offset: float = 0  # seconds trained by the run this one resumes

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When the stage last started, on the clock of `time.monotonic`."""
        return self._start.get(RunningStage(stage))

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When the stage last ended, on the clock of `time.monotonic`."""
        return self._end.get(RunningStage(stage))

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Seconds spent in a stage: until it ended, or until now while it runs.

        Args:
            stage: ``"train"``, ``"validate"`` or ``"test"``.

        Raises:
            ValueError: there is no stage of that name.
        """
        start = self.start_time(stage)
        end = self.end_time(stage)
        offset = self._offset if stage == RunningStage.TRAINING else 0
        return offset if start is None else offset + (time.monotonic() if end is None else end) - start

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Seconds left of ``duration``; None if there is none."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    on_train_start, on_train_end = _stage_hooks(RunningStage.TRAINING)
    on_validation_start, on_validation_end = _stage_hooks(RunningStage.VALIDATING)
    on_test_start, on_test_end = _stage_hooks(RunningStage.TESTING)

    def on_fit_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._stop_if_over(trainer)  # a resumed run may have used up its time already

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._interval == "step":
            self._stop_if_over(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if self._interval == "epoch":
            self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: Trainer) -> None:
        if self._duration is None:
            return
        # Clocks differ, and all ranks must stop after the same batch.
        over = trainer.strategy.reduce_boolean_decision(self.time_elapsed() >= self._duration, all=False)
        trainer.should_stop = trainer.should_stop or over
        if over and self._verbose:
            elapsed = timedelta(seconds=int(self.time_elapsed()))
            rank_zero_info(f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop.")

    def state_dict(self) -> dict[str, Any]:
        return {"time_elapsed": {stage.value: self.time_elapsed(stage) for stage in RunningStage}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset = state_dict.get("time_elapsed", {}).get(RunningStage.TRAINING.value, 0)


class GradientAccumulationScheduler(Callback):
    """Changes ``trainer.accumulate_grad_batches`` from epoch to epoch.

    Args:
        scheduling: from an epoch, counted from 0, to the number of batches that are accumulated from then on. Before the
            first of them every batch is a step.

    Raises:
        TypeError: ``scheduling`` is empty.
        MisconfigurationException: an epoch is below 0, or a number of batches below 1.

    Examples:
        >>> scheduler = GradientAccumulationScheduler({4: 2, 8: 4})
        >>> [scheduler.get_accumulate_grad_batches(epoch) for epoch in (0, 4, 20)]
        [1, 2, 4]
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not scheduling:
            raise TypeError(
                f"`GradientAccumulationScheduler({scheduling!r})` schedules nothing. Pass `{{epoch: batches}}`."
            )
        for epoch, batches in scheduling.items():
            given = f"Got `GradientAccumulationScheduler({{{epoch!r}: {batches!r}}})`."
            if not isinstance(epoch, int) or epoch < 0:
                raise MisconfigurationException(f"Epoch should be an int greater than or equal to 0. {given}")
            if not isinstance(batches, int) or batches < 1:
                raise MisconfigurationException(f"Accumulation factor should be an int greater than 0. {given}")
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._forget_run()

    def _forget_run(self) -> None:
        self._set: int | None = None

    def going_to_accumulate_grad_batches(self) -> bool:
        """Whether any epoch accumulates more than one batch."""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """How many batches are accumulated in ``epoch``, counted from 0."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        what = "`GradientAccumulationScheduler`"
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{what} is not supported for manual optimization, which decides itself when to step. Remove it."
            )
        if trainer.strategy.handles_gradient_accumulation:
            name = type(trainer.strategy).__name__
            raise RuntimeError(f"{what}: `{name}` accumulates by itself. Use `Trainer(accumulate_grad_batches=...)`.")
        window = trainer.accumulate_grad_batches
        if window not in (1, self._set):
            raise ValueError(f"{what} overwrites `Trainer(accumulate_grad_batches={window})`. Remove one of the two.")
        own = [
            name
            for name in ("optimizer_step", "optimizer_zero_grad")
            if overrides_method(pl_module, name, LightningModule)
        ]
        if own and self.going_to_accumulate_grad_batches():
            rank_zero_warn(f"Gradients are accumulated: {own} will only be called when stepping.")
        self.on_train_epoch_start(trainer)  # a run that resumes inside an epoch does not start that epoch again

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.accumulate_grad_batches = self._set = self.get_accumulate_grad_batches(trainer.current_epoch)
