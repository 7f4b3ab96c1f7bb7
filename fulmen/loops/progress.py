"""`Progress`: the counters of training, and where in the story it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fulmen.utilities.seed import generator_states, set_generator_states
from fulmen.utilities.types import LightningEnum


class Position(LightningEnum):
    """Where in the story a snapshot was taken; what resuming means is one `match` on it (`FitLoop.pick_up`)."""

    EPOCH_START = "EPOCH_START"  # until `on_train_epoch_start` has run: the epoch runs from its first batch
    IN_BATCH = "IN_BATCH"  # during a training batch: that batch does not count, it is done again
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

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that the file loads with `weights_only=True`."""
        return {**asdict(self), "position": self.position.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name == "position":
                self.position = Position(value)
            elif name in self.__dataclass_fields__:
                setattr(self, name, value)


class Draws:
    """Lets a resumed epoch draw the random numbers that the epoch which was never stopped drew.

    Arguments:
        stored: states of all generators when the checkpoint was taken; None when there is nothing to continue.
    """

    def __init__(self, stored: dict[str, Any] | None) -> None:
        self.stored = stored
        self.after_opening: dict[str, Any] | None = None

    def rewind(self) -> None:
        """Back to the states of the checkpoint."""
        if self.stored is not None:
            set_generator_states(self.stored)

    def note(self) -> None:
        """The iterator of the epoch has just been made, which draws."""
        self.after_opening = generator_states() if self.stored is not None else None

    def continued(self) -> bool:
        """After `on_train_epoch_start`: whether the iterator is still the right one; if so, draws go on behind it."""
        stored, after, self.stored = self.stored, self.after_opening, None
        if stored is None or after is None:
            return False
        now = generator_states()
        untouched = torch.equal(now["torch"], stored["torch"]) and tuple(now["python"][1]) == tuple(stored["python"][1])
        if untouched:
            set_generator_states(after)
        return untouched
