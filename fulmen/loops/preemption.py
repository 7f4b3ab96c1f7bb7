"""The end of a run that was told to end: at which boundary, with which file; and how the next one goes on from it."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint
from fulmen.checkpoint import auto, paths
from fulmen.checkpoint.snapshot import check_content
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.loggers.logger import FolderLogger
from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO
from fulmen.storage.filesystem import is_remote, local_path
from fulmen.storage.sharded import is_sharded
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer

LAST = 1 << 60  # behind all validation batches


def after_step(loop: FitLoop) -> None:
    """A signal came: ends the run if an accumulation window is complete, and all processes end here."""
    if not in_window(loop) and loop.trainer.strategy.agree_to_stop((loop.progress.batches, LAST)):
        end(loop.trainer)


def after_evaluation_batch(loop: EvaluationLoop, batch_idx: int, dataloader_idx: int) -> None:
    """A signal came: ends the run here; inside fit if all processes do, which only a batch that all have can tell."""
    trainer = loop.trainer
    if not loop.inside_fit:
        raise trainer.signals.exception()
    place = (trainer.fit_loop.progress.batches, (dataloader_idx << 40) + batch_idx)
    everywhere = loop.join.have_all(batch_idx, dataloader_idx)
    if everywhere and not in_window(trainer.fit_loop) and trainer.strategy.agree_to_stop(place):
        end(trainer)


def in_window(loop: FitLoop) -> bool:
    """Do gradients wait for more batches before there is a step?"""
    return bool(loop.progress.batch % loop.trainer.accumulate_grad_batches) and not loop.progress.is_last_batch


def end(trainer: Trainer) -> NoReturn:
    """Saves, if something was trained and the run writes checkpoints, and raises what ends the run."""
    signals = trainer.signals
    signals.pending = trainer.strategy.broadcast(signals.pending)  # all end because of what the first rank was told
    signals.received_sigterm = signals.received_sigterm or signals.pending == signal.SIGTERM
    training = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run
    folder = trainer.default_root_dir if signals.requeueing else None
    path = trainer.strategy.broadcast(paths.preemption_path(trainer.callbacks, folder)) if training else None
    if path is not None:
        signals.saving = True
        try:
            trainer.save_checkpoint(path)
            trainer.strategy.finish_saving()
            signals.saved = path
            rank_zero_info(f"Saved a checkpoint to {path}: `Trainer.fit(ckpt_path='auto')` continues from there.")
        except Exception as error:
            what = f"The run was told to end, and its last checkpoint {path!r} could not be written:"
            rank_zero_warn(f"{what} {type(error).__name__}: {error} Resume from the one before.")
        finally:
            signals.saving = False
    raise signals.exception()


def check_checkpoint(trainer: Trainer, path: str, weights_only: bool | None = None) -> None:
    """Raises if a checkpoint cannot be read, or holds what this run cannot take over."""
    trainer.strategy.verify_checkpoint(path)
    storage: Any = trainer.strategy.checkpoint_io
    readable = isinstance(getattr(storage, "checkpoint_io", storage), TorchCheckpointIO) and not is_remote(path)
    if readable and (is_sharded(path) or not os.path.isdir(local_path(path))):
        load = partial(storage.load_checkpoint, map_location="cpu", weights_only=weights_only)
        training = trainer.state.fn == TrainerFn.FITTING
        check_content(auto.read_outline(path, load), path, trainer.lightning_module, training)


def choose_checkpoint(trainer: Trainer, ckpt_path: Any, weights_only: bool | None) -> Any:
    """The checkpoint to resume from: for "auto" the newest good one of the run, as rank 0 sees it, or None."""
    trainer.fit_loop.automatic = ckpt_path == paths.AUTO
    if ckpt_path != paths.AUTO:
        return ckpt_path
    strategy, root, found = trainer.strategy, trainer.default_root_dir, None
    folders = {folder: None for c in trainer.callbacks if isinstance(c, Checkpoint) for folder in c.folders(trainer)}
    storage: Any = strategy.checkpoint_io

    load = partial(storage.load_checkpoint, map_location="cpu", weights_only=weights_only)

    def search() -> None:
        nonlocal found
        kinds = {c.FILE_EXTENSION for c in trainer.callbacks if hasattr(c, "FILE_EXTENSION")}
        candidates = auto.list_checkpoints(folders, kinds | {auto.EXTENSION})
        if isinstance(strategy.cluster_environment, SLURMEnvironment):
            candidates += paths.list_files(root, paths.HPC)
        looks = type(storage).verify_checkpoint is not CheckpointIO.verify_checkpoint
        fits = partial(check_content, module=trainer.lightning_module, training=True)
        found = auto.find_latest_checkpoint(candidates, load, strategy.verify_checkpoint if looks else None, fits)

    if not trainer.fast_dev_run:
        strategy.on_rank_zero(search, "find a checkpoint to continue from")
    found = trainer._ckpt_path = strategy.broadcast(found)
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
    steps, folder = trainer.global_step, str(savers[0].dirpath)
    try:
        if not any(saver._last_global_step_saved == steps and not saver.save_weights_only for saver in savers):
            trainer.save_checkpoint(os.path.join(folder, paths.FINISHED))
            trainer.strategy.finish_saving()
        trainer.strategy.remove_checkpoint(os.path.join(folder, paths.PREEMPTED))
    except OSError as error:
        if savers[0].on_save_error == "raise":
            raise
        what = f"Training is over, and no file in {folder} says so: {type(error).__name__}: {error}."
        rank_zero_warn(f"{what} The same command would train again from the newest checkpoint there.")
