"""Reading and writing files under the names that public code imports: `_load`, `_lazy_load`, `get_filesystem`, ..."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fulmen.fabric.checkpoint import check_names
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import LocalFiles, atomic_write, is_remote, local_path
from fulmen.storage.sharded import META, is_sharded, read_all
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.types import _PATH, Stateful

_METADATA_FILENAME = META


def get_filesystem(path: _PATH, **options: Any) -> Any:
    """The fsspec file system that holds a path; without fsspec, one for local paths that has its main methods.

    Arguments:
        options: of the file system, such as credentials.
    """
    if not is_installed("fsspec") and not is_remote(path):
        return LocalFiles()
    fsspec = import_optional("fsspec", f"to reach `{path}`")
    return fsspec.core.url_to_fs(os.fspath(path), **options)[0]


def _is_local_file_protocol(path: _PATH) -> bool:
    return not is_remote(path)


def _is_object_storage(files: Any) -> bool:
    """Is a file system a store of objects, which knows no folders?"""
    protocol = files.protocol if hasattr(files, "protocol") else "file"
    names = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    return bool({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl"} & set(names))


def _is_dir(files: Any, path: _PATH, strict: bool = False) -> bool:
    """Is this a folder? In a store of objects every path may be one, unless `strict`."""
    if _is_object_storage(files) and not strict:
        return True
    return bool(files.isdir(os.fspath(path)))


def _load(path_or_url: IO[bytes] | _PATH, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """The content of a file, URL or open file."""
    if not isinstance(path_or_url, (str, os.PathLike)):
        return torch.load(path_or_url, map_location=map_location, weights_only=weights_only)
    return TorchCheckpointIO().load_checkpoint(path_or_url, map_location, weights_only)


def _atomic_save(checkpoint: dict[str, Any], filepath: _PATH) -> None:
    """Writes a file that is whole or not there."""
    atomic_write(filepath, lambda file: torch.save(checkpoint, file))


class _NotYetLoadedTensor:
    """No tensor is one of these: those of `_lazy_load` are ordinary ones, which read their file when they are used."""


def _lazy_load(filename: _PATH) -> Any:
    """The content of a local file, whose tensors are read from the disk when they are first used."""
    if not os.path.isfile(local_path(filename)):
        raise FileNotFoundError(f"The path {str(filename)!r} is no file, so nothing can be loaded from it.")
    return torch.load(local_path(filename), map_location="cpu", mmap=True, weights_only=False)


def _materialize_tensors(collection: Any) -> Any:
    """The same collection: a tensor of `_lazy_load` needs nothing to be used."""
    return collection


def _load_distributed_checkpoint(checkpoint_folder: Path) -> dict[str, Any]:
    """The content of a folder of shards, in whole tensors."""
    return read_all(checkpoint_folder)


def _is_sharded_checkpoint(path: _PATH) -> bool:
    return is_sharded(path)


def _is_full_checkpoint(path: _PATH) -> bool:
    return os.path.isfile(path)


def _move_state_into(source: dict[str, Any], destination: dict[str, Any], keys: set[str] | None = None) -> None:
    """Moves entries from one state to another, into the objects there that can load a state."""
    for name in set(source) if keys is None else keys & set(source):
        value = source.pop(name)
        target = destination.get(name)
        if isinstance(target, Stateful):
            target.load_state_dict(value)
        else:
            destination[name] = value


def _validate_keys_for_strict_loading(
    requested_keys: Iterable[str], checkpoint_keys: Iterable[str], strict: bool
) -> None:
    if strict:
        check_names(dict.fromkeys(requested_keys), dict.fromkeys(checkpoint_keys))


def _apply_filter(
    key: str, filter: dict[str, Callable[[str, Any], bool]], source_dict: object, target_dict: dict[str, Any]
) -> None:
    """Puts what a filter keeps of an entry into the target."""
    keeps = filter.get(key)
    if keeps is None or not isinstance(source_dict, dict):
        target_dict[key] = source_dict
        return
    for name, value in source_dict.items():
        if keeps(name, value):
            target_dict.setdefault(key, {})[name] = value


def get_torchvision_model(model_name: str, **kwargs: Any) -> nn.Module:
    """A model of torchvision by its name.

    Arguments:
        model_name: such as "resnet18".
        kwargs: of the function that makes it, such as ``weights``.
    """
    models = import_optional("torchvision.models", "for `get_torchvision_model`")
    if not hasattr(models, model_name):
        hint = suggest_name(model_name, models.list_models())
        raise AttributeError(f"torchvision has no model {model_name!r}.{hint}", name=model_name)
    model: nn.Module = models.get_model(model_name, **kwargs)
    return model
