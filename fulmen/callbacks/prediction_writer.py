"""`BasePredictionWriter` stores what `predict` returns; `LambdaCallback` is a callback written in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fulmen.callbacks.callback import Callback
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.introspection import takes_argument
from fulmen.utilities.types import LightningEnum

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    Hook = Callable[..., Any] | None


class WriteInterval(LightningEnum):
    """When a `BasePredictionWriter` writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        return self in (WriteInterval.BATCH, WriteInterval.BATCH_AND_EPOCH)

    @property
    def on_epoch(self) -> bool:
        return self in (WriteInterval.EPOCH, WriteInterval.BATCH_AND_EPOCH)


class BasePredictionWriter(Callback):
    """Base class for callbacks that store predictions while they are made.

    Implement `write_on_batch_end`, `write_on_epoch_end` or both. Every rank writes its own part, so name files after
    ``trainer.global_rank``. When memory is short, call ``trainer.predict(..., return_predictions=False)``.

    Args:
        write_interval: ``"batch"`` calls `write_on_batch_end` after every batch, ``"epoch"`` calls `write_on_epoch_end` once
            at the end, ``"batch_and_epoch"`` does both.

    Raises:
        MisconfigurationException: ``write_interval`` is none of the three.

    Examples:
        >>> class Writer(BasePredictionWriter):
        ...     def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        ...         torch.save(prediction, f"rank{trainer.global_rank}-batch{batch_idx}.pt")
        >>> Writer("batch").interval.on_epoch
        False
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        known = [interval.value for interval in WriteInterval]
        if write_interval not in known:
            hint = suggest_name(str(write_interval), known)
            raise MisconfigurationException(f"`{write_interval=}` should be one of {known}.{hint}")
        self.interval = WriteInterval(write_interval)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if takes_argument(pl_module.predict_step, "dataloader_iter", explicit=True):
            what = f"`{type(self).__name__}` does not know the samples that `predict_step(dataloader_iter)` takes."
            raise NotImplementedError(f"{what} Write `predict_step(batch, batch_idx)`.")

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, batch_indices: list[int] | None,
                           batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # fmt: skip
        """Stores the prediction of one batch.

        Args:
            trainer: the trainer that predicts.
            pl_module: the module it predicts with.
            prediction: what ``predict_step`` returned.
            batch_indices: which samples of the data set the batch has; None if the loader does not tell.
            batch: the batch.
            batch_idx: its number within the loader, from 0.
            dataloader_idx: number of the loader, from 0.
        """
        raise NotImplementedError

    def write_on_epoch_end(self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any],
                           batch_indices: Sequence[Any] | None) -> None:  # fmt: skip
        """Stores all predictions at once.

        Args:
            trainer: the trainer that predicts.
            pl_module: the module it predicts with.
            predictions: what ``predict_step`` returned, by batch; with several loaders by loader, then by batch.
            batch_indices: which samples each of them belongs to, as ``batch_indices[loader][batch]``.
        """
        raise NotImplementedError

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any,
                             batch_idx: int, dataloader_idx: int = 0) -> None:  # fmt: skip
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)


class LambdaCallback(Callback):
    """A callback made of functions, for what fits on a line.

    Every argument has the name of a hook, and the function gets what `Callback`'s hook of that name gets.

    Raises:
        TypeError: there is no hook of that name.

    Examples:
        >>> said = LambdaCallback(on_train_start=lambda trainer, pl_module: print("here we go"))
        >>> said.on_train_start(None, None)
        here we go
    """

    def __init__(
        self, setup: Hook = None, teardown: Hook = None, on_fit_start: Hook = None, on_fit_end: Hook = None,
        on_sanity_check_start: Hook = None, on_sanity_check_end: Hook = None, on_train_batch_start: Hook = None,
        on_train_batch_end: Hook = None, on_train_epoch_start: Hook = None, on_train_epoch_end: Hook = None,
        on_validation_epoch_start: Hook = None, on_validation_epoch_end: Hook = None, on_test_epoch_start: Hook = None,
        on_test_epoch_end: Hook = None, on_validation_batch_start: Hook = None, on_validation_batch_end: Hook = None,
        on_test_batch_start: Hook = None, on_test_batch_end: Hook = None, on_train_start: Hook = None,
        on_train_end: Hook = None, on_validation_start: Hook = None, on_validation_end: Hook = None,
        on_test_start: Hook = None, on_test_end: Hook = None, on_exception: Hook = None,
        on_save_checkpoint: Hook = None, on_load_checkpoint: Hook = None, on_before_backward: Hook = None,
        on_after_backward: Hook = None, on_before_optimizer_step: Hook = None, on_before_zero_grad: Hook = None,
        on_predict_start: Hook = None, on_predict_end: Hook = None, on_predict_batch_start: Hook = None,
        on_predict_batch_end: Hook = None, on_predict_epoch_start: Hook = None, on_predict_epoch_end: Hook = None,
        **unknown: Any,
    ) -> None:  # fmt: skip
        given = {name: value for name, value in locals().items() if hasattr(Callback, name)}
        if unknown:
            name = next(iter(unknown))
            raise TypeError(f"`LambdaCallback({name}=...)`: there is no such hook.{suggest_name(name, given)}")
        # Set on the instance: the plan of a run calls what differs from `Callback`, and only that.
        vars(self).update({name: function for name, function in given.items() if function is not None})
