"""When `ModelCheckpoint` writes: after so many steps or epochs, or so much time."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fulmen.utilities.errors import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


class SaveSchedule:
    """One of three intervals, and whether epochs are looked at after training or after validation.

    Arguments:
        every_n_train_steps: optimizer steps between two files; 0 or None for never.
        every_n_epochs: epochs between two files; 0 for never, and 1 if nothing else is given either.
        train_time_interval: time between two files.
        save_on_train_epoch_end: look after training epochs (True) or after validations (False); None decides by how
            often validation runs.

    Raises:
        MisconfigurationException: for an interval below 0, or more than one.
    """

    def __init__(
        self, every_n_train_steps: int | None, every_n_epochs: int | None, train_time_interval: timedelta | None,
        save_on_train_epoch_end: bool | None,
    ) -> None:  # fmt: skip
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self.every_n_train_steps = every_n_train_steps or 0
        self.every_n_epochs = every_n_epochs or 0
        self.train_time_interval = train_time_interval
        self.save_on_train_epoch_end = save_on_train_epoch_end
        self._last_save_s = 0.0
        chosen = {name: value for name, value in self.intervals().items() if value}
        problem = ""
        if self.every_n_train_steps < 0 or self.every_n_epochs < 0:
            problem = "intervals must be 0 (never) or more."
        elif len(chosen) > 1:
            problem = "only one of them is possible. Add a second `ModelCheckpoint`."
        if problem:
            raise MisconfigurationException(f"`ModelCheckpoint`: {chosen}: {problem}")

    def intervals(self) -> dict[str, Any]:
        """The three by name, which tell two callbacks apart."""
        return {
            "every_n_train_steps": self.every_n_train_steps,
            "every_n_epochs": self.every_n_epochs,
            "train_time_interval": self.train_time_interval,
        }

    def start_clock(self) -> None:
        """Training begins: the first interval of time does, too."""
        self._last_save_s = time.monotonic()

    def is_step_due(self, trainer: Trainer) -> bool:
        """Is a file due after this optimizer step? With an interval of time, all ranks must ask."""
        if self.every_n_train_steps:
            return trainer.global_step % self.every_n_train_steps == 0
        if self.train_time_interval is None:
            return False
        passed_s = time.monotonic() - self._last_save_s
        due: bool = trainer.strategy.broadcast(passed_s >= self.train_time_interval.total_seconds())  # clocks differ
        if due:
            self._last_save_s += passed_s
        return due

    def is_epoch_due(self, trainer: Trainer, after_training: bool) -> bool:
        """Is this epoch's turn, and is it looked at here: after training or after validation?"""
        every = self.every_n_epochs
        if every < 1 or (trainer.current_epoch + 1) % every:
            return False
        return self.looks_after_training(trainer) is after_training

    def looks_after_training(self, trainer: Trainer) -> bool:
        """Are epochs looked at after training, and not after validation?"""
        chosen = self.save_on_train_epoch_end
        if chosen is None:
            once_per_epoch = trainer.val_check_time_s is None and trainer.check_val_every_n_epoch == 1
            chosen = once_per_epoch and (trainer.val_check_interval == 1.0 or not sum(trainer.num_val_batches))
        return bool(chosen)
