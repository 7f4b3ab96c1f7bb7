"""What can be known to be wrong before anything runs: checked once per call, refused by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.timing import Timer
from fulmen.hooks import REMOVED_HOOKS
from fulmen.module import LightningModule
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning
from fulmen.utilities.introspection import overridden, parameters_of
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

# By verb: whose loader it needs, and the methods that must be written.
NEEDED = {
    "fit": ("train", "training_step(self, batch, batch_idx)", "configure_optimizers(self)"),
    "validate": ("val", "validation_step(self, batch, batch_idx)"),
    "test": ("test", "test_step(self, batch, batch_idx)"),
    "predict": ("predict",),
}


def configuration(trainer: Trainer) -> None:
    """Raises for a module, datamodule or combination of arguments that cannot run."""
    module, verb = trainer.lightning_module, trainer.state.fn
    assert verb is not None
    for name, successor in REMOVED_HOOKS.items():
        if callable(getattr(module, name, None)):
            what = f"Support for `{name}` has been removed: `{type(module).__name__}.{name}` would never be called."
            raise NotImplementedError(f"{what} Collect what you need in the step and use `{successor}(self)`.")
    refuse_misspelt(module, LightningModule)
    for callback in trainer.callbacks:
        refuse_misspelt(callback, Callback)
    kind, *signatures = NEEDED[verb.value]
    for signature in signatures:
        method = signature.partition("(")[0]
        if not overridden(module, method, LightningModule):
            what = f"No `{method}()` method defined in {type(module).__name__} to run `Trainer.{verb.value}`."
            raise MisconfigurationException(f"{what} Define `def {signature}`.")
    if not callable(getattr(module, "predict_step", None)) and verb == TrainerFn.PREDICTING:
        raise MisconfigurationException("`predict_step` cannot be None to run `Trainer.predict`. Define it.")
    if not trainer.sources.get(kind).is_defined():
        owners = [type(owner).__name__ for owner in (module, trainer.datamodule) if owner is not None]
        what = f"`Trainer.{verb.value}` has no batches: no `{kind}_dataloader()` method defined in"
        fix = f"Pass a loader to `trainer.{verb.value}(...)`, or define that method."
        raise MisconfigurationException(f"{what} {' or '.join(owners)}. {fix}")
    if verb == TrainerFn.FITTING:
        _check_fit(trainer, module)
        _resolve_durations(trainer)


def _check_fit(trainer: Trainer, module: LightningModule) -> None:
    """Arguments that exclude each other, and validation of which one half is missing."""
    name = type(module).__name__
    if any(parameter.name == "optimizer_idx" for parameter in parameters_of(module.training_step)):
        what = f"`{name}.training_step` has a parameter `optimizer_idx`: several optimizers need manual optimization."
        raise RuntimeError(f"{what} Set `self.automatic_optimization = False`, and step the optimizers yourself.")
    if not module.automatic_optimization:
        value, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        why = "is not supported for manual optimization. Remove"
        if value is not None and value > 0:
            fix = f"`Trainer(gradient_clip_val={value})`, and call `self.clip_gradients(...)` before each step."
            raise MisconfigurationException(f"Automatic gradient clipping {why} {fix}")
        if batches != 1:
            fix = f"`Trainer(accumulate_grad_batches={batches})`, and step every so many batches yourself."
            raise MisconfigurationException(f"Automatic gradient accumulation {why} {fix}")
    has_step = overridden(module, "validation_step", LightningModule)
    has_loader = trainer.sources.get("val").is_defined()
    if has_loader and not has_step:
        rank_zero_warn(f"There are validation batches, but {name} has no `validation_step`: nothing is validated.")
    if has_step and not has_loader:
        what = f"{name} has a `validation_step`, but there are no validation batches: nothing is validated."
        rank_zero_warn(what, category=PossibleUserWarning)


def _resolve_durations(trainer: Trainer) -> None:
    """`max_epochs` and `min_epochs` that were left open, now that the callbacks are known."""
    loop = trainer.fit_loop
    if loop.max_epochs is None:
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        loop.max_epochs = 1000 if loop.max_steps == -1 and not timed else -1
        if loop.max_epochs == 1000:
            what = "No limit was given (`max_epochs`, `max_steps`, `max_time`): training ends after 1000 epochs."
            rank_zero_warn(f"{what} `max_epochs=-1` means none.", category=PossibleUserWarning)
    if loop.min_epochs is None:
        loop.min_epochs = 1 if loop.min_steps is not None else 0


def refuse_misspelt(owner: Any, base: type) -> None:
    """A method whose name is nearly a hook's, while that hook itself is not overridden, would never be called."""
    known = {name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name, None))}
    for cls in type(owner).__mro__:
        if cls.__module__.startswith(("fulmen.", "torch")):
            continue
        for name, member in vars(cls).items():
            if name.startswith("_") or name in known or not callable(member) or isinstance(member, type):
                continue
            for hook in get_close_matches(name, known, n=1, cutoff=0.9):
                if not overridden(owner, hook, base):
                    what = f"`{cls.__name__}.{name}` looks like a misspelt hook, and would never be called."
                    fix = f"Did you mean `{hook}`? Rename it; if it is a method of your own, to something less alike."
                    raise MisconfigurationException(f"{what} {fix}")
