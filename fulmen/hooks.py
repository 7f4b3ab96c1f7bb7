"""Every hook, once: who may implement it, in which order they are called, and what may be logged inside it.

`HOOKS` is the table the `HookPlan` of the loops is compiled from; the classes below it are the no-op methods users
override. At each hook callbacks come first, in the order of `trainer.callbacks`, then the module, then the strategy.
When the hooks run, with those of the module and the datamodule that are no events but give or do something::

    fit:
        configure_callbacks
        prepare_data                    on one process of each node
        setup
        configure_model
        resuming:
            on_load_checkpoint
        configure_optimizers
        on_fit_start
        validating:
            on_sanity_check_start
            (validation)                of `num_sanity_val_steps` batches
            on_sanity_check_end
        train_dataloader
        on_train_start
        each epoch:
            on_train_epoch_start
            each batch:
                (transfer)
                on_train_batch_start
                end of accumulation:
                    optimizer_step      around all that follows up to the clipping
                training_step
                start of accumulation:
                    on_before_zero_grad
                    optimizer_zero_grad
                on_before_backward
                backward
                on_after_backward
                end of accumulation:
                    on_before_optimizer_step
                    configure_gradient_clipping
                    clip_gradients
                    lr_scheduler_step   after a step or, by default, after the last batch of the epoch
                on_train_batch_end
                validation is due:
                    on_validation_model_zero_grad
                    (validation)
            on_train_epoch_end
            saving:
                on_save_checkpoint      whenever a checkpoint is written
        on_train_end
        on_fit_end
        teardown

    validate:
        (start)
        (validation)
        teardown

    test:
        (start)
        test_dataloader
        on_test_model_eval
        on_test_start
        on_test_epoch_start
        each batch:
            (transfer)
            on_test_batch_start
            test_step
            on_test_batch_end
        on_test_epoch_end
        on_test_end
        on_test_model_train
        teardown

    predict:
        (start)
        predict_dataloader
        on_predict_model_eval
        on_predict_start
        on_predict_epoch_start
        each batch:
            (transfer)
            on_predict_batch_start
            predict_step
            on_predict_batch_end
        on_predict_epoch_end
        on_predict_end
        teardown

    validation:
        val_dataloader                  the first time
        on_validation_model_eval
        on_validation_start
        on_validation_epoch_start
        each batch:
            (transfer)
            on_validation_batch_start
            validation_step
            on_validation_batch_end
        on_validation_epoch_end
        on_validation_end
        on_validation_model_train

    start:
        configure_callbacks
        prepare_data
        setup
        configure_model

    transfer:
        on_before_batch_transfer
        transfer_batch_to_device
        on_after_batch_transfer

With several devices each process runs all of this on its own batches; only `prepare_data` does not run everywhere. A run
that fails calls `on_exception` of every callback and of the datamodule, and no `teardown`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.errors import MisconfigurationException

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen.utilities.types import EVAL_DATALOADERS, STEP_OUTPUT, TRAIN_DATALOADERS


def nothing(*_: Any) -> None:
    """The hook nobody implements."""


@dataclass(frozen=True)
class LogRule:
    """What `self.log` does by default in one hook, and which of `on_step` and `on_epoch` may be chosen there."""

    on_step: bool
    on_epoch: bool
    step_allowed: bool = True


STEP = LogRule(on_step=True, on_epoch=False)
EVALUATION = LogRule(on_step=False, on_epoch=True)
EPOCH = LogRule(on_step=False, on_epoch=True, step_allowed=False)
NEVER = None


@dataclass(frozen=True)
class Hook:
    """One row of the table: the parties are called in the order they are listed."""

    name: str
    order: str = "callbacks, module"
    log: LogRule | None = NEVER


def _rows(names: str, order: str = "callbacks, module", log: LogRule | None = NEVER) -> list[Hook]:
    return [Hook(name, order, log) for name in names.split()]


_WITH_STRATEGY = "callbacks, module, strategy"

HOOKS: tuple[Hook, ...] = (
    *_rows("setup teardown on_fit_start on_fit_end on_save_checkpoint on_load_checkpoint"),
    *_rows("on_exception on_sanity_check_start on_sanity_check_end", "callbacks"),
    # training
    *_rows("on_train_start", _WITH_STRATEGY, EPOCH),
    *_rows("on_train_end", _WITH_STRATEGY),
    *_rows("on_train_epoch_start", log=EPOCH),
    *_rows("on_train_epoch_end", "callbacks, module, monitors", EPOCH),
    *_rows("on_train_batch_start", _WITH_STRATEGY, STEP),
    *_rows("on_train_batch_end on_before_zero_grad on_before_backward on_after_backward", log=STEP),
    *_rows("on_before_optimizer_step", log=STEP),
    # validation and test
    *_rows("on_validation_model_zero_grad on_validation_model_eval on_validation_model_train", "module"),
    *_rows("on_test_model_eval on_test_model_train", "module"),
    *_rows("on_validation_start on_test_start", _WITH_STRATEGY, EPOCH),
    *_rows("on_validation_end on_test_end", _WITH_STRATEGY),
    *_rows("on_validation_epoch_start on_validation_epoch_end on_test_epoch_start on_test_epoch_end", log=EPOCH),
    *_rows("on_validation_batch_start on_validation_batch_end", log=EVALUATION),
    *_rows("on_test_batch_start on_test_batch_end", log=EVALUATION),
    # predict
    *_rows("on_predict_model_eval", "module"),
    *_rows("on_predict_start on_predict_end", _WITH_STRATEGY),
    *_rows("on_predict_epoch_start on_predict_epoch_end on_predict_batch_start on_predict_batch_end"),
)

# Methods that are called at one place only and not through the plan, but inside which `self.log` may be called.
_STEP_METHODS = "training_step backward optimizer_step optimizer_zero_grad configure_gradient_clipping clip_gradients"
LOG_RULES: dict[str, LogRule | None] = {
    **{hook.name: hook.log for hook in HOOKS},
    **dict.fromkeys(_STEP_METHODS.split(), STEP),
    **dict.fromkeys(("validation_step", "test_step"), EVALUATION),
}

# Hooks of 1.x that would silently never be called, and their successors.
REMOVED_HOOKS: dict[str, str] = {
    f"{stage}_{old}": f"on_{hook}_{new}"
    for stage, hook in (("training", "train"), ("validation", "validation"), ("test", "test"), ("predict", "predict"))
    for old, new in (("epoch_end", "epoch_end"), ("step_end", "batch_end"))
} | {
    "on_before_accelerator_backend_setup": "setup",
    "on_configure_sharded_model": "setup",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_hpc_load": "on_load_checkpoint",
    "on_hpc_save": "on_save_checkpoint",
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_keyboard_interrupt": "on_exception",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
}


class ModelHooks:
    """Hooks of a `LightningModule` around training, evaluation and prediction; all do nothing by default.

    The last words of each description say what `self.log` may do there. *Logs per step*: the value of the step, unless
    `on_epoch=True` asks for one over the epoch. *Logs per epoch*: the value reduced over the epoch, and with
    `on_step=True` each of them. *Only per epoch*: there is no step. *Logs nothing*: `self.log` raises.
    """

    def on_fit_start(self) -> None:
        """Once, when the model is on its device and before optimizers continue from a checkpoint. Logs nothing."""

    def on_fit_end(self) -> None:
        """Once, at the end of fit; the module is back on the CPU. Logs nothing."""

    def on_train_start(self) -> None:
        """Once, after the sanity check and before the first epoch. Logs only per epoch."""

    def on_train_end(self) -> None:
        """Once, after the last epoch, also when training stopped early. Logs nothing."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of each training epoch. Logs only per epoch."""

    def on_train_epoch_end(self) -> None:
        """After the last batch of each training epoch, and after the validation inside of it.

        Callbacks that look at metrics, such as `ModelCheckpoint` and `EarlyStopping`, run after this one: they see what
        is logged here. Logs only per epoch.

        Examples:
            >>> class Net(ModelHooks):
            ...     def on_train_epoch_end(self):
            ...         self.log("tokens_seen", self.tokens)
        """

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before each `training_step`, with the batch on its device. Logs per step.

        Arguments:
            batch: what the loader gave, after the transfer hooks.
            batch_idx: the number of the batch in this epoch, from 0.

        Returns:
            -1 skips this batch and the rest of the epoch; anything else changes nothing.
        """

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        """After each batch, and after the step if one was made. Logs per step.

        Arguments:
            outputs: what `training_step` returned; its loss is detached, and divided by the batches of one step.
            batch: the batch `training_step` had.
            batch_idx: the number of the batch in this epoch, from 0.
        """

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Once per step, before gradients are cleared: those of the step before are still there. Logs per step."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before each backward pass; ``loss`` is already divided by the batches of one step. Logs per step."""

    def on_after_backward(self) -> None:
        """After each backward pass; under a loss scaler the gradients are still scaled. Logs per step."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Once per step: gradients are complete and unscaled, and not clipped yet. Logs per step.

        Examples:
            >>> class Net(ModelHooks):
            ...     def on_before_optimizer_step(self, optimizer):
            ...         self.log("first_gradient", self.layer.weight.grad.norm())
        """

    def on_validation_start(self) -> None:
        """Before each validation, in eval mode and without gradients. Logs only per epoch."""

    def on_validation_end(self) -> None:
        """After each validation; what it logged is in `trainer.callback_metrics`. Logs nothing."""

    def on_validation_epoch_start(self) -> None:
        """Before the first batch of each validation. Logs only per epoch."""

    def on_validation_epoch_end(self) -> None:
        """After the last batch of each validation: the place to log what was collected. Logs only per epoch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each `validation_step`; ``dataloader_idx`` counts the loaders from 0. Logs per epoch."""

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After each `validation_step`; ``outputs`` is what it returned. Logs per epoch."""

    def on_validation_model_zero_grad(self) -> None:
        """Before validation inside fit: frees the gradients, unless batches of a step are still missing. Logs nothing."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Before each validation: puts the module into eval mode. Logs nothing."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """After each validation. Not overridden, every submodule gets back the mode it had before. Logs nothing."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Before testing: puts the module into eval mode. Logs nothing."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """After testing. Not overridden, every submodule gets back the mode it had before. Logs nothing."""
        self.train()  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        """Once, before testing, in eval mode and without gradients. Logs only per epoch."""

    def on_test_end(self) -> None:
        """Once, after testing; what it logged is in `trainer.callback_metrics`. Logs nothing."""

    def on_test_epoch_start(self) -> None:
        """Before the first test batch. Logs only per epoch."""

    def on_test_epoch_end(self) -> None:
        """After the last test batch: the place to log what was collected. Logs only per epoch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each `test_step`; ``dataloader_idx`` counts the loaders from 0. Logs per epoch."""

    def on_test_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After each `test_step`; ``outputs`` is what it returned. Logs per epoch."""

    def on_predict_model_eval(self) -> None:
        """Before prediction: puts the module into eval mode. Logs nothing."""
        self.eval()  # type: ignore[attr-defined]

    def on_predict_start(self) -> None:
        """Once, before prediction, in eval mode and without gradients. Logs nothing."""

    def on_predict_end(self) -> None:
        """Once, after prediction. Logs nothing."""

    def on_predict_epoch_start(self) -> None:
        """Before the first batch to predict. Logs nothing."""

    def on_predict_epoch_end(self) -> None:
        """After the last batch to predict. Logs nothing."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before each `predict_step`; ``dataloader_idx`` counts the loaders from 0. Logs nothing."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After each `predict_step`; ``outputs`` are the predictions it returned. Logs nothing."""

    def configure_model(self) -> None:
        """Creates layers late, on the device and in the dtype of the run: large models never exist twice.

        Every verb calls it, so it must do nothing when the layers are there.

        Examples:
            >>> class Net(ModelHooks):
            ...     layer = None
            ...     def configure_model(self):
            ...         if self.layer is None:
            ...             self.layer = torch.nn.Linear(1024, 1024)
        """

    def configure_sharded_model(self) -> None:
        """Deprecated: use `configure_model`, whose layers are made on the device of the run and in its dtype."""


class DataHooks:
    """Where batches come from and how they reach the device; shared by modules and datamodules.

    Attributes:
        prepare_data_per_node: whether `prepare_data` runs on one process of each node (True) or on one in all.
        allow_zero_length_dataloader_with_multiple_devices: accept loaders without batches on several devices.
    """

    prepare_data_per_node: bool = True  # of the class, too: not every datamodule calls `super().__init__()`

    def __init__(self) -> None:
        super().__init__()
        self.prepare_data_per_node = True
        self.allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Downloads or tokenises, on one process of each node while others wait.

        Attributes set here exist in that process only: read the files in `setup`.
        """

    def setup(self, stage: str) -> None:
        """At the start of every verb, on every process: reads and splits data, or builds what depends on them.

        Arguments:
            stage: "fit", "validate", "test" or "predict".
        """

    def teardown(self, stage: str) -> None:
        """At the end of every verb, on every process; not called after an exception.

        Arguments:
            stage: "fit", "validate", "test" or "predict".
        """

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """The training batches, asked for once, or every `reload_dataloaders_every_n_epochs`.

        Returns:
            An iterable of batches, usually a `DataLoader`; or a list, tuple or dict of them: each batch has one of each.
        """
        raise _not_implemented("train_dataloader", self)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """The validation batches.

        Returns:
            An iterable of batches, or several in a list, tuple or dict: they are read one after the other, and
            `dataloader_idx` says which one a batch is from.
        """
        raise _not_implemented("val_dataloader", self)

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The test batches: one iterable, or several, as for `val_dataloader`."""
        raise _not_implemented("test_dataloader", self)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """The batches to predict: one iterable, or several, as for `val_dataloader`."""
        raise _not_implemented("predict_dataloader", self)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes each batch while it is still on the host, and returns it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves each batch and returns it; override it for containers whose tensors `.to()` does not reach.

        Arguments:
            batch: tensors, nested in lists, tuples, dicts, dataclasses; or anything with a method `to(device)`.
            device: of this process.
            dataloader_idx: which loader the batch is from, counted from 0.
        """
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes each batch once it is on the device, for example to augment images there, and returns it."""
        return batch


class CheckpointHooks:
    """What a module adds to a checkpoint, and takes from it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read and before the weights are loaded. Logs nothing.

        Arguments:
            checkpoint: the whole content; what is changed here is loaded as changed.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written. Logs nothing.

        Arguments:
            checkpoint: the whole content. What is added must be of plain types or tensors, so that it can be loaded
                with `weights_only=True`.

        Examples:
            >>> class Net(CheckpointHooks):
            ...     def on_save_checkpoint(self, checkpoint):
            ...         checkpoint["vocabulary"] = ["a", "b"]
            ...     def on_load_checkpoint(self, checkpoint):
            ...         self.vocabulary = checkpoint["vocabulary"]
            >>> checkpoint = {}
            >>> Net().on_save_checkpoint(checkpoint)
            >>> checkpoint
            {'vocabulary': ['a', 'b']}
        """


def _not_implemented(hook: str, owner: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{type(owner).__name__}.{hook}` was called but is not implemented. "
        f"`{hook}` must be implemented to be used with the Lightning Trainer when no loader is passed to it. "
        f"Define `def {hook}(self): return DataLoader(...)`, or pass the loader to the trainer's method."
    )
