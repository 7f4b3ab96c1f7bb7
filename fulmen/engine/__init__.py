"""The machine: devices, processes, strategies, precision, storage. Fires no hooks and knows neither Trainer nor Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Accelerator": "fulmen.engine.accelerators",
        "CheckpointIO": "fulmen.engine.checkpoint_io",
        "ClusterEnvironment": "fulmen.engine.cluster",
        "DamagedCheckpointError": "fulmen.engine.checkpoint_io",
        "Precision": "fulmen.engine.precision",
        "Strategy": "fulmen.engine.strategy",
        "announce": "fulmen.engine.resolve",
        "resolve": "fulmen.engine.resolve",
    },
)

if TYPE_CHECKING:
    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.checkpoint_io import CheckpointIO, DamagedCheckpointError
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.precision import Precision
    from fulmen.engine.resolve import announce, resolve
    from fulmen.engine.strategy import Strategy
