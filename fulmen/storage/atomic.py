"""Temporary files and folders named after the process that writes them, and removing those of processes that died."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.(?P<target>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.tmp(\.old)?")
QUIET_SECONDS = 3600  # a file of another machine that nobody wrote to for so long has no writer any more


def temporary_name(path: str) -> str:
    """A new hidden name beside `path`, where a rename to it is atomic."""
    folder, name = os.path.split(os.path.abspath(path))
    writer = f"{_host_id()}-{os.getpid()}-{_start_ticks(os.getpid())}-{uuid.uuid4().hex[:8]}"
    # Only folders, whose renaming may have to be finished later, need a name of any length: see `remove_leftovers`.
    return os.path.join(folder, f".{name if len(os.fsencode(name)) < 200 else name[:40]}.{writer}.tmp")


def lock_file(descriptor: int) -> None:
    """Until it is closed, or this process dies, others see that an open file or folder is being written."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks: the name has to do
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked_folder(folder: str) -> Generator[None]:
    """A new folder, claimed while it is being written; gone afterwards, unless it was renamed."""
    os.makedirs(folder)
    descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            lock_file(descriptor)
        yield
    finally:
        _delete_path(folder)
        if descriptor is not None:
            os.close(descriptor)


def replace_folder(folder: str, path: str) -> None:
    """Renames a finished folder; what was at its new place is removed afterwards."""
    old = f"{folder}.old"
    try:
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(folder, path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    flush_folder(os.path.dirname(path))
    _delete_path(old)


def remove_whole(path: str) -> None:
    """Deletes a local file or folder; a folder is gone as a whole, or is still there."""
    if os.path.isdir(path) and not os.path.islink(path):
        aside = temporary_name(path)
        os.rename(path, aside)
        path = aside
    _delete_path(path)


def remove_leftovers(folder: str) -> list[str]:
    """Removes what dead writers left in a local folder; a renaming of folders they had begun is finished.

    Returns the names of what is gone. Where this process may not do so, everything stays as it is.
    """
    done: list[str] = []
    names = []
    with suppress(OSError):
        names = sorted(os.listdir(folder))  # "x.tmp" comes before "x.tmp.old"
    for name in names:
        if writer := _NAME.fullmatch(name):
            with suppress(OSError):
                done += [name] if _finish_rename(os.path.join(folder, name), writer) else []
    return done


def finish_interrupted_rename(path: str) -> None:
    """If nothing is at a local path, the renaming of a folder to it may have been interrupted: then it is finished."""
    if not os.path.lexists(path):
        remove_leftovers(os.path.dirname(os.path.abspath(path)))


_NO_WAITING = 0 if sys.platform == "win32" else os.O_NONBLOCK


def _finish_rename(path: str, writer: re.Match[str]) -> bool:
    new = path.removesuffix(".old")
    target = os.path.join(os.path.dirname(path), writer["target"])
    if (path != new and os.path.lexists(new)) or _writer_is_alive(path, writer):
        return False
    # The old one was moved away already: the new one is complete, or `replace_folder` would not have been reached.
    if os.path.lexists(f"{new}.old") and not os.path.lexists(target):
        os.rename(path, target)
        flush_folder(os.path.dirname(path))
    else:
        _delete_path(path)
    return not os.path.lexists(path)


def _writer_is_alive(path: str, writer: re.Match[str]) -> bool:
    with suppress(FileNotFoundError):  # a link that leads nowhere
        descriptor = os.open(path, os.O_RDONLY | _NO_WAITING)  # a pipe would wait for a writer
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks here
            pass
        finally:
            os.close(descriptor)
    if writer["host"] == _host_id():
        return _start_ticks(int(writer["pid"])) == writer["start"]
    # The locks of some network file systems are not seen by other machines.
    inside = [entry.path for entry in os.scandir(path)] if os.path.isdir(path) and not os.path.islink(path) else []
    with suppress(FileNotFoundError):
        return time.time() - max(os.lstat(file).st_mtime for file in (path, *inside)) < QUIET_SECONDS
    return True  # it is just disappearing


def _delete_path(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


def _host_id() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _start_ticks(pid: int) -> str:
    """When a process of this machine started, in ticks since the boot; "" if there is none, "0" where nobody knows."""
    if not os.path.exists("/proc/self/stat"):
        return "0"
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == b"Z" else fields[19].decode()


def flush_folder(folder: str) -> None:
    """Makes renaming in it permanent, where a system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            flush_to_disk(descriptor)
        finally:
            os.close(descriptor)


def flush_to_disk(descriptor: int) -> None:
    """Waits until what was written to an open file is on the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot; a disk that fails still raises.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
