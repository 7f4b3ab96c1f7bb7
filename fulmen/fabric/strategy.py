"""`Strategy` as Fabric uses it: the engine's strategies, which are handed modules and optimizers instead of a Trainer."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fulmen.engine import parallel as engine_parallel
from fulmen.engine import strategy as engine_strategy
from fulmen.engine import strategy_registry as engine_registry
from fulmen.engine.accelerators import Accelerator, Registry
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import Precision
from fulmen.fabric.checkpoint import collect_states, load_object, load_states
from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO
from fulmen.utilities.introspection import overrides_method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim.lr_scheduler import LRScheduler

    from fulmen.engine.collectives import ReduceOp
    from fulmen.fabric.checkpoint import Filter
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH


class Strategy(engine_strategy.Strategy):
    """Where modules, gradients and batches of a `Fabric` go.

    It is the engine's strategy with other words for the same acts: modules and optimizers are handed to `setup_module`
    and `setup_optimizer`, and a checkpoint is whatever state the user puts together.

    Arguments:
        accelerator: the kind of device; by default what Fabric chooses.
        checkpoint_io: stores checkpoints; by default files.
        precision: in which numbers to compute; by default 32 bits.
    """

    setup_is_joint = False  # can a module and its optimizer only be set up together?
    has_own_backward = False  # does only `backward` know how to backpropagate?
    backward_is_prepared = False  # is `backward` running?
    _checkpoint_io: CheckpointIO | None = None

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision)

    # ------------------------------------------------------------------ parts

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Stores checkpoints: as files, unless another one was given."""
        given = self._checkpoint_io
        if given is None:
            given = self._checkpoint_io = TorchCheckpointIO()
        return given

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def precision(self) -> Precision:
        """In which numbers modules compute: in 32 bits, unless another one was given."""
        if self._precision_plugin is None:
            self.precision_plugin = Precision()
        return self.precision_plugin

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self.precision_plugin = precision

    # ------------------------------------------------------------------ setting up

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """Tensors created inside are made on the device, in the dtype of the precision."""
        with self.root_device, self.precision.tensor_init_context():
            yield

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """Modules created inside are made where, in the dtype, and as far as the strategy wants them.

        With ``empty_init`` weights are left uninitialised, because a checkpoint will fill them.
        """
        self.precision_plugin = self.precision  # the engine's context needs one, also where none was given
        with super().tensor_init_context(empty_init), self.module_sharded_context():
            yield

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """The part of `module_init_context` that concerns sharding."""
        return nullcontext()

    def setup_module(self, module: Module) -> Module:
        """What is called in place of a module: a wrapper, where the strategy exchanges gradients."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """What is stepped in place of an optimizer."""
        self.precision.watch_optimizer(optimizer)
        return optimizer

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: LRScheduler | None = None
    ) -> tuple[Module, list[Optimizer], LRScheduler | None]:
        """Both at once, in the order in which they were given, for strategies that need to know them together."""
        wrapped = self.setup_module(module)
        return wrapped, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def module_to_device(self, module: Module) -> None:
        """Moves a module to the device of this process."""
        module.to(self.root_device)

    def model_to_device(self) -> None:
        self.module_to_device(self.model)

    def setup(self, trainer: Trainer) -> None:
        """Refuses a Trainer.

        Raises:
            TypeError: always; a Trainer needs the class of the same name in `fulmen.strategies`.
        """
        name = type(self).__name__
        what = f"`fulmen.fabric.strategies.{name}` works with `Fabric`, not with `Trainer`."
        raise TypeError(f"{what} Use `fulmen.strategies.{name}`.")

    @classmethod
    def register_strategies(cls, strategy_registry: Registry) -> None:
        """Adds the names that mean this class."""
        for name, (path, init) in STRATEGY_NAMES.items():
            if path.endswith(f":{cls.__name__}"):
                strategy_registry.register(name, cls, description=cls.__name__, **init)

    # ------------------------------------------------------------------ steps

    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Scales the loss if the precision does so, and backpropagates.

        Arguments:
            tensor: the loss.
            module: the module that it comes from, for precisions that want to know.
            args: passed to `Tensor.backward`, like `kwargs`.
        """
        precision = self.precision
        scaled = precision.pre_backward(tensor, module)  # type: ignore[arg-type]
        scaled = tensor if scaled is None else scaled
        with self.preparing_backward():
            if overrides_method(precision, "backward", Precision):
                precision.backward(scaled, module, *args, **kwargs)  # type: ignore[arg-type]
            else:
                scaled.backward(*args, **kwargs)
        precision.post_backward(scaled, module)  # type: ignore[arg-type]

    @contextmanager
    def preparing_backward(self) -> Generator[None]:
        """Around a backward pass that this strategy makes: `loss.backward()` is right there."""
        before = self.backward_is_prepared
        self.backward_is_prepared = True
        try:
            yield
        finally:
            self.backward_is_prepared = before

    def clip_gradients_norm(
        self,
        module: Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Scales the gradients of an optimizer together, so that their norm is at most `max_norm`.

        Returns:
            The norm before, on its device.

        Raises:
            RuntimeError: it is infinite or not a number, unless `error_if_nonfinite` is False.
        """
        self.precision.unscale_gradients(optimizer)
        norm = self.precision.clip_grad_by_norm(optimizer, max_norm, norm_type, error_if_nonfinite)
        assert norm is not None
        return norm

    def clip_gradients_value(self, module: Module, optimizer: Optimizer, clip_val: float) -> None:
        """Clamps every element of the gradients of an optimizer to [-clip_val, clip_val]."""
        self.precision.unscale_gradients(optimizer)
        self.precision.clip_grad_by_value(optimizer, float(clip_val))

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:  # type: ignore[override]
        """Applies the update, as the precision wants it done; returns what `Optimizer.step` does.

        Arguments:
            optimizer: the one to step.
            kwargs: of `Optimizer.step`, such as a ``closure``.
        """
        return self.precision.optimizer_step(optimizer, **kwargs)

    def all_reduce(
        self, tensor: Tensor | Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = "mean"
    ) -> Any:
        """The same value on every process, combined element-wise; what is not a tensor comes back unchanged."""
        return self.reduce(tensor, group, reduce_op)

    # ------------------------------------------------------------------ states and files

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        """Weights and buffers, under the names of the module that was set up."""
        return module.state_dict()

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Puts weights and buffers back, as `Module.load_state_dict` does."""
        module.load_state_dict(state_dict, strict=strict)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer; one that spreads it over processes has it on rank 0 only."""
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
            return optimizer.state_dict() if self.is_global_zero else {}
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Puts the state of an optimizer back."""
        with self.precision.state_context(optimizer):
            optimizer.load_state_dict(state)
        engine_strategy.move_optimizer_state(optimizer, self.root_device)

    def save_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: dict[str, Module | Optimizer | Any],
        storage_options: Any = None,
        filter: dict[str, Filter] | None = None,
    ) -> None:
        """Writes a checkpoint; all processes call this.

        Arguments:
            path: where to.
            state: of modules, optimizers and whatever else has a `state_dict`, that is saved; other values are as they are.
            storage_options: for the `CheckpointIO`.
            filter: by key of `state`, which entries of that state dict are saved: `keeps(name, value) -> bool`.
        """
        super().save_checkpoint(collect_states(self, state, filter or {}), path, storage_options)

    def load_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: Module | Optimizer | dict[str, Module | Optimizer | Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a checkpoint, and puts it into modules, optimizers and whatever else has a `load_state_dict`.

        Arguments:
            path: of the checkpoint.
            state: what is filled, under the keys of the file, and where plain values are replaced; or one module or
                optimizer, for a file that is its state dict; or nothing.
            strict: must the file have all keys of `state`, and all names of a module?
            weights_only: False also builds objects of any class, whose code runs then; only for files you trust.

        Returns:
            What of the file was not put anywhere.

        Raises:
            KeyError: `state` has a key that the file has not.
        """
        content = super().load_checkpoint(path, weights_only)
        if isinstance(state, (Module, Optimizer)):
            load_object(self, state, content, strict)
            return {}
        return load_states(self, state, content, strict) if state else content


class SingleDeviceStrategy(Strategy, engine_registry.SingleDeviceStrategy):
    """One process, one device.

    Arguments:
        device: "cpu", "cuda:0", a `torch.device` ...

    >>> strategy = SingleDeviceStrategy("cpu")
    >>> strategy.save_checkpoint("net.ckpt", {"net": torch.nn.Linear(2, 1), "epoch": 3})
    >>> strategy.load_checkpoint("net.ckpt")["epoch"]
    3
    """

    def __init__(
        self,
        device: torch.device | str | int = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        engine_registry.SingleDeviceStrategy.__init__(self, device, accelerator, checkpoint_io, precision)

    def all_reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """The value as it is: there is no other process."""
        return tensor

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is nobody to wait for."""

    def model_to_device(self) -> None:
        self.module_to_device(self.model)


class ParallelStrategy(Strategy, engine_parallel.ParallelStrategy):  # type: ignore[misc]
    """One process per device, each with the whole program and a part of the data."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        engine_parallel.ParallelStrategy.__init__(
            self, accelerator, parallel_devices, cluster_environment, checkpoint_io, precision
        )


# Names that mean a strategy, the class, and the arguments it is made with. It is imported when it is chosen.
_DDP = "fulmen.fabric.ddp:DDPStrategy"
_FSDP = "fulmen.fabric.sharded:FSDPStrategy"
_DEEPSPEED = "fulmen.fabric.deepspeed:DeepSpeedStrategy"
_OFFLOAD: dict[str, Any] = {"offload_optimizer": True, "offload_parameters": True}
_NVME = {"remote_device": "nvme", "offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
STRATEGY_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": (_DDP, {"start_method": "popen"}),
    "ddp_spawn": (_DDP, {"start_method": "spawn"}),
    "ddp_fork": (_DDP, {"start_method": "fork"}),
    "ddp_notebook": (_DDP, {"start_method": "fork"}),
    "ddp_find_unused_parameters_true": (_DDP, {"find_unused_parameters": True, "start_method": "popen"}),
    "dp": ("fulmen.fabric.ddp:DataParallelStrategy", {}),
    "fsdp": (_FSDP, {}),
    "fsdp_cpu_offload": (_FSDP, {"cpu_offload": True}),
    "deepspeed": (_DEEPSPEED, {}),
    "deepspeed_stage_1": (_DEEPSPEED, {"stage": 1}),
    "deepspeed_stage_1_offload": (_DEEPSPEED, {"stage": 1, "offload_optimizer": True}),
    "deepspeed_stage_2": (_DEEPSPEED, {"stage": 2}),
    "deepspeed_stage_2_offload": (_DEEPSPEED, {"stage": 2, "offload_optimizer": True}),
    "deepspeed_stage_3": (_DEEPSPEED, {"stage": 3}),
    "deepspeed_stage_3_offload": (_DEEPSPEED, {"stage": 3, **_OFFLOAD}),
    "deepspeed_stage_3_offload_nvme": (_DEEPSPEED, {"stage": 3, **_OFFLOAD, **_NVME}),
    "single_xla": ("fulmen.fabric.xla:SingleDeviceXLAStrategy", {}),
    "single_tpu": ("fulmen.fabric.xla:SingleDeviceXLAStrategy", {}),
    "xla": ("fulmen.fabric.xla:XLAStrategy", {}),
    "xla_fsdp": ("fulmen.fabric.xla:XLAFSDPStrategy", {}),
}
STRATEGY_REGISTRY = Registry("strategy", taken=ValueError)
for _name, (_path, _init) in STRATEGY_NAMES.items():
    STRATEGY_REGISTRY.register(_name, _path, description=_path.partition(":")[2], **_init)
