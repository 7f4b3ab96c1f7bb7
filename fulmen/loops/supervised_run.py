"""`TrainerRun`: what the watchdog of a process may ask of its trainer, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class TrainerRun:
    """One run of a trainer: a `fulmen.supervision.protocols.SupervisedRun`.

    Arguments:
        notify: tells callbacks and loggers of an exception.
    """

    def __init__(self, trainer: Trainer, notify: Callable[[BaseException], None]) -> None:
        self.trainer = trainer
        self._notify = notify

    def notify_exception(self, error: BaseException) -> None:
        self._notify(error)

    def describe_position(self) -> str:
        stage = self.trainer.state.stage
        progress = self.trainer.progress
        return f"{'done' if stage is None else stage.value}, epoch {progress.epochs}, batch {progress.batch}"

    def finalize_loggers(self) -> None:
        for logger in self.trainer.loggers:
            with contextlib.suppress(Exception):
                logger.finalize("failed")

    def handles_signal(self, number: int) -> bool:
        return self.trainer.signals.handles(number)

    def request_stop(self, number: int) -> bool:
        return self.trainer.signals.request_stop(number)

    def is_saving_last(self) -> bool:
        return self.trainer.signals.saving
