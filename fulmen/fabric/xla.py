"""Names of Fabric's strategies for XLA devices, which are not supported: making any of them says so."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from fulmen.engine.accelerators import Accelerator
from fulmen.engine.precision import Precision
from fulmen.engine.xla import xla_error
from fulmen.fabric.ddp import DDPStrategy
from fulmen.fabric.strategy import SingleDeviceStrategy
from fulmen.storage.checkpoint_io import CheckpointIO

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fulmen.engine.collectives import ReduceOp
    from fulmen.engine.fsdp import Policy


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    """Stands for one XLA device."""

    def __init__(
        self,
        device: int | torch.device | str = 0,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
    ) -> None:
        raise xla_error(self, "`SingleDeviceStrategy`")


class XLAStrategy(DDPStrategy):
    """Stands for several XLA devices."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        sync_module_states: bool = True,
    ) -> None:
        raise xla_error(self, "`DDPStrategy`")

    def all_reduce(
        self, output: Tensor | Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = None
    ) -> Any:
        return super().all_reduce(output, group, reduce_op)


class XLAFSDPStrategy(XLAStrategy):
    """Stands for parameters that are spread over XLA devices."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        auto_wrap_policy: Policy | None = None,
        activation_checkpointing_policy: type[Module] | None = None,
        state_dict_type: Literal["full", "sharded"] = "sharded",
        sequential_save: bool = False,
        **kwargs: Any,
    ) -> None:
        raise xla_error(self, "`FSDPStrategy`")

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Entered where a module is made."""
        return self.model_sharded_context()
