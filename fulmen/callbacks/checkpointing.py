"""Callbacks that write checkpoints: `ModelCheckpoint` by plan, `OnExceptionCheckpoint` when a run breaks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.save_schedule import SaveSchedule
from fulmen.callbacks.saved_files import (
    SavedFiles,
    UnfinishedSaves,
    background_io,
    folder_of_run,
    prepare_folder,
    redirect_link,
    remove_or_warn,
    worst_score,
    write_link,
)
from fulmen.metrics.logbook import explain_missing_metric
from fulmen.storage.async_io import AsyncCheckpointIO
from fulmen.storage.filesystem import ensure_dir, get_filesystem, is_remote, local_path
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import alias_property
from fulmen.utilities.rank_zero import WarningCache, rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")  # `{name}` or `{name:format}` in a file name
_STATE_OF_FOLDER = ("best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path")


class Checkpoint(Callback):
    """Marks a callback that writes checkpoints: it runs after all others and is in `trainer.checkpoint_callbacks`."""

    monitors = True

    def folders(self, trainer: Trainer) -> list[str]:
        """Where it puts checkpoints, and `Trainer.fit(ckpt_path="auto")` looks for one."""
        return [os.fspath(getattr(self, "dirpath", None) or folder_of_run(trainer))]

    def find_handed_back(self) -> str | None:
        """A checkpoint that whoever started this process hands back, for `fit` to continue from."""
        return None


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
    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None, monitor: str | None = None,
        verbose: bool = False, save_last: bool | Literal["link"] | None = None, save_top_k: int = 1,
        save_on_exception: bool = False, save_weights_only: bool = False, mode: str = "min",
        auto_insert_metric_name: bool = True, every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None, every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None, enable_version_counter: bool = True,
        on_save_error: Literal["raise", "warn"] = "raise", async_save: bool = False,
    ) -> None:  # fmt: skip
        self.dirpath: str | None = None if dirpath is None else os.fspath(dirpath)
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
        self._enable_version_counter = enable_version_counter
        self.on_save_error = on_save_error
        problems = {
            f"`{mode=}` is not known. Use 'min' or 'max'.": mode not in ("min", "max"),
            f"`{on_save_error=}` is not known. Use 'raise' or 'warn'.": on_save_error not in ("raise", "warn"),
            f"`{save_top_k=}` must be -1 (keep all), 0 (none) or the number of files to keep.": save_top_k < -1,
            f"`{save_top_k=}` needs a `monitor`, the name of a logged value.": monitor is None and save_top_k > 1,
        }
        for message, wrong in problems.items():
            if wrong:
                raise MisconfigurationException(f"`ModelCheckpoint`: {message}")

        self._schedule = SaveSchedule(every_n_train_steps, every_n_epochs, train_time_interval, save_on_train_epoch_end)
        self._triggers = self._schedule.intervals()
        self.async_save = async_save
        self._found_folder: str | None = None  # in the place of a `dirpath` that was not given
        self._forget_run()

    every_n_epochs: int = alias_property(
        "_schedule.every_n_epochs", "A checkpoint is due after every that many epochs; 0 means never."
    )
    # Under these names libraries that come with subclasses of their own know the schedule.
    _every_n_train_steps: int = alias_property("_schedule.every_n_train_steps", "Steps between two files.")
    _every_n_epochs: int = alias_property("_schedule.every_n_epochs", "Epochs between two files.")
    _train_time_interval: timedelta | None = alias_property("_schedule.train_time_interval", "Time between two files.")
    _save_on_train_epoch_end: bool | None = alias_property(
        "_schedule.save_on_train_epoch_end", "Save after training epochs rather than validations?"
    )

    best_model_path: str = alias_property("_files.best_model_path", "The best file, or the newest without `monitor`.")
    best_model_score: Tensor | None = alias_property("_files.best_model_score", "The score of the best file.")
    best_k_models: dict[str, Tensor] = alias_property("_files.best_k_models", "The scores of the best files, by path.")
    kth_best_model_path: str = alias_property("_files.kth_best_model_path", "The worst of the best `save_top_k` files.")
    kth_value: Tensor = alias_property("_files.kth_value", "The score of the worst of the best `save_top_k` files.")
    current_score: Tensor | None = alias_property("_files.current_score", "The score of the last file that was kept.")
    last_model_path: str = alias_property("_files.last_model_path", "The file that `save_last` writes.")
    _last_checkpoint_saved: str = alias_property("_files.newest_path", "The file that was written last.")
    _last_global_step_saved: int = alias_property("_files.newest_step", "The step of the file that was written last.")

    def _forget_run(self) -> None:
        if self.dirpath == self._found_folder:
            self.dirpath = None
        self._files = SavedFiles(self.mode, worst_score(self.mode))
        self._unfinished = UnfinishedSaves()
        self._validated = self._deferred = False  # a save by step or time waits for the validation that follows
        self._superseded: list[str] = []  # what a run left here when it ended, until there is a newer file
        self._warnings = WarningCache()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, **self._triggers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        given = self.dirpath
        self.dirpath = trainer.strategy.broadcast(self.dirpath or folder_of_run(trainer))
        if given is None:
            self._found_folder = self.dirpath
        if self.async_save and background_io(trainer) is None:
            trainer.strategy.checkpoint_io = AsyncCheckpointIO(trainer.strategy.checkpoint_io, always=False)
        if self.save_last == "link" and is_remote(self.dirpath):
            what = f"`ModelCheckpoint(save_last='link')`: there are no links in `dirpath={self.dirpath}`."
            raise ValueError(f"{what} Use `save_last=True`, which writes a full copy.")
        self._superseded = []
        if stage == "fit":
            nested = bool(os.path.dirname(self.filename or ""))
            self._superseded = prepare_folder(trainer, self.dirpath, nested, writes=self.save_top_k != 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._schedule.start_clock()
        self._deferred = self._validated = False

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._unfinished.unannounced:
            self._unfinished.announce(trainer, self)
        schedule = self._schedule
        if not (schedule.every_n_train_steps or schedule.train_time_interval is not None):
            return
        if not trainer.optimization.stepped:
            return  # gradients wait for more batches
        if schedule.is_step_due(trainer) and not self._should_skip_saving_checkpoint(trainer):
            known = self.monitor in trainer.callback_metrics
            named = self.monitor not in (None, "epoch", "step")
            too_early = trainer.validation_schedule.is_due() if known else named
            self._deferred = self.monitor is not None and too_early
            if not self._deferred:
                self._save_due_checkpoint(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = not trainer.sanity_checking
        deferred = self._deferred and self.monitor in trainer.callback_metrics
        due = deferred or self._schedule.is_epoch_due(trainer, after_training=False)
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._deferred = False
            self._save_due_checkpoint(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What still waits after validation is settled here, if only by the complaint that `monitor` does not exist.
        deferred = self._deferred and (self._validated or not trainer.enable_validation)
        self._deferred = self._deferred and not deferred
        due = deferred or self._schedule.is_epoch_due(trainer, after_training=True)
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_due_checkpoint(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nothing_kept = not self._files.newest_path or self.save_top_k == 0
        if nothing_kept and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._unfinished.await_all(trainer, self._files, self.on_save_error)
        self._unfinished.announce(trainer, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unfinished.announce(trainer, self)
        if self.save_on_exception and not self._should_skip_saving_checkpoint(trainer):
            metrics = self._monitor_candidates(trainer)
            filepath = self._free_path(trainer, metrics)
            if not self._write_file(trainer, filepath, self._files.copy()):
                return
            self._save_last_checkpoint(trainer, metrics)
            rank_zero_info(f"{type(exception).__name__} was raised: {exception}. Saved a checkpoint to {filepath}")

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        """Is this no moment to write files: not training for real, or already saved at this step?"""
        return not _is_training(trainer) or self._files.newest_step == trainer.global_step

    def _save_due_checkpoint(self, trainer: Trainer) -> None:
        """A checkpoint is due: keep this one if it is worth it, and let ``last`` follow."""
        if self.save_top_k == 0:
            return
        metrics = self._monitor_candidates(trainer)
        if self._save_topk_checkpoint(trainer, metrics) is not False:
            self._save_last_checkpoint(trainer, metrics)

    # These have the names of the API, under which subclasses of others call and replace them.

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Any]:
        """The logged values with "epoch" and "step", which a user may have logged too."""
        logged = trainer.callback_metrics
        metrics: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step, **logged}
        return {**metrics, "epoch": int(metrics["epoch"]), "step": int(metrics["step"])}

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> bool | None:
        """Writes a file if it is among the newest or best. False if none was written, and ``last`` stays as it is."""
        self._unfinished.await_all(trainer, self._files, self.on_save_error)
        if self.monitor is not None:
            return self._keep_if_best(trainer, monitor_candidates)
        previous = self._files.best_model_path
        before = self._files.copy()
        filepath = self._files.best_model_path = self._free_path(trainer, monitor_candidates, replaces=previous)
        if not self._write_file(trainer, filepath, before):
            return False
        if self.save_top_k == 1:
            self._make_room(trainer, previous, filepath)
        return True

    def _keep_if_best(self, trainer: Trainer, metrics: dict[str, Any]) -> bool:
        if self.monitor not in metrics:
            asked_by = f"`{type(self).__name__}(monitor={self.monitor!r})`"
            message = explain_missing_metric(trainer.book, asked_by, str(self.monitor), metrics)
            if self._validated:
                raise MisconfigurationException(message)
            self._warnings.warn(message)  # validation may yet log it
            return False
        epoch = metrics.get("epoch", trainer.current_epoch)
        where = f"Epoch {epoch}, global step {metrics.get('step', trainer.global_step)}: {self.monitor!r}"
        # sync: the decision needs the number; kept on the CPU so that the stored state loads anywhere
        current = torch.as_tensor(metrics[self.monitor]).detach().cpu().clone()
        if not self.check_monitor_top_k(trainer, current):
            if self.verbose:
                rank_zero_info(f"{where} was not in top {self.save_top_k}")
            return False
        files = self._files
        before = files.copy()
        k = self.save_top_k if self.save_top_k > 0 else len(files.best_k_models) + 1
        # Removed from the list before the write, so that the file does not name what it replaces …
        displaced = files.displace_worst(k)  # more than one if the run that is resumed kept more
        filepath = self._free_path(trainer, metrics, replaces=displaced[0] if displaced else "")
        files.add_scored(filepath, current, k)
        if self.verbose:
            reached = f"{where} reached {current:.5f} (best {files.best_model_score:.5f})"
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
        return trainer.strategy.reduce_boolean_decision(self._files.is_among_best(current, self.save_top_k))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Writes ``last``, if that is wanted."""
        if not self.save_last:
            return
        filepath = self._free_path(
            trainer, monitor_candidates, replaces=self._files.last_model_path, template=self.CHECKPOINT_NAME_LAST
        )
        files = self._files
        before = files.copy()
        previous = files.last_model_path
        files.last_model_path = filepath
        io = background_io(trainer)
        write = None
        if self.save_last == "link" and files.newest_path not in ("", filepath):
            link: Callable[[], Any] = partial(write_link, files.newest_path, filepath)
            if io is not None:
                link = partial(io.after_writing, link, filepath, exists=True)
            write = partial(trainer.strategy.on_rank_zero, link, f"make the link {filepath!r}")
        elif io is not None and (self.async_save or io.always) and files.has_other_of(trainer.global_step, filepath):
            # What is being written anyway, instead of a copy that would have to wait for it.
            write = partial(io.write_again, filepath)
            self._unfinished.expect_announcement()
        if self._write_file(trainer, filepath, before, write):
            self._make_room(trainer, previous, filepath)

    def _write_file(
        self, trainer: Trainer, filepath: str, before: SavedFiles, write: Callable[[], Any] | None = None
    ) -> bool:
        """Writes one file. If that fails, all is noted as `before`, and `on_save_error` decides whether False comes."""
        self._files.begin_write()
        try:
            write() if write is not None else self._save_checkpoint(trainer, filepath)
        except Exception as error:
            if not self._files.is_writing():  # the file is there: a logger failed
                raise
            self._files.take_back(filepath, before, error, trainer.global_step, self.on_save_error)
            return False
        self._files.note_written(trainer.global_step)
        if background_io(trainer) is not None:
            self._unfinished.note(filepath, before)
        return True

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes one file and tells the loggers; every file comes through here."""
        io = background_io(trainer)
        with io.in_background() if io is not None and self.async_save else nullcontext():
            trainer.save_checkpoint(filepath, self.save_weights_only)
        while self._superseded and not self.save_weights_only:
            remove_or_warn(self._superseded.pop(), trainer.strategy.remove_checkpoint, self.on_save_error)
        self._files.note_written(trainer.global_step, filepath)
        self._unfinished.expect_announcement()
        self._unfinished.announce(trainer, self)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Removes one file; every removal comes through here."""
        trainer.strategy.remove_checkpoint(filepath)

    def _make_room(self, trainer: Trainer, previous: str, current: str) -> None:
        """Removes ``previous`` unless that is the new file, the one being resumed from, or outside of ``dirpath``."""
        paths = (previous, trainer.ckpt_path, self.dirpath)
        old, resumed, folder = (os.path.abspath(local_path(path or "")) for path in paths)
        if previous and previous != current and old != resumed and old.startswith(os.path.join(folder, "")):
            link = self._files.last_model_path
            if self.save_last == "link" and trainer.is_global_zero and os.path.islink(link):
                redirect_link(trainer, link, current)
            remove_or_warn(previous, partial(self._remove_checkpoint, trainer), self.on_save_error)

    def _free_path(
        self, trainer: Trainer, metrics: dict[str, Any], replaces: str = "", template: str | None = None
    ) -> str:
        """The next file, named after the metrics of the first rank; ``replaces`` is free: it is about to be removed."""
        share = trainer.strategy.broadcast
        version = self.STARTING_VERSION
        filepath, replaces = share((self.format_checkpoint_name(metrics, template), replaces))
        while self._enable_version_counter and filepath != replaces and self.file_exists(filepath, trainer):
            filepath = share(self.format_checkpoint_name(metrics, template, ver=version))
            version += 1
        return filepath

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Does the first rank see this file? All ranks must ask."""
        io = background_io(trainer)
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

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
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
        files = self._files
        return {
            "monitor": self.monitor, "best_model_path": files.best_model_path, "current_score": files.current_score,
            "dirpath": self.dirpath, "best_model_score": files.best_model_score,
            "best_k_models": dict(files.best_k_models), "kth_best_model_path": files.kth_best_model_path,
            "kth_value": files.kth_value, "last_model_path": files.last_model_path,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("dirpath", self.dirpath)
        if self.dirpath == before:
            of_folder = {name: state_dict[name] for name in _STATE_OF_FOLDER if name in state_dict}
            self._files = replace(self._files, **of_folder)
        else:
            what = f"`dirpath` is {self.dirpath!r} now, and was {before!r} in the checkpoint being loaded"
            rank_zero_warn(f"{what}: only `best_model_path` is taken over. Use the same `dirpath` to keep the others.")
        self._files.best_model_path = state_dict["best_model_path"]


class OnExceptionCheckpoint(Checkpoint):
    """Writes one checkpoint when a run breaks: the next ``fit`` with this callback resumes from it, and removes it."""

    FILE_EXTENSION: ClassVar[str] = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
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


def _is_training(trainer: Trainer) -> bool:
    """Is it training, and for real?"""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and not trainer.fast_dev_run
