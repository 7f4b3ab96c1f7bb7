"""Metrics, files and models to the platform of Lightning AI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal

import torch

from fulmen.loggers.logger import Params, ServiceLogger, as_numbers, flatten_params, plain_value
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn


class LitLogger(ServiceLogger):
    """Logs to an experiment of Lightning AI, through the client `litlogger` and the account it is logged in to.

    Args:
        root_dir: the folder under which files of all experiments are; by default "lightning_logs".
        name: of the experiment; by default made of the time.
        teamspace: where the experiment is shown; by default that of the account.
        metadata: texts by name that describe the experiment.
        store_step: keep the step of each number.
        log_model: True sends the checkpoints that exist when the run ends well, "all" each one when it is written.
        save_logs: send what the terminal shows, too.
        checkpoint_name: of the models that are sent; by default the name of their file.

    Raises:
        ModuleNotFoundError: `litlogger` is not installed.

    Examples:
        >>> logger = LitLogger(name="first try", metadata={"data": "mnist"})  # doctest: +SKIP
        >>> trainer = Trainer(logger=logger)  # doctest: +SKIP
    """

    def __init__(
        self, root_dir: str | os.PathLike[str] | None = None, name: str | None = None, teamspace: str | None = None,
        metadata: dict[str, str] | None = None, store_step: bool = True, log_model: Literal["all"] | bool = False,
        save_logs: bool = True, checkpoint_name: str | None = None,
    ) -> None:  # fmt: skip
        import_optional("litlogger", "by `LitLogger`")
        super().__init__(log_model=log_model)
        now = datetime.now(timezone.utc)
        self._root_dir = os.fspath(root_dir or "./lightning_logs")
        self._name = name or f"run-{now:%Y%m%d-%H%M%S}"
        self._version = now.isoformat(timespec="milliseconds")
        self._checkpoint_name = checkpoint_name
        described = {str(key): str(value) for key, value in (metadata or {}).items()}
        self._options: dict[str, Any] = {
            "name": self._name, "root_dir": self._root_dir, "teamspace": teamspace, "metadata": described,
            "store_step": store_step, "save_logs": save_logs,
        }  # fmt: skip

    def _open_experiment(self) -> Any:
        os.makedirs(self.log_dir, exist_ok=True)
        return import_optional("litlogger", "by `LitLogger`").init(**self._options)

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._name

    @property
    def version(self) -> str:
        """When the logger was made, in UTC."""
        return self._version

    @property
    def root_dir(self) -> str:
        """The folder of all experiments."""
        return self._root_dir

    @property
    def save_dir(self) -> str:
        """The folder under which checkpoints are put: the same."""
        return self._root_dir

    @property
    def log_dir(self) -> str:
        """The folder of this experiment."""
        return os.path.join(self._root_dir, self._name)

    @property
    def sub_dir(self) -> str | None:
        """There are no folders below `log_dir`."""
        return None

    @property
    def url(self) -> str:
        """Where the experiment is shown; it is started if need be."""
        return str(self.experiment.url)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Records numbers.

        Args:
            metrics: numbers by name.
            step: their position on the x axis.
        """
        self.experiment.log_metrics(as_numbers(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Params, metrics: dict[str, Any] | None = None) -> None:
        """Records hyper-parameters as texts, nested ones under names like "optimizer/lr".

        Args:
            params: a mapping or a namespace.
            metrics: numbers to record beside them.
        """
        self.log_metadata({name: str(plain_value(value)) for name, value in flatten_params(params).items()})
        if metrics:
            self.log_metrics(metrics)

    @rank_zero_only
    def log_metadata(self, params: Params) -> None:
        """Records texts that describe the experiment; those of the same names are replaced.

        Args:
            params: a mapping or a namespace.
        """
        described = {name: str(plain_value(value)) for name, value in flatten_params(params).items()}
        self._options["metadata"].update(described)
        self.experiment.log_metadata(described)

    @rank_zero_only
    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Warns: the platform shows no graphs."""
        rank_zero_warn("`LitLogger` cannot show the graph of a model. Use `TensorBoardLogger(log_graph=True)`.")

    @rank_zero_only
    def log_file(self, path: str | os.PathLike[str]) -> None:
        """Sends a file.

        Args:
            path: of the file.
        """
        self.experiment.log_file(os.fspath(path))

    @rank_zero_only
    def get_file(self, path: str | os.PathLike[str], verbose: bool = True) -> str:
        """Brings a file back that `log_file` sent.

        Args:
            path: where it was, and will be.
            verbose: print that it came.

        Returns:
            Its path.
        """
        return str(self.experiment.get_file(os.fspath(path), verbose=verbose))

    @rank_zero_only
    def log_model(
        self, model: torch.nn.Module, staging_dir: str | os.PathLike[str] | None = None, verbose: bool = False,
        version: str | None = None, metadata: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Sends a model as an object.

        Args:
            model: is pickled by the client.
            staging_dir: a folder for the file in between.
            verbose: show how far it is.
            version: of the model.
            metadata: describes it.
        """
        folder = None if staging_dir is None else os.fspath(staging_dir)
        self.experiment.log_model(model, staging_dir=folder, verbose=verbose, version=version, metadata=metadata)

    @rank_zero_only
    def log_model_artifact(
        self, path: str | os.PathLike[str], verbose: bool = False, version: str | None = None
    ) -> None:
        """Sends a file of weights, or a folder.

        Args:
            path: of the file or folder.
            verbose: show how far it is.
            version: of the model.
        """
        self.experiment.log_model_artifact(os.fspath(path), verbose=verbose, version=version)

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        name = self._checkpoint_name or os.path.splitext(os.path.basename(path))[0]
        self.log_model_artifact(path, version=f"{name}-best" if "best" in aliases else name)

    @rank_zero_only
    def save(self) -> None:
        """Nothing to do: the client sends what is waiting by itself."""

    @rank_zero_only
    def finalize(self, status: str | None = None) -> None:
        """The run is over: sends checkpoints and what is waiting, and closes the experiment.

        Args:
            status: "success", "failed" or "finished".
        """
        super().finalize(status or "success")
        if self._experiment is not None:
            self._experiment.finalize(status)
            self._experiment = None  # what is logged from now on continues it
