"""Metrics and models to Weights & Biases."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

from fulmen.loggers.logger import Params, ServiceLogger, as_numbers, plain_params, plain_value
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from pandas import DataFrame
    from torch import nn


class WandbLogger(ServiceLogger):
    """Logs to a run of Weights & Biases; the x axis is ``trainer/global_step``.

    Args:
        name: what the run is called on the web page.
        save_dir: for the files of ``wandb`` and the Trainer's checkpoints; ``dir`` is a synonym.
        version: the id of a run to continue; ``id`` is a synonym.
        offline: write files only, to be sent later with ``wandb sync``.
        project: defaults to the environment variable ``WANDB_PROJECT``, then to "lightning_logs".
        experiment: a ``wandb.Run`` to use instead of starting one.
        checkpoint_name: name of the model artifact instead of ``model-<run id>``.
        add_file_policy: "mutable" copies a checkpoint before sending it, "immutable" does not.
        kwargs: passed to ``wandb.init``.

    Examples:
        >>> logger = WandbLogger(project="trials", offline=True)  # doctest: +SKIP
    """

    opens_first = True  # `sync_tensorboard` sees the event files of writers that are made afterwards
    name = property(lambda self: self._project, doc="The project.")
    save_dir = property(lambda self: self._save_dir, doc="The folder under which checkpoints are put.")

    def __init__(
        self, name: str | None = None, save_dir: str | os.PathLike[str] = ".", version: str | None = None,
        offline: bool = False, dir: str | os.PathLike[str] | None = None, id: str | None = None,
        anonymous: bool | None = None, project: str | None = None, log_model: Literal["all"] | bool = False,
        experiment: Any = None, prefix: str = "", checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable", **kwargs: Any,
    ) -> None:  # fmt: skip
        _import_wandb()
        if offline and log_model:
            what = f"`WandbLogger(log_model={log_model}, offline=True)` cannot send checkpoints without a connection."
            raise MisconfigurationException(f"{what} Leave one of the two out.")
        super().__init__(prefix, log_model)
        self._experiment = experiment
        self._checkpoint_name = checkpoint_name
        self.add_file_policy = add_file_policy
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._save_dir = os.fspath(save_dir if dir is None else dir)
        place = {"name": name, "project": self._project, "dir": self._save_dir}
        options = {**place, "id": version or id, "resume": "allow"}
        modes = {**({"anonymous": "allow"} if anonymous else {}), **({"mode": "offline"} if offline else {})}
        self._init_options: dict[str, Any] = {**options, **modes, **kwargs}
        # With `sync_tensorboard`, wandb itself logs an axis of this name.
        self._step_name = "global_step" if self._init_options.get("sync_tensorboard") else "trainer/global_step"

    def _open_experiment(self) -> Any:
        wandb = _import_wandb()
        run = wandb.run
        if run is not None:
            what = "A wandb run is already in progress and is used by this `WandbLogger`."
            rank_zero_warn(f"{what} Call `wandb.finish()` before making the logger to get a new run.")
        else:
            os.makedirs(self._save_dir, exist_ok=True)
            run = wandb.init(**self._init_options)
        self._init_options["id"] = run.id
        if callable(getattr(run, "define_metric", None)):
            run.define_metric(self._step_name)
            run.define_metric("*", step_metric=self._step_name, step_sync=True)
        return run

    @property
    def version(self) -> str | None:
        """The id of the run; None until there is one."""
        version: str | None = self._experiment.id if self._experiment is not None else self._init_options["id"]
        return version

    @rank_zero_only
    def log_hyperparams(self, params: Params) -> None:
        """Adds hyper-parameters to the configuration of the run.

        Args:
            params: a mapping, a namespace or a dataclass, nested or not.
        """
        config = plain_params(params, lambda value: getattr(value, "__name__", None) or plain_value(value))
        self.experiment.config.update(config, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Records numbers; tensors of several elements become histograms.

        Args:
            metrics: numbers by name.
            step: their position on the x axis.
        """
        axis = {} if step is None else {self._step_name: step}
        self.experiment.log({**as_numbers(metrics, self._prefix, keep_arrays=True), **axis})  # they become histograms

    def watch(
        self, model: nn.Module, log: str | None = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Sends histograms of gradients or parameters, and the graph, while training.

        Args:
            model: whose layers are watched.
            log: "gradients", "parameters", "all" or None.
            log_freq: after how many backward passes.
            log_graph: send the graph too.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    def log_table(
        self, key: str, columns: list[str] | None = None, data: list[list[Any]] | None = None,
        dataframe: DataFrame | None = None, step: int | None = None,
    ) -> None:  # fmt: skip
        """Logs texts, numbers or media as a table: from names and rows, or from a data frame.

        Args:
            key: the name of the table.
            columns: names of its columns.
            data: a list of rows.
            dataframe: of pandas, in the place of both.
            step: its position on the x axis.
        """
        self.log_metrics({key: _import_wandb().Table(columns=columns, data=data, dataframe=dataframe)}, step)

    log_text = log_table

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs images.

        Args:
            key: the name they have together.
            images: arrays, PIL images or paths.
            step: their position on the x axis.
            **kwargs: for `wandb.Image`, such as ``caption``: lists with an entry for each image.

        Raises:
            TypeError: they are no list.
            ValueError: a list of another length.
        """
        self._log_media("Image", key, images, step, kwargs)

    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs sounds.

        Args:
            key: the name they have together.
            audios: arrays or paths.
            step: their position on the x axis.
            **kwargs: for `wandb.Audio`: lists with an entry for each sound.
        """
        self._log_media("Audio", key, audios, step, kwargs)

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Logs videos.

        Args:
            key: the name they have together.
            videos: arrays or paths.
            step: their position on the x axis.
            **kwargs: for `wandb.Video`: lists with an entry for each video.
        """
        self._log_media("Video", key, videos, step, kwargs)

    @rank_zero_only
    def _log_media(
        self, kind: str, key: str, items: list[Any], step: int | None, options: dict[str, list[Any]]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f"`{key}` must be logged as a list, not as a `{type(items).__name__}`.")
        for name, values in options.items():
            if len(values) != len(items):
                raise ValueError(f"`{name}` has {len(values)} entries for the {len(items)} items of `{key}`.")
        each = ({name: values[i] for name, values in options.items()} for i in range(len(items)))
        self.log_metrics({key: [getattr(_import_wandb(), kind)(item, **own) for item, own in zip(items, each)]}, step)

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        name = self._checkpoint_name or f"model-{self.experiment.id}"
        artifact = _import_wandb().Artifact(name=name, type="model", metadata=about)
        artifact.add_file(path, name="model.ckpt", policy=self.add_file_policy)
        self.experiment.log_artifact(artifact, aliases=aliases)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str,
        save_dir: str | os.PathLike[str] | None = None,
        artifact_type: str | None = None,
        use_artifact: bool = True,
    ) -> str:
        """Downloads an artifact.

        Args:
            artifact: its name, such as ``"team/project/model-abc:best"``.
            save_dir: the folder for its files; by default one of the client.
            artifact_type: what kind it is of.
            use_artifact: record that the current run uses it, if there is one.

        Returns:
            The folder of its files.
        """
        wandb = _import_wandb()
        record = wandb.run is not None and use_artifact
        found = wandb.run.use_artifact(artifact) if record else wandb.Api().artifact(artifact, type=artifact_type)
        folder: str = found.download(root=None if save_dir is None else os.fspath(save_dir))
        return folder

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Records that the run uses an artifact.

        Args:
            artifact: its name.
            artifact_type: what kind it is of.

        Returns:
            The artifact, as an object of the client.
        """
        return self.experiment.use_artifact(artifact, type=artifact_type)


def _import_wandb() -> Any:
    return import_optional("wandb", "by `WandbLogger`", minimum=">=0.12.10")
