"""`save_hyperparameters`: constructor arguments, remembered while the constructor still runs."""

from __future__ import annotations

import copy
import inspect
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch

from fulmen.utilities.collections import AttributeDict
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.modules import is_picklable
from fulmen.utilities.rank_zero import rank_zero_warn

# Stored by Lightning's command line beside the arguments: who rebuilds the object, and which subclass it is.
NOT_LOGGED = ("_class_path", "_instantiator")
# The name that all files have there, so that any program with this API can rebuild the object.
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
_given: ContextVar[tuple[type, Mapping[str, Any]] | None] = ContextVar("given_hyperparameters", default=None)


@contextmanager
def given_hyperparameters(cls: type, values: Mapping[str, Any]) -> Iterator[None]:
    """While an object of exactly `cls` is made here, `save_hyperparameters` keeps these values for its arguments.

    A command line gives what its configuration says, in which objects are class paths and arguments.
    """
    token = _given.set((cls, values))
    try:
        yield
    finally:
        _given.reset(token)


def _configured_arguments(obj: object, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of `obj` as they were given for it; others, such as linked ones and those of bases, as they are found.

    None if nothing was given.
    """
    cls, values = _given.get() or (None, {})
    if type(obj) is not cls:
        return None
    return {**values, **{name: value for name, value in found.items() if name not in values}}


class HyperparametersMixin:
    """Remembers constructor arguments of a module or datamodule in `hparams`."""

    # On the class, since a dataclass saves before a base constructor runs; TorchScript cannot read annotations as texts.
    _log_hyperparams = False
    _hparams_name = None  # type: str | None
    _hparams_removed = {}  # type: dict[str, str]

    def save_hyperparameters(
        self, *args: Any, ignore: Iterable[str] | str | None = None, frame: FrameType | None = None, logger: bool = True
    ) -> None:
        """Keep constructor arguments in `hparams`, for checkpoints and loggers. Call it inside `__init__`.

        The values are the local variables of this object's running constructors, base classes included; a subclass
        wins. `**kwargs` are flattened, `*args` are left out.

        Arguments:
            args: nothing for all arguments, names of some, or one mapping or `Namespace` whose content is kept.
            ignore: arguments not to keep; also forgets them if a base class has kept them.
            frame: where to look for the constructors; the caller's frame by default.
            logger: whether loggers receive them at the start of a run.
        """
        self._log_hyperparams = logger
        ignored = {ignore} if isinstance(ignore, str) else set(ignore or ())
        self.remove_ignored_hparams(ignored)
        found = init_arguments(self, frame or inspect.currentframe().f_back)  # type: ignore[union-attr]
        objects = [arg for arg in args if not isinstance(arg, str)]
        if len(objects) > 1:
            what = f"`save_hyperparameters` keeps the content of one object, not of {len(objects)} objects."
            raise ValueError(f"{what} Merge them into one dict, or pass names of arguments.")
        if objects:
            chosen = _content_of(objects[0], ignored)
            self._hparams_name = next((name for name, value in found.items() if value is objects[0]), None)
        else:
            chosen = _select_arguments(self, args, found, ignored)
            self._hparams_name = "kwargs"
        for name, value in chosen.items():
            if isinstance(value, torch.nn.Module):
                _advise_to_ignore(name, "is an instance of `nn.Module`, which is already saved during checkpointing.")
        if isinstance(chosen, dict) and isinstance(self.hparams, dict):
            self.hparams.update(chosen)
        else:
            self._hparams = chosen
        self._hparams_initial = _copy_hparams(self.hparams)

    def note_removed_hparam(self, name: str, type_name: str) -> None:
        """No checkpoint can hold this one; checkpoints name it, and its type."""
        self._hparams_removed = {**self._hparams_removed, name: type_name}

    def remove_ignored_hparams(self, ignore_list: Iterable[str]) -> None:
        """Forget these names if they were kept before."""
        for name in ignore_list:
            self.hparams.pop(name, None)

    @property
    def hparams(self) -> AttributeDict:
        """What was kept; may be changed, and is what checkpoints hold. Keys are attributes too.

        A configuration object that was given, such as one of OmegaConf, stays what it is.
        """
        hparams: AttributeDict = self.__dict__.setdefault("_hparams", AttributeDict())
        return hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of what was kept, as it was at that time; this is what loggers receive."""
        initial: AttributeDict = _copy_hparams(self.__dict__.get("_hparams_initial", AttributeDict()))
        return initial


def save_hyperparameters(
    obj: Any, *args: Any, ignore: Iterable[str] | str | None = None, frame: FrameType | None = None,
    given_hparams: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """`HyperparametersMixin.save_hyperparameters` as a function; ``given_hparams`` are kept as they are."""
    given = args if given_hparams is None else (dict(given_hparams),)
    frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
    HyperparametersMixin.save_hyperparameters(obj, *given, ignore=ignore, frame=frame)


def _content_of(given: object, ignored: set[str]) -> MutableMapping[str, Any]:
    """The hyper-parameters in one object, without those ignored; a configuration object stays what it is."""
    content = vars(given) if isinstance(given, Namespace) else given
    if content is None:
        return AttributeDict()
    if isinstance(content, MutableMapping) and not isinstance(content, dict):
        return content
    if not isinstance(content, Mapping):
        what = f"Hyper-parameters were given as the {type(content).__name__} {content!r}, which has no names."
        raise ValueError(f"{what} Pass a dict, a `Namespace`, names of arguments, or nothing to keep all.")
    return AttributeDict({name: value for name, value in content.items() if name not in ignored})


def _select_arguments(
    obj: HyperparametersMixin, names: Sequence[str], found: dict[str, Any], ignored: set[str]
) -> AttributeDict:
    """The arguments of these names, or all, without those that are ignored; as they were given for `obj`, if they were."""
    configured = _configured_arguments(obj, found)
    available = {**found, **(configured or {})}
    unknown = [name for name in names if name not in available and name not in ignored]
    if unknown:
        what = f"{unknown} are no arguments of the running `__init__`, which are {sorted(found)}."
        raise KeyError(what + suggest_name(unknown[0], found))
    wanted = names or (found if configured is None else configured)
    chosen = AttributeDict({name: available[name] for name in wanted if name not in ignored})
    if configured is not None and not names:
        chosen["_instantiator"] = INSTANTIATOR
    return chosen


def init_arguments(obj: object, frame: FrameType | None) -> dict[str, Any]:
    """The arguments of all constructors of `obj` that are running in `frame` and its callers."""
    found: dict[str, Any] = {}
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            names, _, keywords, values = inspect.getargvalues(frame)
            if names and values.get(names[0]) is obj:
                # Base classes come first on the way out, so a subclass's value replaces theirs.
                found.update({name: values[name] for name in names[1:] if name in values})
                found.update(values.get(keywords or "", {}))
        frame = frame.f_back
    for name, value in found.items():
        # A dataclass fills in defaults made by a factory only later; its frame still holds a placeholder.
        if type(value).__module__ == "dataclasses" and type(value).__name__.startswith("_HAS_DEFAULT"):
            found[name] = getattr(obj, name)
    return found


def drop_unpicklable(owner: HyperparametersMixin) -> None:
    """Remove what could not be stored in a checkpoint; called when a run starts. Checkpoints name it."""
    hparams = owner.hparams
    for name in [name for name, value in hparams.items() if not is_picklable(value)]:
        owner.note_removed_hparam(name, type(hparams.pop(name)).__qualname__)
        _advise_to_ignore(name, "was removed from `hparams`: it cannot be pickled, so no checkpoint can hold it.")


def _advise_to_ignore(name: str, what: str) -> None:
    rank_zero_warn(f"The hyper-parameter `{name}` {what} Use `self.save_hyperparameters(ignore=[{name!r}])`.")


def clean_for_loggers(module: HyperparametersMixin, datamodule: HyperparametersMixin | None) -> dict[str, Any]:
    """The hyper-parameters of both that loggers should receive; an error if one name has different values."""
    sources = [source for source in (module, datamodule) if source is not None and source._log_hyperparams]
    merged: dict[str, Any] = {}
    for source in sources:
        new = {name: value for name, value in source.hparams_initial.items() if name not in NOT_LOGGED}
        clashes = [name for name in merged if name in new and not _are_equal(merged[name], new[name])]
        # The initial values are copies, and copies of one object may be unequal.
        clashes = [name for name in clashes if not _is_one([source.hparams.get(name) for source in sources])]
        if clashes:
            what = f"Module and datamodule would log different values for the hyper-parameters {clashes}."
            raise RuntimeError(f"{what} Rename them, or save one side with `save_hyperparameters(logger=False)`.")
        merged.update(new)
    return merged


def _are_equal(first: Any, second: Any) -> bool:
    try:
        equal = first == second
        if hasattr(equal, "all"):  # arrays and tensors compare element by element
            equal = first.shape == second.shape and equal.all()
        return first is second or bool(equal)
    except Exception:  # comparing is up to the values
        return False


def _is_one(values: list[Any]) -> bool:
    return values[0] is not None and all(value is values[0] for value in values)


def _copy_hparams(hparams: Any) -> Any:
    try:
        return copy.deepcopy(hparams)
    except Exception:  # a value that cannot be copied (a lock, an open file) is shared
        return copy.copy(hparams)
