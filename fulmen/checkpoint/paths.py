"""What `ckpt_path` means: "best", "last" and "hpc" become the path of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fulmen.storage.atomic import remove_leftovers
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import get_filesystem, is_remote, local_path, modified_ns
from fulmen.storage.integrity import DamagedCheckpointError
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

Verify = Callable[[Any], Any]  # raises if a checkpoint cannot be used

AUTO = "auto"
# Beside the files of `ModelCheckpoint`, until one of them is newer: of a run that was told to end, and of one that is over.
PREEMPTED = "preempted.ckpt"
FINISHED = "finished.ckpt"
HPC = r"hpc_ckpt_\d+\.ckpt"
_OF_BROKEN_RUN = object()  # like "last", without a warning if there is none


def resolve_path(
    ckpt_path: str | os.PathLike[str] | None,
    *,
    verb: str,
    callbacks: Sequence[Any],
    root_dir: str | os.PathLike[str],
    model_given: bool,
    fast_dev_run: bool = False,
    folder_of: Callable[[Any], str] | None = None,
    verify: Verify | None = None,
    requeued: bool = False,
) -> str | os.PathLike[str] | None:
    """The file to load, or None to keep the weights there are; a `ValueError` if the name leads to nothing.

    `folder_of` tells where a `ModelCheckpoint` without `dirpath` is going to write. What `verify` finds damaged is
    replaced, with a warning, by the newest good checkpoint in the folders of the callbacks. `requeued`: the job may be
    one that was interrupted and started again.
    """
    if ckpt_path is None:
        ckpt_path = _default_name(verb, callbacks, model_given, requeued and bool(list_files(os.fspath(root_dir), HPC)))
    if ckpt_path is None:
        return None
    found: str | None
    if ckpt_path == "best":
        found = find_best_checkpoint(callbacks, verb, fast_dev_run)
    elif ckpt_path == _OF_BROKEN_RUN:
        found = find_last_checkpoint(callbacks, folder_of)
    elif ckpt_path == "last":
        found = find_last_checkpoint(callbacks, folder_of)
        if found is None:
            what = f'`trainer.{verb}(ckpt_path="last")` loads nothing: there is no last checkpoint available.'
            rank_zero_warn(f"{what} `ModelCheckpoint(save_last=True)` writes one.")
    elif os.fspath(ckpt_path) == "hpc":
        found = _newest_of_requeued_jobs(verb, os.fspath(root_dir), is_first_start=requeued and verb == "fit")
    else:
        return _check_path(ckpt_path, verb)
    return found and _fall_back_to_newest_good(found, callbacks, folder_of, verify)


def _default_name(verb: str, callbacks: Sequence[Any], model_given: bool, requeued: bool) -> Any:
    """What is meant where no `ckpt_path` is given; None where the weights stay as they are."""
    if verb == "fit":
        if requeued:
            return "hpc"
        return _OF_BROKEN_RUN if any(map(_saves_on_exception, callbacks)) else None
    if model_given:
        return None
    what = f"`trainer.{verb}()` was called without a model: the best model of the previous `fit` call will be used."
    rank_zero_warn(f'{what} Say so with `ckpt_path="best"`, or pass the model to use its weights as they are.')
    return "best"


def _newest_of_requeued_jobs(verb: str, root_dir: str, is_first_start: bool) -> str | None:
    """The one with the highest number of those that interrupted jobs wrote; None for a job that may be new, if it is."""
    newest = find_newest_of_requeued_jobs(root_dir)
    if newest is None and is_first_start:
        rank_zero_info(f"`Trainer.fit(ckpt_path='hpc')` starts anew: no `hpc_ckpt_N.ckpt` is in {root_dir}.")
    elif newest is None:
        raise _nothing_to_load(verb, "hpc", f"no `hpc_ckpt_N.ckpt` is in {root_dir}")
    return newest


def find_newest_of_requeued_jobs(folder: str) -> str | None:
    """The one with the highest number of those in a folder that interrupted jobs wrote, if there are any."""
    return max(list_files(folder, HPC), key=_last_number, default=None)


def _check_path(ckpt_path: str | os.PathLike[str], verb: str) -> str | os.PathLike[str]:
    """What is not the name of a file, such as "auto", which is looked for when the processes have met."""
    path = os.fspath(ckpt_path)
    if path == AUTO and verb != "fit":
        raise _nothing_to_load(verb, path, "only `fit` resumes a run")
    if not path:
        raise _nothing_to_load(verb, path, "an empty path names no file")
    if re.match(r"registry(:|$)", path) and not os.path.exists(path):
        raise _nothing_to_load(verb, path, "the model registry is a hosted service, not reached here")
    return AUTO if path == AUTO else ckpt_path


def find_best_checkpoint(callbacks: Iterable[Any], verb: str, fast_dev_run: bool = False) -> str:
    """The best file of the first `ModelCheckpoint`."""
    judges = [callback for callback in callbacks if hasattr(callback, "best_model_path")]
    if len(judges) > 1:
        rank_zero_warn(
            f'`trainer.{verb}(ckpt_path="best")` is that of the first one of {len(judges)} `ModelCheckpoint`s.'
        )
    if fast_dev_run:
        raise _nothing_to_load(verb, "best", "`fast_dev_run` writes no checkpoints")
    if not judges or not judges[0].best_model_path:
        why = "`ModelCheckpoint` has not saved anything" if judges else "the trainer has no `ModelCheckpoint`"
        raise _nothing_to_load(verb, "best", why)
    best: str = judges[0].best_model_path
    return best


def find_newest_good(candidates: Iterable[str], verify: Verify | None = None) -> str | None:
    """The newest of these checkpoints that is whole; a warning names each newer one that is not.

    None without candidates.

    Raises:
        DamagedCheckpointError: there are some, and none is good.
    """
    verify = verify or TorchCheckpointIO().verify_checkpoint
    damaged: list[str] = []
    for path in sorted(candidates, key=_sort_key, reverse=True):
        try:
            verify(path)
        except Exception as error:  # nothing that can be wrong with a file may keep the run from another one
            damaged.append(describe_failure(path, error))
            continue
        for problem in damaged:
            rank_zero_warn(f"{problem} The newest good one is used instead: {path!r}.")
        return path
    if damaged:
        raise DamagedCheckpointError("\n".join(["No checkpoint is good, so none can be loaded:", *damaged]))
    return None


def _fall_back_to_newest_good(
    path: str, callbacks: Iterable[Any], folder_of: Callable[[Any], str] | None, verify: Verify | None
) -> str:
    """The path, if it is whole; else the newest good checkpoint beside it or in the folders of the callbacks."""
    if verify is None:
        return path
    try:
        verify(path)
        return path
    except Exception as error:
        folders = {os.path.dirname(path), *(_folder_of(c, folder_of) for c in callbacks if hasattr(c, "dirpath"))}
        extension = re.escape(os.path.splitext(path)[1])
        others = {file for folder in folders for file in list_files(folder, rf"[^.].*{extension}")} - {path}
        if (found := find_newest_good(others, verify)) is None:
            raise
        rank_zero_warn(f"{describe_failure(path, error)} The newest good one is used instead: {found!r}.")
        return found


def describe_failure(path: str, error: Exception) -> str:
    """What is wrong with a checkpoint, with its path."""
    if path in str(error):
        return str(error)
    return f"The checkpoint {path!r} cannot be used: {type(error).__name__}: {error}."


def _folder_of(callback: Any, folder_of: Callable[[Any], str] | None) -> str:
    return os.fspath(callback.dirpath or (folder_of(callback) if folder_of is not None else ""))


def preemption_path(callbacks: Iterable[Any], requeue_folder: str | None) -> str | None:
    """Where the checkpoint goes with which a run ends that was told to end; None if the run writes none.

    `requeue_folder` is given if the job will start again, and find the next `hpc_ckpt_N.ckpt` there.
    """
    if requeue_folder is not None:
        numbers = map(_last_number, list_files(requeue_folder, HPC))
        return os.path.join(requeue_folder, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")
    savers = [callback for callback in callbacks if hasattr(callback, "FILE_EXTENSION")]
    first = next((os.fspath(saver.ckpt_path) for saver in savers if _saves_on_exception(saver)), None)
    folders = (saver.dirpath for saver in savers if hasattr(saver, "CHECKPOINT_NAME_LAST") and saver.dirpath)
    return first or next((os.path.join(folder, PREEMPTED) for folder in folders), None)


def _last_number(path: str) -> int:
    return int(re.findall(r"\d+", os.path.basename(path))[-1])


def _saves_on_exception(callback: Any) -> bool:
    """`OnExceptionCheckpoint` writes one file only, and knows its name."""
    return hasattr(callback, "ckpt_path") and hasattr(callback, "FILE_EXTENSION")


def find_last_checkpoint(callbacks: Iterable[Any], folder_of: Callable[[Any], str] | None = None) -> str | None:
    """The newest of the files that `ModelCheckpoint(save_last=True)` or `OnExceptionCheckpoint` have written."""
    found = []
    for callback in callbacks:
        if hasattr(callback, "CHECKPOINT_NAME_LAST"):
            folder = _folder_of(callback, folder_of)
            # Logged values in the name may be anything, also nothing that Python's format would give back.
            name = re.sub(r"\\\{.*?\\\}", ".*", re.escape(callback.CHECKPOINT_NAME_LAST))
            found += list_files(folder, f"{name}.*{re.escape(callback.FILE_EXTENSION)}")
        elif _saves_on_exception(callback):
            path = os.fspath(callback.ckpt_path)
            found += [path] if get_filesystem(path).exists(path) else []
    return max(found, key=_sort_key, default=None)


def list_files(folder: str, pattern: str) -> list[str]:
    """The files in a folder whose whole name matches the regular expression; what dead writers left goes first."""
    files = get_filesystem(folder)
    if not folder or not files.isdir(folder):
        return []
    if not is_remote(folder):
        remove_leftovers(local_path(folder))
    # Remote file systems list paths without their scheme, so only names are taken over.
    names = (os.path.basename(str(path).rstrip("/")) for path in files.ls(folder, detail=False))
    return [os.path.join(folder, name) for name in names if re.fullmatch(pattern, name)]


def _sort_key(path: str) -> tuple[Any, str]:
    """Sorts by the time of writing; a link that leads nowhere, or to itself, counts itself."""
    try:
        return modified_ns(path), path
    except OSError:
        return (os.lstat(path).st_mtime_ns if os.path.islink(path) else 0), path


def _nothing_to_load(verb: str, given: str, why: str) -> ValueError:
    return ValueError(f"`trainer.{verb}(ckpt_path={given!r})` has nothing to load: {why}. Pass the path of a file.")
