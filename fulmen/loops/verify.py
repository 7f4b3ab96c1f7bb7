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
    """Raises for a module, datamodule or combination of arguments that cannot run.

    Raises:
        MisconfigurationException: a missing step, optimizer or loader; arguments that exclude each other.
    """
    module, verb = trainer.lightning_module, trainer.state.fn
    refuse_removed(module)
    refuse_misspelt(module, LightningModule)
    for callback in trainer.callbacks:
        refuse_misspelt(callback, Callback)
    if verb == TrainerFn.FITTING:
        _for_fit(trainer, module)
    elif verb == TrainerFn.VALIDATING:
        _for_verb(trainer, module, "validation_step", "val", "validate")
    elif verb == TrainerFn.TESTING:
        _for_verb(trainer, module, "test_step", "test", "test")
    else:
        _for_verb(trainer, module, None, "predict", "predict")


def _for_fit(trainer: Trainer, module: LightningModule) -> None:
    name = type(module).__name__
    _require(module, "training_step", "def training_step(self, batch, batch_idx): return loss")
    _require(
        module, "configure_optimizers", "def configure_optimizers(self): return torch.optim.Adam(self.parameters())"
    )
    _require_loader(trainer, module, "train", "fit")
    if any(p.name == "optimizer_idx" for p in parameters_of(module.training_step)):
        raise RuntimeError(
            f"`{name}.training_step` has a parameter `optimizer_idx`. "
            "Training with multiple optimizers is only supported with manual optimization. "
            "Set `self.automatic_optimization = False`, remove the parameter, and step the optimizers yourself."
        )
    if not module.automatic_optimization:
        _for_manual(trainer)
    has_step = overridden(module, "validation_step", LightningModule)
    has_loader = trainer.sources.get("val").is_defined()
    if has_loader and not has_step:
        rank_zero_warn(f"You passed in a `val_dataloader` but {name} has no `validation_step`. Skipping val loop.")
    if has_step and not has_loader:
        rank_zero_warn(
            f"{name} defines `validation_step` but there is no `val_dataloader`. Skipping val loop.",
            category=PossibleUserWarning,
        )
    _resolve_durations(trainer)


def _for_manual(trainer: Trainer) -> None:
    value, batches = trainer.gradient_clip_val, trainer.accumulate_grad_batches
    if value is not None and value > 0:
        raise MisconfigurationException(
            f"`Trainer(gradient_clip_val={value})` with manual optimization. "
            "Automatic gradient clipping is not supported for manual optimization. "
            "Remove it, and call `self.clip_gradients(optimizer, ...)` before `optimizer.step()`."
        )
    if batches != 1:
        raise MisconfigurationException(
            f"`Trainer(accumulate_grad_batches={batches})` with manual optimization. "
            "Automatic gradient accumulation is not supported for manual optimization. "
            "Remove it, and call `optimizer.step()` every so many batches yourself."
        )


def _resolve_durations(trainer: Trainer) -> None:
    """`max_epochs` and `min_epochs` that were left open, now that the callbacks are known."""
    loop = trainer.fit_loop
    if loop.max_epochs is None:
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        if loop.max_steps == -1 and not timed:
            rank_zero_warn(
                "`max_epochs` was not set. Setting it to 1000 epochs. To train without an epoch limit, set `max_epochs=-1`.",
                category=PossibleUserWarning,
            )
            loop.max_epochs = 1000
        else:
            loop.max_epochs = -1
    if loop.min_epochs is None:
        loop.min_epochs = 1 if loop.min_steps is not None else 0


def _for_verb(trainer: Trainer, module: LightningModule, step: str | None, kind: str, verb: str) -> None:
    if step is not None and not overridden(module, step, LightningModule):
        raise MisconfigurationException(
            f"No `{step}()` method defined in {type(module).__name__} to run `Trainer.{verb}`. "
            f"Define `def {step}(self, batch, batch_idx): ...`."
        )
    if step is None and not callable(getattr(module, "predict_step", None)):
        raise MisconfigurationException("`predict_step` cannot be None to run `Trainer.predict`. Define it.")
    _require_loader(trainer, module, kind, verb)


def _require(module: LightningModule, method: str, example: str) -> None:
    if not overridden(module, method, LightningModule):
        raise MisconfigurationException(
            f"No `{method}()` method defined in {type(module).__name__}. Trainer expects one to run `fit`. Trainer "
            f"requires `{method}`. Define `{example}`."
        )


def _require_loader(trainer: Trainer, module: LightningModule, kind: str, verb: str) -> None:
    if not trainer.sources.get(kind).is_defined():
        given = f" or the datamodule {type(trainer.datamodule).__name__}" if trainer.datamodule is not None else ""
        raise MisconfigurationException(
            f"`Trainer.{verb}` has no batches: no `{kind}_dataloader()` method defined in {type(module).__name__}{given}. "
            f"Pass a loader to `trainer.{verb}(...)`, or define `{kind}_dataloader`."
        )


def refuse_removed(module: LightningModule) -> None:
    """Hooks of 1.x would silently never be called."""
    for name, successor in REMOVED_HOOKS.items():
        if callable(getattr(module, name, None)):
            raise NotImplementedError(
                f"`{type(module).__name__}.{name}` is defined. Support for `{name}` has been removed, it would never "
                f"be called. Collect what you need in the step and use `{successor}(self)`."
            )


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
                raise MisconfigurationException(
                    f"`{cls.__name__}.{name}` looks like a misspelt hook. Did you mean `{hook}`? "
                    "A method of that name would never be called. "
                    f"Rename it to `{hook}`; or, if it is a method of your own, to something less alike."
                )


def _alike(name: str, hook: str) -> bool:
    matcher = SequenceMatcher(None, name, hook)
    return matcher.real_quick_ratio() >= _LIKE and matcher.quick_ratio() >= _LIKE and matcher.ratio() >= _LIKE
