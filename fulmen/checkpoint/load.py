"""`load_from_checkpoint`: a module or datamodule rebuilt from the arguments and the state a file holds."""

from __future__ import annotations

import ast
import csv
import functools
import inspect
import os
import pickle
from collections.abc import Callable, Iterable
from math import inf
from typing import IO, TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import nn

from fulmen.checkpoint.hparams import OMEGACONF, Missing, read_objects
from fulmen.checkpoint.lightning_format import migrate_checkpoint
from fulmen.checkpoint.pruned import match_pruning
from fulmen.checkpoint.rebuild import find_imported, holds_class_paths, rebuild_arguments
from fulmen.checkpoint.snapshot import load_weights
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import get_filesystem
from fulmen.storage.integrity import load_verified
from fulmen.utilities.collections import AttributeDict
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.introspection import parameters_of
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION

# What files of a command line interface name as the function that rebuilds the object. Others are refused, or opening a
# file could run any code; nor is one of these called: `rebuild_arguments` does their work.
INSTANTIATORS = {
    f"{package}.cli.instantiate_module" for package in ("lightning.pytorch", "pytorch_lightning", "fulmen")
}

# Where hyper-parameters of modules stood in the first files of Lightning.
OLD_KEYS = ("hparams", "module_arguments")


class _ClassOnlyMethod(classmethod):  # type: ignore[type-arg]  # takes arguments for type checkers only
    """A class method that must not be called on an instance, where users would expect it to change that instance."""

    def __get__(self, instance: object, owner: type | None = None) -> Callable[..., Any]:
        if instance is None:
            return super().__get__(None, owner)

        @functools.wraps(self.__func__)
        def refuse_call(*_: Any, **__: Any) -> NoReturn:
            name = f"{type(instance).__name__}.{self.__func__.__name__}"
            raise TypeError(
                f"`{name}` cannot be called on an instance: it makes a new one. Use `loaded = {name}(...)`."
            )

        return refuse_call


if TYPE_CHECKING:
    ClassOnlyMethod = classmethod  # so that type checkers know what it returns
else:
    ClassOnlyMethod = _ClassOnlyMethod


def load_from_checkpoint(
    cls: Any,
    checkpoint_path: str | os.PathLike[str] | IO[bytes],
    map_location: MAP_LOCATION = None,
    hparams_file: str | os.PathLike[str] | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """An object of `cls` (or of the subclass the file names) made from the file; `kwargs` replace stored arguments."""
    location = keep_available_device if map_location is None else map_location
    checkpoint = read_checkpoint(checkpoint_path, location, weights_only)
    key = cls.CHECKPOINT_HYPER_PARAMS_KEY
    missing: dict[str, Missing] = {}
    stored = None if hparams_file is None else _load_existing_hparams(hparams_file)
    if stored is None:
        old = [checkpoint[name] for name in OLD_KEYS if name in checkpoint and issubclass(cls, nn.Module)]
        checkpoint[key] = checkpoint.get(key) or next(iter(old), {})
        missing = read_objects(checkpoint, key, weights_only, location, skip=kwargs)
        stored = checkpoint[key]
    # `on_load_checkpoint` shall see the arguments that are used.
    checkpoint[key] = {**stored, **kwargs}
    built = _build_object(cls, dict(stored), kwargs, checkpoint, missing, weights_only is False)
    if not isinstance(built, nn.Module):
        if type(built).__qualname__ in checkpoint:
            built.load_state_dict(checkpoint[type(built).__qualname__])
        return built
    _restore_module(built, checkpoint, strict, checkpoint_path)
    weights = [value for value in checkpoint["state_dict"].values() if isinstance(value, torch.Tensor)]
    if not weights:
        rank_zero_warn(f"The checkpoint {checkpoint_path!r} holds no weights: its state dict is empty.")
        return built
    return built.to(weights[0].device)


def _load_existing_hparams(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    try:
        return load_hparams(path)
    except FileNotFoundError:
        what = f"`hparams_file={os.fspath(path)!r}` does not exist"
        rank_zero_warn(f"{what}: the hyper-parameters of the checkpoint are used. Pass the file that a logger wrote.")
        return None


def read_checkpoint(
    path: str | os.PathLike[str] | IO[bytes], map_location: MAP_LOCATION, weights_only: bool | None
) -> dict[str, Any]:
    """The content of a file, brought up to date."""
    if isinstance(path, (str, os.PathLike)):
        checkpoint = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
    else:
        name = path.name if hasattr(path, "name") else repr(path)
        checkpoint = load_verified(path, name, map_location, weights_only)
    return migrate_checkpoint(checkpoint, path)


def keep_available_device(storage: Any, location: str) -> Any:
    """A `map_location` for `torch.load`: what was on a device that is missing here comes to the CPU."""
    kind, _, index = location.partition(":")
    present = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    return storage if int(index or 0) >= present.get(kind, inf) else None


def _build_object(
    cls: type, stored: dict[str, Any], kwargs: dict[str, Any], checkpoint: dict[str, Any], missing: dict[str, Missing],
    trusted: bool,
) -> Any:  # fmt: skip
    """The new object, from the arguments its constructor accepts."""
    cls = _class_to_build(cls, stored.get("_instantiator"), stored.pop("_class_path", None))
    stored |= _rebuilt_arguments(cls, stored, kwargs, trusted)
    signature = _Signature(parameters_of(cls.__init__)[1:])  # type: ignore[misc]
    accepted = signature.accepted
    name = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_NAME)  # type: ignore[attr-defined]
    if name in accepted:  # one argument that holds all hyper-parameters
        inside = {k: v for k, v in kwargs.items() if k in stored or k in missing or k not in accepted}
        kind = _container_of_hparams(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_TYPE))  # type: ignore[attr-defined]
        arguments = {name: kind({**stored, **inside}), **kwargs}
        missing = {} if name in kwargs else missing
    else:
        inside = {}
        arguments = {**stored, **kwargs}
        missing = {k: why for k, why in missing.items() if k in accepted or signature.takes_any}
    if not signature.takes_any:
        arguments = {k: v for k, v in arguments.items() if k in accepted}
        _warn_of_ignored(cls, kwargs.keys() - accepted - inside.keys(), accepted)
    required = [name for name in signature.required if name not in arguments]
    _say_what_is_missing(cls, required, missing, trusted, bool(stored))
    by_position = [arguments.pop(name) for name in signature.positional_only if name in arguments]
    return cls(*by_position, **arguments)


def _rebuilt_arguments(cls: type, stored: dict[str, Any], kwargs: dict[str, Any], trusted: bool) -> dict[str, Any]:
    """Those that a command line has stored, but for what `kwargs` replace anyway."""
    if stored.pop("_instantiator", None) is None:
        return {}
    needed = {name: value for name, value in stored.items() if name not in kwargs}
    return rebuild_arguments(cls, needed, trusted) if holds_class_paths(needed) else needed


class _Signature:
    """What a constructor accepts, by name; `takes_any` if it has `**kwargs`."""

    def __init__(self, parameters: list[inspect.Parameter]) -> None:
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.accepted = {p.name for p in named}
        self.required = [p.name for p in named if p.default is p.empty]
        self.positional_only = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)


def _warn_of_ignored(cls: type, names: Iterable[str], accepted: set[str]) -> None:
    for name in names:
        what = f"The argument `{name}` was left out: `{cls.__name__}.__init__` does not accept it."
        rank_zero_warn(what + suggest_name(name, accepted))


def _class_to_build(cls: type, instantiator: str | None, class_path: str | None) -> type:
    """The class itself, or the subclass that a file of a command line interface names."""
    if instantiator not in (None, *INSTANTIATORS):
        what = f"The checkpoint wants to be built by `{instantiator}`, and a file could name any function."
        raise ValueError(f"{what} If you trust it, add its name to `fulmen.checkpoint.load.INSTANTIATORS`.")
    return cls if instantiator is None or class_path is None else _imported_subclass(cls, class_path)


def _container_of_hparams(kind: type | str | None) -> Callable[[dict[str, Any]], Any]:
    """What makes one argument of a dict of hyper-parameters; files name it, those of Lightning by a class."""
    if kind == OMEGACONF:
        create: Callable[[dict[str, Any]], Any] = import_optional(
            OMEGACONF, "for its hyper-parameters"
        ).OmegaConf.create
        return create
    return AttributeDict if kind is None or isinstance(kind, str) else kind


def _say_what_is_missing(
    cls: type, required: list[str], missing: dict[str, Missing], trusted: bool, any_stored: bool
) -> None:
    """Raises if the file lacks needed arguments or may not give them, and warns of those that take their defaults."""
    names = [*required, *(name for name in missing if name not in required)]
    if not names:
        return
    reasons = "; ".join(f"`{name}` is {lost.why}" for name, lost in missing.items())
    fix = f"pass them: `{cls.__name__}.load_from_checkpoint(path, {', '.join(f'{name}=...' for name in names)})`."
    if any(lost.in_file for lost in missing.values()):
        what = f"Hyper-parameters of `{cls.__name__}` are stored as objects: {reasons}."
        how = "Make their classes importable under these names, or"
        if not trusted:
            what += " Building objects of a file can run any code."
            how = "If you trust it, pass `weights_only=False`, or allow the classes with"
            how += " `torch.serialization.add_safe_globals([...])`; or"
        raise pickle.UnpicklingError(f"{what} {how} {fix}")
    if not required:
        what = f"Defaults take the place of hyper-parameters that the checkpoint does not hold: {reasons}."
        rank_zero_warn(f"{what} To have them back, {fix}")
        return
    what = (
        f"`{cls.__name__}.__init__` is missing {len(required)} required argument(s): {', '.join(map(repr, required))}."
    )
    if not reasons:
        reasons = "`save_hyperparameters(ignore=...)` leaves them out" if any_stored else ""
        reasons = reasons or "it has none, since `save_hyperparameters()` was not called in `__init__`"
    raise TypeError(f"{what} The checkpoint does not hold them: {reasons}. To load it, {fix}")


def _imported_subclass(cls: type, class_path: str) -> type:
    """The class of that name, if it is imported already and is a kind of `cls`."""
    found = find_imported(class_path)
    if inspect.isclass(found) and issubclass(found, cls):
        return found
    what = f"The checkpoint is of a `{class_path}`, which is not an imported subclass of `{cls.__name__}`."
    raise ValueError(f"{what} If you trust the file, import that class first.")


def _restore_module(module: Any, checkpoint: dict[str, Any], strict: bool | None, source: object) -> None:
    """The weights of a new module, after its own hooks had their turn."""
    own = getattr(module, "_strict_loading", None)
    if strict is not None and own is not None and strict != own:
        what = f"`load_from_checkpoint({strict=})` contradicts `{type(module).__name__}.strict_loading={own}`."
        raise ValueError(f"{what} Leave `strict` out, or use the same value for both.")
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    match_pruning(module, checkpoint)
    load = lambda: module.load_state_dict(checkpoint["state_dict"], strict=strict)  # noqa: E731
    differences: Any = load_weights(source, module, checkpoint, strict, load) or ([], [])
    for keys, one, other in zip(differences, ("model", "checkpoint"), ("checkpoint", "model")):
        if keys:
            rank_zero_warn(f"Keys of the {one} that the {other} does not have: {list(keys)}")


def load_hparams(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Constructor arguments from a .yaml, .yml or .csv file, as loggers write them.

    A CSV file has the columns "key" and "value"; values are read as Python literals where possible.

    Examples:
        >>> _ = open("hparams.csv", "w").write("key,value\\nlr,0.1\\nname,net\\n")
        >>> load_hparams("hparams.csv")
        {'lr': 0.1, 'name': 'net'}
    """
    extension = os.path.splitext(os.fspath(path))[1].lower()
    if extension in (".yaml", ".yml"):
        return load_hparams_from_yaml(path)
    if extension != ".csv":
        raise ValueError(f"`hparams_file={os.fspath(path)!r}`: a file that ends in .yaml, .yml or .csv is needed.")
    with get_filesystem(path).open(os.fspath(path), "r", newline="") as file:
        return {row["key"]: _parse_literal(row["value"]) for row in csv.DictReader(file)}


def load_hparams_from_yaml(config_yaml: str | os.PathLike[str], use_omegaconf: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; names of functions and classes in it are refused.

    Args:
        config_yaml: path or URL of the file.
        use_omegaconf: accepted for compatibility; the result is always a dict.

    Raises:
        ValueError: the file names an object of Python, which could run any code.
    """
    with get_filesystem(config_yaml).open(os.fspath(config_yaml), "r") as file:
        yaml = import_optional("yaml", "to read hyper-parameters")
        try:
            return yaml.load(file, _plain_loader(yaml)) or {}
        except yaml.constructor.ConstructorError as error:
            what = f"The file {os.fspath(config_yaml)!r} names an object of Python, which could run any code: {error}."
            raise ValueError(f"{what} Remove it there, and pass that argument in the call.") from error


def _plain_loader(yaml: Any) -> Any:
    """Numbers, texts and their collections, tuples too; names of functions and classes are refused."""

    class Loader(yaml.FullLoader):  # type: ignore[misc]  # known only where the package is installed
        yaml_multi_constructors: ClassVar[dict[str, Any]] = {}

    return Loader


def _parse_literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
