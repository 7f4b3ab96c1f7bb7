"""Constructor arguments that a command line has stored: nested objects stand there as class paths and arguments.

`jsonargparse` turns them into objects again, by the type hints of the constructor. A checkpoint may come from anywhere, so
that without `weights_only=False` only parts of a model are built: modules, optimizers, schedulers, and classes that
`torch.serialization.add_safe_globals` allows, and only if they are imported already.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.utilities.optional import import_optional

T = TypeVar("T")

# Making one of these runs the constructor of a part of a model.
MODEL_PARTS = (nn.Module, Optimizer, LRScheduler)


def instantiate_module(class_type: type[T], config: Mapping[str, Any]) -> T:
    """An object of `class_type` made from the arguments in `config`, in which objects are class paths and arguments.

    Arguments:
        class_type: The class; a base of it if `config` names the class as "_class_path".
        config: Arguments by name, as a command line stores them among the hyper-parameters of a checkpoint.

    Raises:
        ValueError: if "_class_path" names no subclass of `class_type`.

    Examples:
        >>> sizes = {"in_features": 2, "out_features": 1}
        >>> instantiate_module(torch.nn.Module, {"_class_path": "torch.nn.Linear", **sizes})
        Linear(in_features=2, out_features=1, bias=True)
    """
    arguments = {name: value for name, value in config.items() if name not in ("_class_path", "_instantiator")}
    path = config.get("_class_path")
    cls = class_type if path is None else import_class(path)
    if not issubclass(cls, class_type):
        raise ValueError(f"`{path}` is no subclass of `{class_type.__name__}`. Name one that is.")
    return cls(**rebuild_arguments(cls, arguments, trusted=True))


def import_class(path: str) -> type:
    """The class under an import path."""
    found = pkgutil.resolve_name(path) if "." in path else None
    if not inspect.isclass(found):
        raise ValueError(f"`{path}` is not the import path of a class. Write it as 'package.module.Class'.")
    return found


def find_imported(path: str) -> Any:
    """What has this import path in the modules that are imported already; None if nothing has."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:depth]))
        found = functools.reduce(lambda holder, part: getattr(holder, part, None), parts[depth:], module)
        if found is not None:
            return found
    return None


def is_imported_as(cls: type, path: str) -> bool:
    """Is this class known under that import path?"""
    return find_imported(path) is cls


def holds_class_paths(value: object) -> bool:
    """Is there an object in it that is described by its class path?"""
    if isinstance(value, Mapping):
        return isinstance(value.get("class_path"), str) or any(map(holds_class_paths, value.values()))
    return isinstance(value, (list, tuple)) and any(map(holds_class_paths, value))


def rebuild_arguments(cls: type, stored: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """The stored arguments of the constructor of `cls` as it takes them, by its type hints.

    Raises:
        UnpicklingError: where `trusted` is false, for what is no part of a model.
    """
    parsers = import_optional("jsonargparse", "for the arguments in the checkpoint", extra="cli")
    parser = parsers.ArgumentParser(exit_on_error=False)
    unstored = {name for name in inspect.signature(cls).parameters if name not in stored}
    added = parser.add_class_arguments(cls, "module", skip=unstored, fail_untyped=False)
    known = {key.removeprefix("module.") for key in added}
    if not trusted:
        for path in _class_paths({name: stored[name] for name in known & stored.keys()}):
            refuse_unless_model_part(find_imported(path), path)
    config = parser.parse_object({"module": {name: value for name, value in stored.items() if name in known}})
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    built = instantiate(config, instantiate_groups=False).get("module")
    return {**stored, **(vars(built) if built is not None else {})}


def _class_paths(value: object) -> list[str]:
    if isinstance(value, Mapping):
        own = [value["class_path"]] if isinstance(value.get("class_path"), str) else []
        return [*own, *(path for item in value.values() for path in _class_paths(item))]
    return [path for item in value for path in _class_paths(item)] if isinstance(value, (list, tuple)) else []


def refuse_unless_model_part(found: object, path: str) -> None:
    """Raises for what a file from anywhere may not have built."""
    if inspect.isclass(found) and issubclass(found, MODEL_PARTS):
        return
    if any(
        found is (entry[0] if isinstance(entry, tuple) else entry) for entry in torch.serialization.get_safe_globals()
    ):
        return
    what = f"The checkpoint wants a `{path}` to be made, which is not an imported part of a model."
    how = "If you trust the file, pass `weights_only=False`, or import that class and allow it with"
    raise pickle.UnpicklingError(f"{what} {how} `torch.serialization.add_safe_globals([...])`.")
