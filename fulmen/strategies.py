"""Public door: where parameters, gradients and batches go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "ParallelStrategy",
    "SingleDeviceStrategy", "SingleDeviceXLAStrategy", "Strategy", "StrategyRegistry", "XLAStrategy",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.engine.ddp import DDPStrategy
    from fulmen.engine.deepspeed import DeepSpeedStrategy
    from fulmen.engine.fsdp import FSDPStrategy
    from fulmen.engine.model_parallel import ModelParallelStrategy
    from fulmen.engine.parallel import ParallelStrategy
    from fulmen.engine.strategy import Strategy
    from fulmen.engine.strategy_registry import SingleDeviceStrategy, StrategyRegistry
    from fulmen.engine.xla import SingleDeviceXLAStrategy, XLAStrategy
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.strategies.single_device`) can be served.
__path__: list[str] = []
