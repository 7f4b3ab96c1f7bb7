"""The arguments of running constructors, and attributes that may live in a module, its hyper-parameters or its data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import FrameType
from typing import Any

from fulmen.utilities.modules import is_picklable
from fulmen.utilities.rank_zero import rank_zero_warn


def clean_namespace(hparams: MutableMapping[str, Any]) -> None:
    """Removes what cannot be pickled, with a warning that names it."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        del hparams[name]
        rank_zero_warn(
            f"`{name}` was removed from the hyper-parameters: it cannot be pickled. Pass something that can."
        )


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """What the constructor calls its own object, ``*args`` and ``**kwargs``; None for what it does not have."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())  # type: ignore[misc]
    by_kind = {parameter.kind: parameter.name for parameter in reversed(parameters)}
    return parameters[0].name, by_kind.get(inspect.Parameter.VAR_POSITIONAL), by_kind.get(inspect.Parameter.VAR_KEYWORD)


def get_init_args(frame: FrameType) -> dict[str, Any]:
    """The arguments of the constructor that runs in a frame, ``**kwargs`` flattened and ``*args`` left out."""
    if "__class__" not in frame.f_locals:
        return {}
    names, _, keywords, values = inspect.getargvalues(frame)
    further: dict[str, Any] = values.get(keywords or "", {})
    return {name: values[name] for name in names[1:]} | further


def collect_init_args(
    frame: FrameType | None, path_args: list[dict[str, Any]], inside: bool = False, classes: tuple[type, ...] = ()
) -> list[dict[str, Any]]:
    """`get_init_args` of the first constructors that run around a frame, the innermost first, after ``path_args``.

    Args:
        inside: is the frame itself called by one of them?
        classes: only constructors of their instances.
    """
    while frame is not None and frame.f_back is not None:
        own = next(iter(frame.f_locals.values()), None)
        if "__class__" in frame.f_locals and (not classes or isinstance(own, classes)):
            path_args.append(get_init_args(frame))
            inside = True
        elif inside:
            break
        frame = frame.f_back
    return path_args


def lightning_hasattr(model: object, attribute: str) -> bool:
    """Does the module have the attribute, or its hyper-parameters, or its trainer's datamodule or theirs?"""
    return any(_find_holders(model, attribute))


def lightning_getattr(model: object, attribute: str) -> Any:
    """The attribute from where `lightning_hasattr` looks; the last of the places wins."""
    holder = [None, *_find_holders(model, attribute)][-1]
    if holder is None:
        raise _missing_attribute(model, attribute)
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: object, attribute: str, value: Any) -> None:
    """Sets the attribute in all places that have it."""
    holders = list(_find_holders(model, attribute))
    if not holders:
        raise _missing_attribute(model, attribute)
    for holder in holders:
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)


def capture_attribute(model: object, attribute: str) -> Callable[[], None]:
    """Remember the attribute in all places that have it; the returned function puts it back."""
    holders = list(_find_holders(model, attribute))
    values = [holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute) for holder in holders]

    def restore_attribute() -> None:
        for holder, value in zip(holders, values):
            if isinstance(holder, dict):
                holder[attribute] = value
            else:
                setattr(holder, attribute, value)

    return restore_attribute


def _find_holders(model: object, attribute: str) -> Iterator[Any]:
    trainer = model._trainer if hasattr(model, "_trainer") else None
    owners = [model] if trainer is None or trainer.datamodule is None else [model, trainer.datamodule]
    for owner in owners:
        if hasattr(owner, attribute):
            yield owner
        hparams = owner.hparams if hasattr(owner, "hparams") else None
        has_it = attribute in hparams if isinstance(hparams, Mapping) else hasattr(hparams, attribute)
        if hparams is not None and has_it:
            yield hparams


def _missing_attribute(model: object, attribute: str) -> AttributeError:
    places = "it, its `hparams`, its datamodule and the `hparams` of that"
    return AttributeError(f"`{attribute}` is not an attribute of {type(model).__name__}. Looked for in {places}.")
