"""Metrics to Comet."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from fulmen.loggers.logger import Params, ServiceLogger, as_numbers, flatten_params, plain_params
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import log, rank_zero_only

if TYPE_CHECKING:
    from torch import Tensor, nn


class CometLogger(ServiceLogger):
    """Logs to an experiment of Comet, online or into a file for a later upload.

    Args:
        api_key: defaults to what the Comet configuration or the environment variable ``COMET_API_KEY`` says.
        experiment_key: the experiment to continue; makes it the `version`.
        mode: "get_or_create" (default), "get" to continue only, "create" for a new one in any case.
        online: False writes a file instead of sending.
        kwargs: passed to ``comet_ml.ExperimentConfig``, such as ``name``, ``tags`` or ``offline_directory``.

    Examples:
        >>> logger = CometLogger(project="trials", name="first")  # doctest: +SKIP
    """

    name = property(lambda self: self._project, doc="The project.")
    save_dir = property(lambda self: self._save_dir, doc="The folder of files for a later upload.")

    def __init__(
        self, *, api_key: str | None = None, workspace: str | None = None, project: str | None = None,
        experiment_key: str | None = None, mode: Literal["get_or_create", "get", "create"] | None = None,
        online: bool | None = None, prefix: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        import_optional("comet_ml", "by `CometLogger`", minimum=">=3.44.4")
        super().__init__(prefix or "")
        renamed = {"project_name": "project", "experiment_name": "name", "save_dir": "offline_directory"}
        for old, new in renamed.items():
            if old in kwargs:
                log.warning(f"`CometLogger({old}=…)` is now called `{new}`.")
                kwargs[new] = os.fspath(kwargs.pop(old))
        if "offline" in kwargs:
            log.warning("`CometLogger(offline=…)` is now the opposite of `online`.")
            online = not kwargs.pop("offline")
        self._project = kwargs.pop("project", project)
        self._save_dir = kwargs.get("offline_directory")
        self._config_options = kwargs
        account = {"api_key": api_key, "workspace": workspace, "project": self._project}
        self._start_options = {**account, "experiment_key": experiment_key, "mode": mode, "online": online}

    def _open_experiment(self) -> Any:
        import comet_ml

        config = comet_ml.ExperimentConfig(**self._config_options)
        options = {key: value for key, value in self._start_options.items() if value is not None}
        experiment = comet_ml.start(experiment_config=config, **options)
        self._start_options.update(experiment_key=experiment.get_key(), mode=None)  # what a copy continues
        return experiment

    @property
    def version(self) -> str | None:
        """The key of the experiment; None until there is one."""
        key: str | None = self._start_options["experiment_key"]
        return key

    @rank_zero_only
    def log_hyperparams(self, params: Params) -> None:
        """Records parameters, also flattened, so that the web page can filter by each.

        Args:
            params: a mapping, a namespace or a dataclass, nested or not.
        """
        plain = plain_params(params)
        self.experiment.log_parameters({**plain, **flatten_params(plain)})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Records numbers; Comet has an axis of its own for the epoch, so that one is passed apart.

        Args:
            metrics: numbers by name.
            step: their position on the x axis.
        """
        others = {name: value for name, value in metrics.items() if name != "epoch"}
        self.experiment.log_metrics(as_numbers(others, self._prefix), step=step, epoch=metrics.get("epoch"))

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Records the text of the model.

        Args:
            model: whose layers are shown.
            input_array: not needed.
        """
        self.experiment.set_model_graph(model)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sends what is waiting. The experiment stays open, so that more can be logged after training.

        Args:
            status: "success", "failed" or "finished".
        """
        if self._experiment is not None:
            self._experiment.flush()
