"""The files of `ModelCheckpoint`: which of them are best, which are not on the disk yet, and what is done with them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.checkpoint.paths import FINISHED, PREEMPTED
from fulmen.storage.async_io import AsyncCheckpointIO
from fulmen.storage.atomic import flush_folder, remove_leftovers, temporary_name
from fulmen.storage.filesystem import get_filesystem, is_remote
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from fulmen.callbacks.checkpointing import ModelCheckpoint
    from fulmen.trainer import Trainer


def worst_score(mode: str) -> Tensor:
    """The score that every other one is better than."""
    return torch.tensor(math.inf if mode == "min" else -math.inf)


@dataclass
class SavedFiles:
    """What a `ModelCheckpoint` says about its files. Paths are "" while there is none.

    `mode` is "min" if the smallest score is best, else "max".
    """

    mode: str
    kth_value: Tensor  # the worst score among the best `k`
    kth_best_model_path: str = ""
    best_model_path: str = ""
    best_model_score: Tensor | None = None
    best_k_models: dict[str, Tensor] = field(default_factory=dict)  # scores by path
    current_score: Tensor | None = None  # of the last file that was kept for its score
    last_model_path: str = ""
    newest_path: str = ""  # what was written last, under whatever name
    newest_step: int = 0  # nothing is worth saving before the first step; -1 while a file is being written

    def copy(self) -> SavedFiles:
        """As it is now, to come back to when a file could not be written."""
        return replace(self, best_k_models=dict(self.best_k_models))

    def begin_write(self) -> None:
        """Until `note_written`, it is not known whether there is a file of this step."""
        self.newest_step = -1

    def is_writing(self) -> bool:
        """Has a write begun, and not been noted as done?"""
        return self.newest_step == -1

    def note_written(self, step: int, filepath: str | None = None) -> None:
        """There is a file of this step, which other names of it follow; those do not count as the newest."""
        self.newest_step = step
        if filepath is not None:
            self.newest_path = filepath

    def has_other_of(self, step: int, filepath: str) -> bool:
        """Was a file of this step written under another name than this one?"""
        return self.newest_step == step and self.newest_path != filepath

    def is_among_best(self, score: Tensor, k: int) -> bool:
        """Does this score belong to the best `k`? Equal values do not displace."""
        scores = sorted(self.best_k_models.values(), reverse=self.mode == "max")[:k]
        if len(self.best_k_models) < k or not scores:
            return len(self.best_k_models) < k
        return bool(score < scores[-1] if self.mode == "min" else score > scores[-1])

    def displace_worst(self, k: int) -> list[str]:
        """Strikes off the worst until there is room for one more of `k`. Returns their paths, the worst first."""
        worst = max if self.mode == "min" else min
        displaced = []
        while len(self.best_k_models) >= k:
            displaced.append(worst(self.best_k_models, key=self.best_k_models.__getitem__))
            del self.best_k_models[displaced[-1]]
        return displaced

    def add_scored(self, path: str, score: Tensor, k: int) -> None:
        """One more of the best `k`; NaN counts as the worst score."""
        scores = self.best_k_models
        best, worst = (min, max) if self.mode == "min" else (max, min)
        self.current_score = scores[path] = worst_score(self.mode) if score.isnan() else score
        self.best_model_path = best(scores, key=scores.__getitem__)
        self.best_model_score = scores[self.best_model_path]
        if len(scores) >= k:
            self.kth_best_model_path = worst(scores, key=scores.__getitem__)
            self.kth_value = scores[self.kth_best_model_path]

    def take_back(self, filepath: str, before: SavedFiles, error: Exception, step: int, on_error: str) -> None:
        """A file could not be written: all is as before. Raises the error, or with ``on_error="warn"`` may only warn.

        Arguments:
            step: that the file was for.
        """
        vars(self).update(vars(before.copy()))
        if on_error == "raise" or not isinstance(error, OSError):
            raise error
        what = f"Step {step}: {filepath!r} was not written: {type(error).__name__}: {error}."
        newest = before.newest_path or "none, so far"
        rank_zero_warn(f"{what} Training continues (`on_save_error='warn'`). The newest checkpoint: {newest}.")


class UnfinishedSaves:
    """Files that may still be on their way to the disk, and that loggers do not know of."""

    def __init__(self) -> None:
        self.unannounced = 0  # of how many files loggers do not know
        self._first: tuple[str, SavedFiles] | None = None  # of those in the background, and what was true before it

    def expect_announcement(self) -> None:
        """One more file that loggers are to hear of."""
        self.unannounced += 1

    def note(self, filepath: str, before: SavedFiles) -> None:
        """A file is being written in the background."""
        if self._first is None:
            self._first = filepath, before

    def await_all(self, trainer: Trainer, files: SavedFiles, on_error: str) -> None:
        """Waits for what is written in the background; that it failed is found out here, and taken back in `files`."""
        if self._first is None:
            return
        filepath, before = self._first
        self._first = None
        try:
            trainer.strategy.finish_saving()
        except Exception as error:
            files.take_back(filepath, before, error, trainer.global_step, on_error)

    def announce(self, trainer: Trainer, callback: ModelCheckpoint) -> None:
        """Tells loggers of the callback's files that are there by now."""
        io = background_io(trainer)
        if io is not None and io.is_writing:
            return
        files = self.unannounced if io is None or not io.failed else 0
        self.unannounced = 0
        for logger in [*trainer.loggers] * files if trainer.is_global_zero else ():
            logger.after_save_checkpoint(callback)


def background_io(trainer: Trainer) -> AsyncCheckpointIO | None:
    """Who writes while training goes on, if anybody does."""
    io = trainer.strategy.checkpoint_io
    return io if isinstance(io, AsyncCheckpointIO) else None


def folder_of_run(trainer: Trainer) -> str:
    """The folder of the first logger's run, or one in `default_root_dir`."""
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return os.path.join(root, str(logger.name), version, "checkpoints")


def prepare_folder(trainer: Trainer, dirpath: str, nested: bool, writes: bool) -> list[str]:
    """Before training: removes what interrupted saves left, and warns of files of another run.

    Arguments:
        nested: may names of files make folders below this one?
        writes: will anything be written?

    Returns:
        What runs left here when they ended, to be removed when there is a newer file.
    """
    files = get_filesystem(dirpath)
    if trainer.is_global_zero:
        _clean_folder(dirpath, below=nested and not is_remote(dirpath))
        resumes = Path(dirpath) in Path(os.path.abspath(trainer.ckpt_path or "")).parents  # files of its own
        if writes and not resumes and files.isdir(dirpath) and len(files.ls(dirpath)):
            rank_zero_warn(f"The checkpoint directory {dirpath} exists and is not empty.")
    return [path for name in (PREEMPTED, FINISHED) if files.exists(path := os.path.join(dirpath, name))]


def _clean_folder(dirpath: str, below: bool) -> None:
    """Removes what interrupted saves left in a folder, and perhaps in those below it."""
    folders = [folder for folder, *_ in os.walk(dirpath)] if below else [dirpath]
    if left := [name for folder in folders for name in remove_leftovers(folder)]:
        rank_zero_info(f"Removed what an interrupted save had left in {dirpath}: {', '.join(left)}")


def remove_or_warn(path: str, remove: Callable[[str], Any], on_error: str) -> None:
    """Removes a file; that it cannot be removed is an error, or with ``on_error="warn"`` a warning."""
    try:
        remove(path)
    except OSError as error:
        if on_error == "raise":
            raise
        rank_zero_warn(f"The checkpoint {path!r} could not be removed: {error}. Remove it by hand.")


def redirect_link(trainer: Trainer, link: str, target: str) -> None:
    """Lets a link lead to another file: at once, or when that one is written. At no moment does it lead nowhere."""
    io = background_io(trainer)
    redirect = partial(write_link, target, link)
    if io is not None and io.is_writing:
        io.after_writing(redirect, link, exists=True)
    elif os.path.exists(target):
        redirect()


def write_link(target: str, link: str) -> None:
    """Makes ``link`` a relative symbolic link, or a copy where links are not possible; what was there is replaced."""
    if os.path.isdir(link) and not os.path.islink(link):
        shutil.rmtree(link)
    temporary = temporary_name(link)
    try:
        os.symlink(os.path.relpath(target, os.path.dirname(link)), temporary)
    except OSError:
        shutil.copytree(target, temporary) if os.path.isdir(target) else shutil.copy(target, temporary)
    os.replace(temporary, link)
    flush_folder(os.path.dirname(temporary))
