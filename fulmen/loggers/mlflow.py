"""Metrics and models to MLflow."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from fulmen.loggers.logger import Params, ServiceLogger, as_numbers, flatten_params, plain_value
from fulmen.storage.filesystem import local_path
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn

MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 250
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000


class MLFlowLogger(ServiceLogger):
    """Logs to a run of an MLflow experiment, in a folder or on a server.

    Args:
        tracking_uri: the server, ``sqlite:///<file>`` or ``file:<folder>``; defaults to ``MLFLOW_TRACKING_URI``, then to
            ``file:<save_dir>``, or ``sqlite:///<save_dir>/mlflow.db`` for clients that no longer write folders.
        log_model: True sends the checkpoints that exist when the run ends, "all" each one when it is written; each in a
            folder of its own, with ``metadata.yaml`` and ``aliases.txt``.
        run_id: a run to continue; ``experiment_name`` is then ignored.
        synchronous: wait for the server at each call; needs mlflow 2.8.

    Examples:
        >>> logger = MLFlowLogger("trials", tracking_uri="sqlite:///mlflow.db")  # doctest: +SKIP
    """

    save_dir = property(lambda self: self._save_dir, doc="The folder of the runs, if they are kept in one.")

    _callback_key = "Checkpoint"

    def __init__(
        self, experiment_name: str = "lightning_logs", run_name: str | None = None, tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None, save_dir: str | None = "./mlruns", log_model: Literal["all"] | bool = False,
        prefix: str = "", artifact_location: str | None = None, run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        import_optional("mlflow", "by `MLFlowLogger`", minimum="" if synchronous is None else ">=2.8.0")
        super().__init__(prefix, log_model)
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._run_id = run_id
        self._experiment_id: str | None = None
        self._artifact_location = artifact_location
        self.tags = tags
        self._save_dir: str | None
        chosen = tracking_uri or os.getenv("MLFLOW_TRACKING_URI")
        folder = save_dir or "./mlruns"
        if chosen is None and not _writes_folders():
            chosen = f"sqlite:///{os.path.join(folder, 'mlflow.db')}"
            self._save_dir = folder
            self._artifact_location = artifact_location or os.path.abspath(os.path.join(folder, experiment_name))
        else:
            chosen = chosen or f"file:{folder}"
            self._save_dir = local_path(chosen).removeprefix("file:") if chosen.startswith("file:") else None
        self._tracking_uri = chosen
        self._call_options = {} if synchronous is None else {"synchronous": synchronous}

    def _open_experiment(self) -> Any:
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        if self._tracking_uri.startswith("sqlite:") and self._save_dir:
            os.makedirs(self._save_dir, exist_ok=True)
        client = MlflowClient(self._tracking_uri)
        if self._run_id is not None:
            self._experiment_id = client.get_run(self._run_id).info.experiment_id
            return client
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage == "deleted":
            what = f"The MLflow experiment {self._experiment_name!r} was deleted, and MLflow keeps its name."
            restore = f"Run `mlflow experiments restore --experiment-id {found.experiment_id}`"
            raise MisconfigurationException(f"{what} {restore}, or pass another `experiment_name`.")
        known = None if found is None else found.experiment_id
        self._experiment_id = known or client.create_experiment(self._experiment_name, self._artifact_location)
        tags = {**(self.tags or {}), **({"mlflow.runName": self._run_name} if self._run_name else {})}
        self._run_id = client.create_run(self._experiment_id, tags=resolve_tags(tags)).info.run_id
        return client

    # Both are known once the experiment is open.
    run_id = version = property(lambda self: self.experiment and self._run_id)
    experiment_id = name = property(lambda self: self.experiment and self._experiment_id)

    @rank_zero_only
    def log_hyperparams(self, params: Params) -> None:
        """Records parameters, nested names joined with "/"; MLflow takes at most 250 characters of a value.

        It keeps the first value of each: others are left out, with a warning.
        """
        from mlflow.entities import Param

        known = dict(self.experiment.get_run(self.run_id).data.params)
        new = []
        kept = []
        for name, value in flatten_params(params).items():
            name = _allowed_name(name)
            text = str(plain_value(value))[:MAX_PARAM_LENGTH]
            if name not in known and not self._is_folder(name, known):
                known[name] = text
                new.append(Param(name, text))
            elif known.get(name) != text:
                kept.append(f"{name}={text} (kept: {known.get(name, 'the names below it')})")
        if kept:
            what = (
                f"MLflow keeps the first value of a parameter, and the run {self.run_id} has others: {', '.join(kept)}."
            )
            rank_zero_warn(
                f"{what} To record the new values, log to a new run: leave `run_id` out, or make a new logger."
            )
        for batch in _split_batches(new, PARAMS_PER_CALL):
            self.experiment.log_batch(run_id=self.run_id, params=batch, **self._call_options)

    def _is_folder(self, name: str, known: Iterable[str]) -> bool:
        """Would the file of this parameter be the folder of another one, or the other way round?"""
        in_files = self._tracking_uri.startswith("file:")
        return in_files and any(f"{k}/".startswith(f"{name}/") or f"{name}/".startswith(f"{k}/") for k in known)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Records numbers; others are left out with a warning, and so are characters that MLflow refuses in names."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = []
        for name, value in as_numbers(metrics, self._prefix).items():
            if not isinstance(value, (int, float)):
                kind = f"text {value!r}" if isinstance(value, str) else f"`{type(value).__name__}` {value!r}"
                rank_zero_warn(
                    f"The metric `{name}` has the {kind} as value, which MLflow cannot record. Log a number."
                )
                continue
            entries.append(Metric(key=_allowed_name(name), value=value, timestamp=now, step=step or 0))
        for batch in _split_batches(entries, METRICS_PER_CALL):
            self.experiment.log_batch(run_id=self.run_id, metrics=batch, **self._call_options)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Marks the run as finished or failed, and sends checkpoints.

        Args:
            status: "success", "failed" or "finished".
        """
        self._send_last_checkpoints()  # of a run that failed, too
        outcome = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}.get(status)
        if self._experiment is not None and outcome:
            self.experiment.set_terminated(self.run_id, outcome)

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        folder = Path(path).stem
        self.experiment.log_artifact(self.run_id, path, folder)
        self.experiment.log_dict(self.run_id, about, f"{folder}/metadata.yaml")
        self.experiment.log_text(self.run_id, str(aliases), f"{folder}/aliases.txt")


def _writes_folders() -> bool:
    """Does the client that is installed keep runs in a folder? Newer ones refuse to, unless a variable asks for it."""
    from mlflow import environment_variables

    switch = getattr(environment_variables, "MLFLOW_ALLOW_FILE_STORE", None)
    return switch is None or bool(switch.get())


def _allowed_name(name: str) -> str:
    """The name as MLflow takes it, with a warning if that is another one."""
    letters = re.sub(r"[^\w/. -]", "", name, flags=re.ASCII)
    allowed = posixpath.normpath(f"/{letters}").strip("/")[:MAX_NAME_LENGTH] or "_"
    if allowed != name:
        what = f"MLflow allows letters, digits and `_/. -` in names: `{name}` is recorded as `{allowed}`."
        rank_zero_warn(what, category=RuntimeWarning)
    return allowed


def _split_batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
