"""Callbacks about when: `Timer` ends training by the clock, `GradientAccumulationScheduler` changes the window by epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.module import LightningModule
from fulmen.utilities.durations import parse_duration
from fulmen.utilities.errors import MisconfigurationException, suggestion
from fulmen.utilities.introspection import overridden
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import RunningStage

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class Timer(Callback):
    """Measures training, validation and testing, and ends training when ``duration`` is over.

    The time already spent is part of the checkpoint, so a resumed run has the rest of it.

    Args:
        duration: "DD:HH:MM:SS", a `timedelta`, or a dict of its arguments; None only measures.
        interval: look at the clock after every batch ("step") or every epoch ("epoch").
        verbose: say that the time is over.
    """

    def __init__(
        self, duration: str | timedelta | dict[str, int] | None = None, interval: str = "step", verbose: bool = True
    ) -> None:
        if interval not in ("step", "epoch"):
            hint = suggestion(str(interval), ("step", "epoch"))
            raise MisconfigurationException(f"`Timer(interval={interval!r})` must be 'step' or 'epoch'.{hint}")
        limit = None if duration is None else parse_duration(duration, "Timer(duration)")
        self._duration = None if limit is None else limit.total_seconds()
        self._interval, self._verbose = str(interval), verbose
        self._start: dict[str, float] = {}
        self._end: dict[str, float] = {}
        self._offset: float = 0  # seconds trained by the run this one resumes

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When the stage last started, on the clock of `time.monotonic`."""
        return self._start.get(stage)

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """When the stage last ended, on the clock of `time.monotonic`."""
        return self._end.get(stage)

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Seconds in the stage until it ended, or until now."""
        start, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset if stage == RunningStage.TRAINING else 0
        if start is None:
            return offset
        return offset + (time.monotonic() if end is None else end) - start

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Seconds left of the duration, None without one."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start[trainer.stage.value] = time.monotonic()
        self._end.pop(trainer.stage.value, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end[trainer.stage.value] = time.monotonic()

    on_validation_start = on_test_start = on_train_start
    on_validation_end = on_test_end = on_train_end

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
    """Accumulates gradients over another number of batches from given epochs on: ``{4: 2}`` is two from the fifth on.

    It sets ``trainer.accumulate_grad_batches``, which keeps its last value afterwards. Epochs before the first key
    accumulate nothing.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not scheduling:
            what = f"`GradientAccumulationScheduler({scheduling!r})` schedules nothing."
            raise TypeError(f"{what} Pass `{{epoch: batches}}`.")
        for epoch, batches in scheduling.items():
            if not isinstance(epoch, int) or epoch < 0 or not isinstance(batches, int) or batches < 1:
                what = f"`GradientAccumulationScheduler`: {{{epoch!r}: {batches!r}}} is not a pair"
                raise MisconfigurationException(f"{what} of an epoch (0 or more) and a number of batches (1 or more).")
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._set: int | None = None

    def going_to_accumulate_grad_batches(self) -> bool:
        """Does any epoch accumulate?"""
        return any(batches > 1 for batches in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """The window in this epoch."""
        return self.scheduling[max(start for start in self.epochs if start <= epoch)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        what = "`GradientAccumulationScheduler`"
        if not pl_module.automatic_optimization:
            raise RuntimeError(f"{what}: manual optimization decides itself when to step. Remove the callback.")
        if trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"{what}: `{type(trainer.strategy).__name__}` accumulates by itself, always over the same number of "
                "batches. Remove the callback and set `Trainer(accumulate_grad_batches=...)`."
            )
        window = trainer.accumulate_grad_batches
        if window not in (1, self._set):
            raise ValueError(f"{what} overwrites `Trainer(accumulate_grad_batches={window})`. Remove one of the two.")
        hooks = ("optimizer_step", "optimizer_zero_grad")
        replaced = [hook for hook in hooks if overridden(pl_module, hook, LightningModule)]
        if replaced and self.going_to_accumulate_grad_batches():
            rank_zero_warn(f"Gradients are accumulated: {replaced} will only be called when stepping.")
        # A run that resumes inside an epoch does not start that epoch again.
        self.on_train_epoch_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.accumulate_grad_batches = self._set = self.get_accumulate_grad_batches(trainer.current_epoch)
