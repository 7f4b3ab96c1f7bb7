"""Objects made from a class path and its arguments, as a configuration spells them."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from fulmen.checkpoint.rebuild import is_imported_as
from fulmen.hparams import given_hyperparameters


def instantiate_class(args: Any | tuple[Any, ...], init: Mapping[str, Any]) -> Any:
    """The object that a class path and arguments describe.

    Arguments:
        args: The first argument of the class, or a tuple of its first arguments.
        init: `{"class_path": "package.Class", "init_args": {...}}`; without "init_args" there are no others.

    Raises:
        ValueError: if "class_path" does not name a class inside a module.

    Examples:
        >>> layer = instantiate_class((4, 2), {"class_path": "torch.nn.Linear", "init_args": {"bias": False}})
        >>> layer
        Linear(in_features=4, out_features=2, bias=False)
    """
    given = args if isinstance(args, tuple) else (args,)
    path = init["class_path"]
    if "." not in path:
        what = f"`class_path={path!r}` has no module."
        raise ValueError(f"{what} Write the whole path of the class, such as 'torch.optim.{path}'.")
    return pkgutil.resolve_name(path)(*given, **(init.get("init_args") or {}))


def class_path_of(cls: type) -> str:
    """The path under which a class can be imported again."""
    return f"{cls.__module__}.{cls.__qualname__}"


def as_class_path(cls: type, init: Mapping[str, Any] | Namespace | None) -> dict[str, Any]:
    """The arguments of a class that is fixed, in the form that also names the class."""
    arguments = init.as_dict() if isinstance(init, Namespace) else dict(init or {})
    return {"class_path": class_path_of(cls), "init_args": arguments}


class RememberingInstantiator:
    """Makes a module or datamodule so that its `save_hyperparameters` keeps what the configuration says.

    There nested objects are class paths and arguments, which any checkpoint can hold and a reader can rebuild.

    Arguments:
        config: The arguments of the class; with `class_path`, `init_args` and `dict_kwargs` where it was chosen by path.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._class_path: str | None = config.get("class_path") if "class_path" in config else None
        self._hparams = dict(config)
        if self._class_path is not None:
            nested = {**(config.get("init_args") or {}), **(config.get("dict_kwargs") or {})}
            self._hparams = {"_class_path": self._class_path, **nested}

    def __call__(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        with self._remember_for(class_type):
            return class_type(*args, **kwargs)

    def _remember_for(self, class_type: type) -> AbstractContextManager[None]:
        """Arguments of the module may be modules, too: they have hyper-parameters of their own."""
        if self._class_path is None or is_imported_as(class_type, self._class_path):
            return given_hyperparameters(class_type, self._hparams)
        return nullcontext()


def instantiate_config(
    parser: ArgumentParser, config: Namespace, instantiators: list[tuple[Any, type, bool]]
) -> Namespace:
    """The configuration with objects in the place of class paths; jsonargparse has renamed this in 4.49."""
    if hasattr(parser, "instantiate"):
        made: Namespace = parser.instantiate(config, instantiators=instantiators)
        return made
    for instantiator, class_type, subclasses in instantiators:
        parser.add_instantiator(instantiator, class_type, subclasses=subclasses)
    made = parser.instantiate_classes(config)
    return made
