"""Calling hooks of a Trainer by their names, as loops of others do it: `_call_callback_hooks(trainer, "on_fit_start")`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from fulmen.checkpoint.snapshot import collect_callback_states
from fulmen.utilities.introspection import adapt_to_signature
from fulmen.utilities.types import TrainerStatus

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


def _call_method(trainer: Trainer, kind: str, owner: object, name: str, *args: Any, **kwargs: Any) -> Any:
    """The method's result, while `self.log` knows that it runs; None if there is no such method."""
    method = getattr(owner, name, None)
    if not callable(method):
        return None
    label = f"[{kind}]{type(owner).__name__}.{name}"
    with trainer.book.inside(name), trainer.profiler.profile(label) if trainer.profiler.active else nullcontext():
        return method(*args, **kwargs)


def _call_lightning_module_hook(
    trainer: Trainer, hook_name: str, *args: Any, pl_module: LightningModule | None = None, **kwargs: Any
) -> Any:
    """What the hook of the module returns."""
    module = pl_module or trainer.lightning_module
    if module is None:
        raise TypeError(f"There is no module whose `{hook_name}` could be called: no run has begun.")
    return _call_method(trainer, "LightningModule", module, hook_name, *args, **kwargs)


def _call_lightning_datamodule_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    """What the hook of the datamodule returns."""
    if trainer.datamodule is None:
        raise TypeError(f"There is no datamodule whose `{hook_name}` could be called.")
    return _call_method(trainer, "LightningDataModule", trainer.datamodule, hook_name, *args, **kwargs)


def _call_callback_hooks(
    trainer: Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    """Calls the hook of all callbacks, or only of those that write checkpoints and the like, or of all others."""
    for callback in trainer.callbacks:
        if monitoring_callbacks is None or callback.monitors == monitoring_callbacks:
            arguments = (trainer, trainer.lightning_module, *args)
            _call_method(trainer, "Callback", callback, hook_name, *arguments, **kwargs)


def _call_strategy_hook(trainer: Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    """What the hook of the strategy returns."""
    return _call_method(trainer, "Strategy", trainer.strategy, hook_name, *args, **kwargs)


def _call_setup_hook(trainer: Trainer) -> None:
    """`setup` of datamodule, callbacks and module."""
    _call_with_stage(trainer, "setup")


def _call_teardown_hook(trainer: Trainer) -> None:
    """`teardown` of datamodule, callbacks and module."""
    _call_with_stage(trainer, "teardown")


def _call_with_stage(trainer: Trainer, name: str) -> None:
    stage: Any = trainer.state.fn
    if trainer.datamodule is not None:
        method = getattr(trainer.datamodule, name)
        adapt_to_signature(method, method, ("stage",))(stage)
    _call_callback_hooks(trainer, name, stage=stage)
    _call_lightning_module_hook(trainer, name, stage=stage)


def _call_configure_model(trainer: Trainer) -> None:
    """`configure_model` of the module, as the strategy wants layers to be made."""
    with trainer.strategy.tensor_init_context(), trainer.strategy.model_sharded_context():
        _call_lightning_module_hook(trainer, "configure_model")


def _call_callbacks_state_dict(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The states of the callbacks that have one, as a checkpoint holds them."""
    return collect_callback_states(trainer)


def _call_callbacks_on_save_checkpoint(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Tells all callbacks that this is going to be saved."""
    _call_callback_hooks(trainer, "on_save_checkpoint", checkpoint)


def _call_callbacks_on_load_checkpoint(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Tells all callbacks that this was read."""
    _call_callback_hooks(trainer, "on_load_checkpoint", checkpoint)


def _call_callbacks_load_state_dict(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Puts the states of a checkpoint into the callbacks."""
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.callbacks:
        if state := states.get(callback.state_key):
            callback.load_state_dict(state)


def _call_and_handle_interrupt(trainer: Trainer, trainer_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns; if it raises, everybody who wants to know of that is told."""
    try:
        return trainer_fn(*args, **kwargs)
    except BaseException as error:
        _interrupt(trainer, error)
        raise


def _interrupt(trainer: Trainer, exception: BaseException) -> None:
    """The run ends with this exception: callbacks, loggers, strategy and datamodule are told."""
    trainer.state.status = TrainerStatus.INTERRUPTED
    for logger in trainer.loggers:
        logger.finalize("failed")
    trainer.strategy.on_exception(exception)
    if trainer.datamodule is not None:
        trainer.datamodule.on_exception(exception)
    _call_callback_hooks(trainer, "on_exception", exception)
