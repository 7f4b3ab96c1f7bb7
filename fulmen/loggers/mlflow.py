"""Metrics and models to MLflow."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from fulmen.loggers.logger import Params, ServiceLogger, as_numbers, flatten_params, plain_value
from fulmen.utilities.filesystem import local_path
from fulmen.utilities.optional import require
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn

MAX_PARAM_LENGTH, PARAMS_PER_CALL = 250, 100


class MLFlowLogger(ServiceLogger):
    """Logs to a run of an MLflow experiment, in a folder or on a server.

    Args:
        tracking_uri: the server, or ``file:<folder>``; defaults to ``MLFLOW_TRACKING_URI``, then ``file:<save_dir>``.
        run_id: a run to continue; ``experiment_name`` is then ignored.
        synchronous: wait for the server at each call; needs mlflow 2.8.
    """

    save_dir: str | None = None

    def __init__(
        self, experiment_name: str = "lightning_logs", run_name: str | None = None, tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None, save_dir: str | None = "./mlruns", log_model: Literal["all"] | bool = False,
        prefix: str = "", artifact_location: str | None = None, run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        require("mlflow", "by `MLFlowLogger`", minimum="" if synchronous is None else ">=2.8.0")
        super().__init__(prefix, log_model)
        self._experiment_name, self._run_name, self._run_id = experiment_name, run_name, run_id
        self._experiment_id: str | None = None
        self._tracking_uri = tracking_uri or os.getenv("MLFLOW_TRACKING_URI") or f"file:{save_dir}"
        local = self._tracking_uri.startswith("file:")
        self.save_dir = local_path(self._tracking_uri).removeprefix("file:") if local else None
        self._artifact_location, self.tags = artifact_location, tags
        self._call_options = {} if synchronous is None else {"synchronous": synchronous}

    def _open(self) -> Any:
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        client = MlflowClient(self._tracking_uri)
        if self._run_id is not None:
            self._experiment_id = client.get_run(self._run_id).info.experiment_id
            return client
        found = client.get_experiment_by_name(self._experiment_name)
        known = found.experiment_id if found is not None and found.lifecycle_stage != "deleted" else None
        self._experiment_id = known or client.create_experiment(self._experiment_name, self._artifact_location)
        tags = {**(self.tags or {}), **({"mlflow.runName": self._run_name} if self._run_name else {})}
        self._run_id = client.create_run(self._experiment_id, tags=resolve_tags(tags)).info.run_id
        return client

    # Both are known once the experiment is open.
    run_id = version = property(lambda self: self.experiment and self._run_id)
    experiment_id = name = property(lambda self: self.experiment and self._experiment_id)

    @rank_zero_only
    def log_hyperparams(self, params: Params) -> None:
        """Records parameters, nested names joined with "/"; MLflow takes at most 250 characters of a value."""
        from mlflow.entities import Param

        flat = flatten_params(params)
        rest = [Param(name, str(plain_value(value))[:MAX_PARAM_LENGTH]) for name, value in flat.items()]
        while rest:
            batch, rest = rest[:PARAMS_PER_CALL], rest[PARAMS_PER_CALL:]
            self.experiment.log_batch(run_id=self.run_id, params=batch, **self._call_options)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Records numbers; text is left out with a warning, and so are characters that MLflow refuses in names."""
        from mlflow.entities import Metric

        now, batch = int(time.time() * 1000), []
        for name, value in as_numbers(metrics, self._prefix).items():
            if isinstance(value, str):
                rank_zero_warn(f"The metric `{name}` has the text {value!r} as value, which MLflow cannot record.")
                continue
            allowed = re.sub(r"[^\w/. -]", "", name, flags=re.ASCII)
            if allowed != name:
                what = f"MLflow allows letters, digits and `_/. -` in names: `{name}` is recorded as `{allowed}`."
                rank_zero_warn(what, category=RuntimeWarning)
            batch.append(Metric(key=allowed, value=value, timestamp=now, step=step or 0))
        self.experiment.log_batch(run_id=self.run_id, metrics=batch, **self._call_options)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        super().finalize(status)
        outcome = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}.get(status)
        if self._experiment is not None and outcome:
            self.experiment.set_terminated(self.run_id, outcome)

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        folder = f"model/checkpoints/{Path(path).stem}"
        self.experiment.log_artifact(self.run_id, path, folder)
        self.experiment.log_dict(self.run_id, {"aliases": aliases, **about}, f"{folder}/metadata.yaml")
