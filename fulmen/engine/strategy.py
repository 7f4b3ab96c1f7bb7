"""`Strategy`: where parameters, gradients and batches go. It has an accelerator, a precision and a place to store files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fulmen.engine.accelerators import Accelerator, Registry
from fulmen.engine.precision import Precision
from fulmen.storage.async_io import AsyncCheckpointIO
from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO, load_with
from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.introspection import alias_property, overrides_method
from fulmen.utilities.keywords import KeywordHints
from fulmen.utilities.modules import call_as_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch.distributed import ProcessGroup
    from torch.nn import Module
    from torch.optim import Optimizer

    from fulmen.engine.buffers import Buffers
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.collectives import ReduceOp
    from fulmen.engine.launch import Launcher, ReportError
    from fulmen.engine.sync_batchnorm import LayerSync
    from fulmen.module import LightningModule
    from fulmen.supervision.protocols import SupervisedRun
    from fulmen.supervision.watchdog import Watchdog
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH, LRSchedulerConfig

T = TypeVar("T")

# How the precision's context around a step is called, where it is not called like the step.
STEP_CONTEXTS = {"training_step": "train_step", "validation_step": "val_step"}


def _move_batch(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    return move_data_to_device(batch, device)


def _call_wrapped_step(name: str) -> Callable[..., Any]:
    """A step of the strategy, for subclasses that extend it: the module's, called as the strategy calls it."""
    return lambda self, *args, **kwargs: self.wrap_step(name)(*args, **kwargs)


class Strategy(KeywordHints, ABC):
    """The machine a model runs on. Fires no hooks: what must happen between its own acts is handed to it.

    Parts that are left out (None) are chosen by `engine.resolve`. Between processes nothing is exchanged: a strategy
    that has several overrides `barrier`, `broadcast`, `reduce`, `reduce_boolean_decision` and `all_gather`.
    """

    strategy_name = "strategy"
    global_rank: int = 0  # index of this process over all nodes
    local_rank: int = 0  # on its node
    node_rank: int = 0
    world_size: int = 1  # processes over all nodes
    buffers: Buffers | None = None  # of a module that several processes train
    report_to_parent: ReportError | None = None  # tells a launcher why this process ends, if it cannot see it
    watchdog_timeout_s: float | None = None  # seconds; None asks FULMEN_WATCHDOG_TIMEOUT_S, and 0 means no watchdog
    handles_gradient_accumulation = False  # are accumulation windows kept inside the strategy?
    forbids_inference_tensors = False  # do collectives refuse tensors made in inference mode?
    watchdog: Watchdog | None = None  # of a run on several processes
    defers_gradient_reduction = False  # are gradients of an accumulation window out of reach before they are reduced?
    save_is_collective = False  # do all processes have to write a checkpoint together?
    aborting = False  # does an exception end this process's part in the run?
    forward_is_collective = False  # do all processes have to run a forward pass together?
    collectives_blocked_reason: str | None = None  # of an error, while some process has no batch and takes no part
    restore_checkpoint_after_setup = False  # can weights only be loaded once the model is wrapped?
    parallel_devices: list[torch.device] | None  # of the processes on this node, for strategies that may have several
    is_distributed = False  # do several processes train the model together?
    start_method: str = ""  # how processes are started, for those strategies that start them
    lightning_restore_optimizer = True  # are optimizer states taken from the checkpoint's own list?

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        # Under the names that subclasses know. `resolve_strategy` fills what is None.
        self._accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._precision_plugin = precision_plugin
        self._launcher: Launcher | None = None
        self._lightning_module: Any = None
        self._model: Any = None
        self._optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[LRSchedulerConfig] = []
        self.cluster_environment: ClusterEnvironment | None = None
        self.run_backward: Callable[..., None] = self._precision_backward  # between `pre_` and `post_backward`
        self.transfer: Callable[..., Any] = _move_batch

    def __getstate__(self) -> dict[str, Any]:
        # Without what a run put in.
        return {**vars(self), "run_backward": self._precision_backward, "transfer": _move_batch}

    @classmethod
    def register_strategies(cls, strategy_registry: Registry) -> None:
        """Adds this class to a registry, under its `strategy_name`."""
        strategy_registry.register(cls.strategy_name, cls, description=cls.__name__)

    def use_environment(self, environment: ClusterEnvironment) -> None:
        """Who this process is among others."""
        self.cluster_environment = environment

    def given_parts(self) -> dict[str, Any]:
        """The parts it was made with, by the name of the argument."""
        return {
            "accelerator": self._accelerator,
            "precision_plugin": self._precision_plugin,
            "checkpoint_io": self._checkpoint_io,
            "cluster_environment": self.cluster_environment,
        }

    def use_devices(self, devices: list[torch.device]) -> None:
        """The devices of this node's processes, for a strategy with `parallel_devices` that was made without."""
        if hasattr(self, "parallel_devices") and self.parallel_devices is None:
            self.parallel_devices = devices

    def use_nodes(self, num_nodes: int, layer_sync: LayerSync | None) -> None:
        """How many machines there are, and what synchronises layers over them while fitting."""

    def configure_launcher(self) -> None:
        """Chooses who starts the processes of a run; subclasses override `_configure_launcher`."""
        self._configure_launcher()

    def _configure_launcher(self) -> None:
        """Nobody: this process is enough."""

    def precision_for(self, name: str) -> Precision | None:
        """The precision of that name, where this strategy needs one of its own."""
        return None

    def use_hardware(self, accelerator: Accelerator, checkpoint_io: CheckpointIO | None) -> None:
        """Where it runs, and where checkpoints are stored; by default where the class says, or in files."""
        self.accelerator = accelerator
        if checkpoint_io is not None:
            self.checkpoint_io = checkpoint_io
        elif self.checkpoint_io is None:
            self.checkpoint_io = TorchCheckpointIO()

    def use_precision(self, precision: Precision, restore_after_setup: bool) -> None:
        """In which numbers it computes, and whether weights can be loaded only after that changed the model."""
        self.precision_plugin = precision
        if restore_after_setup:
            self.restore_checkpoint_after_setup = True

    def use_backward(self, run_backward: Callable[..., None]) -> None:
        """Between `pre_backward` and `post_backward`, this runs instead: the training loop's own, which fires hooks."""
        self.run_backward = run_backward

    def attach_module(self, module: LightningModule) -> None:
        """The user's module, of the run that begins; also where a class shows it as a property that cannot be set."""
        self._lightning_module = module

    def check_gradients(self) -> None:
        """After the first backward pass: an error if gradients are missing that others wait for."""

    def use_transfer(self, transfer: Callable[[Any, torch.device, int], Any] | None) -> None:
        """What moves a batch to a device, given the loader's index too; None is the usual way."""
        self.transfer = transfer or _move_batch

    # Properties, so that a subclass may have its own.
    accelerator: Accelerator = alias_property("_accelerator", "The kind of device.")
    checkpoint_io: CheckpointIO = alias_property("_checkpoint_io", "Stores checkpoints.")
    precision_plugin: Precision = alias_property("_precision_plugin", "In which numbers the model computes.")
    launcher: Launcher | None = alias_property("_launcher", "Starts the processes; None when this one is enough.")
    model: Any = alias_property("_model", "The model as it is called, wrapped if the strategy wraps.")
    optimizers: list[Optimizer] = alias_property("_optimizers", "The optimizers of this run.")
    lightning_module: LightningModule | None = alias_property("_lightning_module", "The user's module, never wrapped.")

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """The device of this process."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this process speaks for all."""
        return self.global_rank == 0

    def setup_environment(self) -> None:
        """Prepares the device, before any user hook runs."""
        self.accelerator.setup_device(self.root_device)

    def connect(self, model: Module) -> None:
        """The module of this run."""
        self._lightning_module = self.model = model

    def setup(self, trainer: Trainer) -> None:
        """Puts the model into place and, for fit, builds its optimizers."""
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.wrap_model(trainer)
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Asks the module for its optimizers and schedulers, through the trainer."""
        self.optimizers, self.lr_scheduler_configs = trainer.read_optimizers(self._lightning_module)

    def setup_precision_plugin(self) -> None:
        """Lets the precision have the last word on model and optimizers."""
        connected = self.precision_plugin.connect(self.model, self.optimizers, self.lr_scheduler_configs)
        self.model, self.optimizers, self.lr_scheduler_configs = connected

    def teardown(self) -> None:
        """Back to the CPU, so that a finished run holds no device memory."""
        if self.root_device.type != "cpu":
            self.move_to_cpu()
        if self.aborting and isinstance(self.checkpoint_io, AsyncCheckpointIO):
            self.checkpoint_io.drain_jobs()  # does not hide why the run ends
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def move_to_cpu(self) -> None:
        """Moves the module and the states of optimizers off the device."""
        for optimizer in self.optimizers:
            move_optimizer_state(optimizer, torch.device("cpu"))
        if self._lightning_module is not None:
            self._lightning_module.cpu()

    @abstractmethod
    def model_to_device(self) -> None:
        """Moves the model to the root device."""

    def wrap_model(self, trainer: Trainer) -> None:
        """Puts around the model what exchanges it or its gradients with other processes, before optimizers are made."""

    def agree_to_stop(self, batch_position: tuple[int, int]) -> bool:
        """A signal came: does the run stop here? All processes reach the same, rising positions."""
        return True

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """Tensors and modules created inside are made on the device, in the dtype of the run.

        With ``empty_init`` weights are left uninitialised, because a checkpoint will fill them.
        """
        skip = _SkipInit() if empty_init else nullcontext()
        with self.root_device, self.precision_plugin.module_init_context(), skip:
            yield

    def model_sharded_context(self) -> AbstractContextManager[Any]:
        """Entered around `configure_model`."""
        return nullcontext()

    def bind_step(self, step_name: str) -> Callable[..., Any]:
        """The cheapest correct callable for a step: the module's method, unless a subclass overrides ours."""
        overridden = overrides_method(self, step_name, Strategy)
        step: Callable[..., Any] = getattr(self, step_name) if overridden else self.wrap_step(step_name)
        return step

    def wrap_step(self, step_name: str) -> Callable[..., Any]:
        """The module's step, called through the forward pass of what a strategy put around the module."""
        step: Callable[..., Any] = getattr(self._lightning_module, step_name)
        if self.model is self._lightning_module:
            return step
        return call_as_forward(self._lightning_module, lambda *args, **kwargs: self.model(*args, **kwargs), step)

    def _forward_redirection(self, wrapper: Module, module: Module, step_name: str, *args: Any, **kwargs: Any) -> Any:
        """A step of a module called through the forward pass of its wrapper, for subclasses that do it themselves."""
        return call_as_forward(module, wrapper, getattr(module, step_name))(*args, **kwargs)

    def step_context(self, step_name: str) -> Callable[[], AbstractContextManager[Any]] | None:
        """The precision's context around a step; None if it has none, so that nothing is entered."""
        for name in (STEP_CONTEXTS.get(step_name, step_name) + "_context", "forward_context"):
            if overrides_method(self.precision_plugin, name, Precision):
                context: Callable[[], AbstractContextManager[Any]] = getattr(self.precision_plugin, name)
                return context
        return None

    training_step = _call_wrapped_step("training_step")
    validation_step = _call_wrapped_step("validation_step")
    test_step = _call_wrapped_step("test_step")
    predict_step = _call_wrapped_step("predict_step")

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The batch on `device` (default: the root device)."""
        return self.transfer(batch, device or self.root_device, dataloader_idx)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Scales, backpropagates (with the hooks around it) and returns the loss that was used."""
        self.pre_backward(closure_loss)
        scaled = self.precision_plugin.pre_backward(closure_loss, self._lightning_module)
        self.run_backward(scaled, optimizer, *args, **kwargs)
        scaled = self.precision_plugin.post_backward(scaled, self._lightning_module)
        self.post_backward(scaled)
        return scaled

    def _precision_backward(self, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:
        self.precision_plugin.backward(loss, self._lightning_module, optimizer, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Module | None = None, **kwargs: Any
    ) -> Any:
        """Runs the closure, if there is one, and applies the update, as the precision wants it done."""
        model = model or self._lightning_module
        return self.precision_plugin.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, gradients are not exchanged between processes."""
        return nullcontext()

    def zero_loss(self) -> Tensor | None:
        """A loss of 0 whose backward pass takes part in those of other processes; None if only a whole step does."""
        return None

    def use_rank_zero_buffers(self) -> None:
        """Validation begins: until `restore_own_buffers`, all processes have the buffers that a checkpoint would hold."""

    def restore_own_buffers(self) -> None:
        """Validation is over: each process has those again that it trains with."""

    def process_dataloader(self, dataloader: T) -> T:
        """A last change to a loader."""
        return dataloader

    def block_collectives(self, reason: str | None) -> None:
        """Lets collectives raise a RuntimeError with this reason, because not all processes would take part; None: no more."""
        self.collectives_blocked_reason = reason

    @contextmanager
    def allow_collectives(self) -> Generator[None]:
        """Inside, collectives run even while they are blocked, because all processes take part in these."""
        reason = self.collectives_blocked_reason
        self.collectives_blocked_reason = None
        try:
            yield
        finally:
            self.collectives_blocked_reason = reason

    def barrier(self, name: str | None = None) -> None:
        """Waits until every process is here."""

    def barrier_without_timeout(self, name: str) -> None:
        """`barrier` for where others may take hours."""
        if self.world_size > 1:
            self.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """The object of process `src`, everywhere."""
        return obj

    def exchange_objects(self, obj: T) -> list[T]:
        """The objects of all processes, by rank; they are pickled."""
        return [self.broadcast(obj, src) for src in range(self.world_size)] if self.world_size > 1 else [obj]

    def on_rank_zero(self, act: Callable[[], Any], what: str) -> None:
        """Does something on rank 0; an error there is one of all processes."""
        problem: Exception | None = None
        try:
            if self.is_global_zero:
                act()
        except Exception as error:
            problem = error
        report = None if problem is None else (type(problem).__name__, str(problem), isinstance(problem, OSError))
        report = self.broadcast(report)
        if problem is not None:
            raise problem
        if report is not None:
            name, text, is_os_error = report
            raise (OSError if is_os_error else RuntimeError)(f"Rank 0 could not {what}: {name}: {text}")

    def reduce(
        self, tensor: Tensor | Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = "mean"
    ) -> Any:
        """The same value on every process, combined element-wise; non-tensors come back unchanged."""
        return tensor

    def all_gather(self, tensor: Tensor, group: ProcessGroup | None = None, sync_grads: bool = False) -> Tensor:
        """The tensors of all processes along a new first dimension."""
        return tensor

    def check_equal_shapes(self, tensors: list[Tensor], group: ProcessGroup | None = None) -> None:
        """Raises on all processes if they have tensors of different shapes."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes (or any, with `all=False`) say yes."""
        return decision

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights and buffers under the names of the user's module."""
        state: dict[str, Any] = self._lightning_module.state_dict()
        return state

    def state_to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state dict of the module, or one like it, as a checkpoint holds it; all processes call this."""
        return state

    def state_from_checkpoint(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A state dict of a checkpoint, as this process has one; all processes call this."""
        return saved

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Puts the weights of a checkpoint into the module."""
        self._lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of one optimizer."""
        wrapped: Optimizer = optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
        return wrapped.state_dict()

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Puts the optimizer states of a checkpoint back; a `RuntimeError` if it holds another number of them."""
        states = checkpoint["optimizer_states"]
        own = self.optimizers
        if len(states) != len(own):
            what = f"The checkpoint has {len(states)} optimizers, but `configure_optimizers` returned {len(own)}."
            raise RuntimeError(
                f"{what} Return those of the saved run, or only take its weights: `load_from_checkpoint`."
            )
        for optimizer, state in zip(own, states):
            with self.precision_plugin.state_context(optimizer):
                optimizer.load_state_dict(state)
            move_optimizer_state(optimizer, self.root_device)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint, on one process."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint onto the CPU."""
        return load_with(self.checkpoint_io, checkpoint_path, "cpu", weights_only)

    def verify_checkpoint(self, checkpoint_path: _PATH) -> None:
        """Raises `DamagedCheckpointError` if a checkpoint is not whole; nothing is loaded."""
        self.checkpoint_io.verify_checkpoint(checkpoint_path)

    def remove_checkpoint(self, filepath: _PATH) -> None:
        """Deletes a checkpoint, on one process."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def finish_saving(self) -> None:
        """Waits until what is saved in the background is written, and raises if it could not be."""
        if self.is_global_zero and isinstance(self.checkpoint_io, AsyncCheckpointIO):
            self.checkpoint_io.wait()

    def abort(self, error: BaseException) -> BaseException:
        """An exception ends this process's part in the run: nobody waits for others now. Returns the real reason."""
        self.abort_collectives()
        if isinstance(self.checkpoint_io, AsyncCheckpointIO):
            self.checkpoint_io.drain_jobs()  # it was logged if that failed, and the exception is what counts now
        return error if self.watchdog is None else self.watchdog.handle_failure(error)

    def abort_collectives(self) -> None:
        """From now on they do nothing: this process leaves the run."""
        self.aborting = True

    def start_watchdog(self, run: SupervisedRun) -> None:
        """The processes have met: from now on, one that fails is found out."""

    def stop_watchdog(self) -> None:
        """The run is over, however it ended."""
        watchdog = self.watchdog
        self.watchdog = None
        if watchdog is not None:
            watchdog.stop()

    # Called at their moments; `on_exception` after the callbacks heard of it, before teardown.
    def pre_backward(self, closure_loss: Tensor) -> None: ...
    def post_backward(self, closure_loss: Tensor) -> None: ...
    def post_training_step(self) -> None: ...
    def on_exception(self, exception: BaseException) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...


def move_optimizer_state(optimizer: Optimizer, device: torch.device) -> None:
    """Moves the tensors of an optimizer's state; "step" counters stay where the optimizer keeps them."""
    for state in vars(optimizer).get("state", {}).values():
        for name, value in state.items() if isinstance(state, dict) else ():
            if name != "step":
                state[name] = move_data_to_device(value, device)


class _SkipInit(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, FunctionType) and func.__module__ == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
