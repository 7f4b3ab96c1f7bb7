"""`DDPStrategy` of Fabric: gradients are averaged by torch's wrapper. `DataParallelStrategy`: one process, several GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import DataParallel, Module, parallel

from fulmen.engine import ddp as engine_ddp
from fulmen.engine import strategy as engine_strategy
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import Precision
from fulmen.fabric.strategy import ParallelStrategy
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.collections import apply_to_collection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fulmen.engine.collectives import ReduceOp

T = TypeVar("T")


class DDPStrategy(ParallelStrategy, engine_ddp.DDPStrategy):  # type: ignore[misc]
    """Torch's `DistributedDataParallel` around each module that is set up.

    Arguments:
        parallel_devices: one for each process of this node; by default those of Fabric.
        process_group_backend: "gloo", "nccl", ...; None takes what suits the device.
        timeout: how long a process waits for the others, when they meet and in each collective; None is 30 minutes.
        start_method: "popen" runs the script again for each device; "spawn", "fork" and "forkserver" run only the call.
        kwargs: further arguments of `DistributedDataParallel`.

    Raises:
        TypeError: for an argument that `DistributedDataParallel` does not have.

    >>> DDPStrategy(find_unused_parameters=True, start_method="spawn").start_method
    'spawn'
    """

    def __init__(
        self, accelerator: Accelerator | None = None, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None, process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30), start_method: str = "popen", **kwargs: Any,
    ) -> None:  # fmt: skip
        engine_ddp.DDPStrategy.__init__(
            self, accelerator, parallel_devices, cluster_environment, checkpoint_io, precision,
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method, **kwargs,
        )  # fmt: skip

    def setup_module(self, module: Module) -> parallel.DistributedDataParallel:
        """The wrapped module; weights and buffers of rank 0 are in all processes afterwards."""
        return engine_ddp.DistributedDataParallel(
            module, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs
        )

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, backward passes of the wrapped module keep their gradients to this process.

        Raises:
            TypeError: it is not a module that `setup_module` returned.
        """
        if not isinstance(module, parallel.DistributedDataParallel):
            what = f"`no_backward_sync` received a `{type(module).__name__}`, which exchanges no gradients."
            raise TypeError(f"{what} Pass the module that was set up.")
        return module.no_sync() if enabled else nullcontext()

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        return super().get_module_state_dict(unwrap_module(module))

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(unwrap_module(module), state_dict, strict)

    def zero_loss(self) -> None:
        """Nothing: uneven inputs are joined by a Trainer only."""


class DataParallelStrategy(ParallelStrategy):
    """One process that copies the module to all of its GPUs for each forward pass: torch's `DataParallel`.

    What the module returns is gathered on the first of them. `DDPStrategy` is faster.

    >>> DataParallelStrategy(parallel_devices=[torch.device("cpu")]).world_size
    1
    """

    strategy_name = "dp"
    is_distributed = False

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, None, checkpoint_io, precision)

    @property
    def root_device(self) -> torch.device:
        """The first device, where results are gathered."""
        return (self.parallel_devices or [torch.device("cpu")])[0]

    # One process, whatever the devices.
    num_processes = property(lambda self: 1, doc="Processes on this node.")
    world_size = property(lambda self: 1, doc="Processes over all nodes.")
    global_rank = property(lambda self: 0, doc="Index of this process over all nodes.")
    local_rank = property(lambda self: 0, doc="Index of this process on its node.")
    node_rank = property(lambda self: 0, doc="Index of this node.")
    distributed_sampler_kwargs = property(lambda self: None, doc="None: this process reads all of the data.")
    group_ready = property(lambda self: False, doc="False: there is no process group.")

    def _configure_launcher(self) -> None:
        """Nothing is launched."""

    def setup_environment(self) -> None:
        engine_strategy.Strategy.setup_environment(self)

    def setup_module(self, module: Module) -> DataParallel[Any]:
        return DataParallel(module, device_ids=self.parallel_devices)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """The batch as it is: the wrapper spreads it."""
        return batch

    def all_reduce(
        self, collection: Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = "mean"
    ) -> Any:
        """Each tensor averaged over its elements, which are those of the devices; in its own dtype."""
        return apply_to_collection(collection, Tensor, lambda tensor: tensor.float().mean().to(tensor.dtype))

    def get_module_state_dict(self, module: Module) -> dict[str, Any]:
        return super().get_module_state_dict(unwrap_module(module))

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        super().load_module_state_dict(unwrap_module(module), state_dict, strict)


def unwrap_module(module: Module) -> Module:
    """What torch's wrappers are around."""
    return module.module if isinstance(module, (parallel.DistributedDataParallel, DataParallel)) else module
