"""Every hook, once: who may implement it, in which order they are called, and what may be logged inside it.

`HOOKS` is the table the `HookPlan` of the loops is compiled from; the classes below it are the no-op methods users
override.
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
    "configure_sharded_model": "configure_model",
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
    """Hooks of a `LightningModule` around training, evaluation and prediction; all do nothing by default."""

    def on_fit_start(self) -> None:
        """At the start of fit, before optimizer states are restored."""

    def on_fit_end(self) -> None:
        """At the end of fit; the module is already back on the CPU."""

    def on_train_start(self) -> None:
        """Before the first training epoch."""

    def on_train_end(self) -> None:
        """After the last training epoch."""

    def on_validation_start(self) -> None:
        """Before validation, in eval mode and without gradients."""

    def on_validation_end(self) -> None:
        """After validation; epoch metrics are already in `trainer.callback_metrics`."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Before `training_step`; the batch is on the device. Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the batch. `outputs` holds the detached loss, already divided by the accumulation window."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before `validation_step`."""

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After `validation_step`; `outputs` is what it returned."""

    def on_validation_model_zero_grad(self) -> None:
        """Before validation inside fit: frees the gradients, unless an accumulation window is open."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Puts the module into eval mode for validation."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """After validation. Not overridden, every submodule gets back the mode it had before."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Puts the module into eval mode for testing."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """After testing. Not overridden, every submodule gets back the mode it had before."""
        self.train()  # type: ignore[attr-defined]

    def on_predict_model_eval(self) -> None:
        """Puts the module into eval mode for prediction."""
        self.eval()  # type: ignore[attr-defined]

    def on_train_epoch_start(self) -> None:
        """At the start of a training epoch."""

    def on_train_epoch_end(self) -> None:
        """At the end of a training epoch, before `ModelCheckpoint` and `EarlyStopping` look at the metrics."""

    def on_validation_epoch_start(self) -> None:
        """At the start of a validation epoch."""

    def on_validation_epoch_end(self) -> None:
        """At the end of a validation epoch."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Between forward and backward, before gradients are cleared: those of the last step are still there."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Before `loss.backward()`; `loss` is already divided by the accumulation window."""

    def on_after_backward(self) -> None:
        """After `loss.backward()`; under a loss scaler the gradients are still scaled."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Before clipping and the step; gradients are complete and unscaled."""

    def configure_model(self) -> None:
        """Creates layers late, on the device and in the dtype of the run. Called by every verb: must be idempotent."""

    # The same moments of testing and prediction.
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...


class DataHooks:
    """Where batches come from and how they reach the device; shared by modules and datamodules."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare_data_per_node: bool = True
        self.allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Downloads or tokenises, on one process only; keep no state here."""

    def setup(self, stage: str) -> None:
        """At the start of a verb, on every process. `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """At the end of a verb, on every process; not called after an exception."""

    def train_dataloader(self) -> Any:
        """The training batches: an iterable, or a nested collection of iterables."""
        raise _not_implemented("train_dataloader", self)

    def val_dataloader(self) -> Any:
        """The validation batches: one iterable or several."""
        raise _not_implemented("val_dataloader", self)

    def test_dataloader(self) -> Any:
        """The test batches: one iterable or several."""
        raise _not_implemented("test_dataloader", self)

    def predict_dataloader(self) -> Any:
        """The batches to predict: one iterable or several."""
        raise _not_implemented("predict_dataloader", self)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch while it is still on the host."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch; override it for containers `.to()` does not reach."""
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch once it is on the device."""
        return batch


class CheckpointHooks:
    """What a module adds to a checkpoint, and takes from it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the weights are loaded; `checkpoint` is the whole file and may be changed."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the file is written; whatever is put in must be loadable with `weights_only=True`."""


def _not_implemented(hook: str, owner: object) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{type(owner).__name__}.{hook}` was called but is not implemented. "
        f"`{hook}` must be implemented to be used with the Lightning Trainer when no loader is passed to it. "
        f"Define `def {hook}(self): return DataLoader(...)`, or pass the loader to the trainer's method."
    )
