"""`CheckpointIO`, where checkpoints are stored: files are replaced atomically, and an error says why one cannot be read."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator
from functools import partial
from typing import IO, Any
from urllib.parse import urlsplit

import torch

from fulmen.storage.atomic import finish_interrupted_rename, remove_whole
from fulmen.storage.filesystem import atomic_write, ensure_dir, get_filesystem, is_remote, local_path, modified_ns
from fulmen.storage.integrity import DamagedCheckpointError, damage_error, load_verified, save_with_digest, verify_file
from fulmen.storage.sharded import META, check_shards, is_dcp_folder, is_sharded, read_all
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.introspection import takes_argument
from fulmen.utilities.types import _PATH


class CheckpointIO(ABC):
    """Saves, loads and removes checkpoints. Subclass it to store them elsewhere, and pass it in ``plugins``.

    Examples:
        >>> class InMemory(CheckpointIO):
        ...     def __init__(self):
        ...         self.stored = {}
        ...     def save_checkpoint(self, checkpoint, path, storage_options=None):
        ...         self.stored[str(path)] = checkpoint
        ...     def load_checkpoint(self, path, map_location=None, weights_only=None):
        ...         return self.stored[str(path)]
        ...     def remove_checkpoint(self, path):
        ...         self.stored.pop(str(path), None)
        >>> import fulmen as pl
        >>> trainer = pl.Trainer(plugins=[InMemory()], logger=False, accelerator="cpu")
        >>> type(trainer.strategy.checkpoint_io).__name__
        'InMemory'
    """

    @abstractmethod
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Called on one process.

        Args:
            checkpoint: nested dicts and lists of plain values and tensors.
            path: where `load_checkpoint` is to find it.
            storage_options: what the user gave to ``Trainer.save_checkpoint``.
        """

    @abstractmethod
    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Called on all processes, with a path that ``save_checkpoint`` was given before.

        Args:
            path: of the checkpoint.
            map_location: where tensors go, as for `torch.load`.
            weights_only: False also builds objects of any class, whose code runs then; only for files you trust.

        Returns:
            What was saved.
        """

    @abstractmethod
    def remove_checkpoint(self, path: _PATH) -> None:
        """Called on one process; a path that is already gone is no error."""

    def verify_checkpoint(self, path: _PATH) -> None:
        """Raises `DamagedCheckpointError` if this cannot be loaded. By default nothing is looked at."""

    def teardown(self) -> None:
        """Called at the end of a run; whatever is still being written must be finished here."""


class TorchCheckpointIO(CheckpointIO):
    """One file per checkpoint, written by `torch.save`, on any file system that fsspec knows.

    Examples:
        >>> import torch
        >>> io = TorchCheckpointIO()
        >>> io.save_checkpoint({"weight": torch.ones(2)}, "some/model.ckpt")
        >>> io.load_checkpoint("some/model.ckpt")
        {'weight': tensor([1., 1.])}
        >>> io.verify_checkpoint("some/model.ckpt")  # raises if a byte of it has changed
        >>> io.remove_checkpoint("some/model.ckpt")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write the file so that a kill at any instant leaves the old content or the new, never a part."""
        if storage_options is not None:
            fix = "Leave them out, or pass a `CheckpointIO` of your own in `plugins`."
            raise TypeError(f"`{storage_options=}`: `TorchCheckpointIO` has no options. {fix}")
        path = os.fspath(path)
        ensure_dir(os.path.dirname(path) or os.curdir)
        try:
            size = atomic_write(path, partial(save_with_digest, checkpoint))
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            what = f"`{_first_unpicklable(checkpoint)}` cannot be pickled into the checkpoint {path!r}: {error}."
            raise type(error)(f"{what} Keep it out of hyper-parameters and states.") from error
        except Exception as error:
            if isinstance(error, OSError) or not is_remote(path):
                raise
            # Each store has errors of its own; callers handle one kind.
            raise OSError(f"The checkpoint {path!r} was not stored: {type(error).__name__}: {error}") from error
        if is_remote(path) and (found := get_filesystem(path).size(path)) != size:
            raise OSError(f"The checkpoint {path!r} has {found:,} of the {size:,} bytes that were written. Save again.")

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or an http(s) URL; without ``map_location`` onto the CPU, whatever device it was written on.

        Raises `DamagedCheckpointError` if the file is cut off, changed (hashes are verified) or no checkpoint at all.
        """
        path = os.fspath(path)
        where = "cpu" if map_location is None else map_location
        if url := path.startswith(("http://", "https://")):
            path = _download_to_cache(path)
        try:
            if is_sharded(path := _find_existing(path)):
                check_shards(path)
                return read_all(path, weights_only)
            with _open_for_reading(path) as file:
                loaded: dict[str, Any] = load_verified(file, path, where, weights_only)
                return loaded
        except DamagedCheckpointError as error:
            beside = None if url else self._good_neighbour(path)
            found = f" The newest good one beside it is {beside!r}." if beside else ""
            raise DamagedCheckpointError(f"{error}{found}") from error

    def verify_checkpoint(self, path: _PATH) -> None:
        """Reads a file or folder, without loading it; `DamagedCheckpointError` if it is not whole and unchanged."""
        path = os.fspath(path)
        if os.path.islink(local_path(path)) and not os.path.exists(local_path(path)):
            raise damage_error(path, "it is a link to a file that is gone")
        if is_sharded(path := _find_existing(path)):
            check_shards(path)
            return
        with _open_for_reading(path) as file:
            verify_file(file, path)

    def _good_neighbour(self, path: str) -> str | None:
        folder = os.path.dirname(path)
        kind = os.path.splitext(path)[1]
        with contextlib.suppress(Exception):  # this only adds to an error
            names = [os.path.basename(str(file).rstrip("/")) for file in get_filesystem(path).ls(folder or os.curdir)]
            others = {os.path.join(folder, name) for name in names if os.path.splitext(name)[1] == kind} - {path}
            for other in sorted(filter(get_filesystem(path).exists, others), key=modified_ns, reverse=True):
                with contextlib.suppress(DamagedCheckpointError, OSError):
                    self.verify_checkpoint(other)
                    return str(other)
        return None

    def remove_checkpoint(self, path: _PATH) -> None:
        if not is_remote(path):
            remove_whole(local_path(path))
            return
        with contextlib.suppress(FileNotFoundError):
            get_filesystem(path).rm(os.fspath(path), recursive=True)


class _WrappingCheckpointIO(CheckpointIO, ABC):
    """The base of those that change how checkpoints are stored, and leave where to another one.

    Arguments:
        checkpoint_io: the other one; by default a `TorchCheckpointIO`.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self.checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io

    def verify_checkpoint(self, path: _PATH) -> None:
        self.checkpoint_io.verify_checkpoint(path)

    def teardown(self) -> None:
        self.checkpoint_io.teardown()


def load_with(io: CheckpointIO, path: _PATH, map_location: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """What a `CheckpointIO` loads; one that was written when `load_checkpoint` took less gets what it takes."""
    options = {"map_location": map_location, "weights_only": weights_only}
    taken = {name: value for name, value in options.items() if takes_argument(io.load_checkpoint, name)}
    return io.load_checkpoint(path, **taken)


def _download_to_cache(url: str) -> str:
    """The file of a URL, where `torch.hub` keeps what it has fetched."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlsplit(url).path))
    if not os.path.exists(path):
        ensure_dir(os.path.dirname(path))
        torch.hub.download_url_to_file(url, path)
    return path


def _find_existing(path: str) -> str:
    """The path, if something that can be opened is there; a renaming that a kill has interrupted is finished first."""
    files = get_filesystem(path)
    if not is_remote(path):
        finish_interrupted_rename(local_path(path))
    if not files.exists(path):
        raise FileNotFoundError(_what_is_there_instead(files, path))
    if not is_remote(path) and not files.isfile(path) and not files.isdir(path):
        raise damage_error(path, "it is a pipe, a socket or a device, not a regular file")
    if files.isdir(path) and not is_sharded(path):
        what = f"The checkpoint {path!r} is a folder without `{META}`, so not one of shards."
        fix = "or such a folder."
        if is_dcp_folder(path):
            fix = f"or turn what torch wrote there, without a trainer, into one: `python -m fulmen consolidate {path}`."
        raise IsADirectoryError(f"{what} Pass a file in it, {fix}")
    return path


@contextlib.contextmanager
def _open_for_reading(path: str) -> Generator[IO[bytes]]:
    """The file, for reading; what is stored elsewhere is fetched once, since it is read twice."""
    with get_filesystem(path).open(path, "rb") as file:
        if not is_remote(path):
            yield file
            return
        with tempfile.TemporaryFile() as fetched:
            shutil.copyfileobj(file, fetched, 1 << 20)
            yield fetched


def _what_is_there_instead(files: Any, path: str) -> str:
    folder, name = os.path.split(path)
    if not files.isdir(folder or os.curdir):
        return f"The checkpoint {path!r} does not exist, and there is no folder {folder!r} either."
    names = [os.path.basename(str(entry).rstrip("/")) for entry in files.ls(folder or os.curdir, detail=False)]
    others = [other for other in names if os.path.splitext(other)[1] in (os.path.splitext(name)[1], ".ckpt")]
    found = f" The folder has {', '.join(others[:8]) or 'no checkpoints'}."
    return f"The checkpoint {path!r} does not exist.{suggest_name(name, names) or found}"


def _first_unpicklable(value: object, name: str = "checkpoint") -> str:
    """Where in nested dictionaries and lists the first value sits that cannot be pickled."""
    children: Any = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, (list, tuple)) else children:
        try:
            with open(os.devnull, "wb") as nowhere:
                torch.save(child, nowhere)
        except Exception:
            return _first_unpicklable(child, f"{name}[{key!r}]")
    return name
