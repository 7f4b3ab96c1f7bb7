"""The connectors of the API's Trainer, as views: each shows parts of fulmen's Trainer under the names that are used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fulmen.callbacks.callback import Callback
from fulmen.checkpoint import paths
from fulmen.checkpoint.lightning_format import to_loops
from fulmen.checkpoint.snapshot import Snapshot, collect_checkpoint
from fulmen.compat.grades import refuse_private
from fulmen.compat.internals_loops import SourceView
from fulmen.defaults import merge_callbacks, sort_callbacks
from fulmen.metrics.values import fetch_numbers
from fulmen.utilities.introspection import alias_property

if TYPE_CHECKING:
    import torch

    from fulmen.datamodule import LightningDataModule
    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.precision import Precision
    from fulmen.engine.strategy import Strategy
    from fulmen.module import LightningModule
    from fulmen.storage.checkpoint_io import CheckpointIO
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH, TrainerFn


class TrainerView:
    """A part of the API's Trainer that is none here.

    Arguments:
        trainer: the one that knows all of it.
    """

    attribute: ClassVar[str]  # of the Trainer

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __getattr__(self, name: str) -> Any:
        if name == "trainer" or name.startswith("__"):  # not there yet: it is being copied
            raise AttributeError(name)
        refuse_private(f"trainer.{self.attribute}", name)


class AcceleratorView(TrainerView):
    """What the run runs on."""

    attribute = "_accelerator_connector"
    strategy: Strategy = alias_property("trainer.strategy", "How the model is spread over devices.")
    accelerator: Accelerator = alias_property("trainer.strategy.accelerator", "The kind of device.")
    precision_plugin: Precision = alias_property("trainer.strategy.precision_plugin", "In which numbers it computes.")
    checkpoint_io: CheckpointIO = alias_property("trainer.strategy.checkpoint_io", "Where checkpoints are stored.")
    cluster_environment: ClusterEnvironment | None = alias_property(
        "trainer.strategy.cluster_environment", "Who this process is among others."
    )
    use_distributed_sampler: bool = alias_property(
        "trainer.use_distributed_sampler", "Are samples dealt out to processes?"
    )
    is_distributed = property(
        lambda self: self.strategy.is_distributed, doc="Do several processes train the model together?"
    )
    sync_batchnorm = property(
        lambda self: getattr(self.strategy, "layer_sync", None) is not None, doc="Is batch norm one of all processes?"
    )
    _accelerator_flag = property(lambda self: self.accelerator.name())
    _num_nodes_flag = property(lambda self: self.trainer.num_nodes)
    _precision_flag = property(lambda self: self.trainer.precision)
    _strategy_flag = property(lambda self: self.strategy.strategy_name)

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this node's processes."""
        devices: list[torch.device] | None = getattr(self.strategy, "parallel_devices", None)
        return devices or [self.strategy.root_device]

    _parallel_devices = parallel_devices

    @property
    def _devices_flag(self) -> int | list[int]:
        """The number of processes on the CPU, the indices of GPUs."""
        on_cpu = self.strategy.root_device.type == "cpu"
        return self.trainer.num_devices if on_cpu else self.trainer.device_ids


class CheckpointView(TrainerView):
    """Saving and restoring, in the steps of the API."""

    attribute = "_checkpoint_connector"
    _snapshot: Snapshot | None = None
    _ckpt_path: _PATH | None = alias_property("trainer.ckpt_path", "The checkpoint that a run loads, or has loaded.")
    _user_managed = property(lambda self: self.trainer._ckpt_path_by_user, doc="Was `trainer.ckpt_path` set?")

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint, as of now; every process must call this."""
        return collect_checkpoint(self.trainer, bool(weights_only))

    def save_checkpoint(self, filepath: _PATH, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """Writes a checkpoint; every process must call this."""
        self.trainer.save_checkpoint(filepath, weights_only, storage_options)

    # ------------------------------------------------------------------ restoring

    @property
    def _opened(self) -> Snapshot:
        if self._snapshot is None:
            self._snapshot = Snapshot(self.trainer)
        return self._snapshot

    @property
    def _loaded_checkpoint(self) -> dict[str, Any]:
        return self._opened.content

    @_loaded_checkpoint.setter
    def _loaded_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._opened.content = checkpoint
        self._opened.path = self._opened.path or "a checkpoint in memory"

    def resume_start(self, checkpoint_path: _PATH | None = None, weights_only: bool | None = None) -> None:
        """Reads a checkpoint, by default the one that the run loads."""
        self._snapshot = Snapshot(self.trainer, checkpoint_path or self.trainer.ckpt_path, weights_only)

    def resume_end(self) -> None:
        """Lets go of it."""
        self._snapshot = None

    def restore_model(self) -> None:
        """Weights, datamodule and callbacks."""
        self._opened.restore_model()

    def restore_training_state(self) -> None:
        """Precision, counters, optimizers and schedulers; in `fit`, once there are optimizers."""
        self._opened.restore_training()

    def restore(self, checkpoint_path: _PATH | None = None, weights_only: bool | None = None) -> None:
        """All of it."""
        self.resume_start(checkpoint_path, weights_only)
        self.restore_model()
        self.restore_training_state()
        self.resume_end()

    def _restore_modules_and_callbacks(
        self, checkpoint_path: _PATH | None = None, weights_only: bool | None = None
    ) -> None:
        self.resume_start(checkpoint_path, weights_only)
        self.restore_model()

    # ------------------------------------------------------------------ what a path means

    def _select_ckpt_path(
        self, state_fn: TrainerFn, ckpt_path: _PATH | None, model_provided: bool, model_connected: bool
    ) -> _PATH | None:
        """The file to load in this verb: what the argument means, or what was set on the trainer."""
        if self._user_managed and ckpt_path is None:
            return self._ckpt_path
        return self._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    def _parse_ckpt_path(
        self, state_fn: TrainerFn, ckpt_path: _PATH | None, model_provided: bool, model_connected: bool
    ) -> _PATH | None:
        """The path behind "best", "last" and "hpc", and that of a path."""
        trainer = self.trainer
        return paths.resolve_path(
            ckpt_path, verb=state_fn.value, callbacks=trainer.callbacks, root_dir=trainer.default_root_dir,
            model_given=model_provided or not model_connected, fast_dev_run=bool(trainer.fast_dev_run),
        )  # fmt: skip

    @staticmethod
    def hpc_save_path(folderpath: _PATH) -> str:
        """Where the next checkpoint of a job goes that will be requeued."""
        return str(paths.preemption_path((), os.fspath(folderpath)))

    @property
    def _hpc_resume_path(self) -> str | None:
        """The newest of those in the root directory."""
        return paths.find_newest_of_requeued_jobs(self.trainer.default_root_dir)

    def _get_lightning_module_state_dict(self) -> dict[str, Tensor]:
        return self.trainer.strategy.lightning_module_state_dict()

    def _get_loops_state_dict(self) -> dict[str, Any]:
        return to_loops(self.trainer.resume_state.saved_progress())


class DataView(TrainerView):
    """Where data comes from."""

    attribute = "_data_connector"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._train_dataloader_source = SourceView(trainer, "train")
        self._val_dataloader_source = SourceView(trainer, "val")
        self._test_dataloader_source = SourceView(trainer, "test")
        self._predict_dataloader_source = SourceView(trainer, "predict")

    def prepare_data(self) -> None:
        """Lets module and datamodule prepare their data, in the processes where they want it."""
        trainer = self.trainer
        ranks = {"local_rank": trainer.local_rank, "global_rank": trainer.global_rank}
        trainer.sources.prepare_data(trainer.lightning_module, trainer.datamodule, **ranks)

    def attach_data(
        self, model: LightningModule, train_dataloaders: Any = None, val_dataloaders: Any = None,
        test_dataloaders: Any = None, predict_dataloaders: Any = None, datamodule: LightningDataModule | None = None,
    ) -> None:  # fmt: skip
        """Says who gives the loaders of the next run: arguments, the datamodule or the module."""
        trainer = self.trainer
        given = {"train": train_dataloaders, "val": val_dataloaders, "test": test_dataloaders}
        verb = "fit" if trainer.state.fn is None else trainer.state.fn.value
        trainer.datamodule = datamodule
        if datamodule is not None:
            datamodule.trainer = trainer
        trainer.sources.attach_data(model, datamodule=datamodule, verb=verb, **given, predict=predict_dataloaders)
        for loop in (trainer.fit_loop, trainer.fit_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.drop_loaders()
        trainer.predict_loop.drop_loaders()
        model.trainer = trainer

    attach_dataloaders = attach_data

    def attach_datamodule(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """The same with a datamodule alone."""
        self.attach_data(model, datamodule=datamodule)

    @property
    def _datahook_selector(self) -> SimpleNamespace:
        """Whose batch hooks run: those of the datamodule go first."""
        trainer = self.trainer
        module = trainer.lightning_module
        data = trainer.datamodule
        find = lambda name: trainer.sources.transfer_owner(name, module, data)  # noqa: E731
        return SimpleNamespace(model=module, datamodule=data, get_instance=find)


class CallbackView(TrainerView):
    """The list of callbacks."""

    attribute = "_callback_connector"

    def _attach_model_callbacks(self) -> None:
        """Adds what `configure_callbacks` of the module gives."""
        trainer = self.trainer
        trainer.callbacks = merge_callbacks(trainer.callbacks, trainer.lightning_module.configure_callbacks())

    def _attach_model_logging_functions(self) -> None:
        """Lets `self.log` of the callbacks be that of the module."""
        for callback in self.trainer.callbacks:
            callback._attach_log(self.trainer.lightning_module)

    @staticmethod
    def _reorder_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
        """Those that tune first, those that write checkpoints last."""
        return sort_callbacks(callbacks)


class LoggerView(TrainerView):
    """What was logged, for those who read it, and the loggers."""

    attribute = "_logger_connector"
    callback_metrics = property(lambda self: self.trainer.callback_metrics, doc="Newest value per name, as tensors.")
    logged_metrics = property(lambda self: self.trainer.logged_metrics, doc="Of those, what goes to loggers.")
    progress_bar_metrics = property(lambda self: self.trainer.progress_bar_metrics, doc="Of those, what bars show.")
    _callback_metrics: dict[str, Tensor] = alias_property("trainer.book.metric_dicts.callback", "Without newer values.")
    _logged_metrics: dict[str, Tensor] = alias_property("trainer.book.metric_dicts.logged", "Without newer values.")
    _progress_bar_metrics: dict[str, float] = alias_property(
        "trainer.book.metric_dicts.progress_bar", "Without newer values."
    )

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """All three, under "callback", "log" and "pbar"."""
        return {"callback": self.callback_metrics, "log": self.logged_metrics, "pbar": self.progress_bar_metrics}

    @property
    def should_update_logs(self) -> bool:
        """Do loggers get what is logged in this batch of training?"""
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.trainer.progress.log_step + 1) % every == 0

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Sends values to the loggers (sync); without a step, with the epoch at the step of the run."""
        if self.trainer.loggers and metrics:
            self.trainer.log_to_loggers(fetch_numbers(dict(metrics)), step, with_epoch=step is None)

    def reset_metrics(self) -> None:
        """Nothing was logged, as far as readers see."""
        for values in (self._callback_metrics, self._logged_metrics, self._progress_bar_metrics):
            values.clear()

    def reset_results(self) -> None:
        """Forgets the values of the loop that runs."""
        self.trainer.book.scope.reset()


class SignalView(TrainerView):
    """The signals that end a run."""

    attribute = "_signal_connector"
    received_sigterm: bool = alias_property("trainer.signals.received_sigterm", "Was the process told to end?")

    def register_signal_handlers(self) -> None:
        """From now on they end the run at the next boundary of a step; a run does this by itself."""
        self.trainer.signals.install_handlers(self.trainer.strategy.cluster_environment)

    def teardown(self) -> None:
        """The handlers as they were before."""
        self.trainer.signals.restore_handlers()
