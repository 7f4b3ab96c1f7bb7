"""What `ckpt_path` means: "best", "last" and "hpc" become the path of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fulmen.storage.atomic import clean
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import get_filesystem, is_remote, local_path, modified
from fulmen.storage.integrity import DamagedCheckpointError
from fulmen.utilities.rank_zero import rank_zero_warn

Verify = Callable[[Any], Any]  # raises if a checkpoint cannot be used

AUTO = "auto"
# Beside the files of `ModelCheckpoint`, until one of them is newer: of a run that was told to end, and of one that is over.
PREEMPTED, FINISHED = "preempted.ckpt", "finished.ckpt"
HPC = r"hpc_ckpt_\d+\.ckpt"


def find(
    ckpt_path: str | os.PathLike | None,
    *,
    verb: str,
    callbacks: Sequence[Any],
    root_dir: str | os.PathLike,
    model_given: bool,
    fast_dev_run: bool = False,
    folder_of: Callable[[Any], str] | None = None,
    verify: Verify | None = None,
    requeued: bool = False,
) -> str | os.PathLike | None:
    """The file to load, or None to go on with the weights there are; a `ValueError` if the name leads to nothing.

    `folder_of` tells where a `ModelCheckpoint` without `dirpath` is going to write. What `verify` finds damaged is
    replaced, with a warning, by the newest good checkpoint in the folders of the callbacks. `requeued`: the job may be
    one that was interrupted, and goes on.
    """
    if ckpt_path is None and verb == "fit" and requeued and files_in(os.fspath(root_dir), HPC):
        ckpt_path = "hpc"
    if ckpt_path is None and verb == "fit":
        # A broken run goes on; no warning if there is none.
        found = last_checkpoint(callbacks, folder_of) if any(map(_saves_on_exception, callbacks)) else None
        return found and _or_newest_good(found, callbacks, folder_of, verify)
    if ckpt_path is None and model_given:
        return None
    if ckpt_path is None:
        what = f"`trainer.{verb}()` was called without a model: the best model of the previous `fit` call will be used."
        rank_zero_warn(f'{what} Say so with `ckpt_path="best"`, or pass the model to use its weights as they are.')
    if ckpt_path is None or ckpt_path == "best":
        return _or_newest_good(best_checkpoint(callbacks, verb, fast_dev_run), callbacks, folder_of, verify)
    if ckpt_path == "last":
        found = last_checkpoint(callbacks, folder_of)
        if found is None:
            what = f'`trainer.{verb}(ckpt_path="last")` loads nothing: there is no last checkpoint available.'
            rank_zero_warn(f"{what} `ModelCheckpoint(save_last=True)` writes one.")
        return found and _or_newest_good(found, callbacks, folder_of, verify)
    path = os.fspath(ckpt_path)
    if path == "hpc":  # the one with the highest number of those that interrupted jobs wrote
        saved = files_in(os.fspath(root_dir), HPC)
        if not saved:
            raise _nothing(verb, path, f"no `hpc_ckpt_N.ckpt` is in {os.fspath(root_dir)}")
        return _or_newest_good(max(saved, key=_number), callbacks, folder_of, verify)
    if path == AUTO:  # looked for when the processes have met
        if verb != "fit":
            raise _nothing(verb, path, "only `fit` resumes a run")
        return AUTO
    if not path:
        raise _nothing(verb, path, "an empty path names no file")
    if re.match(r"registry(:|$)", path) and not os.path.exists(path):
        raise _nothing(verb, path, "the model registry is a hosted service, not reached here")
    return ckpt_path


def best_checkpoint(callbacks: Iterable[Any], verb: str, fast_dev_run: bool = False) -> str:
    """The best file of the first `ModelCheckpoint`."""
    judges = [callback for callback in callbacks if hasattr(callback, "best_model_path")]
    if len(judges) > 1:
        rank_zero_warn(
            f'`trainer.{verb}(ckpt_path="best")` is that of the first one of {len(judges)} `ModelCheckpoint`s.'
        )
    if fast_dev_run:
        raise _nothing(verb, "best", "`fast_dev_run` writes no checkpoints")
    if not judges or not judges[0].best_model_path:
        why = "`ModelCheckpoint` has not saved anything" if judges else "the trainer has no `ModelCheckpoint`"
        raise _nothing(verb, "best", why)
    return judges[0].best_model_path


def newest_good(candidates: Iterable[str], verify: Verify | None = None) -> str | None:
    """The newest of these checkpoints that is whole; a warning names each newer one that is not.

    None without candidates.

    Raises:
        DamagedCheckpointError: there are some, and none is good.
    """
    verify, damaged = verify or TorchCheckpointIO().verify_checkpoint, []
    for path in sorted(candidates, key=_age, reverse=True):
        try:
            verify(path)
        except Exception as error:  # nothing that can be wrong with a file may keep the run from another one
            damaged.append(named(path, error))
            continue
        for problem in damaged:
            rank_zero_warn(f"{problem} The newest good one is used instead: {path!r}.")
        return path
    if damaged:
        raise DamagedCheckpointError("\n".join(["No checkpoint is good, so none can be loaded:", *damaged]))
    return None


def _or_newest_good(
    path: str, callbacks: Iterable[Any], folder_of: Callable[[Any], str] | None, verify: Verify | None
) -> str:
    """The path, if it is whole; else the newest good checkpoint beside it or in the folders of the callbacks."""
    if verify is None:
        return path
    try:
        verify(path)
        return path
    except Exception as error:
        folders = {os.path.dirname(path), *(_folder(c, folder_of) for c in callbacks if hasattr(c, "dirpath"))}
        extension = re.escape(os.path.splitext(path)[1])
        others = {file for folder in folders for file in files_in(folder, rf"[^.].*{extension}")} - {path}
        if (found := newest_good(others, verify)) is None:
            raise
        rank_zero_warn(f"{named(path, error)} The newest good one is used instead: {found!r}.")
        return found


def named(path: str, error: Exception) -> str:
    """What is wrong with a checkpoint, with its path."""
    if path in str(error):
        return str(error)
    return f"The checkpoint {path!r} cannot be used: {type(error).__name__}: {error}."


def _folder(callback: Any, folder_of: Callable[[Any], str] | None) -> str:
    return os.fspath(callback.dirpath or (folder_of(callback) if folder_of is not None else ""))


def stop_file(callbacks: Iterable[Any], requeue_folder: str | None) -> str | None:
    """Where the checkpoint goes with which a run ends that was told to end; None if the run writes none.

    `requeue_folder` is given if the job will start again, and find the next `hpc_ckpt_N.ckpt` there.
    """
    if requeue_folder is not None:
        numbers = map(_number, files_in(requeue_folder, HPC))
        return os.path.join(requeue_folder, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")
    savers = [callback for callback in callbacks if hasattr(callback, "FILE_EXTENSION")]
    first = next((os.fspath(saver.ckpt_path) for saver in savers if _saves_on_exception(saver)), None)
    folders = (saver.dirpath for saver in savers if hasattr(saver, "CHECKPOINT_NAME_LAST") and saver.dirpath)
    return first or next((os.path.join(folder, PREEMPTED) for folder in folders), None)


def _number(path: str) -> int:
    return int(re.findall(r"\d+", os.path.basename(path))[-1])


def _saves_on_exception(callback: Any) -> bool:
    """`OnExceptionCheckpoint` writes one file only, and knows its name."""
    return hasattr(callback, "ckpt_path") and hasattr(callback, "FILE_EXTENSION")


def last_checkpoint(callbacks: Iterable[Any], folder_of: Callable[[Any], str] | None = None) -> str | None:
    """The newest of the files that `ModelCheckpoint(save_last=True)` or `OnExceptionCheckpoint` have written."""
    found = []
    for callback in callbacks:
        if hasattr(callback, "CHECKPOINT_NAME_LAST"):
            folder = _folder(callback, folder_of)
            # Logged values in the name may be anything, also nothing that Python's format would give back.
            name = re.sub(r"\\\{.*?\\\}", ".*", re.escape(callback.CHECKPOINT_NAME_LAST))
            found += files_in(folder, f"{name}.*{re.escape(callback.FILE_EXTENSION)}")
        elif _saves_on_exception(callback):
            path = os.fspath(callback.ckpt_path)
            found += [path] if get_filesystem(path).exists(path) else []
    return max(found, key=_age, default=None)


def files_in(folder: str, pattern: str) -> list[str]:
    """The files in a folder whose whole name matches the regular expression; what dead writers left goes first."""
    files = get_filesystem(folder)
    if not folder or not files.isdir(folder):
        return []
    if not is_remote(folder):
        clean(local_path(folder))
    # Remote file systems list paths without their scheme, so only names are taken over.
    names = (os.path.basename(str(path).rstrip("/")) for path in files.ls(folder, detail=False))
    return [os.path.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def _age(path: str) -> tuple[Any, str]:
    """Sorts by the time of writing; a link that leads nowhere, or to itself, counts itself."""
    try:
        return modified(path), path
    except OSError:
        return (os.lstat(path).st_mtime_ns if os.path.islink(path) else 0), path


def _nothing(verb: str, given: Any, why: str) -> ValueError:
    return ValueError(f"`trainer.{verb}(ckpt_path={given!r})` has nothing to load: {why}. Pass the path of a file.")
