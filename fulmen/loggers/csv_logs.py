"""Metrics as rows of a CSV file."""

from __future__ import annotations

import csv
import io
import os
import time
from typing import Any

from fulmen.loggers.logger import FolderLogger, Params, as_dict, as_numbers, write_yaml
from fulmen.storage.filesystem import atomic_write, ensure_dir, get_filesystem
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn


class ExperimentWriter:
    """The rows of one run: collected in memory, appended to ``metrics.csv`` by `save`.

    The header is the sorted union of all names seen. A new name rewrites the file once (the old one stays until the
    new one is complete); otherwise rows are only appended. Numbers are written so that they read back exactly.
    """

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = "hparams.yaml"

    def __init__(self, log_dir: str) -> None:
        self.log_dir, self.metrics_file_path = log_dir, os.path.join(log_dir, self.NAME_METRICS_FILE)
        self.metrics: list[dict[str, Any]] = []  # not yet in the file
        self.metrics_keys: list[str] = []  # the header of the file
        self.hparams: dict[str, Any] = {}
        self.num_rows = 0
        self.last: dict[str, str] = {}  # the newest row as the file has it
        self._files = get_filesystem(log_dir)
        # Of another run, unless this one resumes it.
        self._foreign = self._files.isdir(log_dir) and bool(self._files.ls(log_dir, detail=False))
        ensure_dir(log_dir)

    def _rewrite_file(self) -> None:
        """The first row of a run that is no other's."""
        self._foreign = False
        what = (
            f"The logging folder `{self.log_dir}` exists and is not empty: its `{self.NAME_METRICS_FILE}` is removed."
        )
        rank_zero_warn(f"{what} Use `version=None` for the next free number, to keep the old one.")
        if self._files.isfile(self.metrics_file_path):
            self._files.rm(self.metrics_file_path)

    def state_dict(self) -> dict[str, Any]:
        """How many rows are in the file, and the last of them."""
        return {"rows": self.num_rows - len(self.metrics), "last": self.last}

    def resume_from(self, state: dict[str, Any]) -> None:
        """Keeps so many rows of the file, if the last of them is the one that was written then.

        Args:
            state: what `state_dict` returned.
        """
        count = state["rows"]
        last = state["last"]
        if not (self._foreign and count and self._files.isfile(self.metrics_file_path)):
            return
        with self._files.open(self.metrics_file_path, "r", newline="") as file:
            rows = list(csv.DictReader(file))
        if len(rows) < count or {name: text for name, text in rows[count - 1].items() if text} != last:
            return  # the file of another run
        self._foreign = False
        self.num_rows = count
        self.last = last
        self.metrics_keys = list(rows[0])
        if len(rows) > count:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows[:count])
            atomic_write(self.metrics_file_path, text.getvalue().encode())

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Adds hyper-parameters to ``hparams.yaml``.

        Args:
            params: values by name.
        """
        self.hparams.update(params)
        write_yaml(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), self.hparams)

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Adds a row; without a step it is numbered by its place in the file.

        Args:
            metrics_dict: numbers by name.
            step: their position on the x axis.
        """
        if self._foreign:
            self._rewrite_file()
        self.metrics.append({**as_numbers(metrics_dict), "step": self.num_rows if step is None else step})
        self.num_rows += 1

    def save(self) -> None:
        """Writes now the rows that are only in memory."""
        if not self.metrics:
            return
        names = sorted(set(self.metrics_keys).union(*self.metrics))
        self.last = {name: str(value) for name, value in self.metrics[-1].items() if value is not None}
        text = io.StringIO(newline="")  # written at once, so that a process that dies meanwhile leaves whole lines
        writer = csv.DictWriter(text, names)
        there = self._files.isfile(self.metrics_file_path)  # another run with the same `version` may have removed it
        if grows := names != self.metrics_keys or not there:
            ensure_dir(self.log_dir)
            writer.writeheader()
            if self.metrics_keys and there:
                with self._files.open(self.metrics_file_path, "r", newline="") as file:
                    writer.writerows(csv.DictReader(file))
        writer.writerows(self.metrics)
        if grows:
            atomic_write(self.metrics_file_path, text.getvalue().encode())
        else:
            with self._files.open(self.metrics_file_path, "a", newline="") as file:
                file.write(text.getvalue())
        self.metrics_keys = names
        self.metrics = []


class CSVLogger(FolderLogger):
    """Writes ``<save_dir>/<name>/<version>/metrics.csv``, a row per call, and ``hparams.yaml`` beside it.

    Args:
        version: a number (the folder is ``version_<N>``) or the folder's name; None for the next free number.
        prefix: put before each name, joined with "-".
        flush_logs_every_n_steps: how many rows, or steps, may wait in memory, where a process that is killed loses
            them. Rows wait no longer than five seconds while more keep coming, and the end of a run writes them all.

    Examples:
        >>> logger = CSVLogger("logs", name="trial", version=0)
        >>> logger.log_metrics({"loss": 0.5}, step=3)
        >>> logger.save()
        >>> print(open("logs/trial/version_0/metrics.csv").read())
        loss,step
        0.5,3
        <BLANKLINE>
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str | None = "lightning_logs", version: int | str | None = None,
        prefix: str = "", flush_logs_every_n_steps: int = 100,
    ) -> None:  # fmt: skip
        if flush_logs_every_n_steps < 1:
            raise ValueError(f"`{flush_logs_every_n_steps=}` must be at least 1.")
        super().__init__(save_dir, name, version, prefix)
        self._flush_logs_every_n_steps = flush_logs_every_n_steps
        self._rows_at_last_save = -1

    def _open_experiment(self) -> ExperimentWriter:
        return ExperimentWriter(self.log_dir)

    @rank_zero_only
    def log_hyperparams(self, params: Params | None = None) -> None:
        """Adds hyper-parameters to ``hparams.yaml``.

        Args:
            params: a mapping, a namespace or a dataclass, nested or not.
        """
        self.experiment.log_hparams(as_dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds a row to ``metrics.csv``; it is in memory until the next write is due.

        Args:
            metrics: numbers by name.
            step: their position on the x axis; by default the number of the row.
        """
        writer = self.experiment
        limit = self._flush_logs_every_n_steps
        writer.log_metrics(as_numbers(metrics, self._prefix) if self._prefix else metrics, step)
        if len(writer.metrics) >= limit or (step is not None and (step + 1) % limit == 0):
            self._save_now()

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows if the last writing was long ago, or if nothing was logged since the last call."""
        writer = self.experiment
        asked_again = self._rows_at_last_save == writer.num_rows
        self._rows_at_last_save = writer.num_rows
        if asked_again or time.monotonic() - self._written_at >= self.WRITE_EVERY_SECONDS:
            writer.save()
            self._written_at = time.monotonic()

    def _save_now(self) -> None:
        """Through `save`, which subclasses override."""
        self._rows_at_last_save = self.experiment.num_rows
        self.save()

    def state_dict(self) -> dict[str, Any] | None:
        """How many rows are in the file; those in memory are written first."""
        if self._experiment is None:
            return None
        self._save_now()
        state: dict[str, Any] = self._experiment.state_dict()
        return state

    @rank_zero_only
    def resume_from(self, state: Any, step: int) -> None:
        """Rows behind those of the checkpoint are removed from the file of that run, and the next ones follow them."""
        self.experiment.resume_from(state)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The run is over: writes what is in memory.

        Args:
            status: "success", "failed" or "finished".
        """
        if self._experiment is not None:  # a logger that was never used leaves no folder behind
            self._save_now()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # the rows that wait travel along
