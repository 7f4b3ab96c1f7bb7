"""Metrics as TensorBoard event files."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

import torch

from fulmen.loggers.logger import FolderLogger, Params, as_dict, as_numbers, flatten_params, plain_value, write_yaml
from fulmen.storage.filesystem import get_filesystem, is_remote
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn


class TensorBoardLogger(FolderLogger):
    """Writes event files to ``<save_dir>/<name>/<version>/<sub_dir>``, and ``hparams.yaml`` beside them.

    Args:
        save_dir: ``~`` and environment variables are replaced.
        version: a number (the folder is ``version_<N>``) or the folder's name; None for the next free number.
        log_graph: draw the model, from its ``example_input_array``.
        default_hp_metric: the hyper-parameter table, which is not shown without a metric, gets ``hp_metric`` of -1.
        prefix: put before each name, joined with "-".
        kwargs: passed to ``SummaryWriter``.

    Examples:
        >>> logger = TensorBoardLogger("logs", name="trial", version=0)
        >>> logger.log_metrics({"loss": 0.5}, step=3)
        >>> logger.finalize("success")
        >>> logger.log_dir
        'logs/trial/version_0'
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str | None = "lightning_logs", version: int | str | None = None,
        log_graph: bool = False, default_hp_metric: bool = True, prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        # Whichever of the two packages that write event files is installed.
        self._import_wandb = "torch.utils.tensorboard" if is_installed("tensorboard") else "tensorboardX"
        if not is_installed("tensorboardX"):
            import_optional("tensorboard", "by `TensorBoardLogger`")
        super().__init__(save_dir, name, version, prefix)
        self._sub_dir = None if sub_dir is None else os.fspath(sub_dir)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._writer_kwargs = kwargs
        self._has_hp_metric = False
        self._found: dict[str, int] = {}  # event files of runs before this one, once they were looked for
        self.hparams: dict[str, Any] = {}

    def _open_experiment(self) -> Any:
        self._found = self._event_files()
        writer = importlib.import_module(self._import_wandb).SummaryWriter(log_dir=self.log_dir, **self._writer_kwargs)
        self._write_hparams()
        return writer

    def _write_hparams(self) -> None:
        """The file is there even if there is nothing in it."""
        path = os.path.join(self.log_dir, self.NAME_HPARAMS_FILE)
        if self.hparams or not get_filesystem(path).isfile(path):
            write_yaml(path, self.hparams)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a point to each curve; a dictionary as value becomes several curves in one chart.

        Args:
            metrics: numbers by name.
            step: their position on the x axis.

        Raises:
            ValueError: a value that is neither a number nor a dictionary of numbers.
        """
        writer = self.experiment
        self._has_hp_metric |= "hp_metric" in metrics
        for name, value in as_numbers(metrics, self._prefix).items():
            try:
                (writer.add_scalars if isinstance(value, dict) else writer.add_scalar)(name, value, step)
            except Exception as error:
                what = f"The metric `{name}` is a `{type(value).__name__}`, which TensorBoard cannot draw."
                raise ValueError(f"{what} Log a number, or a dictionary of numbers.") from error

    @rank_zero_only
    def log_hyperparams(
        self, params: Params, metrics: dict[str, Any] | float | None = None, step: int | None = None
    ) -> None:
        """Adds a row to the hyper-parameter table, with first values of its metrics.

        Args:
            params: a mapping, a namespace or a dataclass, nested or not.
            metrics: numbers by name; a number alone means ``hp_metric``.
            step: their position on the x axis.
        """
        params = as_dict(params)
        self.hparams.update(params)
        writer = self.experiment  # makes the folder
        self._write_hparams()
        if metrics is None and not self._default_hp_metric:
            return
        if metrics is None:
            metrics = {"hp_metric": -1}
            if not self._has_hp_metric and not self._found:  # what was logged stays, also when a later verb runs
                self.log_metrics(metrics, step)
        else:
            metrics = metrics if isinstance(metrics, dict) else {"hp_metric": metrics}
            self.log_metrics(metrics, step)
        plain = {k: "None" if v is None else plain_value(v) for k, v in flatten_params(params).items()}
        library = importlib.import_module(f"{self._import_wandb}.summary")
        for summary in library.hparams(plain, as_numbers(metrics, self._prefix)):
            writer._get_file_writer().add_summary(summary)

    @rank_zero_only
    def log_graph(self, model: Any, input_array: torch.Tensor | None = None) -> None:
        """Draws the model, if the logger was made with ``log_graph=True``.

        Args:
            model: whose layers are shown.
            input_array: an example of its input; by default its ``example_input_array``.
        """
        if not self._log_graph:
            return
        example = getattr(model, "example_input_array", None) if input_array is None else input_array
        if not isinstance(example, (torch.Tensor, tuple)):
            what = f"The graph of the model was not logged: the example input is a `{type(example).__name__}`."
            rank_zero_warn(f"{what} Set `self.example_input_array` to a tensor, or a tuple of the arguments.")
            return
        if hasattr(model, "on_before_batch_transfer"):  # the same hooks a batch goes through
            example = model.on_before_batch_transfer(example, 0)
            example = model.transfer_batch_to_device(example, model.device, 0)
            example = model.on_after_batch_transfer(example, 0)
        self.experiment.add_graph(model, example)

    @rank_zero_only
    def save(self) -> None:
        """Hands events to the file every few seconds."""
        if time.monotonic() - self._written_at >= self.WRITE_EVERY_SECONDS:
            self.experiment.flush()
            self._written_at = time.monotonic()

    def _event_files(self) -> dict[str, int]:
        """The sizes of the event files of this folder, where files can be cut."""
        folder = "" if is_remote(self.log_dir) or not os.path.isdir(self.log_dir) else self.log_dir
        names = [name for name in os.listdir(folder) if ".tfevents." in name] if folder else []
        return {name: os.path.getsize(os.path.join(folder, name)) for name in names}

    def state_dict(self) -> dict[str, int] | None:
        """The sizes of the event files; what waits in memory is written first."""
        if self._experiment is None:
            return None
        self._experiment.flush()
        return self._event_files()

    @rank_zero_only
    def resume_from(self, state: Any, step: int) -> None:
        """Files are cut where they ended then. Steps in younger ones, this run's and those before it, are hidden."""
        writer = self.experiment
        if not state or not any(name in self._found for name in state):
            return  # another folder
        for name, size in state.items():
            if self._found.get(name, 0) > size:
                os.truncate(os.path.join(self.log_dir, name), size)
        if any(name not in state for name in self._found):
            writer.close()
            self._writer_kwargs = {**self._writer_kwargs, "purge_step": step}
            self._experiment = None

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run is over: writes what is in memory, and closes the file.

        Args:
            status: "success", "failed" or "finished".
        """
        if self._experiment is not None:
            self.save()
            self._experiment.close()
