"""Files from the internet, once: what is there already is used as it is."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from fulmen.storage.filesystem import atomic_write

TIMEOUT_S = 30


def fetch_file(url: str, destination: str | os.PathLike[str], md5: str | None = None) -> None:
    """Downloads a file, unless it is there already. Where it is, is either nothing or the whole file.

    Args:
        url: where it comes from.
        destination: its local path; missing folders are made.
        md5: the checksum of the right content, in hexadecimal.

    Raises:
        ConnectionError: it cannot be reached, or what came is not the right content.
    """
    path = Path(destination)
    if path.exists():
        return
    help_out = f"Put the file at {path} yourself; it is used from there."
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content = response.read()
    except OSError as error:  # urllib's errors, refused connections and timeouts are all of this kind
        raise ConnectionError(f"{url} could not be downloaded: {error}. {help_out}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 is not None and found != md5:
        raise ConnectionError(f"{url} gave another content than expected: its MD5 is {found}, not {md5}. {help_out}")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)
