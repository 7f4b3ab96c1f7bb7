"""Callbacks that write checkpoints: `ModelCheckpoint` by plan, `OnExceptionCheckpoint` when a run breaks."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from fulmen.callbacks.callback import Callback
from fulmen.checkpoint.paths import FINISHED, PREEMPTED
from fulmen.metrics.logbook import explain_missing_metric
from fulmen.storage.async_io import AsyncCheckpointIO
from fulmen.storage.atomic import flush_folder, remove_leftovers, temporary_name
from fulmen.storage.filesystem import ensure_dir, get_filesystem, is_remote, local_path
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import alias_property
from fulmen.utilities.rank_zero import WarningCache, rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

_TRIGGERS = ("every_n_train_steps", "every_n_epochs", "train_time_interval")
_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # `{name}` or `{name:format}` in a file name
_STATE_OF_FOLDER = ("best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path")
_NOTED = ("current_score", "best_model_path", *_STATE_OF_FOLDER, "_last_checkpoint_saved", "_last_global_step_saved")
_STATE = ("monitor", "best_model_path", "current_score", "dirpath", *_STATE_OF_FOLDER)


class Checkpoint(Callback):
    """Marks a callback that writes checkpoints: it runs after all others and is in `trainer.checkpoint_callbacks`."""

    monitors = True

    def folders(self, trainer: Trainer) -> list[str]:
        """Where it puts checkpoints, and `Trainer.fit(ckpt_path="auto")` looks for one."""
        return [os.fspath(getattr(self, "dirpath", None) or folder_of_run(trainer))]


class ModelCheckpoint(Checkpoint):
    """Writes checkpoints during fit and keeps the best or the newest of them.

    **When.** After every ``every_n_epochs`` epochs (1 if nothing is given), ``every_n_train_steps`` optimizer steps, or
    ``train_time_interval``; one of the three. Epochs are looked at after training or after validation
    (``save_on_train_epoch_end``). A save by step or time waits for the validation that comes next, or that first gives
    ``monitor`` a value.

    **What.** Without ``monitor``: the newest (``save_top_k=1``), all (-1) or none (0). With it: the best ``save_top_k``. What has
    to make room is removed after the new file was written.

    Args:
        dirpath: folder or URL; by default ``checkpoints`` in the first logger's folder, or in ``default_root_dir``.
        filename: may contain logged names, ``"{epoch}-{val_loss:.2f}"``. A name with a slash makes a folder, unless
            ``auto_insert_metric_name=False``.
        monitor: name of the logged value that decides which files are best.
        verbose: say which files are written.
        save_last: also write ``last.ckpt`` whenever a checkpoint is written; ``"link"`` makes it a symbolic link.
        save_top_k: how many files are kept; -1 keeps all, 0 writes none.
        save_on_exception: write one more file when the run breaks.
        save_weights_only: leave out what only a resume needs: optimizers, schedulers, loops, callbacks.
        mode: whether the smallest (``"min"``) or the largest (``"max"``) value of ``monitor`` is best.
        auto_insert_metric_name: write ``{epoch}`` as ``epoch=3`` rather than ``3``.
        every_n_train_steps: optimizer steps between two files; 0 or None for never.
        train_time_interval: time between two files.
        every_n_epochs: epochs between two files; 0 for never.
        save_on_train_epoch_end: look after training epochs (True) or after validations (False); None means after training,
            unless validation runs inside of epochs, by the clock, or not in every epoch.
        enable_version_counter: add ``-v1``, ``-v2``, … instead of overwriting a file of the same name.
        on_save_error: whether the run ends (``"raise"``) or continues (``"warn"``) when a file cannot be written: the disk is
            full, the folder read-only or gone. Nothing is removed then, and no attribute names that file.
        async_save: continue to train while a file is written, as of the moment it was due; see `AsyncCheckpointIO`.

    Raises:
        MisconfigurationException: arguments that do not go together, or are out of range.

    Examples:
        >>> checkpoint = ModelCheckpoint(monitor="val_loss", filename="{epoch}-{val_loss:.2f}", save_top_k=3)
        >>> checkpoint.format_checkpoint_name({"epoch": 2, "val_loss": 0.1234})
        'epoch=2-val_loss=0.12.ckpt'
    """

    _changeable = "every_n_train_steps"
    best_model_path: str
    last_model_path: str
    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self, dirpath: str | os.PathLike | None = None, filename: str | None = None, monitor: str | None = None,
        verbose: bool = False, save_last: bool | Literal["link"] | None = None, save_top_k: int = 1,
        save_on_exception: bool = False, save_weights_only: bool = False, mode: str = "min",
        auto_insert_metric_name: bool = True, every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None, every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None, enable_version_counter: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise", async_save: bool = False,
    ) -> None:  # fmt: skip
        if every_n_train_steps is None and every_n_epochs is None and train_time_interval is None:
            every_n_epochs = 1
        self._every_n_train_steps = every_n_train_steps or 0
        self._every_n_epochs = every_n_epochs or 0
        self._train_time_interval = train_time_interval
        self._triggers = {name: getattr(self, f"_{name}") for name in _TRIGGERS}
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        if self.dirpath is not None and not is_remote(self.dirpath):
            self.dirpath = os.path.realpath(os.path.expanduser(local_path(self.dirpath)))
        self.filename = None if filename is None else os.fspath(filename)
        self.monitor = monitor
        self.mode = mode
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.auto_insert_metric_name = auto_insert_metric_name
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self._enable_version_counter = enable_version_counter
        self.on_save_error = on_save_error
        chosen = {name: value for name, value in self._triggers.items() if value}
        negative = self._every_n_train_steps < 0 or self._every_n_epochs < 0
        problems = {
            f"`{mode=}` is not known. Use 'min' or 'max'.": mode not in ("min", "max"),
            f"`{on_save_error=}` is not known. Use 'raise' or 'warn'.": on_save_error not in ("raise", "warn"),
            f"`{save_top_k=}` must be -1 (keep all), 0 (none) or the number of files to keep.": save_top_k < -1,
            f"`{save_top_k=}` needs a `monitor`, the name of a logged value.": monitor is None and save_top_k > 1,
            f"{chosen}: intervals must be 0 (never) or more.": negative,
            f"{chosen}: only one of them is possible. Add a second `ModelCheckpoint`.": len(chosen) > 1,
        }
        for message, wrong in problems.items():
            if wrong:
                raise MisconfigurationException(f"`ModelCheckpoint`: {message}")

        self.async_save = async_save
        self._found_folder: str | None = None  # in the place of a `dirpath` that was not given
        self._forget_run()

    every_n_epochs = alias_property(
        "_every_n_epochs", "A checkpoint is due after every that many epochs; 0 means never."
    )

    def _forget_run(self) -> None:
        if self.dirpath == self._found_folder:
            self.dirpath = None
        self.current_score: torch.Tensor | None = None
        self.best_model_score: torch.Tensor | None = None
        self.best_model_path = self.kth_best_model_path = self.last_model_path = ""
        self.best_k_models: dict[str, torch.Tensor] = {}
        self.kth_value = self._worst_score = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self._last_global_step_saved = 0  # nothing is worth saving before the first step
        self._last_checkpoint_saved = ""
        self._last_time_checked = 0.0
        self._validated = self._deferred = False  # a save by step or time waits for the validation that follows
        self._superseded: list[str] = []  # what a run left here when it ended, until there is a newer file
        self._warnings = WarningCache()
        self._unannounced = 0  # of how many files that are being written loggers do not know
        self._unconfirmed: tuple[str, dict[str, Any]] | None = None  # the first of them, and what was noted before it

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, **self._triggers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        given = self.dirpath
        self.dirpath = trainer.strategy.broadcast(self.dirpath or folder_of_run(trainer))
        if given is None:
            self._found_folder = self.dirpath
        if self.async_save and _background_io(trainer) is None:
            trainer.strategy.checkpoint_io = AsyncCheckpointIO(trainer.strategy.checkpoint_io, always=False)
        if self.save_last == "link" and is_remote(self.dirpath):
            what = f"`ModelCheckpoint(save_last='link')`: there are no links in `dirpath={self.dirpath}`."
            raise ValueError(f"{what} Use `save_last=True`, which writes a full copy.")
        if stage == "fit" and trainer.is_global_zero:
            names_make_folders = os.path.dirname(self.filename or "") and not is_remote(self.dirpath)
            folders = [folder for folder, *_ in os.walk(self.dirpath)] if names_make_folders else [self.dirpath]
            if left := [name for folder in folders for name in remove_leftovers(folder)]:
                rank_zero_info(f"Removed what an interrupted save had left in {self.dirpath}: {', '.join(left)}")
        files = get_filesystem(self.dirpath)
        ends = (os.path.join(self.dirpath, name) for name in (PREEMPTED, FINISHED) if stage == "fit")
        self._superseded = list(filter(files.exists, ends))
        writes = stage == "fit" and trainer.is_global_zero and self.save_top_k != 0
        resumes = Path(self.dirpath) in Path(os.path.abspath(trainer.ckpt_path or "")).parents  # files of its own
        if writes and not resumes and files.isdir(self.dirpath) and len(files.ls(self.dirpath)):
            rank_zero_warn(f"The checkpoint directory {self.dirpath} exists and is not empty.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_time_checked = time.monotonic()
        self._deferred = self._validated = False

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._unannounced:
            _tell_loggers(self, trainer)
        due = False
        interval = self._train_time_interval
        if not (self._every_n_train_steps or interval is not None) or not trainer.optimization.stepped:
            return  # nothing is due, or gradients wait for more batches
        if self._every_n_train_steps:
            due = trainer.global_step % self._every_n_train_steps == 0
        elif interval is not None:
            passed = time.monotonic() - self._last_time_checked
            if due := trainer.strategy.broadcast(passed >= interval.total_seconds()):  # clocks differ
                self._last_time_checked += passed
        if due and not self._nothing_to_save(trainer):
            known = self.monitor in trainer.callback_metrics
            too_early = (
                self.monitor not in (None, "epoch", "step") if not known else trainer.validation_schedule.is_due()
            )
            self._deferred = self.monitor is not None and too_early
            if not self._deferred:
                self._save_due_checkpoint(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking
        deferred = self._deferred and self.monitor in trainer.callback_metrics
        if (deferred or _epoch_due(self, trainer, after_training=False)) and not self._nothing_to_save(trainer):
            self._deferred = False
            self._save_due_checkpoint(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What still waits after validation is settled here, if only by the complaint that `monitor` does not exist.
        deferred = self._deferred and (self._validated or not trainer.enable_validation)
        self._deferred = self._deferred and not deferred
        if (deferred or _epoch_due(self, trainer, after_training=True)) and not self._nothing_to_save(trainer):
            self._save_due_checkpoint(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nothing_kept = not self._last_checkpoint_saved or self.save_top_k == 0
        if self.save_last and nothing_kept and not self._nothing_to_save(trainer):
            self._write_last(trainer, _metrics_of(trainer))
        _await_background_save(self, trainer)
        _tell_loggers(self, trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _tell_loggers(self, trainer)
        if self.save_on_exception and not self._nothing_to_save(trainer):
            metrics = _metrics_of(trainer)
            filepath = self._free_path(trainer, metrics)
            if not self._write_file(trainer, filepath, _file_record(self)):
                return
            if self.save_last:
                self._write_last(trainer, metrics)
            rank_zero_info(f"{type(exception).__name__} was raised: {exception}. Saved a checkpoint to {filepath}")

    def _nothing_to_save(self, trainer: Trainer) -> bool:
        """Is this no moment to write files: not training for real, or already saved at this step?"""
        return not _is_training(trainer) or self._last_global_step_saved == trainer.global_step

    def _save_due_checkpoint(self, trainer: Trainer) -> None:
        """A checkpoint is due: keep this one if it is worth it, and let ``last`` follow."""
        if self.save_top_k == 0:
            return
        _await_background_save(self, trainer)
        metrics = _metrics_of(trainer)
        if self.monitor is None:
            previous = self.best_model_path
            before = _file_record(self)
            self.best_model_path = self._free_path(trainer, metrics, replaces=previous)
            if not self._write_file(trainer, self.best_model_path, before):
                return
            if self.save_top_k == 1:
                self._make_room(trainer, previous, self.best_model_path)
        elif not self._keep_if_best(trainer, metrics):
            return
        if self.save_last:
            self._write_last(trainer, metrics)

    def _keep_if_best(self, trainer: Trainer, metrics: dict[str, Any]) -> bool:
        if self.monitor not in metrics:
            asked_by = f"`{type(self).__name__}(monitor={self.monitor!r})`"
            message = explain_missing_metric(trainer.book, asked_by, str(self.monitor), metrics)
            if self._validated:
                raise MisconfigurationException(message)
            self._warnings.warn(message)  # validation may yet log it
            return False
        where = f"Epoch {metrics['epoch']}, global step {metrics['step']}: {self.monitor!r}"
        # sync: the decision needs the number; kept on the CPU so that the stored state loads anywhere
        current = torch.as_tensor(metrics[self.monitor]).detach().cpu().clone()
        if not self.check_monitor_top_k(trainer, current):
            if self.verbose:
                rank_zero_info(f"{where} was not in top {self.save_top_k}")
            return False
        scores = self.best_k_models
        before = _file_record(self)
        k = self.save_top_k if self.save_top_k > 0 else len(scores) + 1
        best, worst = (min, max) if self.mode == "min" else (max, min)
        # Removed from the list before the write, so that the file does not name what it replaces …
        displaced = []  # more than one if the run that is resumed kept more
        while len(scores) >= k:
            displaced.append(worst(scores, key=scores.__getitem__))
            scores.pop(displaced[-1])
        filepath = self._free_path(trainer, metrics, replaces=displaced[0] if displaced else "")
        self.current_score = scores[filepath] = self._worst_score if current.isnan() else current
        self.best_model_path = best(scores, key=scores.__getitem__)
        self.best_model_score = scores[self.best_model_path]
        if len(scores) >= k:
            self.kth_best_model_path = worst(scores, key=scores.__getitem__)
            self.kth_value = scores[self.kth_best_model_path]
        if self.verbose:
            reached = f"{where} reached {current:.5f} (best {self.best_model_score:.5f})"
            rank_zero_info(f"{reached}, saving model to {filepath!r} as top {k}")
        if not self._write_file(trainer, filepath, before):
            return False
        for path in displaced:
            self._make_room(trainer, path, filepath)  # … and from the disk after it
        return True

    def check_monitor_top_k(self, trainer: Trainer, current: torch.Tensor | None = None) -> bool:
        """Does ``current`` belong to the best ``save_top_k``? Ranks must agree; equal values do not displace."""
        if current is None or self.save_top_k == -1:
            return current is not None
        better = len(self.best_k_models) < self.save_top_k
        scores = sorted(self.best_k_models.values(), reverse=self.mode == "max")[: self.save_top_k]
        if scores and not better:
            better = bool(current < scores[-1] if self.mode == "min" else current > scores[-1])
        return trainer.strategy.reduce_boolean_decision(better)

    def _write_last(self, trainer: Trainer, metrics: dict) -> None:
        filepath = self._free_path(trainer, metrics, replaces=self.last_model_path, template=self.CHECKPOINT_NAME_LAST)
        before = _file_record(self)
        previous = self.last_model_path
        self.last_model_path = filepath
        newest = self._last_checkpoint_saved
        io = _background_io(trainer)
        write = None
        if self.save_last == "link" and newest not in ("", filepath):
            link: Callable[[], Any] = partial(_write_link, newest, filepath)
            if io is not None:
                link = partial(io.after_writing, link, filepath, exists=True)
            write = partial(trainer.strategy.on_rank_zero, link, f"make the link {filepath!r}")
        elif self._last_global_step_saved == trainer.global_step and newest != filepath and _in_background(self, io):
            # What is being written anyway, instead of a copy that would have to wait for it.
            write = partial(io.write_again, filepath)  # type: ignore[union-attr]
            self._unannounced += 1
        if self._write_file(trainer, filepath, before, write):
            self._make_room(trainer, previous, filepath)

    def _write_file(
        self, trainer: Trainer, filepath: str, before: dict[str, Any], write: Callable[[], Any] | None = None
    ) -> bool:
        """Writes one file. If that fails, all is noted as `before`, and `on_save_error` decides whether False comes."""
        self._last_global_step_saved = -1
        try:
            write() if write is not None else self._save_checkpoint(trainer, filepath)
        except Exception as error:
            if self._last_global_step_saved != -1:  # the file is there: a logger failed
                raise
            _restore_record(self, trainer, filepath, before, error)
            return False
        self._last_global_step_saved = trainer.global_step
        if _background_io(trainer) is not None and self._unconfirmed is None:
            self._unconfirmed = filepath, before
        return True

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes one file and tells the loggers; every file comes through here."""
        io = _background_io(trainer)
        with io.in_background() if io is not None and self.async_save else nullcontext():
            trainer.save_checkpoint(filepath, self.save_weights_only)
        while self._superseded and not self.save_weights_only:
            _remove_or_warn(self, self._superseded.pop(), trainer.strategy.remove_checkpoint)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self._unannounced += 1
        _tell_loggers(self, trainer)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Removes one file; every removal comes through here."""
        trainer.strategy.remove_checkpoint(filepath)

    def _make_room(self, trainer: Trainer, previous: str, current: str) -> None:
        """Removes ``previous`` unless that is the new file, the one being resumed from, or outside of ``dirpath``."""
        paths = (previous, trainer.ckpt_path, self.dirpath)
        old, resumed, folder = (os.path.abspath(local_path(path or "")) for path in paths)
        if previous and previous != current and old != resumed and old.startswith(os.path.join(folder, "")):
            if self.save_last == "link" and trainer.is_global_zero and os.path.islink(self.last_model_path):
                link = partial(_write_link, current, self.last_model_path)
                io = _background_io(trainer)
                if io is not None and io.is_writing:  # at no moment to a file that is gone
                    io.after_writing(link, self.last_model_path, exists=True)
                elif os.path.exists(current):
                    link()
            _remove_or_warn(self, previous, partial(self._remove_checkpoint, trainer))

    def _free_path(self, trainer: Trainer, metrics: dict, replaces: str = "", template: str | None = None) -> str:
        """The next file, named after the metrics of the first rank; ``replaces`` is free: it is about to be removed."""
        share = trainer.strategy.broadcast
        version = self.STARTING_VERSION
        filepath, replaces = share((self.format_checkpoint_name(metrics, template), replaces))
        while self._enable_version_counter and filepath != replaces and self.file_exists(filepath, trainer):
            filepath = share(self.format_checkpoint_name(metrics, template, ver=version))
            version += 1
        return filepath

    def file_exists(self, filepath: str | os.PathLike, trainer: Trainer) -> bool:
        """Does the first rank see this file? All ranks must ask."""
        io = _background_io(trainer)
        soon = None if io is None else io.will_exist(filepath)
        exists = get_filesystem(filepath).exists(os.fspath(filepath)) if soon is None else soon
        return trainer.strategy.broadcast(exists)

    def format_checkpoint_name(self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None,
                               prefix: str | None = None) -> str:  # fmt: skip
        """The path of a checkpoint with these metrics; names that are not among them count as 0.

        >>> ModelCheckpoint(filename="{epoch}-{val_loss:.2f}").format_checkpoint_name({"epoch": 1, "val_loss": 0.126})
        'epoch=1-val_loss=0.13.ckpt'
        """

        def format_field(field: re.Match[str]) -> str:
            name = field[1]
            how = field[2] or ""
            value = metrics.get(name, 0)
            text = format(value.item() if isinstance(value, torch.Tensor) else value, how)
            return f"{name}{self.CHECKPOINT_EQUALS_CHAR}{text}" if self.auto_insert_metric_name else text

        template = filename or self.filename or f"{{epoch}}{self.CHECKPOINT_JOIN_CHAR}{{step}}"
        parts = [prefix, _FIELD.sub(format_field, template), None if ver is None else f"v{ver}"]
        name = self.CHECKPOINT_JOIN_CHAR.join(part for part in parts if part) + self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def to_yaml(self, filepath: str | os.PathLike | None = None) -> None:
        """Lists ``best_k_models`` in a YAML file, by default ``best_k_models.yaml`` in ``dirpath``."""
        path = os.path.join(self.dirpath or "", "best_k_models.yaml") if filepath is None else os.fspath(filepath)
        ensure_dir(os.path.dirname(path) or ".")
        with get_filesystem(path).open(path, "w") as file:
            for checkpoint, score in self.best_k_models.items():
                number = json.dumps(score.item()).replace("Infinity", ".inf").replace("NaN", ".nan")
                file.write(f"{json.dumps(checkpoint)}: {number}\n")
            if not self.best_k_models:
                file.write("{}\n")

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in _STATE}, "best_k_models": dict(self.best_k_models)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("dirpath", self.dirpath)
        if self.dirpath == before:
            for name in _STATE_OF_FOLDER:
                setattr(self, name, state_dict.get(name, getattr(self, name)))
        else:
            what = f"`dirpath` is {self.dirpath!r} now, and was {before!r} in the checkpoint being loaded"
            rank_zero_warn(f"{what}: only `best_model_path` is taken over. Use the same `dirpath` to keep the others.")
        self.best_model_path = state_dict["best_model_path"]


class OnExceptionCheckpoint(Checkpoint):
    """Writes one checkpoint when a run breaks: the next ``fit`` with this callback resumes from it, and removes it."""

    FILE_EXTENSION: ClassVar[str] = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike, filename: str = "on_exception") -> None:
        if not filename:
            raise ValueError("`OnExceptionCheckpoint(filename='')` names no file: the filename cannot be empty.")
        self.dirpath = dirpath
        self.filename = filename

    @property
    def ckpt_path(self) -> str:
        """The file that is written."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        # Before the first step, or without training, there is nothing that a file of an earlier break should make way for.
        if _is_training(trainer) and trainer.global_step and trainer.signals.saved != self.ckpt_path:
            trainer.save_checkpoint(self.ckpt_path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # a look at the broken run by `validate` is no end of it
            trainer.strategy.remove_checkpoint(self.ckpt_path)


def folder_of_run(trainer: Trainer) -> str:
    """The folder of the first logger's run, or one in `default_root_dir`."""
    if not trainer.loggers:
        return os.path.join(trainer.default_root_dir, "checkpoints")
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return os.path.join(root, str(logger.name), version, "checkpoints")


def _is_training(trainer: Trainer) -> bool:
    """Is it training, and for real?"""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run


def _background_io(trainer: Trainer) -> AsyncCheckpointIO | None:
    """Who writes while training goes on, if anybody does."""
    io = trainer.strategy.checkpoint_io
    return io if isinstance(io, AsyncCheckpointIO) else None


def _in_background(callback: ModelCheckpoint, io: AsyncCheckpointIO | None) -> bool:
    return io is not None and (callback.async_save or io.always)


def _file_record(callback: ModelCheckpoint) -> dict[str, Any]:
    """What this callback says about its files."""
    return {**{name: getattr(callback, name) for name in _NOTED}, "best_k_models": dict(callback.best_k_models)}


def _restore_record(
    callback: ModelCheckpoint, trainer: Trainer, filepath: str, before: dict[str, Any], error: Exception
) -> None:
    vars(callback).update(before)
    if callback.on_save_error == "raise" or not isinstance(error, OSError):
        raise error
    what = f"Step {trainer.global_step}: {filepath!r} was not written: {type(error).__name__}: {error}."
    newest = before["_last_checkpoint_saved"] or "none, so far"
    rank_zero_warn(f"{what} Training continues (`on_save_error='warn'`). The newest checkpoint: {newest}.")


def _remove_or_warn(callback: ModelCheckpoint, path: str, remove: Callable[[str], Any]) -> None:
    try:
        remove(path)
    except OSError as error:
        if callback.on_save_error == "raise":
            raise
        rank_zero_warn(f"The checkpoint {path!r} could not be removed: {error}. Remove it by hand.")


def _await_background_save(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Waits for what is written in the background; that it failed is found out here."""
    if callback._unconfirmed is None:
        return
    (filepath, before), callback._unconfirmed = callback._unconfirmed, None
    try:
        trainer.strategy.finish_saving()
    except Exception as error:
        _restore_record(callback, trainer, filepath, before, error)


def _tell_loggers(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Of the files that are there by now."""
    io = _background_io(trainer)
    if io is not None and io.is_writing:
        return
    files = callback._unannounced if io is None or not io.failed else 0
    callback._unannounced = 0
    for logger in [*trainer.loggers] * files if trainer.is_global_zero else ():
        logger.after_save_checkpoint(callback)


def _epoch_due(callback: ModelCheckpoint, trainer: Trainer, after_training: bool) -> bool:
    """Is this epoch's turn, and is it looked at here: after training or after validation?"""
    every = callback._every_n_epochs
    chosen = callback._save_on_train_epoch_end
    if every < 1 or (trainer.current_epoch + 1) % every:
        return False
    if chosen is None:
        once_per_epoch = trainer.val_check_time_s is None and trainer.check_val_every_n_epoch == 1
        chosen = once_per_epoch and (trainer.val_check_interval == 1.0 or not sum(trainer.num_val_batches))
    return bool(chosen) is after_training


def _metrics_of(trainer: Trainer) -> dict[str, Any]:
    """The logged values with "epoch" and "step", which a user may have logged too."""
    metrics: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step, **trainer.callback_metrics}
    return {**metrics, "epoch": int(metrics["epoch"]), "step": int(metrics["step"])}


def _write_link(target: str, link: str) -> None:
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
