"""Names for XLA devices, such as TPUs. No such device is supported: making any of these objects says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.engine.accelerators import Accelerator, CPUAccelerator
from fulmen.engine.cluster import LightningEnvironment
from fulmen.engine.ddp import DDPStrategy
from fulmen.engine.precision import Precision
from fulmen.engine.strategy_registry import SingleDeviceStrategy
from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fulmen.engine.collectives import ReduceOp


def xla_error(made: object, instead: str) -> ModuleNotFoundError:
    """The error for making an object of XLA."""
    what = f"`{type(made).__name__}` is for XLA devices such as TPUs, which fulmen does not support."
    return ModuleNotFoundError(f"{what} Use {instead}.", name="torch_xla")


class XLAAccelerator(CPUAccelerator):
    """Stands for XLA devices, of which there are none here.

    >>> XLAAccelerator.is_available()
    False
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise xla_error(self, "`accelerator='auto'`")

    is_available = staticmethod(lambda: False)
    auto_device_count = staticmethod(lambda: 0)
    name = staticmethod(lambda: "tpu")


class XLAPrecision(Precision):
    """Stands for the numbers of XLA devices."""

    def __init__(self, precision: str = "32-true") -> None:
        raise xla_error(self, "`precision='bf16-true'` or another one")


class XLACheckpointIO(TorchCheckpointIO):
    """Stands for the storage of XLA devices."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise xla_error(self, "`TorchCheckpointIO`")


class XLAEnvironment(LightningEnvironment):
    """Stands for the processes of XLA devices.

    >>> XLAEnvironment.detect()
    False
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise xla_error(self, "`LightningEnvironment`")

    detect = staticmethod(lambda: False)


class SingleDeviceXLAStrategy(SingleDeviceStrategy):
    """Stands for training on one XLA device."""

    strategy_name = "single_xla"
    debug: bool

    def __init__(
        self,
        device: int | torch.device | str,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
    ) -> None:
        raise xla_error(self, "`SingleDeviceStrategy`")


class XLAStrategy(DDPStrategy):
    """Stands for training on several XLA devices."""

    strategy_name = "xla"
    debug: bool

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
        sync_module_states: bool = True,
        **_: Any,
    ) -> None:
        raise xla_error(self, "`DDPStrategy`")

    def reduce(
        self, output: Tensor | Any, group: ProcessGroup | None = None, reduce_op: ReduceOp | None = "mean"
    ) -> Any:
        return super().reduce(output, group, reduce_op)
