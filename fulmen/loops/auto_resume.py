"""Automatic resume: which checkpoint a run continues from, and the file by which a finished run says so."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint
from fulmen.checkpoint import auto, paths
from fulmen.checkpoint.snapshot import check_content
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.loggers.logger import FolderLogger
from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO, load_with
from fulmen.storage.filesystem import is_remote, local_path
from fulmen.storage.sharded import is_sharded
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.trainer import Trainer


def check_checkpoint(trainer: Trainer, path: str, weights_only: bool | None = None) -> None:
    """Raises if a checkpoint cannot be read, or holds what this run cannot take over."""
    trainer.strategy.verify_checkpoint(path)
    storage: Any = trainer.strategy.checkpoint_io
    readable = isinstance(getattr(storage, "checkpoint_io", storage), TorchCheckpointIO) and not is_remote(path)
    if readable and (is_sharded(path) or not os.path.isdir(local_path(path))):
        load = partial(load_with, storage, map_location="cpu", weights_only=weights_only)
        training = trainer.state.fn == TrainerFn.FITTING
        check_content(auto.read_outline(path, load), path, trainer.lightning_module, training)


def prefer_handed_back(trainer: Trainer, ckpt_path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """The path; where a fit names none or "auto", what the engine that started this process hands back, if it does."""
    if trainer.state.fn != TrainerFn.FITTING or ckpt_path not in (None, paths.AUTO):
        return ckpt_path
    handed = (callback.find_handed_back() for callback in trainer.callbacks if isinstance(callback, Checkpoint))
    return next(filter(None, handed), ckpt_path)


def choose_checkpoint(
    trainer: Trainer, ckpt_path: str | os.PathLike[str] | None, weights_only: bool | None
) -> str | os.PathLike[str] | None:
    """The checkpoint to resume from: for "auto" the newest good one of the run, as rank 0 sees it, or None."""
    trainer.fit_loop.automatic = ckpt_path == paths.AUTO
    if ckpt_path != paths.AUTO:
        return ckpt_path
    strategy = trainer.strategy
    found = None
    folders = {folder: None for c in trainer.callbacks if isinstance(c, Checkpoint) for folder in c.folders(trainer)}
    storage: Any = strategy.checkpoint_io

    load = partial(load_with, storage, map_location="cpu", weights_only=weights_only)

    def find_newest() -> None:
        nonlocal found
        kinds = {c.FILE_EXTENSION for c in trainer.callbacks if hasattr(c, "FILE_EXTENSION")}
        candidates = auto.list_checkpoints(folders, kinds | {auto.EXTENSION})
        if isinstance(strategy.cluster_environment, SLURMEnvironment):
            candidates += paths.list_files(trainer.default_root_dir, paths.HPC)
        looks = type(storage).verify_checkpoint is not CheckpointIO.verify_checkpoint
        fits = partial(check_content, module=trainer.lightning_module, training=True)
        found = auto.find_latest_checkpoint(candidates, load, strategy.verify_checkpoint if looks else None, fits)

    if not trainer.fast_dev_run:
        strategy.on_rank_zero(find_newest, "find a checkpoint to continue from")
    found = strategy.broadcast(found)
    shown = ", ".join(folders) or "any folder: the run writes none"
    said = f"continues from {found}" if found else f"starts anew: there is no checkpoint in {shown}"
    rank_zero_info(f"`Trainer.fit(ckpt_path='auto')` {said}.")
    return found


def reuse_logger_version(trainer: Trainer) -> None:
    """Before "auto": if checkpoints go where the first logger does, it reuses its newest version that has some.

    Others that count their versions in the same folder use the same, now and when the run starts anew.
    """
    loggers = [one for one in trainer.loggers if isinstance(one, FolderLogger) and one._version is None]
    has_own_folders = all(
        getattr(c, "dirpath", True) is not None for c in trainer.callbacks if isinstance(c, Checkpoint)
    )
    if has_own_folders or not loggers or trainer.loggers[0] is not loggers[0]:
        return
    found = auto.find_newest_version(loggers[0].root_dir, "checkpoints")
    version = loggers[0].version if found is None else found
    for logger in loggers:
        if logger.root_dir == loggers[0].root_dir:
            logger.use_version(version, claimed=found is not None)


def mark_finished(trainer: Trainer) -> None:
    """Training is over: with "auto" there is a file that says so, so that the same command ends at once."""
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    if not savers or not trainer.fit_loop.automatic or trainer.fast_dev_run:
        return
    folder = str(savers[0].dirpath)
    try:
        if not any(
            saver._last_global_step_saved == trainer.global_step and not saver.save_weights_only for saver in savers
        ):
            trainer.save_checkpoint(os.path.join(folder, paths.FINISHED))
            trainer.strategy.finish_saving()
        trainer.strategy.remove_checkpoint(os.path.join(folder, paths.PREEMPTED))
    except OSError as error:
        if savers[0].on_save_error == "raise":
            raise
        what = f"Training is over, and no file in {folder} says so: {type(error).__name__}: {error}."
        rank_zero_warn(f"{what} The same command would train again from the newest checkpoint there.")
