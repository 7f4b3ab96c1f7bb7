"""Hyper-parameters in checkpoints: plain values as they are, objects as pickles that are opened on request.

A checkpoint loads with `weights_only=True` whatever its hyper-parameters are: the pickles of those that are objects stand
in our chapter as bytes, which only `read_objects` turns into objects again. It asks `torch.load`, so that the rules of the
file hold for them: with `weights_only=False` everything is built, else only data classes and what the user has allowed.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections import OrderedDict
from collections.abc import Container
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION

CHAPTER = "hparams"  # in the chapter "fulmen": {key of the checkpoint: {name: {"type": ..., "pickle": bytes}}}
OMEGACONF = "omegaconf"  # the type of hyper-parameters that were a `DictConfig`
PLAIN = (type(None), bool, int, float, str, bytes, Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size)
_ARRAYS = ("_reconstruct", "scalar")
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
# Building one of these runs nothing but a constructor that keeps what it is given.
DATA_CLASSES = {
    "argparse": ("Namespace",),
    "builtins": ("bool", "complex", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"),
    "collections": ("defaultdict",),
    "datetime": ("date", "datetime", "timedelta"),
    "fulmen.utilities.collections": ("AttributeDict",),
    "numpy": ("dtype", "ndarray"),
    "numpy._core.multiarray": _ARRAYS,
    "numpy.core.multiarray": _ARRAYS,
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": (
        "AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode", "StringNode"
    ),
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "types": ("SimpleNamespace",),
    "typing": ("Any", "Dict", "List", "Tuple", "Union"),
}  # fmt: skip


class Missing(NamedTuple):
    """A hyper-parameter that cannot be given back: is it in the file, and why not?"""

    in_file: bool
    why: str


def is_plain(value: object, around: tuple[int, ...] = ()) -> bool:
    """Is it made of what `torch.load(weights_only=True)` reads in every process, whatever classes this one allows?"""
    kind = type(value)
    if kind in PLAIN:
        return not (isinstance(value, Tensor) and vars(value))  # it may carry anything
    if kind not in (dict, OrderedDict, list, tuple, set) or id(value) in around:
        return False
    assert isinstance(value, (dict, list, tuple, set))
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return all(is_plain(item, (*around, id(value))) for item in items)


def write_hparams(checkpoint: dict[str, Any], owner: Any) -> None:
    """Adds the hyper-parameters of a module or datamodule. What cannot be pickled is named here and in the file."""
    key = owner.CHECKPOINT_HYPER_PARAMS_KEY
    hparams = owner.hparams
    if hparams and owner._hparams_name:
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
    if type(hparams).__module__.startswith("omegaconf"):
        hparams = sys.modules["omegaconf"].OmegaConf.to_container(hparams)
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = OMEGACONF  # a name: classes make files that are not safe
    entries = {name: {"type": kind} for name, kind in owner._hparams_removed.items() if name not in hparams}
    objects = {name: _pickle_entry(value) for name, value in hparams.items() if not is_plain(value)}
    if lost := {name: entry["type"] for name, entry in objects.items() if "pickle" not in entry}:
        what = f"Hyper-parameters are left out of checkpoints, since they cannot be pickled: {lost} (name: type)."
        fix = f"Pass them again, as in `load_from_checkpoint(path, {next(iter(lost))}=...)`"
        warn_once(f"{what} {fix}, and use `save_hyperparameters(ignore={[*lost]})`.")
    if hparams:
        checkpoint[key] = {name: value for name, value in hparams.items() if name not in objects}
    if entries or objects:
        checkpoint.setdefault("fulmen", {}).setdefault(CHAPTER, {})[key] = {**entries, **objects}


def _pickle_entry(value: object) -> dict[str, Any]:
    entry = {"type": type(value).__qualname__}
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception:  # objects raise whatever they like while being pickled
        return entry
    return {**entry, "pickle": file.getvalue()}


def read_objects(
    checkpoint: dict[str, Any],
    key: str,
    weights_only: bool | None,
    map_location: MAP_LOCATION = None,
    skip: Container[str] = (),
) -> dict[str, Missing]:
    """Puts the stored objects among the hyper-parameters under `key`, but for the names in `skip`.

    Returns those that cannot be given back, by name.
    """
    missing = {}
    for name, entry in ((checkpoint.get("fulmen") or {}).get(CHAPTER) or {}).get(key, {}).items():
        if name in skip:
            continue
        if "pickle" not in entry:
            why = f"a `{entry['type']}` that could not be pickled when the file was written"
            missing[name] = Missing(False, why)
            continue
        try:
            value = _load_object(entry["pickle"], weights_only, map_location)
        except Exception as error:  # of the object's class, or of torch, which refuses that class
            missing[name] = Missing(True, _explain_refusal(entry, error, weights_only))
        else:
            checkpoint.setdefault(key, {})[name] = value
    return missing


def _load_object(pickled: bytes, weights_only: bool | None, map_location: MAP_LOCATION) -> Any:
    allowed = [entry for found in _refused_classes(pickled) if _is_data(found) for entry in _to_allow(found)]
    known = torch.serialization.get_safe_globals()
    as_data = None if weights_only is None else True
    with torch.serialization.safe_globals([entry for entry in allowed if entry not in known]):
        try:  # as data first, which also knows classes by the names they have in other versions of Python
            return torch.load(io.BytesIO(pickled), map_location, weights_only=as_data)
        except Exception:
            if weights_only is not False:
                raise
    return torch.load(io.BytesIO(pickled), map_location, weights_only=False)


def _is_data(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return name in DATA_CLASSES.get(module, ())


def _to_allow(path: str) -> list[Any]:
    """What `torch.load` needs to be told to build objects of this data class."""
    module, _, name = path.rpartition(".")
    try:  # only Python 3.13 has `pathlib._local`
        found = getattr(importlib.import_module(module.removesuffix("._local")), name)
    except (ImportError, AttributeError):  # of a package, or a version of it, that is not installed here
        return []
    known_as = f"{found.__module__}.{found.__name__}"
    entries = [found if known_as == path else (found, path)]
    if path == "numpy.dtype":  # each type of numbers is a class of its own
        entries += {type(found(code)) for code in "?bhilqBHILQefdgFDGSUVmM"}
    return entries


def _explain_refusal(entry: dict[str, Any], error: Exception, weights_only: bool | None) -> str:
    if weights_only is False:
        return f"a `{entry['type']}` that cannot be built here ({type(error).__name__}: {error})"
    classes = [found for found in _refused_classes(entry["pickle"]) if not _is_data(found)]
    return f"a `{entry['type']}` with objects of {', '.join(classes) or 'classes that need more than data'}"


def _refused_classes(pickled: bytes) -> list[str]:
    """The classes in it that `torch.load(weights_only=True)` refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(pickled)))
    except Exception:  # torch can list those of its own files only
        return []
