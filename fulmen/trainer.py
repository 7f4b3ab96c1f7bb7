"""`Trainer`: runs a `LightningModule` through fit, validate, test and predict."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, cast

import torch

from fulmen import defaults, loops, settings
from fulmen.callbacks.callback import Callback
from fulmen.callbacks.checkpointing import Checkpoint
from fulmen.callbacks.saved_files import folder_of_run
from fulmen.checkpoint import paths
from fulmen.checkpoint.pruned import fit_pruning
from fulmen.checkpoint.snapshot import Snapshot, collect_checkpoint
from fulmen.data.sources import Sources
from fulmen.datamodule import LightningDataModule
from fulmen.defaults import assemble_callbacks, assemble_loggers, assemble_profiler, merge_callbacks, send_hparams
from fulmen.engine.cluster import SLURMEnvironment
from fulmen.engine.resolve import announce_accelerator, resolve_strategy
from fulmen.engine.strategy import Strategy
from fulmen.hparams import drop_unpicklable
from fulmen.loggers.logger import FolderLogger, Logger, claim_versions
from fulmen.loops import auto_resume, checks
from fulmen.loops.evaluate import EvaluationLoop
from fulmen.loops.fit import FitLoop
from fulmen.loops.hook_plan import HookPlan, update_plan
from fulmen.loops.predict import PredictionLoop
from fulmen.loops.progress import Loop
from fulmen.loops.signals import Signals
from fulmen.loops.supervised_run import TrainerRun
from fulmen.metrics.logbook import LogBook
from fulmen.metrics.values import fetch_numbers
from fulmen.module import LightningModule, make_late_layers, missing_super_init
from fulmen.optimizers import LightningOptimizer, read_optimizers
from fulmen.trainer_properties import TrainerProperties
from fulmen.utilities import types as states  # noqa: F401  (`fulmen.trainer.states`)
from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.console import is_interactive
from fulmen.utilities.errors import INTERRUPTED, MisconfigurationException, _TunerExitException, describe_received
from fulmen.utilities.introspection import adapt_to_signature, overrides_method
from fulmen.utilities.keywords import hide_unknown, refuse_misuse
from fulmen.utilities.modules import from_compiled, is_compiled, picklable_attributes
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import isolate_rng
from fulmen.utilities.seed import seed_everything as seed_everything  # imported from here by many scripts
from fulmen.utilities.types import RunningStage, TrainerFn, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.precision import Precision
    from fulmen.engine.sync_batchnorm import LayerSync
    from fulmen.loops.trials import Trials
    from fulmen.profilers.profiler import Profiler
    from fulmen.storage.checkpoint_io import CheckpointIO
    from fulmen.utilities.types import (
        EVAL_DATALOADERS,
        TRAIN_DATALOADERS,
        AcceleratorName,
        ClipAlgorithmName,
        GradClipAlgorithmType,
        LRSchedulerConfig,
        PrecisionInput,
        ProfilerName,
        StrategyName,
    )

    Plugin: TypeAlias = Precision | CheckpointIO | ClusterEnvironment | LayerSync

# The deep-path finder of fulmen.compat serves `fulmen.trainer.states` and `fulmen.trainer.trainer`.
__path__: list[str] = []


class Trainer(TrainerProperties):
    """Runs a `LightningModule`: give it arguments, then call `fit`, `validate`, `test` and `predict`.

    All arguments are optional and given by name. Each can be preset by an environment variable `PL_TRAINER_<NAME>`; what
    is passed in code wins. A wrong value is refused by name when the Trainer is made.

    Arguments: where it runs
        accelerator: Kind of device: "cpu", "gpu" (CUDA or MPS, whichever is there), "cuda", "mps", or an `Accelerator`.
            "auto" (default) takes a GPU if torch finds one, else the CPU. Refused: a kind that torch does not find.
        strategy: How the model is spread over devices: the name of a strategy, such as "ddp", "fsdp" or "deepspeed", or
            a `Strategy`. "auto" (default) is one device without processes, or "ddp" on several. Refused: unknown names,
            and strategies for one device with several.
        devices: Which devices of this machine: a number of them (processes, on the CPU), -1 for all, or a list of
            indices such as `[0, 2]` or "0,2". "auto" (default) is all GPUs, or one process on the CPU. Refused: 0, and
            devices that are not there.
        num_nodes: How many machines take part, 1 by default. Refused: what contradicts the cluster that started it.
        precision: In which numbers it computes: "32-true" (default), "16-mixed" (float16 where it is safe, with a loss
            scaler), "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine". Refused: what the device
            cannot compute in.

    Arguments: callbacks and loggers
        logger: A `Logger`, several, or True (default): TensorBoard if it is installed, else CSV files. False logs
            nowhere. Refused: classes instead of instances.
        callbacks: A `Callback` or a list. The default ones (see `enable_checkpointing` and the like) are added unless
            one of their kind is among them. Refused: two progress bars, and two callbacks that keep state under one key.

    Arguments: how long
        fast_dev_run: True, or a number n: one batch (n) of every loop to find errors, without loggers and checkpoints.
            False by default. Refused: negative numbers.
        max_epochs: Training ends after this many epochs; -1 is no limit. Without it, `max_steps` and `max_time` the
            limit is 1000. Refused: less than -1.
        min_epochs: Training does not stop early before this many epochs; none by default.
        max_steps: Training ends after this many optimizer steps; -1 (default) is no limit. Refused: less than -1.
        min_steps: Training does not stop early before this many optimizer steps; none by default.
        max_time: Training ends after this time: "DD:HH:MM:SS", a `timedelta`, or a dict of its arguments such as
            `{"hours": 8}`. No limit by default. The epoch is not finished.

    Arguments: how much data
        limit_train_batches: Batches of each training epoch: an int is a number, a float up to 1.0 a fraction. 1.0, which
            is all, by default. Refused: negative numbers, fractions above 1.
        limit_val_batches: The same for each validation loader; 0 switches validation off.
        limit_test_batches: The same for each test loader.
        limit_predict_batches: The same for each predict loader.
        overfit_batches: Train and validate on so few batches, the same ones in each epoch: an int is a number, a float a
            fraction. 0.0 (default) is off.

    Arguments: how often
        val_check_interval: Validate after this many training batches (int), this fraction of an epoch (float), or this
            time (as in `max_time`). 1.0 (default) is once per epoch. Refused: 0, and more batches than an epoch has
            unless `check_val_every_n_epoch=None`.
        check_val_every_n_epoch: Validate in every so many epochs, 1 by default. None counts batches across epochs.
            Refused: less than 1, floats.
        num_sanity_val_steps: Batches of each validation loader that are tried before training, to find errors early; 2
            by default, 0 for none, -1 for all.
        log_every_n_steps: Optimizer steps between two rows of the loggers, 50 by default; 0 is never.

    Arguments: what is on
        enable_checkpointing: Add a `ModelCheckpoint` that keeps the newest epoch; True by default. Refused: False beside
            a checkpoint callback.
        enable_progress_bar: Add a progress bar; True by default. Refused: False beside a bar.
        enable_model_summary: Print the layers and their sizes at the start; True by default.

    Arguments: optimization
        accumulate_grad_batches: Batches per optimizer step, 1 by default; the step is that of one large batch. Refused:
            less than 1, and dicts (`GradientAccumulationScheduler` changes the number by epoch).
        gradient_clip_val: Gradients are clipped to this size before each step; not by default.
        gradient_clip_algorithm: "norm" (default) scales all gradients of an optimizer together, "value" clips each
            element.

    Arguments: everything else
        deterministic: True lets torch use deterministic algorithms only, which raises where there are none; "warn" only
            warns. Not touched by default.
        benchmark: cuDNN tries algorithms out and keeps the fastest: good for inputs of one size. Not touched by default,
            False if `deterministic`.
        inference_mode: Evaluate under `torch.inference_mode` (default), else under `torch.no_grad`.
        use_distributed_sampler: Deal the samples of each loader out to the processes; True by default. With False the
            loaders must do it.
        profiler: Measure what a run spends its time on: "simple", "advanced", "pytorch", "xla", or a `Profiler`. None by
            default.
        detect_anomaly: Let autograd find the operation that gave a NaN, at a high price; False by default.
        barebones: Everything off that costs time, to measure it; False by default. Refused: any of those things
            switched on beside it.
        plugins: A `Precision`, `CheckpointIO`, `ClusterEnvironment` or `LayerSync`, or a list with one of each. None by
            default. Refused: two of one kind, and one that the strategy or `precision` brings, too.
        sync_batchnorm: Batch norm sees the batches of all processes as one; False by default.
        reload_dataloaders_every_n_epochs: Ask for new loaders after every so many epochs; 0 (default) is never.
        default_root_dir: Folder or URL for what has no place of its own; the working directory by default.
        enable_autolog_hparams: Send hyper-parameters to the loggers at the start; True by default.
        model_registry: Refused: it needs a service of a vendor.
        strict_resume: Refuse to continue inside an epoch whose data or batch size has changed (default); False begins
            the next epoch instead.

    Raises:
        MisconfigurationException: for values and combinations that cannot run, with what to write instead.
        TypeError: for values of a wrong type, and for unknown arguments, with the nearest name.

    Examples:
        >>> trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False)
        >>> trainer.max_epochs
        3
        >>> trainer.fit(model, train_loader, val_loader)  # doctest: +SKIP
    """

    @settings.read_environment
    def __init__(
        self, *,
        # hardware
        accelerator: AcceleratorName | Accelerator = "auto", strategy: StrategyName | Strategy = "auto",
        devices: list[int] | str | int = "auto", num_nodes: int = 1, precision: PrecisionInput | None = None,
        # plug-ins
        logger: Logger | Iterable[Logger] | bool | None = None, callbacks: list[Callback] | Callback | None = None,
        # how long
        fast_dev_run: int | bool = False, max_epochs: int | None = None, min_epochs: int | None = None,
        max_steps: int = -1, min_steps: int | None = None, max_time: str | timedelta | dict[str, int] | None = None,
        # how much data
        limit_train_batches: int | float | None = None, limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None, limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        # how often
        val_check_interval: int | float | str | timedelta | dict[str, int] | None = None,
        check_val_every_n_epoch: int | None = 1, num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        # what is on
        enable_checkpointing: bool | None = None, enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        # optimization
        accumulate_grad_batches: int = 1, gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: ClipAlgorithmName | GradClipAlgorithmType | None = None,
        # everything else
        deterministic: bool | Literal["warn"] | None = None, benchmark: bool | None = None, inference_mode: bool = True,
        use_distributed_sampler: bool = True, profiler: Profiler | ProfilerName | None = None, detect_anomaly: bool = False,
        barebones: bool = False, plugins: Plugin | list[Plugin] | None = None, sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0, default_root_dir: str | os.PathLike[str] | None = None,
        enable_autolog_hparams: bool = True, model_registry: str | None = None, strict_resume: bool = True,
    ) -> None:  # fmt: skip
        arguments = {name: value for name, value in locals().items() if name != "self"}
        checked = settings.check(**arguments)
        settings.apply_torch_flags(checked.deterministic, checked.benchmark)
        self._keep_settings(checked)
        self.state = TrainerState()
        self.book = LogBook()
        self.signals = Signals()
        self.sources = Sources(LightningModule, LightningDataModule)
        self.datamodule: LightningDataModule | None = None
        self.should_stop: bool = False
        self._identity = os.urandom(8).hex()  # the same after pickling, unlike `id`
        self._log_dir: str | None = None  # of rank 0
        self._ckpt_path: str | os.PathLike[str] | None = None
        self._ckpt_path_by_user = False
        machine = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "sync_batchnorm")
        self.strategy: Strategy = resolve_strategy(
            **defaults.complete_machine({name: arguments[name] for name in machine})
        )
        self._num_nodes = arguments["num_nodes"]
        announce_accelerator(self.strategy)
        self.profiler = assemble_profiler(arguments["profiler"])
        self.loggers = assemble_loggers(checked)
        self.callbacks: list[Callback] = assemble_callbacks(arguments["callbacks"], checked, self.strategy)
        self.fit_loop = FitLoop(self, checked.max_epochs, checked.min_epochs)
        self.fit_loop.max_steps = checked.max_steps
        self.fit_loop.min_steps = checked.min_steps
        self.validate_loop = EvaluationLoop(self, RunningStage.VALIDATING)
        self.test_loop = EvaluationLoop(self, RunningStage.TESTING)
        self.predict_loop = PredictionLoop(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("hooks", "_lightning_optimizers")}

    def __dir__(self) -> list[str]:
        """What users may use; parts that only the loops and callbacks of this package ask for are left out."""
        return [name for name in super().__dir__() if name not in _INTERNAL and not re.match(r"_(?!_)", name)]

    _elsewhere = False  # is the run that failed one of other processes?

    # ------------------------------------------------------------------ the four verbs

    @hide_unknown
    def fit(
        self, model: LightningModule, train_dataloaders: TRAIN_DATALOADERS | LightningDataModule | None = None,
        val_dataloaders: EVAL_DATALOADERS | None = None, datamodule: LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None, **unknown: NoReturn,
    ) -> None:  # fmt: skip
        """Trains the module until a limit is reached, validating as often as the arguments of the Trainer say.

        Arguments:
            model: The module to train; it keeps what it learns.
            train_dataloaders: An iterable of batches, usually a `DataLoader`, or a list or dict of them; or a datamodule.
                None asks the module's `train_dataloader`.
            val_dataloaders: The same for validation; several are read one after the other.
            datamodule: A `LightningDataModule`, instead of loaders.
            ckpt_path: Continue from this file or URL, or from "best" or "last"; "auto": from the newest checkpoint of this
                run if there is one, so that a scheduler can start the same command again.
            weights_only: Handed to `torch.load`: False unpickles anything, for files you trust.

        Raises:
            MisconfigurationException: for a module, loaders or arguments that cannot be trained with.
            SystemExit: after Ctrl-C, with status 130, when checkpoints and logs are written.

        Examples:
            >>> import torch
            >>> from fulmen import LightningModule
            >>> class Regression(LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.layer = torch.nn.Linear(4, 1)
            ...     def training_step(self, batch, batch_idx):
            ...         x, y = batch
            ...         return torch.nn.functional.mse_loss(self.layer(x), y)
            ...     def configure_optimizers(self):
            ...         return torch.optim.SGD(self.parameters(), lr=0.1)
            >>> dataset = torch.utils.data.TensorDataset(torch.ones(24, 4), torch.ones(24, 1))
            >>> loader = torch.utils.data.DataLoader(dataset, batch_size=8)
            >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            >>> trainer = Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing=False, **quiet)
            >>> trainer.fit(Regression(), loader)
            >>> trainer.global_step
            6
        """
        refuse_misuse(self, Trainer, Trainer.fit, unknown)
        if isinstance(train_dataloaders, LightningDataModule):
            datamodule = train_dataloaders
            train_dataloaders = None
        loaders = {"train": train_dataloaders, "val": val_dataloaders}
        self._attach(TrainerFn.FITTING, RunningStage.TRAINING, model, datamodule, loaders)
        self.should_stop = False
        if ckpt_path == paths.AUTO:
            auto_resume.reuse_logger_version(self)
        run = self._run if self.strategy.launcher is None else self._launch
        run(self.fit_loop, self._chosen_path(ckpt_path, True, weights_only), weights_only)

    @hide_unknown
    def validate(
        self, model: LightningModule | None = None, dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None, verbose: bool = True,
        datamodule: LightningDataModule | None = None, weights_only: bool | None = None, **unknown: NoReturn,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the validation loaders.

        Arguments:
            model: The module; None takes the one of the last run.
            dataloaders: An iterable of batches, several in a list or dict, or a datamodule. None asks the module's
                `val_dataloader`.
            ckpt_path: Load weights from this file or URL first, or from "best" or "last". None keeps the module's
                weights; without `model` it means "best".
            verbose: Print a table of the results.
            datamodule: A `LightningDataModule`, instead of loaders.
            weights_only: Handed to `torch.load`: False unpickles anything, for files you trust.

        Returns:
            For each loader a dict of the values that were logged over the epoch.
        """
        refuse_misuse(self, Trainer, Trainer.validate, unknown)
        self.validate_loop.verbose = verbose
        results: list[dict[str, float]] = self._evaluate(
            self.validate_loop, model, dataloaders, datamodule, ckpt_path, weights_only
        )
        return results

    @hide_unknown
    def test(
        self, model: LightningModule | None = None, dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None, verbose: bool = True,
        datamodule: LightningDataModule | None = None, weights_only: bool | None = None, **unknown: NoReturn,
    ) -> list[dict[str, float]]:  # fmt: skip
        """One pass over the test loaders; exact on several devices, too.

        Arguments:
            model: The module; None takes the one of the last run.
            dataloaders: An iterable of batches, several in a list or dict, or a datamodule. None asks the module's
                `test_dataloader`.
            ckpt_path: Load weights from this file or URL first, or from "best" or "last". None keeps the module's
                weights; without `model` it means "best".
            verbose: Print a table of the results.
            datamodule: A `LightningDataModule`, instead of loaders.
            weights_only: Handed to `torch.load`: False unpickles anything, for files you trust.

        Returns:
            For each loader a dict of the values that were logged over the epoch.
        """
        refuse_misuse(self, Trainer, Trainer.test, unknown)
        self.test_loop.verbose = verbose
        results: list[dict[str, float]] = self._evaluate(
            self.test_loop, model, dataloaders, datamodule, ckpt_path, weights_only
        )
        return results

    @hide_unknown
    def predict(
        self, model: LightningModule | None = None, dataloaders: EVAL_DATALOADERS | LightningDataModule | None = None,
        datamodule: LightningDataModule | None = None, return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None, weights_only: bool | None = None, **unknown: NoReturn,
    ) -> list[Any] | None:  # fmt: skip
        """Runs `predict_step` on every batch.

        Arguments:
            model: The module; None takes the one of the last run.
            dataloaders: An iterable of batches, several in a list or dict, or a datamodule. None asks the module's
                `predict_dataloader`.
            datamodule: A `LightningDataModule`, instead of loaders.
            return_predictions: Keep the predictions and return them (default). False saves the memory, for runs whose
                callbacks write them.
            ckpt_path: Load weights from this file or URL first, or from "best" or "last". None keeps the module's
                weights; without `model` it means "best".
            weights_only: Handed to `torch.load`: False unpickles anything, for files you trust.

        Returns:
            What `predict_step` returned for each batch, on the CPU; a list of such lists for several loaders; None with
            `return_predictions=False`.

        Examples:
            >>> import torch
            >>> from fulmen import LightningModule
            >>> class Double(LightningModule):
            ...     def forward(self, batch):
            ...         return 2 * batch
            >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
            >>> loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=3)
            >>> trainer.predict(Double(), loader)
            [tensor([0., 2., 4.]), tensor([ 6.,  8., 10.])]
        """
        refuse_misuse(self, Trainer, Trainer.predict, unknown)
        self.predict_loop.return_predictions = return_predictions is not False
        predictions: list[Any] | None = self._evaluate(
            self.predict_loop, model, dataloaders, datamodule, ckpt_path, weights_only
        )
        return predictions

    def _evaluate(
        self, loop: EvaluationLoop, model: object, loaders: object, datamodule: object, ckpt_path: object,
        weights_only: bool | None,
    ) -> Any:  # fmt: skip
        if isinstance(loaders, LightningDataModule):
            datamodule = loaders
            loaders = None
        self._attach(TrainerFn(loop.stage.value), loop.stage, model, datamodule, {loop.kind: loaders})
        run = self._run if self.strategy.launcher is None else self._launch
        return run(loop, self._chosen_path(ckpt_path, model is not None, weights_only), weights_only)

    def _attach(
        self, fn: TrainerFn, stage: RunningStage, model: object, datamodule: object, loaders: dict[str, Any]
    ) -> None:
        """Checks what was passed to a verb and attaches it; nothing has run yet."""
        name = f"Trainer.{fn.value}"
        if model is None and fn != TrainerFn.FITTING:
            model = self.lightning_module
            if model is None:
                raise TypeError(
                    f"`{name}()` requires a `LightningModule`: none was passed, now or in a previous run. Pass `model=`."
                )
        module = _check_model(name, model)
        data = _check_data(name, datamodule, loaders)
        self.state.begin_run(fn, stage)
        self.datamodule = data
        if data is not None:
            data.trainer = self
        self.sources.attach_data(module, **loaders, datamodule=data, verb=fn.value)
        for loop in (self.fit_loop, self.fit_loop.val_loop, self.validate_loop, self.test_loop, self.predict_loop):
            loop.drop_loaders()
        self.strategy.attach_module(module)
        module.trainer = self

    def _chosen_path(
        self, ckpt_path: object, model_given: bool, weights_only: bool | None
    ) -> str | os.PathLike[str] | None:
        """The checkpoint to load, from the argument or a path the user set on the trainer."""
        if not isinstance(ckpt_path, (str, os.PathLike, type(None))):
            what = f"`Trainer.{self.state.fn.value}(ckpt_path=...)` received {describe_received(ckpt_path)}."  # type: ignore[union-attr]
            raise TypeError(f"{what} Pass a path or URL, 'best', 'last', 'auto', or None.")
        if self._ckpt_path_by_user:
            if ckpt_path is None:
                return self._ckpt_path
            self._ckpt_path_by_user = False
            rank_zero_warn(
                f"`trainer.ckpt_path = {self._ckpt_path!r}` was set, but `ckpt_path={ckpt_path!r}` is passed: "
                "the argument is used."
            )
        self._ckpt_path = paths.resolve_path(
            auto_resume.prefer_handed_back(self, ckpt_path),
            verb=self.state.fn.value,  # type: ignore[union-attr]
            callbacks=self.callbacks,
            root_dir=self.default_root_dir,
            model_given=model_given,
            fast_dev_run=bool(self.fast_dev_run),
            folder_of=lambda _: folder_of_run(self),
            verify=lambda path: auto_resume.check_checkpoint(self, path, weights_only),
            requeued=isinstance(self.strategy.cluster_environment, SLURMEnvironment),
        )
        return self._ckpt_path

    # ------------------------------------------------------------------ in other processes

    def _launch(self, loop: Loop, ckpt_path: str | os.PathLike[str] | None, weights_only: bool | None) -> Any:
        """`_run` in as many processes as there are devices."""
        for logger in self.loggers:
            _ = logger.version  # looked for once: all processes, this one too, mean the same folder
        launcher = self.strategy.launcher
        assert launcher is not None
        try:
            return launcher.launch(self._run_launched, loop, ckpt_path, weights_only, trainer=self)
        except BaseException as error:
            self.state.end_run(TrainerStatus.INTERRUPTED)
            if hasattr(launcher, "runs_elsewhere") and launcher.runs_elsewhere:
                with launcher.end_if_asleep():
                    self._tell_here(error)
            raise

    def _tell_here(self, error: BaseException) -> None:
        """A run in other processes failed, which told their callbacks, saved and closed loggers: those here hear of it."""
        told = KeyboardInterrupt() if isinstance(error, SystemExit) and error.code == INTERRUPTED else error
        self._elsewhere = True
        try:
            for callback in self.callbacks:
                if not isinstance(callback, Checkpoint):
                    callback.on_exception(self, self.lightning_module, told)
            if self.datamodule is not None:
                self.datamodule.on_exception(told)
        finally:
            self._elsewhere = False

    def _run_launched(self, *args: Any) -> Any:
        # A module or datamodule that was pickled arrives without its trainer.
        for part in (self.lightning_module, self.datamodule):
            if part is not None:
                part.trainer = self
        return self._run(*args)

    def pack_results(self) -> dict[str, Any]:
        """What a run on another process leaves behind, for `unpack_results` where the call was made."""
        return {
            "weights": move_data_to_device(self.lightning_module.state_dict(), torch.device("cpu")),
            "callbacks": [
                (key, picklable_attributes(c, (self, self.lightning_module))) for key, c in self._keyed_callbacks()
            ],
            "progress": self.fit_loop.progress,
            "limits": (self.max_epochs, self.min_epochs),
            "state": self.state,
            "should_stop": self.should_stop,
            "metrics": self.book.metric_dicts.state_dict(),
        }

    def unpack_results(self, packed: dict[str, Any]) -> None:
        """Makes this trainer and its module look as if the run had been here."""
        module = self.lightning_module
        if module.state_dict().keys() != packed["weights"].keys():
            module.configure_model()  # so that there are layers to load the weights into
        weights = fit_pruning(packed["weights"], module.state_dict())
        nowhere = any(parameter.is_meta for parameter in module.parameters())
        for name, tensor in module.state_dict(keep_vars=True).items() if not nowhere else ():
            if isinstance(tensor, torch.Tensor):  # the precision may have made it another type
                tensor.data = tensor.data.to(weights[name].dtype)
        module.load_state_dict(weights, assign=nowhere)
        changed = dict(packed["callbacks"])
        for key, callback in self._keyed_callbacks():
            vars(callback).update(changed.get(key, {}))
        self.fit_loop.progress = packed["progress"]
        self.state = packed["state"]
        self.max_epochs, self.min_epochs = packed["limits"]
        self.should_stop = packed["should_stop"]
        self.book.metric_dicts.load_state_dict(packed["metrics"])

    def _keyed_callbacks(self) -> list[tuple[Any, Callback]]:
        """The callbacks under keys that are the same in other processes, where the module may have added some."""
        kinds = [(type(callback).__qualname__, callback.state_key) for callback in self.callbacks]
        return [((*kind, kinds[:index].count(kind)), self.callbacks[index]) for index, kind in enumerate(kinds)]

    # ------------------------------------------------------------------ one run

    def _run(self, loop: Loop, ckpt_path: str | os.PathLike[str] | None, weights_only: bool | None) -> Any:
        """Everything around a loop, in order."""
        fit = self.state.fn == TrainerFn.FITTING
        # The caller may have switched gradients off: a generator that waits inside of `no_grad` does it, too.
        with torch.inference_mode(False), torch.enable_grad(), self._lifecycle(loop):
            module = self.lightning_module
            self.strategy.connect(module)
            self._connect_callbacks()
            checks.check_configuration(self)
            self.strategy.setup_environment()
            self.strategy.start_watchdog(TrainerRun(self, self._tell))
            self.signals.install_handlers(self.strategy.cluster_environment if fit else None)
            ckpt_path = auto_resume.choose_checkpoint(self, ckpt_path, weights_only)
            self._ckpt_path = ckpt_path
            self._claim_log_dirs()
            self._share_log_dir()
            self._prepare_data()
            self._call_setup_hooks()
            make_late_layers(self.lightning_module, self.strategy)
            snapshot = Snapshot(self, ckpt_path, weights_only)
            late = self.strategy.restore_checkpoint_after_setup
            if not late:
                snapshot.restore_model()
            self.book.clear()
            self.strategy.setup(self)
            if fit:
                self.hooks.on_fit_start()
            with isolate_rng():
                send_hparams(self)
            if late:
                snapshot.restore_model()
            snapshot.restore_training()
            self.strategy.barrier("_CheckpointConnector.resume_end")
            self.strategy.barrier("run-stage")
            self.signals.enable_deferred()
            module.zero_grad()
            loop.begin_run()
            if fit and self.detect_anomaly:
                with torch.autograd.set_detect_anomaly(True):
                    return loop.run()
            return loop.run()

    @contextmanager
    def _lifecycle(self, loop: Loop) -> Generator[None]:
        """Teardown whatever happens; on an exception nothing that was saved or logged is lost."""
        completed = False
        try:
            with suppress(_TunerExitException):
                yield
                completed = True
            self._finish(loop, completed)
            if self.strategy.report_to_parent is None:  # else once its results are on their way
                self.strategy.stop_watchdog()
        except BaseException as error:
            told = self.signals.cause_of(error)
            if interrupted := isinstance(told, KeyboardInterrupt):
                rank_zero_info("Detected KeyboardInterrupt, attempting graceful shutdown ...")
                self.signals.ignore_interrupts()
            reason = self._abort(loop, told)
            if interrupted and not is_interactive():
                sys.exit(INTERRUPTED)
            if reason is not error:
                raise reason from error
            raise
        finally:
            self.signals.restore_handlers()
        self.signals.exit_if_pending()

    def _finish(self, loop: Loop, completed: bool) -> None:
        """The end of a run that went well; not completed if it was only there to tune something."""
        self.strategy.finish_saving()
        self._close(loop)
        if completed and self.state.fn == TrainerFn.FITTING:
            self.hooks.on_fit_end()
        stage: Any = self.state.fn
        if self.datamodule is not None:
            adapt_to_signature(self.datamodule.teardown, self.datamodule.teardown, ("stage",))(stage)
        self.hooks.teardown(stage)
        with isolate_rng():
            for logger in self.loggers:
                logger.finalize("success")
        self.profiler.describe()
        self.profiler.teardown(stage)
        self.state.end_run(TrainerStatus.FINISHED)
        self.book.close_scope()

    def _abort(self, loop: Loop, error: BaseException) -> BaseException:
        """The end of a run that failed: everybody is told, logs are closed, workers end."""
        self.state.status = TrainerStatus.INTERRUPTED
        error = self.strategy.abort(error)
        try:
            self._tell(error)
        finally:
            self._close(loop)
            self.profiler.teardown(self.state.fn)
            self.strategy.stop_watchdog()
            self.state.stage = None
            self.book.close_scope()
            if self.is_global_zero:
                self.signals.requeue_job()
        return error

    def _tell(self, error: BaseException) -> None:
        """Of an exception, everybody who wants to know. The watchdog does it too."""
        self.book.hook = "on_exception"
        with ExitStack() as told:  # also if one of them fails the others are told, and what was logged is written
            for logger in reversed(self.loggers):
                told.callback(logger.finalize, "finished" if self.signals.is_requeueing else "failed")
            told.callback(self.strategy.on_exception, error)
            if self.datamodule is not None:
                told.callback(self.datamodule.on_exception, error)
            for callback in reversed(self.callbacks):
                told.callback(callback.on_exception, self, self.lightning_module, error)

    def _close(self, loop: Loop) -> None:
        self.strategy.teardown()
        loop.teardown()
        if self.lightning_module is not None:
            self.lightning_module.untoggle_optimizer()  # one that is toggled when the run breaks
        self.book.metric_dicts.move_to_cpu()
        for optimizer in self.__dict__.pop("_lightning_optimizers", None) or ():
            optimizer.leave_run()

    def _connect_callbacks(self) -> None:
        """Callbacks of the module, in the right order, with `self.log` attached; and the first hook plan."""
        module = self.lightning_module
        from_module = module.configure_callbacks()
        self.callbacks = merge_callbacks(self.callbacks, from_module)
        if self.state.fn == TrainerFn.FITTING:
            for callback in self.callbacks:
                callback._enter_fit(self._identity)
        for callback in self.callbacks:
            callback._attach_log(module)
        self.book.connect(module, has_loggers=bool(self.loggers), distributed=self.world_size > 1)
        self.compile_hooks()

    def _prepare_data(self) -> None:
        if self.profiler.active:
            self.profiler.module = self.lightning_module
            rank = self.local_rank if self.world_size > 1 else None
            log_dir = self.log_dir or self.default_root_dir
            self.profiler.setup(stage=cast("str", self.state.fn), local_rank=rank, log_dir=log_dir)
        self.sources.prepare_data(
            self.lightning_module, self.datamodule, local_rank=self.local_rank, global_rank=self.global_rank
        )
        self.strategy.barrier_without_timeout("prepare_data")

    def _call_setup_hooks(self) -> None:
        module = self.lightning_module
        stage = cast("str", self.state.fn)
        for owner in (module, self.datamodule):
            if owner is not None:
                drop_unpicklable(owner)
        module.__dict__["_device"] = self.strategy.root_device
        with isolate_rng():
            for logger in sorted(self.loggers, key=_opens_late):
                _ = getattr(logger, "experiment", None)
        self._share_log_dir()
        self.strategy.barrier("pre_setup")
        if self.datamodule is not None:
            adapt_to_signature(self.datamodule.setup, self.datamodule.setup, ("stage",))(stage)
        self.hooks.setup(stage)
        self.strategy.barrier("post_setup")

    def compile_hooks(self) -> HookPlan:
        """The plan of who listens to which hook, made anew if an object or a method of one has changed."""
        self.hooks = update_plan(vars(self).get("hooks"), self)
        return self.hooks

    # ------------------------------------------------------------------ what the loops ask for

    def read_optimizers(self, module: LightningModule) -> tuple[list[Any], list[Any]]:
        """What `configure_optimizers` returned, as two lists; asked by the strategy."""
        with self.book.inside("configure_optimizers"):
            answer = module.configure_optimizers()
        self.__dict__.pop("_lightning_optimizers", None)
        return read_optimizers(module, answer)

    @property
    def lightning_optimizers(self) -> list[LightningOptimizer]:
        """The optimizers, wrapped so that a step knows about hooks, precision and counting."""
        found = self.__dict__.get("_lightning_optimizers")
        if found is None:
            found = [o if isinstance(o, LightningOptimizer) else LightningOptimizer(o) for o in self.optimizers]
            self.__dict__["_lightning_optimizers"] = found
        return found

    def replace_lr_schedulers(self, configs: list[LRSchedulerConfig]) -> None:
        """From now on these are the schedulers of the run."""
        self.lr_scheduler_configs[:] = configs  # in place: others hold this list
        self.fit_loop.schedulers.refresh()

    def report(self, values: dict[str, Any], step: int | None = None, with_epoch: bool = False) -> dict[str, float]:
        """Fetches logged values in one transfer (sync) and sends them to the loggers."""
        if not values or (not self.loggers and not self.state.stage.evaluating):  # type: ignore[union-attr]
            return {}
        numbers = fetch_numbers(values)
        self.book.sent_to_loggers = numbers
        if self.loggers:
            self.log_to_loggers(dict(numbers), step, with_epoch)
        return numbers

    def log_to_loggers(self, metrics: dict[str, float], step: int | None = None, with_epoch: bool = False) -> None:
        """Sends plain numbers to every logger.

        Arguments:
            step: the x axis; by default the loggers' own counter.
            with_epoch: adds the epoch as a metric, unless there is one called "step": it is the x axis then.
        """
        if with_epoch and "step" in metrics:
            step = int(metrics.pop("step"))
        elif with_epoch:
            metrics.setdefault("epoch", self.current_epoch)
        if step is None:
            step = self.progress.log_step
        for logger in self.loggers:
            logger.log_metrics(metrics=metrics, step=step)
            logger.save()

    def mode_hook(self, hook: str, otherwise: Callable[[], Any]) -> None:
        """One of the hooks that switch the module's mode: the user's version, or what we do without one."""
        if overrides_method(self.lightning_module, hook, LightningModule):
            getattr(self.hooks, hook)()
        else:
            otherwise()

    def open_trials(self, callbacks: Sequence[Callback], **limits: int | float) -> AbstractContextManager[Trials]:
        """Inside, trials of the verb that runs can be run, with these callbacks; afterwards everything is as it was.

        Arguments:
            limits: `limit_train_batches` and the like, for the trials.
        """
        return loops.open_trials(self, callbacks, limits)

    @property
    def prediction_writers(self) -> list[Any]:
        """Callbacks that write predictions."""
        return [callback for callback in self.callbacks if hasattr(callback, "write_on_batch_end")]

    # ------------------------------------------------------------------ files and small things

    def save_checkpoint(
        self, filepath: str | os.PathLike[str], weights_only: bool | None = None, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint; every process must call this.

        Arguments:
            filepath: Where to; local folders are made.
            weights_only: Leave out callbacks, optimizers, schedulers and precision.
            storage_options: Handed to the `CheckpointIO`.

        Raises:
            AttributeError: before a module was given to this Trainer.
        """
        if self.lightning_module is None:
            raise AttributeError(
                "There is nothing to save: no model is attached to this Trainer yet. "
                "Call `trainer.fit`, `validate`, `test` or `predict` first."
            )
        if self._elsewhere:
            what = f"No checkpoint is written to {os.fspath(filepath)!r}: the run was in other processes, and here are"
            rank_zero_warn(
                f"{what} the weights from before it. `on_exception` runs there too, and saves what they had."
            )
            return
        if self.strategy.aborting and self.strategy.save_is_collective:
            what = f"No checkpoint is written to {os.fspath(filepath)!r}: the weights are spread over processes,"
            rank_zero_warn(f"{what} and this one ends because of an exception. Resume from the last one before.")
            return
        with self.profiler.profile("save_checkpoint"):
            checkpoint = collect_checkpoint(self, bool(weights_only))
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            if self.state.status != TrainerStatus.RUNNING:
                self.strategy.finish_saving()  # nobody else would wait for it
            self.strategy.barrier("Trainer.save_checkpoint")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on one process per node; the arguments are those of Python's `print`."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Modules created inside are made on the device and in the dtype of the run.

        Arguments:
            empty_init: Leave their memory uninitialised, because a checkpoint will fill it.

        Examples:
            >>> import torch
            >>> trainer = Trainer(accelerator="cpu", precision="64-true", logger=False)
            >>> with trainer.init_module():
            ...     layer = torch.nn.Linear(4, 1)
            >>> layer.weight.dtype
            torch.float64
        """
        return self.strategy.tensor_init_context(empty_init=empty_init)

    def _claim_log_dirs(self) -> None:
        """The first process finds folders for logs that no other run has; all know them."""
        versions = self.strategy.broadcast(claim_versions(self.loggers) if self.is_global_zero else [])
        for logger, version in zip((one for one in self.loggers if isinstance(one, FolderLogger)), versions):
            logger._version = version

    def _share_log_dir(self) -> None:
        if self.world_size > 1:
            self._log_dir = None
            self._log_dir = self.strategy.broadcast(self.log_dir)


def _opens_late(logger: Logger) -> bool:
    """Is it opened after those whose libraries watch what others write?"""
    return not (hasattr(logger, "opens_first") and logger.opens_first)


def _check_model(name: str, model: object) -> LightningModule:
    """The module to run, out of what `torch.compile` made of it; a TypeError for anything else."""
    if is_compiled(model):
        model = from_compiled(model)
    if not isinstance(model, LightningModule):
        raise TypeError(
            f"`{name}()` requires a `LightningModule`, got: {describe_received(model)}. "
            "Pass an instance of a class derived from `fulmen.LightningModule`."
        )
    if "_modules" not in vars(model):
        raise TypeError(missing_super_init(model))
    return model


def _check_data(name: str, datamodule: object, loaders: dict[str, Any]) -> LightningDataModule | None:
    """The datamodule, if one was passed; an error for anything else, or for loaders beside it."""
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise TypeError(
            f"`{name}(datamodule=...)` requires a `LightningDataModule`, got: {describe_received(datamodule)}. "
            "Pass an instance of a class derived from `fulmen.LightningDataModule`."
        )
    if any(isinstance(loader, LightningDataModule) for loader in loaders.values()):
        raise TypeError(f"`{name}` received a datamodule in place of loaders. Pass it as `datamodule=`.")
    if datamodule is not None and any(loader is not None for loader in loaders.values()):
        raise MisconfigurationException(
            f"`{name}` received loaders and a datamodule at the same time. Pass one of the two."
        )
    return datamodule


_INTERNAL = frozenset([
    "book", "compile_hooks", "first_train_loader", "hooks", "lightning_optimizers", "log_to_loggers", "mode_hook",
    "open_trials", "optimization", "pack_results", "prediction_writers", "progress", "read_optimizers", "report",
    "resume_state", "signals",
    "sources", "unpack_results", "val_check_time_s", "validation_schedule",
])  # fmt: skip
