"""Public door: where parameters, gradients and batches go."""

from __future__ import annotations

from fulmen.engine.ddp import DDPStrategy
from fulmen.engine.deepspeed import DeepSpeedStrategy
from fulmen.engine.fsdp import FSDPStrategy
from fulmen.engine.model_parallel import ModelParallelStrategy
from fulmen.engine.parallel import ParallelStrategy
from fulmen.engine.strategy import SingleDeviceStrategy, Strategy, StrategyRegistry

# Makes this a package for the import system, so that deep paths (`fulmen.strategies.single_device`) can be served.
__path__: list[str] = []
