"""`Callback`: code that runs at given points of a run without being part of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fulmen.utilities.keywords import KeywordHints

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import STEP_OUTPUT


class Callback(KeywordHints):
    """Base class of callbacks: override the hooks you need, the others cost nothing.

    `fulmen.hooks` (docs/hooks.md) shows when each hook runs. The last words of each description say what `self.log` and
    `self.log_dict` may do there; they are those of the module. *Logs per step*: the value of the step, unless
    `on_epoch=True` asks for one over the epoch. *Logs per epoch*: the value reduced over the epoch, and with
    `on_step=True` each of them. *Logs only per epoch*: there is no step. *Logs nothing*: `self.log` raises.

    Examples:
        >>> class PrintLoss(Callback):
        ...     def on_train_epoch_end(self, trainer, pl_module):
        ...         print(f"epoch {trainer.current_epoch}: {trainer.callback_metrics['train_loss']:.3f}")
        >>> trainer = Trainer(callbacks=[PrintLoss()], max_epochs=3)  # doctest: +SKIP
    """

    monitors: ClassVar[bool] = False  # looks at metrics: its `on_train_epoch_end` runs after the module's
    _changeable: ClassVar[str] = ""  # from this argument on, those in the state key may change when a run is resumed
    only_shows: ClassVar[bool] = False  # draws on a screen, and must not change the random numbers of the run
    tunes: ClassVar[bool] = False  # runs trials at the start of a run, before all others
    _fitted_by: str | None = None  # the identity of the Trainer that fitted with it last

    if TYPE_CHECKING:  # those of the module, attached when a run starts
        log: Callable[..., None]
        log_dict: Callable[..., None]

    @property
    def state_key(self) -> str:
        """Under this name the state is stored in checkpoints; two callbacks of one run need two names.

        Override it with `_generate_state_key` when instances with different arguments can be used together.

        Examples:
            >>> class Snapshots(Callback):
            ...     def __init__(self, every: int):
            ...         self.every = every
            ...     @property
            ...     def state_key(self) -> str:
            ...         return self._generate_state_key(every=self.every)
            >>> Snapshots(every=2).state_key
            "Snapshots{'every': 2}"
        """
        return type(self).__qualname__

    def _generate_state_key(self, **kwargs: Any) -> str:
        """The class name followed by the arguments that tell two instances apart."""
        return f"{type(self).__qualname__}{kwargs!r}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain types and tensors; nothing is stored for an empty one.

        Examples:
            >>> class CountBatches(Callback):
            ...     batches = 0
            ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ...         self.batches += 1
            ...     def state_dict(self):
            ...         return {"batches": self.batches}
            ...     def load_state_dict(self, state_dict):
            ...         self.batches = state_dict["batches"]
            >>> counter = CountBatches()
            >>> counter.load_state_dict({"batches": 7})
            >>> counter.state_dict()
            {'batches': 7}
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave; not called when a checkpoint holds no state for this callback.

        Arguments of the constructor count as the script gives them, so that a run can be resumed with other ones.
        """

    def _continues(self, key: str) -> bool:
        """Is the state that a script with other arguments stored under this key one that this callback continues?"""
        fixed, found, _ = self.state_key.partition(f"{self._changeable!r}: ")
        return bool(found) and key.startswith(fixed)

    def _forget_run(self) -> None:
        """Back to the state of a callback that was never used: another Trainer is going to fit with it."""

    def _enter_fit(self, trainer_identity: str) -> None:
        """A fit starts: with another Trainer than before the callback starts from new, with the same one it continues."""
        if self._fitted_by not in (None, trainer_identity):
            self._forget_run()
        self._fitted_by = trainer_identity

    def _attach_log(self, pl_module: LightningModule) -> None:
        """Lets `self.log` and `self.log_dict` be those of the module that runs."""
        self.log = pl_module.log
        self.log_dict = pl_module.log_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the start of every verb, on every process. Logs nothing.

        Arguments:
            stage: "fit", "validate", "test" or "predict".
        """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end of every verb, on every process; not called after an exception. Logs nothing.

        Arguments:
            stage: "fit", "validate", "test" or "predict".
        """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, when the model is on its device and before optimizers continue from a checkpoint. Logs nothing."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, at the end of fit; the module is back on the CPU. Logs nothing."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, before the validation batches that are tried before training. Logs nothing."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after the validation batches that are tried before training. Logs nothing."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after the sanity check and before the first epoch. Logs only per epoch."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after the last epoch, also when training stopped early. Logs nothing."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch of each training epoch. Logs only per epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last batch of each training epoch, and after the validation inside of it. Logs only per epoch.

        Callbacks with ``monitors = True``, such as `ModelCheckpoint` and `EarlyStopping`, run after the module's hook,
        all others before it.
        """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each `training_step`, with the batch on its device. Logs per step.

        Arguments:
            batch_idx: the number of the batch in this epoch, from 0.
        """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """After each batch, and after the step if one was made. Logs per step.

        Arguments:
            outputs: what `training_step` returned; its loss is detached, and divided by the batches of one step.
            batch_idx: the number of the batch in this epoch, from 0.
        """

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Once per step, before gradients are cleared: those of the step before are still there. Logs per step."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Before each backward pass; ``loss`` is already divided by the batches of one step. Logs per step."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each backward pass; under a loss scaler the gradients are still scaled. Logs per step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Once per step: gradients are complete and unscaled, and not clipped yet. Logs per step."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before each validation, in eval mode and without gradients. Logs only per epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each validation; what it logged is in `trainer.callback_metrics`. Logs nothing."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch of each validation. Logs only per epoch."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last batch of each validation, before the module's hook. Logs only per epoch."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each `validation_step`; ``dataloader_idx`` counts the loaders from 0. Logs per epoch."""

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """After each `validation_step`; ``outputs`` is what it returned. Logs per epoch."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, before testing, in eval mode and without gradients. Logs only per epoch."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after testing; what it logged is in `trainer.callback_metrics`. Logs nothing."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first test batch. Logs only per epoch."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last test batch, before the module's hook. Logs only per epoch."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each `test_step`; ``dataloader_idx`` counts the loaders from 0. Logs per epoch."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """After each `test_step`; ``outputs`` is what it returned. Logs per epoch."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, before prediction, in eval mode and without gradients. Logs nothing."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once, after prediction. Logs nothing."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first batch to predict. Logs nothing."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last batch to predict. Logs nothing."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before each `predict_step`; ``dataloader_idx`` counts the loaders from 0. Logs nothing."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """After each `predict_step`; ``outputs`` are the predictions it returned. Logs nothing."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before each checkpoint is written. Logs nothing.

        Arguments:
            checkpoint: the whole content, which may be changed; `state_dict` is the place for the callback's own state.
        """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint was read and before `load_state_dict`. Logs nothing.

        Arguments:
            checkpoint: the whole content; what is changed here is loaded as changed.
        """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """When a run fails, at any point, also by Ctrl-C; the exception is raised again afterwards. Logs nothing."""
