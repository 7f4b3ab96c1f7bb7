"""Public door: how Fabric splits work over devices and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "STRATEGY_REGISTRY", "DDPStrategy", "DataParallelStrategy", "DeepSpeedStrategy", "FSDPStrategy",
    "ModelParallelStrategy", "ParallelStrategy", "SingleDeviceStrategy", "SingleDeviceXLAStrategy", "Strategy",
    "XLAFSDPStrategy", "XLAStrategy",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.fabric.ddp import DataParallelStrategy, DDPStrategy
    from fulmen.fabric.deepspeed import DeepSpeedStrategy
    from fulmen.fabric.sharded import FSDPStrategy, ModelParallelStrategy
    from fulmen.fabric.strategy import STRATEGY_REGISTRY, ParallelStrategy, SingleDeviceStrategy, Strategy
    from fulmen.fabric.xla import SingleDeviceXLAStrategy, XLAFSDPStrategy, XLAStrategy
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.fabric.strategies.ddp`) can be served.
__path__: list[str] = []
