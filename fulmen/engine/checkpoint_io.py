"""Where checkpoints are stored: files that are either old or complete, and clear words when one cannot be read."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from abc import ABC, abstractmethod
from typing import IO, Any

import torch

from fulmen.engine.sharded_checkpoint import META, is_sharded, read_all
from fulmen.utilities.errors import suggestion
from fulmen.utilities.filesystem import atomic_write, ensure_dir, get_filesystem, is_remote


class DamagedCheckpointError(RuntimeError):
    """The file is no checkpoint, or not a whole one. Nothing of it was loaded."""


class CheckpointIO(ABC):
    """Saves, loads and removes checkpoints. Subclass it to store them elsewhere, and pass it in ``plugins``."""

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Called on one process. ``storage_options`` is what the user gave to ``Trainer.save_checkpoint``."""

    @abstractmethod
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Called on all processes, with a path that ``save_checkpoint`` was given before."""

    @abstractmethod
    def remove_checkpoint(self, path: Any) -> None:
        """Called on one process; a path that is already gone is no error."""

    def teardown(self) -> None:
        """Called at the end of a run; whatever is still being written must be finished here."""


class TorchCheckpointIO(CheckpointIO):
    """One file per checkpoint, written by `torch.save`, on any file system that fsspec knows."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file so that a kill at any instant leaves the old content or the new, never a part."""
        if storage_options is not None:
            fix = "Leave them out, or pass a `CheckpointIO` of your own in `plugins`."
            raise TypeError(f"`{storage_options=}`: `TorchCheckpointIO` has no options. {fix}")
        path = os.fspath(path)
        ensure_dir(os.path.dirname(path) or os.curdir)
        try:
            atomic_write(path, lambda file: torch.save(checkpoint, file))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            what = f"`{_first_unpicklable(checkpoint)}` cannot be pickled into the checkpoint {path!r}: {error}."
            raise type(error)(f"{what} Keep it out of hyper-parameters and states.") from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file or an http(s) URL; without ``map_location`` onto the CPU, whatever device it was written on.

        Raises `DamagedCheckpointError` if the file is cut off, changed (checksums are verified) or no checkpoint at all.
        """
        path, where = os.fspath(path), "cpu" if map_location is None else map_location
        if path.startswith(("http://", "https://")):
            return torch.hub.load_state_dict_from_url(path, map_location=where, weights_only=bool(weights_only))
        files = get_filesystem(path)
        if not files.exists(path):
            raise FileNotFoundError(_what_is_there_instead(files, path))
        if is_sharded(path):
            return read_all(path, weights_only)
        if files.isdir(path):
            what = f"The checkpoint {path!r} is a folder without `{META}`, so not one of shards."
            raise IsADirectoryError(f"{what} Pass a file in it, or such a folder.")
        with files.open(path, "rb") as file:
            _verify(file, path)
            file.seek(0)
            try:
                return torch.load(file, map_location=where, weights_only=weights_only)
            except Exception as error:
                if isinstance(error, pickle.UnpicklingError) and (classes := _refused_classes(file, str(error))):
                    what = f"The checkpoint {path!r} holds objects of {classes}, and loading classes can run any code."
                    fix = f"`weights_only=False`, or call `torch.serialization.add_safe_globals([{classes}])`"
                    raise pickle.UnpicklingError(f"{what} If you trust the file, pass {fix}.") from error
                # A verified archive is not damaged; nor is a file for which a class, a device or memory is missing.
                missing = isinstance(error, (ImportError, AttributeError, MemoryError)) or "deserialize" in str(error)
                if missing or (zipfile.is_zipfile(file) and "PytorchStreamReader" not in str(error)):
                    raise
                raise _damaged(path, "it begins like a file of `torch.save`, but does not go on like one") from error

    def remove_checkpoint(self, path: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            get_filesystem(path).rm(os.fspath(path), recursive=True)


def _verify(file: IO[bytes], path: str) -> None:
    """Whether this is a whole file of `torch.save`.

    `torch.load` does not compare the checksums that `torch.save` wrote: a flipped bit would become a wrong weight.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if not size:
        raise _damaged(path, "it is empty")
    if head.startswith(b"PK"):
        try:
            archive = zipfile.ZipFile(file)
            # Checksums can be switched off when saving; over a network it would mean to fetch everything twice.
            checkable = any(entry.CRC for entry in archive.infolist()) and not is_remote(path)
            broken = archive.testzip() if checkable else None
        except Exception as error:  # what a wrong byte in the archive's directory leads to is hard to foresee
            raise _damaged(path, f"it is cut off after {size:,} bytes, or changed ({error})") from error
        if broken is not None:
            raise _damaged(path, f"the checksum of its part {broken!r} is wrong: it was changed after it was written")
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise _damaged(path, f"it is a zip archive of {size:,} bytes that `torch.save` did not write")
    elif not head.startswith(b"\x80"):  # every pickle, which older versions of torch wrote, begins like this
        raise _damaged(path, f"its {size:,} bytes begin with {head[:30]!r}, which `torch.save` does not write")


def _damaged(path: str, found: str) -> DamagedCheckpointError:
    fix = "Load another checkpoint, or copy or download this one again."
    return DamagedCheckpointError(f"The checkpoint {path!r} cannot be read: {found}. {fix}")


def _what_is_there_instead(files: Any, path: str) -> str:
    folder, name = os.path.split(path)
    if not files.isdir(folder or os.curdir):
        return f"The checkpoint {path!r} does not exist, and there is no folder {folder!r} either."
    names = [os.path.basename(str(entry).rstrip("/")) for entry in files.ls(folder or os.curdir, detail=False)]
    others = [other for other in names if os.path.splitext(other)[1] in (os.path.splitext(name)[1], ".ckpt")]
    found = f" The folder has {', '.join(others[:8]) or 'no checkpoints'}."
    return f"The checkpoint {path!r} does not exist.{suggestion(name, names) or found}"


def _refused_classes(file: IO[bytes], message: str) -> str:
    """The classes because of which `torch.load` refused the file."""
    file.seek(0)
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # torch lists them for its newer format only; its message names the first one
        return ", ".join(re.findall(r"GLOBAL (\S+)", message))


def _first_unpicklable(value: Any, name: str = "checkpoint") -> str:
    """Where in nested dictionaries the first value sits that cannot be pickled."""
    for key, child in value.items() if isinstance(value, dict) else ():
        try:
            with open(os.devnull, "wb") as nowhere:
                torch.save(child, nowhere)
        except Exception:
            return _first_unpicklable(child, f"{name}[{key!r}]")
    return name
