"""`Progress`: the counters of training, and where in the story it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fulmen.utilities.types import LightningEnum


class Position(LightningEnum):
    """Where in the story a snapshot was taken; what resuming means is one `match` on it (`FitLoop.pick_up`)."""

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

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that the file loads with `weights_only=True`."""
        return {**asdict(self), "position": self.position.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name == "position":
                self.position = Position(value)
            elif name in self.__dataclass_fields__:
                setattr(self, name, value)
