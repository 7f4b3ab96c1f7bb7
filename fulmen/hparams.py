"""`save_hyperparameters`: constructor arguments, remembered while the constructor still runs."""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from fulmen.utilities.collections import AttributeDict
from fulmen.utilities.errors import suggestion
from fulmen.utilities.modules import is_picklable
from fulmen.utilities.rank_zero import rank_zero_warn

# Written by the command line interface beside the arguments: who rebuilds the object, and which subclass it is.
INSTANTIATOR_KEY = "_instantiator"
CLASS_PATH_KEY = "_class_path"

_PRIMITIVES = (bool, int, float, str)
_given: ContextVar[dict[str, Any] | None] = ContextVar("given_hyperparameters", default=None)


class HyperparametersMixin:
    """Remembers constructor arguments of a module or datamodule in `hparams`."""

    # On the class, since a dataclass saves before a base constructor runs; not annotated, since TorchScript cannot
    # read annotations that are texts.
    _log_hyperparams = False
    _hparams_name = None  # type: str | None

    def save_hyperparameters(
        self, *args: Any, ignore: Iterable[str] | str | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Keep constructor arguments in `hparams`, for checkpoints and loggers. Call it inside `__init__`.

        The values are the local variables of all running constructors of this object, base classes included; where
        they use the same name, the subclass wins. `**kwargs` are flattened, `*args` are left out.

        Args:
            args: nothing for all arguments, the names of some of them, or one mapping or `Namespace` whose content
                is kept instead.
            ignore: arguments not to keep; also forgets them if a base class has kept them.
            frame: where to look for the constructors; the caller's frame by default.
            logger: whether loggers receive them at the start of a run.

        Raises:
            KeyError: a name is not an argument.
            ValueError: the object is neither mapping nor `Namespace`, or there are several.
        """
        self._log_hyperparams = logger
        ignored = [ignore] if isinstance(ignore, str) else list(ignore or ())
        self.remove_ignored_hparams(ignored)
        found = init_arguments(self, frame or inspect.currentframe().f_back)  # type: ignore[union-attr]
        given = _given.get()
        arguments = {k: v for k, v in (found if given is None else given).items() if k not in ignored}
        objects = [arg for arg in args if not isinstance(arg, str)]
        if len(objects) > 1:
            raise ValueError(
                f"`save_hyperparameters` received {len(objects)} objects. It keeps the content of one, or arguments by"
                " name. Merge them into one dict, or pass the names of the arguments as strings."
            )
        if objects:
            chosen = as_hparams(objects[0])
            self._hparams_name = next((name for name, value in found.items() if value is objects[0]), None)
            if isinstance(chosen, dict):
                chosen = AttributeDict({k: v for k, v in chosen.items() if k not in ignored})
        else:
            chosen = AttributeDict(_named(arguments, args, ignored) if args else arguments)
            self._hparams_name = "kwargs"
        _warn_about_modules(chosen)
        self._set_hparams(chosen)
        self._hparams_initial = _copied(self.hparams)

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Forget these names if they were kept before."""
        for name in ignore_list:
            self.hparams.pop(name, None)

    @property
    def hparams(self) -> AttributeDict | MutableMapping:
        """What was kept; may be changed, and is what checkpoints hold. Keys are attributes too."""
        return self.__dict__.setdefault("_hparams", AttributeDict())

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of what was kept, as it was at that time; this is what loggers receive."""
        return _copied(self.__dict__.get("_hparams_initial", AttributeDict()))

    def _set_hparams(self, hp: MutableMapping | Mapping | Namespace) -> None:
        hp = as_hparams(hp)
        if isinstance(hp, dict) and isinstance(self.hparams, dict):
            self.hparams.update(hp)
        else:
            self._hparams = hp


def init_arguments(obj: object, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of all constructors of `obj` that are running in `frame` and its callers."""
    found: dict[str, Any] = {}
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            # Base classes come first on the way out, so a subclass's value replaces theirs.
            found.update(_constructor_arguments(obj, frame))
        frame = frame.f_back
    return found


def _constructor_arguments(obj: object, frame: FrameType) -> dict[str, Any]:
    names, _, keywords, values = inspect.getargvalues(frame)
    if not names or values.get(names[0]) is not obj:
        return {}
    arguments = {name: values[name] for name in names[1:] if name in values}
    for name, value in arguments.items():
        # A dataclass fills in defaults made by a factory only later; its frame still holds a placeholder.
        if type(value).__module__ == "dataclasses" and type(value).__name__.startswith("_HAS_DEFAULT"):
            arguments[name] = getattr(obj, name)
    return {**arguments, **values.get(keywords, {})} if keywords else arguments


def _named(arguments: Mapping[str, Any], names: Iterable[str], ignored: Iterable[str]) -> dict[str, Any]:
    wanted = [name for name in names if name not in ignored]
    for name in wanted:
        if name not in arguments:
            raise KeyError(
                f"`save_hyperparameters({name!r})`: no running constructor has this argument, only {sorted(arguments)}."
                f"{suggestion(name, arguments)} Call it inside `__init__`, with names of its arguments."
            )
    return {name: arguments[name] for name in wanted}


def as_hparams(hp: Any) -> MutableMapping:
    """`hp` as a mapping with attribute access; configuration objects that are mutable mappings stay what they are."""
    if hp is None:
        return AttributeDict()
    if isinstance(hp, Namespace):
        return AttributeDict(vars(hp))
    if isinstance(hp, MutableMapping) and not isinstance(hp, dict):
        return hp
    if isinstance(hp, Mapping):
        return AttributeDict(hp)
    kind = "primitive value" if isinstance(hp, _PRIMITIVES) else f"object of type `{type(hp).__name__}`"
    raise ValueError(
        f"Hyper-parameters were given as the {kind} {hp!r}, in which they have no names. Pass a dict or a `Namespace`,"
        " the name of the argument as a string, or nothing to keep all arguments."
    )


@contextmanager
def given_hyperparameters(arguments: Mapping[str, Any], instantiator: str | None = None) -> Iterator[None]:
    """Inside, `save_hyperparameters` keeps these instead of looking at constructors.

    Used by the command line interface, whose configuration can rebuild arguments that are objects themselves.
    """
    marker = {} if instantiator is None else {INSTANTIATOR_KEY: instantiator}
    token = _given.set({**arguments, **marker})
    try:
        yield
    finally:
        _given.reset(token)


def drop_unpicklable(hparams: MutableMapping) -> None:
    """Remove what could not be stored in a checkpoint; called when a run starts."""
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        del hparams[name]
        rank_zero_warn(
            f"The hyper-parameter `{name}` was removed from `hparams`: it cannot be pickled, so no checkpoint can hold"
            f" it. `self.save_hyperparameters(ignore=[{name!r}])` avoids this warning."
        )


def clean_for_loggers(module: HyperparametersMixin, datamodule: HyperparametersMixin | None) -> dict[str, Any]:
    """The hyper-parameters of both that loggers should receive; empty if there are none.

    Raises:
        RuntimeError: both use one name for different values.
    """
    ours, theirs = (
        {k: v for k, v in source.hparams_initial.items() if k not in (CLASS_PATH_KEY, INSTANTIATOR_KEY)}
        if source is not None and source._log_hyperparams
        else {}
        for source in (module, datamodule)
    )
    clashes = [name for name in ours if name in theirs and not _same(ours[name], theirs[name])]
    if clashes:
        raise RuntimeError(
            f"The module and the datamodule have different values for the hyper-parameters {clashes}, and loggers would"
            " receive both under one name. Rename one, or save it with `save_hyperparameters(logger=False)`."
        )
    return {**ours, **theirs}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and bool((first == second).all())
    try:
        return first is second or bool(first == second)
    except Exception:  # arrays and the like compare element by element
        return False


def _copied(hparams: Any) -> Any:
    try:
        return copy.deepcopy(hparams)
    except Exception:  # a value that cannot be copied (a lock, an open file) is shared
        return copy.copy(hparams)


def _warn_about_modules(hparams: Mapping[str, Any]) -> None:
    for name, value in hparams.items():
        if isinstance(value, torch.nn.Module):
            rank_zero_warn(
                f"The hyper-parameter `{name}` is an `nn.Module`, whose weights are in the checkpoint already and would"
                f" be stored twice. Leave it out: `self.save_hyperparameters(ignore=[{name!r}])`."
            )
