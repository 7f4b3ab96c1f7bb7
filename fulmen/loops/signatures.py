"""Whether steps and hooks can be called at all: looked at before anything runs, refused with the signature to write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.datamodule import LightningDataModule
from fulmen.hooks import HOOKS
from fulmen.module import LightningModule
from fulmen.utilities.introspection import match_parameters, overrides_method, takes_argument

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

# By verb, the steps that run.
STEPS = {
    "fit": ("training_step", "validation_step"),
    "validate": ("validation_step",),
    "test": ("test_step",),
    "predict": ("predict_step",),
}
_LOADER = "dataloader_idx"


@lru_cache(maxsize=256)
def names_of(base: type, hook: str) -> tuple[str, ...]:
    """The names of the arguments that a hook is called with, as the base class declares it."""
    method = getattr(base, hook, None)
    return tuple(inspect.signature(method).parameters)[1:] if method is not None else ()


def check_signatures(trainer: Trainer) -> None:
    """Raises a TypeError for a step or hook that cannot be called with what it would get."""
    module = trainer.lightning_module
    verb = str(trainer.state.fn.value)  # type: ignore[union-attr]
    for name in STEPS[verb]:
        method = getattr(module, name)
        if overrides_method(module, name, LightningModule) and not takes_argument(
            method, "dataloader_iter", explicit=True
        ):
            names = names_of(
                LightningModule, "on_train_batch_start" if name == "training_step" else "on_test_batch_start"
            )
            _check_callable(module, name, method, names, needed=("batch",))
    parties: list[tuple[Any, type]] = [(module, LightningModule), (trainer.datamodule, LightningDataModule)]
    for owner, base in parties + [(callback, Callback) for callback in trainer.callbacks]:
        for hook in HOOKS:
            if hasattr(base, hook.name) and overrides_method(owner, hook.name, base):
                names = names_of(base, hook.name)
                needed = tuple(name for name in names if name != _LOADER)
                _check_callable(owner, hook.name, getattr(owner, hook.name), names, needed)


def _check_callable(
    owner: object, name: str, method: Callable[..., Any], names: Sequence[str], needed: Sequence[str]
) -> None:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return
    positions, named = match_parameters(method, names)
    missing = [given for given in needed if given not in named and names.index(given) not in positions]
    problem = f"it takes no `{missing[0]}`" if missing else None
    if problem is None:
        try:
            signature.bind(*positions, **named)
        except TypeError as error:
            problem = str(error)
    if problem is not None:
        given = f"with ({', '.join(names)})" if names else "without arguments"
        shown = ", ".join(["self", *(f"{each}=0" if each == _LOADER else each for each in names)])
        what = f"`{type(owner).__name__}.{name}{signature}` is called {given}, and that cannot work: {problem}."
        raise TypeError(f"{what} Define `def {name}({shown})`.")
