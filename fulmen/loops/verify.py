"""What can be known to be wrong before anything runs: checked once per call, refused by name."""

from __future__ import annotations

from difflib import SequenceMatcher
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

# How alike a method's name and a hook's must be for it to be taken for a misspelling.
_LIKE = 0.9


def configuration(trainer: Trainer) -> None:
    """Raises for a module, datamodule or combination of arguments that cannot run."""
    module, verb = trainer.lightning_module, trainer.state.fn
    assert verb is not None
    refuse_removed(module)
    refuse_misspelt(module, LightningModule)
    for callback in trainer.callbacks:
        refuse_misspelt(callback, Callback)
    if verb == TrainerFn.FITTING:
        _require(module, "training_step", "def training_step(self, batch, batch_idx): return loss", "fit")
        optimizer = "torch.optim.Adam(self.parameters())"
        _require(module, "configure_optimizers", f"def configure_optimizers(self): return {optimizer}", "fit")
        _require_loader(trainer, "train", "fit")
        _check_fit(trainer, module)
        _resolve_durations(trainer)
    elif verb == TrainerFn.PREDICTING:
        if not callable(getattr(module, "predict_step", None)):
            raise MisconfigurationException("`predict_step` cannot be None to run `Trainer.predict`. Define it.")
        _require_loader(trainer, "predict", "predict")
    else:
        step, kind = ("test_step", "test") if verb == TrainerFn.TESTING else ("validation_step", "val")
        _require(module, step, f"def {step}(self, batch, batch_idx): ...", verb.value)
        _require_loader(trainer, kind, verb.value)


def _require(module: LightningModule, method: str, example: str, verb: str) -> None:
    if not overridden(module, method, LightningModule):
        what = f"No `{method}()` method defined in {type(module).__name__} to run `Trainer.{verb}`."
        raise MisconfigurationException(f"{what} Define `{example}`.")


def _require_loader(trainer: Trainer, kind: str, verb: str) -> None:
    if not trainer.sources.get(kind).is_defined():
        owners = [type(owner).__name__ for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]
        what = f"`Trainer.{verb}` has no batches: no `{kind}_dataloader()` method defined in {' or '.join(owners)}."
        raise MisconfigurationException(f"{what} Pass a loader to `trainer.{verb}(...)`, or define that method.")


def _check_fit(trainer: Trainer, module: LightningModule) -> None:
    """Arguments that exclude each other, and validation of which one half is missing."""
    name = type(module).__name__
    if any(parameter.name == "optimizer_idx" for parameter in parameters_of(module.training_step)):
        what = f"`{name}.training_step` has a parameter `optimizer_idx`."
        why = "Several optimizers need manual optimization."
        fix = "Set `self.automatic_optimization = False`, remove the parameter, and step the optimizers yourself."
        raise RuntimeError(f"{what} {why} {fix}")
    if not module.automatic_optimization:
        value, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        why = "is not supported for manual optimization. Remove"
        if value is not None and value > 0:
            fix = (
                f"`Trainer(gradient_clip_val={value})`, and call `self.clip_gradients(...)` before `optimizer.step()`."
            )
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


def refuse_removed(module: LightningModule) -> None:
    """Hooks of 1.x would silently never be called."""
    for name, successor in REMOVED_HOOKS.items():
        if callable(getattr(module, name, None)):
            what = f"Support for `{name}` has been removed: `{type(module).__name__}.{name}` would never be called."
            raise NotImplementedError(f"{what} Collect what you need in the step and use `{successor}(self)`.")


def refuse_misspelt(owner: Any, base: type) -> None:
    """A method whose name is nearly a hook's, while that hook itself is not overridden, would never be called."""
    known = {name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name, None))}
    library = __name__.split(".")[0]
    for cls in type(owner).__mro__:
        if cls.__module__.split(".")[0] == library or cls.__module__.startswith("torch"):
            continue
        for name, member in vars(cls).items():
            if name.startswith("_") or name in known or not callable(member) or isinstance(member, type):
                continue
            hook = next((k for k in sorted(known) if _alike(name, k)), None)
            if hook is not None and not overridden(owner, hook, base):
                what = f"`{cls.__name__}.{name}` looks like a misspelt hook, and would never be called."
                fix = f"Did you mean `{hook}`? Rename it; if it is a method of your own, to something less alike."
                raise MisconfigurationException(f"{what} {fix}")


def _alike(name: str, hook: str) -> bool:
    matcher = SequenceMatcher(None, name, hook)
    return matcher.real_quick_ratio() >= _LIKE and matcher.quick_ratio() >= _LIKE and matcher.ratio() >= _LIKE
