"""`ckpt_path="auto"`: which checkpoint of a run's folders it goes on from."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fulmen.checkpoint.paths import files_in
from fulmen.engine.checkpoint_io import DamagedCheckpointError
from fulmen.engine.sharded_checkpoint import META, is_sharded
from fulmen.utilities.filesystem import is_remote, local_path, modified
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.temporaries import clean

EXTENSION = ".ckpt"  # unless callbacks write others
Load = Callable[[str], dict[str, Any]]


def checkpoints_in(folders: Iterable[str], extensions: Iterable[str] = (EXTENSION,)) -> list[str]:
    """Everything in the folders that has the name of a checkpoint; on this machine also further down."""
    found: dict[str, None] = {}
    ends = tuple(extensions)
    for folder in folders:
        if is_remote(folder):
            found.update(dict.fromkeys(files_in(folder, rf"[^.].*({'|'.join(map(re.escape, ends))})")))
            continue
        for place, below, _ in os.walk(local_path(folder)):
            clean(place)  # also puts a folder in place whose renaming was interrupted
            here = [name for name in os.listdir(place) if name.endswith(ends) and not name.startswith(".")]
            found.update((os.path.join(place, name), None) for name in here)
            below[:] = [name for name in below if name not in here]
    return list(found)


def newest_good(candidates: Iterable[str], load: Load, verify: Callable[[str], Any] | None = None) -> str | None:
    """The checkpoint of the most steps, among equals the youngest; None if there is none.

    One that is damaged is named in a warning; one of weights only cannot be resumed and does not count.

    Arguments:
        load: reads a whole file.
        verify: raises if a file is damaged; else it is loaded to see that.

    Raises:
        DamagedCheckpointError: there are some, and none is good.
    """
    known, damaged = [], 0
    for path in candidates:
        try:
            if (steps := _steps(path, load)) is not None:
                known.append((steps, modified(path), path))
        except (DamagedCheckpointError, OSError) as error:
            rank_zero_warn(f"Passed over: {error}")
            damaged += 1
    for *_, path in sorted(known, reverse=True):
        try:
            if verify is not None or not is_sharded(path):
                (verify or load)(path)
            return path
        except (DamagedCheckpointError, OSError) as error:
            rank_zero_warn(f"Passed over: {error}")
            damaged += 1
    if damaged:
        what = f"None of the run's {damaged} checkpoints can be read, so there is nothing to go on from."
        raise DamagedCheckpointError(f"{what} Move them away to start anew, or bring back a copy of one.")
    return None


def newest_version(root: str, folder: str) -> int | None:
    """The highest N for which `root/version_N/folder` holds a checkpoint."""
    numbers = sorted((int(re.findall(r"\d+$", path)[0]) for path in files_in(root, r"version_\d+")), reverse=True)
    return next((n for n in numbers if checkpoints_in([os.path.join(root, f"version_{n}", folder)])), None)


def _steps(path: str, load: Load) -> int | None:
    """The steps that a checkpoint has seen, without reading its tensors where that can be helped; None if without optimizer."""
    content: Any = None
    where = os.path.join(local_path(path), META) if is_sharded(path) else local_path(path)
    if not is_remote(path) and os.path.isfile(where):
        try:
            content = torch.load(where, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError):
            content = None  # damaged, of an old format, or with classes: reading all of it tells which
    if not isinstance(content, dict):
        content = load(path)
    return int(content.get("global_step", 0)) if "optimizer_states" in content or is_sharded(path) else None
