"""The loggers of Fabric: those of the Trainer, which write at once, into the folder ``<root_dir>/<name>/<version>``."""

from __future__ import annotations

import os
from typing import Any

from fulmen.loggers import csv_logs, tensorboard
from fulmen.loggers.logger import FabricLogger, Params
from fulmen.loggers.logger import rank_zero_experiment as rank_zero_experiment
from fulmen.utilities.rank_zero import rank_zero_only

Logger = FabricLogger  # its name in Fabric


class CSVLogger(csv_logs.CSVLogger):
    """Writes ``<root_dir>/<name>/<version>/metrics.csv``, a row per call.

    Arguments:
        root_dir: the folder of all runs.
        name: a level of folders below; None or an empty text leaves it out.
        version: a number (the folder is ``version_<N>``) or the folder's name; None for the next free number.
        prefix: put before each name, joined with "-".
        flush_logs_every_n_steps: how many rows, or steps, may wait in memory until `save` or `finalize`.

    >>> logger = CSVLogger("logs", name="digits")
    >>> logger.log_metrics({"loss": 0.5}, step=0)
    >>> logger.save()
    >>> print(open(os.path.join(logger.log_dir, "metrics.csv")).read())
    loss,step
    0.5,0
    <BLANKLINE>
    """

    def __init__(
        self, root_dir: str | os.PathLike[str], name: str | None = "lightning_logs", version: int | str | None = None,
        prefix: str = "", flush_logs_every_n_steps: int = 100,
    ) -> None:  # fmt: skip
        super().__init__(root_dir, name, version, prefix, flush_logs_every_n_steps)

    root_dir = property(lambda self: self._save_dir, doc="The folder of all runs.")
    versions_dir = property(lambda self: os.path.join(self.root_dir, self.name), doc="The folder of all versions.")

    @rank_zero_only
    def log_hyperparams(self, params: Params | None = None) -> None:
        """Refuses: the file has columns of numbers.

        Raises:
            NotImplementedError: always.
        """
        what = "`fulmen.fabric.loggers.CSVLogger` does not log hyper-parameters."
        raise NotImplementedError(f"{what} Use `TensorBoardLogger`, or write them to a file.")

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that are only in memory."""
        self.experiment.save()


class TensorBoardLogger(tensorboard.TensorBoardLogger):
    """Writes event files to ``<root_dir>/<name>/<version>/<sub_dir>``.

    Arguments:
        root_dir: the folder of all runs; ``~`` and environment variables are replaced.
        name: a level of folders below; None or an empty text leaves it out.
        version: a number (the folder is ``version_<N>``) or the folder's name; None for the next free number.
        default_hp_metric: the hyper-parameter table, which is not shown without a metric, gets ``hp_metric`` of -1.
        prefix: put before each name, joined with "-".
        sub_dir: one more level below the version.
        kwargs: passed to ``SummaryWriter``.
    """

    def __init__(
        self, root_dir: str | os.PathLike[str], name: str | None = "lightning_logs", version: int | str | None = None,
        default_hp_metric: bool = True, prefix: str = "", sub_dir: str | os.PathLike[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(root_dir, name, version, True, default_hp_metric, prefix, sub_dir, **kwargs)

    root_dir = property(lambda self: self._save_dir, doc="The folder of all runs.")
    versions_dir = property(lambda self: os.path.join(self.root_dir, self.name), doc="The folder of all versions.")

    def _write_hparams(self) -> None:
        """Hyper-parameters are in the event file alone."""

    @rank_zero_only
    def save(self) -> None:
        """Hands what was logged to the file."""
        self.experiment.flush()
