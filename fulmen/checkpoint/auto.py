"""`ckpt_path="auto"`: which checkpoint in the folders of a run it continues from."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.serialization import skip_data

from fulmen.checkpoint.lightning_format import refuse_foreign
from fulmen.checkpoint.paths import describe_failure, list_files
from fulmen.storage.atomic import remove_leftovers
from fulmen.storage.filesystem import get_filesystem, is_remote, local_path, modified_ns
from fulmen.storage.integrity import DamagedCheckpointError, damage_error
from fulmen.storage.sharded import META, is_sharded
from fulmen.utilities.rank_zero import rank_zero_warn

EXTENSION = ".ckpt"  # unless callbacks write others
Load = Callable[[str], dict[str, Any]]
Check = Callable[[str], Any]
Fits = Callable[[Any, str], Any]


class Candidate(NamedTuple):
    """A checkpoint to choose from, in the order in which the last one is the best."""

    steps: int
    written_ns: int
    path: str


def list_checkpoints(folders: Iterable[str], extensions: Iterable[str] = (EXTENSION,)) -> list[str]:
    """Everything in the folders that has the name of a checkpoint; on this machine also further down."""
    found: dict[str, None] = {}
    ends = tuple(extensions)
    for folder in folders:
        if is_remote(folder):
            found.update(dict.fromkeys(list_files(folder, rf"[^.].*({'|'.join(map(re.escape, ends))})")))
            continue
        for parent, below, _ in os.walk(local_path(folder)):
            remove_leftovers(parent)  # also finishes the renaming of a folder that was interrupted
            here = [name for name in os.listdir(parent) if name.endswith(ends) and not name.startswith(".")]
            found.update((os.path.join(parent, name), None) for name in here)
            below[:] = [name for name in below if name not in here]
    return list(found)


def find_latest_checkpoint(
    candidates: Iterable[str], load: Load, verify: Check | None = None, fits: Fits | None = None
) -> str | None:
    """The checkpoint of the most steps, among equals the youngest; None if there is none.

    One that cannot be read, for whatever reason, is named in a warning; one of weights only cannot be resumed and does
    not count.

    Arguments:
        load: reads a whole file.
        verify: raises if a file is damaged; else it is loaded to see that.
        fits: raises if content, perhaps without tensors, of a path is not that of this run. If none fits, the newest
            whole one is taken: restoring it says why not.

    Raises:
        DamagedCheckpointError: there are some, and none is good.
        UnpicklingError: none is good, and the newest holds classes that may not be loaded.
    """
    aside: dict[str, Exception] = {}  # what cannot be used, by path
    unfit: dict[str, Exception] = {}
    read = partial(_read_candidate, load=load, verify=verify)
    known, unknown = _list_candidates(candidates, load, aside)
    found = _first_that_fits(sorted(known, reverse=True), read, fits, aside, unfit)
    if found is None and unfit:
        return next(iter(unfit))
    if found is None and aside:
        raise _no_good_checkpoint(aside)
    for path, why in unfit.items():
        _set_aside(path, why, aside)
    # One whose damage hides how many steps it has seen is to be named too.
    since = modified_ns(found.path) if found is not None else 0
    _read_newer(unknown, known, since, found, read, aside)
    return None if found is None else found.path


def _read_newer(
    unknown: list[Candidate], known: list[Candidate], since_ns: int, found: Candidate | None, read: Load,
    aside: dict[str, Exception],
) -> None:  # fmt: skip
    """Puts those aside that were written since the one that was found, and cannot be read or are no checkpoints."""
    for candidate in (*unknown, *known):
        if candidate.written_ns > since_ns and candidate.path not in aside and candidate != found:
            with _skipping_unreadable(candidate.path, aside):
                content = read(candidate.path)
                if candidate in unknown:
                    refuse_foreign(content, candidate.path)


def _first_that_fits(
    known: list[Candidate], read: Load, fits: Fits | None, aside: dict[str, Exception], unfit: dict[str, Exception]
) -> Candidate | None:
    """The first that can be read and fits; those before it go to `aside` if they cannot be read, else to `unfit`."""
    for candidate in known:
        with _skipping_unreadable(candidate.path, aside):
            content = read(candidate.path)
            try:
                if fits is not None:
                    fits(content, candidate.path)
                return candidate
            except Exception as error:
                unfit[candidate.path] = error
    return None


def _list_candidates(
    paths: Iterable[str], load: Load, aside: dict[str, Exception]
) -> tuple[list[Candidate], list[Candidate]]:
    """Those that say how many steps they have seen, and those of weights only, which do not."""
    known: list[Candidate] = []
    unknown: list[Candidate] = []
    for path in paths:
        with _skipping_unreadable(path, aside):
            steps = _steps_seen(read_outline(path, load), path)
            candidate = Candidate(steps or 0, modified_ns(path), path)
            (unknown if steps is None else known).append(candidate)
    return known, unknown


def _read_candidate(path: str, load: Load, verify: Check | None) -> Any:
    if verify is not None:
        verify(path)
    return read_outline(path, load) if verify is not None or is_sharded(path) else load(path)


@contextmanager
def _skipping_unreadable(path: str, aside: dict[str, Exception]) -> Generator[None]:
    """Whatever is wrong with one file, the search continues with the next."""
    try:
        yield
    except Exception as error:
        _set_aside(path, error, aside)


def read_outline(path: str, load: Load) -> Any:
    """What a checkpoint holds, without reading its tensors where that is possible."""
    where = os.path.join(local_path(path), META) if is_sharded(path) else local_path(path)
    if is_remote(path):
        with suppress(Exception), skip_data(), get_filesystem(path).open(path, "rb") as file:  # a few kB are fetched
            if isinstance(content := torch.load(file, map_location="cpu", weights_only=True), dict):
                return content
    elif os.path.isfile(where):
        with suppress(Exception):  # damaged, of an old format, or with classes: reading all of it tells which
            if isinstance(content := torch.load(where, map_location="cpu", weights_only=True, mmap=True), dict):
                return content
    return load(path)


def _steps_seen(content: object, path: str) -> int | None:
    """The steps that a checkpoint has seen; None if it is without optimizer."""
    if not isinstance(content, dict):
        raise damage_error(path, f"it holds a `{type(content).__name__}`, not the dict that a checkpoint is")
    return int(content.get("global_step", 0)) if "optimizer_states" in content or is_sharded(path) else None


def _set_aside(path: str, error: Exception, aside: dict[str, Exception]) -> None:
    aside[path] = error
    rank_zero_warn(f"Passed over: {describe_failure(path, error)}")


def _no_good_checkpoint(aside: dict[str, Exception]) -> Exception:
    for error in aside.values():
        if isinstance(error, pickle.UnpicklingError):  # it says what to pass to load the file
            return error
    what = f"None of the run's {len(aside)} checkpoints can be read, so there is nothing to continue from."
    return DamagedCheckpointError(f"{what} Move them away to start anew, or bring back a copy of one.")


def find_newest_version(root: str, folder: str) -> int | None:
    """The highest N for which `root/version_N/folder` holds a checkpoint."""
    numbers = sorted((int(re.findall(r"\d+$", path)[0]) for path in list_files(root, r"version_\d+")), reverse=True)
    return next((n for n in numbers if list_checkpoints([os.path.join(root, f"version_{n}", folder)])), None)
