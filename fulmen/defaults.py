"""What a Trainer is assembled from: its callbacks, loggers and profiler, in the order users rely on."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from fulmen import callbacks as all_callbacks
from fulmen import integrations, profilers
from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpointing import Checkpoint, ModelCheckpoint
from fulmen.callbacks.model_summary import ModelSummary, RichModelSummary
from fulmen.callbacks.non_finite_guard import NonFiniteGuard
from fulmen.callbacks.progress_bar import ProgressBar
from fulmen.callbacks.timer import Timer
from fulmen.hparams import clean_for_loggers
from fulmen.loggers.csv_logs import CSVLogger
from fulmen.loggers.logger import DummyLogger, Logger
from fulmen.loggers.tensorboard import TensorBoardLogger
from fulmen.profilers.profiler import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler, XLAProfiler
from fulmen.utilities.errors import MisconfigurationException, describe_received, suggest_name
from fulmen.utilities.optional import is_installed
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy
    from fulmen.settings import Settings
    from fulmen.trainer import Trainer

RICH = "rich", ">=10.2.2"
PROFILERS: dict[str, Callable[[], Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": lambda: profilers.PyTorchProfiler(),  # loaded on first use
    "xla": XLAProfiler,
}
RAY_TRAIN = "ray.train"  # is imported in its workers before any script of a user
# How the variables begin by which Kubeflow Trainer says where to report to.
KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_"
# Callbacks other installed packages want in every run.
ENTRY_POINTS = "fulmen.callbacks_factory", "lightning.pytorch.callbacks_factory"


@functools.cache
def _find_entry_points(path: tuple[str, ...]) -> list[EntryPoint]:
    """What installed packages bring; looking through all of them takes 10 ms."""
    found = entry_points()
    return [entry for group in ENTRY_POINTS for entry in found.select(group=group)]


def complete_machine(machine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The Trainer's arguments about the machine; the engine that started this process may know them better."""
    return integrations.join_ray_train(machine) if RAY_TRAIN in sys.modules else machine


def assemble_callbacks(given: object, settings: Settings, strategy: Strategy | None = None) -> list[Callback]:
    """The user's callbacks and the default ones. The user's own list is left as it is."""
    callbacks = as_callbacks(given, "Trainer(callbacks=...)")
    reporting = [] if settings.barebones or settings.fast_dev_run else _engine_callbacks(strategy)
    reports = any(isinstance(callback, Checkpoint) for callback in reporting)
    if _is_missing(callbacks, Checkpoint, settings.enable_checkpointing, "enable_checkpointing") and not reports:
        callbacks.append(ModelCheckpoint())
    _add_timer(callbacks, settings)
    if _is_missing(callbacks, ProgressBar, settings.enable_progress_bar, "enable_progress_bar"):
        # Each is loaded on first use.
        callbacks.append(all_callbacks.RichProgressBar() if is_installed(*RICH) else all_callbacks.TQDMProgressBar())
    if settings.enable_model_summary and not any(isinstance(callback, ModelSummary) for callback in callbacks):
        callbacks.append(RichModelSummary() if is_installed(*RICH) else ModelSummary())
    callbacks += reporting
    callbacks += _entry_point_callbacks()
    _check_state_keys(callbacks)
    return sort_callbacks(callbacks)


def _add_timer(callbacks: list[Callback], settings: Settings) -> None:
    """The one that `max_time` asks for, unless the user has one."""
    if settings.max_time is not None and any(isinstance(callback, Timer) for callback in callbacks):
        rank_zero_info("`Trainer(max_time=...)` has no effect: `callbacks` holds a Timer already.")
    elif settings.max_time is not None:
        callbacks.append(Timer(duration=settings.max_time, interval="step"))


def _engine_callbacks(strategy: Strategy | None) -> list[Callback]:
    """What reports to the engine that started this process, if that asks for reports."""
    found: list[Callback] = []
    cluster = strategy.cluster_environment if strategy is not None else None
    if RAY_TRAIN in sys.modules and isinstance(cluster, integrations.RayTrainEnvironment):
        found.append(integrations.RayTrainReport())
    is_named = any(name.startswith(KUBEFLOW) for name in os.environ)
    if is_named and integrations.KubeflowProgress.is_configured():
        found.append(integrations.KubeflowProgress())
    return found


def _entry_point_callbacks() -> list[Callback]:
    """The callbacks that installed packages bring."""
    brought: list[Callback] = []
    for entry in _find_entry_points(tuple(sys.path)):
        with isolate_rng():
            made = entry.load()()
        new = [made] if isinstance(made, Callback) else list(made)
        brought.extend(new)
        rank_zero_info(f"The entry point {entry.name!r} brings {len(new)} callback(s).")
    return brought


def _check_state_keys(callbacks: Sequence[Callback]) -> None:
    """Raises if the states of two callbacks would have one name in checkpoints."""
    seen: set[str] = set()
    for callback in callbacks:
        if callback.state_key in seen and callback.state_dict():
            what = f"Two callbacks of one kind have states: `{type(callback).__name__}` with the state key"
            fix = "Use different arguments, or override `state_key`."
            raise RuntimeError(f"{what} {callback.state_key!r}, so a checkpoint could not tell them apart. {fix}")
        seen.add(callback.state_key)


def as_callbacks(given: object, source: str) -> list[Callback]:
    """One callback, several or None as a new list; an error that names ``source`` for anything else."""
    if given is None:
        return []
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping, Callback))
    callbacks: list[Callback] = []
    for callback in given if isinstance(given, Iterable) and several else [given]:
        if not isinstance(callback, Callback):
            what = f"`{source}` received {describe_received(callback)}."
            raise MisconfigurationException(f"{what} Pass one or several instances of `Callback`.")
        callbacks.append(callback)
    return callbacks


def _is_missing(callbacks: list[Callback], kind: type[Callback], wanted: bool, switch: str) -> bool:
    """Is there no callback of a kind that is wanted? An error, which names the switch, if there is one that is not."""
    names = [type(callback).__name__ for callback in callbacks if isinstance(callback, kind)]
    if kind is ProgressBar and len(names) > 1:
        raise MisconfigurationException(f"`callbacks` holds several progress bars, keep one: {', '.join(names)}.")
    if names and not wanted:
        what = f"`Trainer({switch}=False)` was passed together with {', '.join(names)}."
        raise MisconfigurationException(f"{what} Remove one of the two.")
    return wanted and not names


def merge_callbacks(callbacks: Sequence[Callback], from_module: Callback | Sequence[Callback] | None) -> list[Callback]:
    """The trainer's callbacks with those of `configure_callbacks`, which replace the ones of the same class."""
    new = as_callbacks(from_module, "configure_callbacks()")
    if not new:
        return list(callbacks)
    kinds = {type(old) for old in callbacks if any(issubclass(type(n), type(old)) for n in new)} - {Callback}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        rank_zero_info(f"These callbacks of `configure_callbacks` take the place of the trainer's: {names}")
    return sort_callbacks([old for old in callbacks if type(old) not in kinds] + new)


def sort_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    """Finders first; checkpoints last, and before them the guard, which keeps a state all others have seen."""

    def place_of(callback: Callback) -> int:
        if callback.tunes:
            return 0
        return 3 if isinstance(callback, Checkpoint) else 2 if isinstance(callback, NonFiniteGuard) else 1

    return sorted(callbacks, key=place_of)


def assemble_loggers(settings: Settings) -> list[Logger]:
    """The loggers of `Trainer(logger=...)`; True stands for TensorBoard, or CSV files without it."""
    given: Any = settings.logger or []
    if given is True:
        given = _default_logger(settings.default_root_dir)
    several = isinstance(given, Iterable) and not isinstance(given, (Logger, str, bytes, Mapping, type))
    loggers = list(given) if several else [given]
    for logger in loggers:
        if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
            what = f"`Trainer(logger=...)` received {describe_received(logger)}."
            fix = "Pass True or False, or instances of loggers, such as `TensorBoardLogger(...)` or `CSVLogger(...)`."
            raise TypeError(f"{what} {fix}")
    return [DummyLogger()] if settings.fast_dev_run and loggers else loggers


def _default_logger(root_dir: str) -> Logger:
    """TensorBoard, or CSV files without it; a job of SLURM keeps its folder when it is started again."""
    version = os.environ.get("SLURM_JOB_ID") if os.environ.get("SLURM_NTASKS") else None
    if is_installed("tensorboard") or is_installed("tensorboardX"):
        return TensorBoardLogger(root_dir, version=version)
    fix = "Run `pip install tensorboard`, or choose with `Trainer(logger=CSVLogger(...))`."
    rank_zero_warn(f"Neither `tensorboard` nor `tensorboardX` is installed: logs go to CSV files. {fix}")
    return CSVLogger(root_dir, version=version)


def run_dir(logger: Logger) -> str | None:
    """Where a logger puts the files of this run."""
    folder: str | None = logger.log_dir if logger.log_dir_is_run_dir else logger.save_dir
    return folder


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


def assemble_profiler(given: object) -> Profiler:
    """A profiler from its short name, or the one that was given."""
    if given is None:
        return PassThroughProfiler()
    if isinstance(given, Profiler):
        return given
    if not isinstance(given, str) or given.lower() not in PROFILERS:
        what = f"`Trainer(profiler=...)` received {describe_received(given)}.{suggest_name(str(given), PROFILERS)}"
        fix = f"Use one of {list(PROFILERS)}, or a `Profiler`."
        raise MisconfigurationException(f"{what} {fix}")
    return PROFILERS[given.lower()]()
