"""Metrics and models to Weights & Biases."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fulmen.loggers.logger import ServiceLogger, as_dict, as_numbers, rank_zero_experiment
from fulmen.utilities.errors import MisconfigurationException, explain
from fulmen.utilities.optional import require
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from wandb import Artifact
    from wandb.sdk.wandb_run import Run


class WandbLogger(ServiceLogger):
    """Logs to a run of Weights & Biases; the x axis is ``trainer/global_step``.

    Args:
        name: what the run is called on the web page.
        save_dir: where ``wandb`` keeps its files and the Trainer its checkpoints; ``dir`` is a synonym.
        version: the id of a run to continue; ``id`` is a synonym.
        offline: write files only, to be sent later with ``wandb sync``.
        project: defaults to the environment variable ``WANDB_PROJECT``, then to "lightning_logs".
        experiment: a run to use instead of starting one.
        checkpoint_name: name of the model artifact instead of ``model-<run id>``.
        add_file_policy: "mutable" copies a checkpoint before sending it, "immutable" does not.
        kwargs: passed to ``wandb.init``.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Run | None = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        require("wandb", "by `WandbLogger`", minimum=">=0.12.10")
        if offline and log_model:
            what = f"`WandbLogger` got `log_model={log_model}` and `offline=True`."
            why = "Checkpoints cannot be sent without a connection."
            raise MisconfigurationException(explain(what, why, "Use `log_model=False` or `offline=False`."))
        super().__init__(prefix, log_model)
        self._experiment = experiment
        self._checkpoint_name = checkpoint_name
        self.add_file_policy = add_file_policy
        self._init_options: dict[str, Any] = {
            "name": name,
            "project": project or os.environ.get("WANDB_PROJECT", "lightning_logs"),
            "dir": os.fspath(save_dir if dir is None else dir),
            "id": version or id,
            "resume": "allow",
            **({} if anonymous is None else {"anonymous": "allow" if anonymous else None}),
            **({"mode": "offline"} if offline else {}),
            **kwargs,
        }
        # With `sync_tensorboard`, wandb itself logs an axis of this name.
        self._step_name = "global_step" if self._init_options.get("sync_tensorboard") else "trainer/global_step"

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The ``wandb`` run, for everything this logger has no method for."""
        if self._experiment is None:
            import wandb

            if wandb.run is not None:
                what = "A wandb run is already in progress and is used by this `WandbLogger`."
                rank_zero_warn(explain(what, fix="Call `wandb.finish()` before making the logger to get a new run."))
                self._experiment = wandb.run
            else:
                os.makedirs(self.save_dir, exist_ok=True)
                self._experiment = wandb.init(**self._init_options)
            self._init_options["id"] = self._experiment.id
            if callable(getattr(self._experiment, "define_metric", None)):
                self._experiment.define_metric(self._step_name)
                self._experiment.define_metric("*", step_metric=self._step_name, step_sync=True)
        return self._experiment

    @property
    def name(self) -> str | None:
        """The project."""
        return self._init_options["project"]

    @property
    def version(self) -> str | None:
        """The id of the run; None until there is one."""
        return self._experiment.id if self._experiment is not None else self._init_options["id"]

    @property
    def save_dir(self) -> str:
        return self._init_options["dir"]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace) -> None:
        config = {key: getattr(value, "__name__", value) for key, value in as_dict(params).items()}
        self.experiment.config.update(config, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        axis = {} if step is None else {self._step_name: step}
        self.experiment.log({**as_numbers(metrics, self._prefix), **axis})

    def watch(
        self, model: torch.nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Send histograms of gradients and/or parameters ("gradients", "parameters", "all") and the graph."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_table(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        """Log texts, numbers or media as a table: from column names and a list of rows, or a pandas data frame."""
        import wandb

        self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    log_text = log_table

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log arrays, PIL images or paths. Keyword arguments (such as captions) are lists, one entry per image."""
        self._log_media("Image", key, images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Like `log_image`, for sounds."""
        self._log_media("Audio", key, audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Like `log_image`, for videos."""
        self._log_media("Video", key, videos, step, kwargs)

    def _log_media(self, kind: str, key: str, items: list[Any], step: int | None, options: dict[str, list]) -> None:
        import wandb

        if not isinstance(items, list):
            raise TypeError(f"`{key}` must be logged as a list, not as a `{type(items).__name__}`.")
        for name, values in options.items():
            if len(values) != len(items):
                raise ValueError(f"`{name}` has {len(values)} entries for the {len(items)} items of `{key}`.")
        each = [{name: values[i] for name, values in options.items()} for i in range(len(items))]
        media = getattr(wandb, kind)
        self.log_metrics({key: [media(item, **own) for item, own in zip(items, each)]}, step)

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        import wandb

        name = self._checkpoint_name or f"model-{self.experiment.id}"
        artifact = wandb.Artifact(name=name, type="model", metadata=about)
        artifact.add_file(path, name="model.ckpt", policy=self.add_file_policy)
        self.experiment.log_artifact(artifact, aliases=aliases)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str, save_dir: Path | str | None = None, artifact_type: str | None = None, use_artifact: bool = True
    ) -> str:
        """The folder with a downloaded artifact, such as ``"team/project/model-abc:best"``; ``use_artifact`` records
        a run in progress as its user."""
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return found.download(root=None if save_dir is None else os.fspath(save_dir))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Artifact:
        """Record that the run uses an artifact, and return it."""
        return self.experiment.use_artifact(artifact, type=artifact_type)
