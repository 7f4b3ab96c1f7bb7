"""The end of a run that was told to end: at which boundary, and with which file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fulmen.checkpoint import paths
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer

LAST = 1 << 60  # behind all validation batches


def after_step(loop: FitLoop) -> None:
    """A signal came: ends the run if an accumulation window is complete, and all processes end here."""
    trainer, progress = loop.trainer, loop.progress
    complete = progress.batch % trainer.accumulate_grad_batches == 0 or progress.is_last_batch
    if complete and trainer.strategy.ends_at((progress.batches, LAST)):
        end(trainer)


def after_evaluation_batch(loop: EvaluationLoop, batch_idx: int, dataloader_idx: int) -> None:
    """A signal came: ends the run here; inside fit if all processes do, which only a batch that all have can tell."""
    trainer = loop.trainer
    if not loop.inside_fit:
        raise trainer.signals.exception()
    place = (trainer.fit_loop.progress.batches, (dataloader_idx << 40) + batch_idx)
    if (loop.full is None or batch_idx < loop.full[dataloader_idx]) and trainer.strategy.ends_at(place):
        end(trainer)


def end(trainer: Trainer) -> NoReturn:
    """Saves, if something was trained and the run writes checkpoints, and raises what ends the run."""
    signals = trainer.signals
    signals.pending = trainer.strategy.broadcast(signals.pending)  # all end because of what the first rank was told
    training = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run
    folder = trainer.default_root_dir if signals.requeueing else None
    path = trainer.strategy.broadcast(paths.stop_file(trainer.callbacks, folder)) if training else None
    if path is not None:
        signals.saving = True
        try:
            trainer.save_checkpoint(path)
            signals.saved = path
            rank_zero_info(f"Saved a checkpoint to {path}: `Trainer.fit(ckpt_path='auto')` goes on from there.")
        except Exception as error:
            what = f"The run was told to end, and its last checkpoint {path!r} could not be written:"
            rank_zero_warn(f"{what} {type(error).__name__}: {error} Resume from the one before.")
        finally:
            signals.saving = False
    raise signals.exception()
