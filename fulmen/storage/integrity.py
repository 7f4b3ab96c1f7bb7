"""Files of `torch.save` that contain their own SHA-256, and reading them: whole and unchanged, or an error that names them.

The hash is the comment of the zip archive that such a file is. It is written, renamed, copied and replaced together
with the content, so the two cannot come apart, as they could in a second file; every reader of such files skips it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import zipfile
from typing import IO, Any

import torch

_MARK = b"fulmen sha256 "
_DIGEST = struct.Struct(f"<H{len(_MARK)}s64s")  # length of the comment, which ends the archive, and the comment


class DamagedCheckpointError(RuntimeError):
    """The file is not a checkpoint, or not a whole one. Nothing of it was loaded."""


class HashingWriter:
    """What `torch.save` writes into: passes everything on and counts it, and hashes it on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.flush = file.flush
        self.size = 0
        self.error: OSError | None = None
        self._hash = hashlib.sha256()
        self._kept = b""

    def write(self, data: bytes | memoryview) -> int:
        # The last two bytes are held back: they are the length of a comment, still 0 when the archive is finished.
        whole = memoryview(data).cast("B") if len(data) > 1 else self._kept + bytes(data)
        if len(data) > 1:
            self._write_through(self._kept)
        self._write_through(whole[:-2])
        self._kept = bytes(whole[-2:])
        return len(data)

    def write_digest(self) -> None:
        """Writes the hash; nothing may follow."""
        self._write_through(_DIGEST.pack(len(_MARK) + 64, _MARK, self._hash.hexdigest().encode()))

    def _write_through(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.size += len(data)


def save_with_digest(content: object, file: IO[bytes]) -> int:
    """`torch.save`, and the hash behind it; returns how many bytes that were."""
    writer = HashingWriter(file)
    try:
        torch.save(content, writer)  # type: ignore[arg-type]
        writer.write_digest()
    except RuntimeError as error:
        raise (writer.error or error) from None  # torch complains about the position it finds after a full disk
    return writer.size


def verify_file(file: IO[bytes], path: str) -> None:
    """Whether this is a whole file of `torch.save`; a `DamagedCheckpointError` says why not.

    `torch.load` does not compare the checksums that `torch.save` wrote: a flipped bit would become a wrong weight.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if not size:
        raise damage_error(path, "it is empty")
    if head.startswith(b"PK"):
        changed = _digest_differs(file, size)
        if changed is False:
            return
        try:
            archive = zipfile.ZipFile(file)
            # Checksums can be switched off when saving.
            broken = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
        except Exception as error:  # what a wrong byte in the archive's directory leads to is hard to foresee
            raise damage_error(path, f"it is cut off after {size:,} bytes, or changed ({error})") from error
        if broken is not None:
            raise damage_error(
                path, f"the checksum of its part {broken!r} is wrong: it was changed after it was written"
            )
        if changed:
            raise damage_error(
                path, f"its SHA-256 is missing or wrong: it was cut off after {size:,} bytes, or changed"
            )
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise damage_error(path, f"it is a zip archive of {size:,} bytes that `torch.save` did not write")
    elif not head.startswith(b"\x80"):  # every pickle, which older versions of torch wrote, begins like this
        raise damage_error(path, f"its {size:,} bytes begin with {head[:30]!r}, which `torch.save` does not write")


def _digest_differs(file: IO[bytes], size: int) -> bool | None:
    """Does the content differ from the hash at the end, or is that cut off? None without one: a file of others."""
    content = max(size - _DIGEST.size, 0)
    file.seek(max(content - 20 - (1 << 16), 0))  # as far back as readers of archives look for their end
    tail = file.read()  # the end of the archive's directory, which has 20 bytes before the length of the comment
    digest = tail[-_DIGEST.size :]
    if len(digest) == _DIGEST.size and _DIGEST.unpack(digest)[:2] == (len(_MARK) + 64, _MARK):
        return bool(hash_prefix(file, content).encode() != _DIGEST.unpack(digest)[2])
    directory = tail[max(tail.rfind(b"PK\5\6"), 0) :]
    return True if _MARK in tail or directory[20:22] == _DIGEST.pack(len(_MARK) + 64, b"", b"")[:2] else None


def hash_prefix(file: IO[bytes], size: int) -> str:
    """The hash of the first so many bytes."""
    found = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))
    file.seek(0)
    while size and (part := block[: file.readinto(block[: min(size, len(block))])]):  # type: ignore[attr-defined]
        found.update(part)
        size -= len(part)
    return found.hexdigest()


def load_verified(file: IO[bytes], path: str, map_location: Any = None, weights_only: bool | None = None) -> Any:
    """What a verified file holds; without `weights_only=False`, no code of it runs."""
    verify_file(file, path)
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=weights_only)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (classes := _refused_classes(file, str(error))):
            what = f"The checkpoint {path!r} holds objects of {classes}, and loading classes can run any code."
            fix = f"`weights_only=False`, or call `torch.serialization.add_safe_globals([{classes}])`"
            raise pickle.UnpicklingError(f"{what} If you trust the file, pass {fix}.") from error
        # A file for which a class, a device or memory is missing is not damaged.
        if isinstance(error, (ImportError, MemoryError)) or "deserialize" in str(error):
            raise
        if zipfile.is_zipfile(file) and "PytorchStreamReader" not in str(error):
            # Where only plain types are read, no code of a user can have failed, and a device raises a `RuntimeError`.
            if weights_only is False or isinstance(error, (RuntimeError, OSError)):
                raise
            found = f"it is a whole archive, but what `torch.save` calls `data.pkl` is not ({type(error).__name__}: {error})"
            raise damage_error(path, found) from error
        if isinstance(error, AttributeError):
            raise
        raise damage_error(path, "it begins like a file of `torch.save`, but does not continue like one") from error


def damage_error(path: str, found: str) -> DamagedCheckpointError:
    fix = "Load another checkpoint, or copy or download this one again."
    return DamagedCheckpointError(f"The checkpoint {path!r} cannot be read: {found}. {fix}")


def _refused_classes(file: IO[bytes], message: str) -> str:
    """The classes because of which `torch.load` refused the file."""
    file.seek(0)
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # torch lists them for its newer format only; its message names the first one
        return ", ".join(re.findall(r"GLOBAL (\S+)", message))
