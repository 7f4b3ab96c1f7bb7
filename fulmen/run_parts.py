"""What a Trainer is assembled from: its callbacks, loggers and profiler, in the order users rely on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fulmen import callbacks as all_callbacks
from fulmen import profilers
from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint
from fulmen.callbacks.model_summary import ModelSummary, RichModelSummary
from fulmen.callbacks.progress_bar import ProgressBar
from fulmen.callbacks.timing import Timer
from fulmen.hparams import clean_for_loggers
from fulmen.loggers.csv_logs import CSVLogger
from fulmen.loggers.logger import DummyLogger, Logger
from fulmen.loggers.tensorboard import TensorBoardLogger
from fulmen.profilers.builtin import AdvancedProfiler, SimpleProfiler
from fulmen.profilers.profiler import PassThroughProfiler, Profiler
from fulmen.utilities.errors import MisconfigurationException, suggestion
from fulmen.utilities.optional import available
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from fulmen.settings import Settings
    from fulmen.trainer import Trainer

RICH = ">=10.2.2"


# ---------------------------------------------------------------------- callbacks


def assemble_callbacks(given: Any, settings: Settings) -> list[Callback]:
    """The user's callbacks and the default ones. The user's own list is left as it is.

    Raises:
        MisconfigurationException: for something that is no callback, or a default that was both given and forbidden.
    """
    if given is None:
        callbacks = []
    else:
        callbacks = [given] if isinstance(given, Callback) else list(given)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"`Trainer(callbacks=...)` received {callback!r}, a {type(callback).__name__}. "
                "Pass instances of `Callback`, not classes or strings."
            )
    _add_checkpointing(callbacks, settings)
    _add_timer(callbacks, settings)
    _add_progress_bar(callbacks, settings)
    if settings.enable_model_summary and not _has(callbacks, ModelSummary):
        callbacks.append(RichModelSummary() if available("rich", RICH) else ModelSummary())
    callbacks.extend(_from_entry_points())
    _check_state_keys(callbacks)
    return in_order(callbacks)


def arrange(callbacks: Sequence[Callback], from_module: Callback | Sequence[Callback] | None) -> list[Callback]:
    """The trainer's callbacks with those of `configure_callbacks`, which replace the ones of the same class."""
    new = [from_module] if isinstance(from_module, Callback) else list(from_module or [])
    if not new:
        return list(callbacks)
    replaced = [
        old for old in callbacks if type(old) is not Callback and any(issubclass(type(n), type(old)) for n in new)
    ]
    if replaced:
        names = ", ".join(sorted({type(old).__name__ for old in replaced}))
        rank_zero_info(
            f"The following callbacks returned in `LightningModule.configure_callbacks` replace existing ones: {names}"
        )
    return in_order([old for old in callbacks if old not in replaced] + new)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Finders first, checkpoints last, the rest as they were."""
    callbacks = list(callbacks)
    return sorted(callbacks, key=lambda c: 0 if c.tunes else 2 if isinstance(c, Checkpoint) else 1)


def _has(callbacks: list[Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _add_checkpointing(callbacks: list[Callback], settings: Settings) -> None:
    if not settings.enable_checkpointing:
        if _has(callbacks, Checkpoint):
            raise MisconfigurationException(
                "`Trainer(enable_checkpointing=False)` was passed together with a checkpoint callback. "
                "Remove one of the two."
            )
    elif not _has(callbacks, Checkpoint):
        callbacks.append(ModelCheckpoint())


def _add_timer(callbacks: list[Callback], settings: Settings) -> None:
    if settings.max_time is None:
        return
    if _has(callbacks, Timer):
        rank_zero_info("Ignoring `Trainer(max_time=...)`, callbacks list already contains a Timer.")
    else:
        callbacks.append(Timer(duration=settings.max_time, interval="step"))


def _add_progress_bar(callbacks: list[Callback], settings: Settings) -> None:
    bars = [type(callback).__name__ for callback in callbacks if isinstance(callback, ProgressBar)]
    if len(bars) > 1:
        raise MisconfigurationException(
            f"You added multiple progress bar callbacks: {', '.join(bars)}. Keep one of them."
        )
    if bars and not settings.enable_progress_bar:
        raise MisconfigurationException(
            f"`Trainer(enable_progress_bar=False)` was passed together with {bars[0]}. Remove one of the two."
        )
    if not bars and settings.enable_progress_bar:
        kind = "RichProgressBar" if available("rich", RICH) else "TQDMProgressBar"
        callbacks.append(getattr(all_callbacks, kind)())


def _from_entry_points() -> list[Callback]:
    """Callbacks other installed packages want in every run."""
    from importlib.metadata import entry_points

    found: list[Callback] = []
    for group in ("fulmen.callbacks_factory", "lightning.pytorch.callbacks_factory"):
        for entry in entry_points(group=group):
            made = entry.load()()
            new = [made] if isinstance(made, Callback) else list(made)
            found.extend(new)
            rank_zero_info(f"Adding {len(new)} callbacks from entry point '{entry.name}'.")
    return found


def _check_state_keys(callbacks: list[Callback]) -> None:
    seen: set[str] = set()
    for callback in callbacks:
        if callback.state_key in seen and callback.state_dict():
            raise RuntimeError(
                f"Found more than one stateful callback of type `{type(callback).__name__}` with the state key "
                f"{callback.state_key!r}. Checkpoints could not tell their states apart. Use different arguments, or "
                "override `state_key`."
            )
        seen.add(callback.state_key)


# ---------------------------------------------------------------------- loggers


def assemble_loggers(settings: Settings) -> list[Logger]:
    """The loggers of `Trainer(logger=...)`; True stands for TensorBoard, or CSV files without it."""
    given = settings.logger
    if given is True:
        loggers: list[Any] = [_default_logger(settings.default_root_dir)]
    elif not given:
        loggers = []
    else:
        loggers = list(given) if isinstance(given, Iterable) and not isinstance(given, Logger) else [given]
    if settings.fast_dev_run and loggers:
        return [DummyLogger()]
    return loggers


def _default_logger(root_dir: str) -> Logger:
    version = os.environ.get("SLURM_JOB_ID") if os.environ.get("SLURM_NTASKS") else None
    if available("tensorboard") or available("tensorboardX"):
        return TensorBoardLogger(save_dir=root_dir, version=version)
    rank_zero_warn(
        "Neither `tensorboard` nor `tensorboardX` is installed: logs go to CSV files. "
        "Install one with `pip install tensorboard`, or choose with `Trainer(logger=CSVLogger(...))`."
    )
    return CSVLogger(save_dir=root_dir, version=version)


def run_dir(logger: Logger) -> str | None:
    """Where a logger puts the files of this run."""
    return logger.log_dir if isinstance(logger, (CSVLogger, TensorBoardLogger)) else logger.save_dir


def send_hparams(trainer: Trainer) -> None:
    """Hyper-parameters and the model graph go to the loggers at the start of a run."""
    if not trainer.enable_autolog_hparams or not trainer.loggers:
        return
    hparams = clean_for_loggers(trainer.lightning_module, trainer.datamodule)
    for logger in trainer.loggers:
        if hparams:
            logger.log_hyperparams(hparams)
        logger.log_graph(trainer.lightning_module)
        logger.save()


# ---------------------------------------------------------------------- profiler


def assemble_profiler(given: Any) -> Profiler:
    """A profiler from its short name, or the one that was given."""
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, Profiler):
        return given
    names = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": "PyTorchProfiler", "xla": "XLAProfiler"}
    kind: Any = names.get(given.lower()) if isinstance(given, str) else None
    if kind is None:
        raise MisconfigurationException(
            f"`Trainer(profiler={given!r})` is not known.{suggestion(str(given), names)} When passing a string, it can "
            f"be one of {list(names)}. Use one of them, or pass a `Profiler`."
        )
    return (getattr(profilers, kind) if isinstance(kind, str) else kind)()
