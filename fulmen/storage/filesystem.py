"""Local and remote paths behind one interface, and files that are either old or complete."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from operator import methodcaller
from typing import IO, Any

from fulmen.storage.atomic import flush_folder, flush_to_disk, lock_file, temporary_name
from fulmen.utilities.optional import import_optional
from fulmen.utilities.types import _PATH

_LOCAL_SCHEMES = ("file://", "local://")
_NO_RENAME = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # so say mounted buckets
_transaction_lock = threading.Lock()  # a file system of fsspec has one transaction, whichever thread began it


def is_remote(path: _PATH) -> bool:
    """Does the path name another place than this machine's file system (``s3://…``, ``memory://…``)?"""
    text = os.fspath(path)
    return "://" in text and not text.startswith(_LOCAL_SCHEMES)


def local_path(path: _PATH) -> str:
    """A local path without ``file://``."""
    text = os.fspath(path)
    return text.split("://", 1)[1] if text.startswith(_LOCAL_SCHEMES) else text


def _on_path(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` as a method whose path may begin with ``file://``."""
    return lambda self, path, *args, **kwargs: fn(local_path(path), *args, **kwargs)


def _open_regular(path: str, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
    """`open`, which reads from regular files only: at a pipe or a device it could wait for ever."""
    if "r" in mode and not is_regular(path, missing_ok=True) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "A regular file is needed, not a pipe, socket or device", path)
    return open(path, mode, *args, **kwargs)


def is_regular(path: str, missing_ok: bool = False) -> bool:
    """Is a regular file, or a link to one, at this local path?"""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return missing_ok


class LocalFiles:
    """This machine's file system, with the methods of an fsspec file system that we use."""

    exists = _on_path(os.path.exists)
    isdir = _on_path(os.path.isdir)
    isfile = _on_path(os.path.isfile)
    size = _on_path(os.path.getsize)
    makedirs = _on_path(os.makedirs)
    open = _on_path(_open_regular)

    def ls(self, path: _PATH, detail: bool = False) -> list[str]:
        """Full paths, sorted; the details fsspec could give are not known here."""
        return sorted(entry.path for entry in os.scandir(local_path(path)))

    def rm(self, path: _PATH, recursive: bool = False) -> None:
        target = local_path(path)
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target) if recursive else os.rmdir(target)
        else:
            os.remove(target)


def get_filesystem(path: _PATH) -> Any:
    """The file system that holds ``path``: ours for local paths, fsspec's (imported now) for URLs."""
    if is_remote(path):
        return import_optional("fsspec", f"to reach `{path}`").core.url_to_fs(os.fspath(path))[0]
    return LocalFiles()


def ensure_dir(path: _PATH) -> None:
    """Make the folder and its parents unless they exist."""
    get_filesystem(path).makedirs(os.fspath(path), exist_ok=True)


def atomic_write(path: _PATH, content: bytes | Callable[[IO[bytes]], Any]) -> Any:
    """Write a file so that, whenever the process dies, ``path`` holds the old content or the new one, never a part.

    ``content`` may be a function that writes into an open file, and what it returns is returned; nothing is left behind
    if it fails. The folder exists.
    """
    write = content if callable(content) else methodcaller("write", content)
    if is_remote(path):
        files = get_filesystem(path)
        # What is written inside a transaction appears at its end, and not at all after an error.
        with _transaction_lock, files.transaction, files.open(os.fspath(path), "wb") as file:
            return write(file)
    target = local_path(path)
    temporary = temporary_name(target)
    try:
        with open(temporary, "xb") as file:
            lock_file(file.fileno())
            written = write(file)
            file.flush()
            flush_to_disk(file.fileno())
        _move_finished(temporary, target)
    finally:
        with suppress(OSError):  # it is gone if all went well
            os.remove(temporary)
    flush_folder(os.path.dirname(temporary))
    return written


def _move_finished(temporary: str, target: str) -> None:
    """Gives a finished file its name. In a mounted bucket without rename, a copy is as good: it is there when it is whole."""
    try:
        os.replace(temporary, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        shutil.copyfile(temporary, target)


def modified_ns(path: _PATH) -> int:
    """When a file or folder was written last, in nanoseconds since 1970."""
    if is_remote(path):
        return int(get_filesystem(path).modified(os.fspath(path)).timestamp() * 1e9)
    return os.stat(local_path(path)).st_mtime_ns
