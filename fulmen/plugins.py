"""Public door: what can be passed in ``plugins``: precision, checkpoint storage, cluster environment, layer sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

# Makes this a package for the import system, so that deep paths (`fulmen.plugins.precision`) can be served.
__path__: list[str] = []

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CheckpointIO": "fulmen.engine.checkpoint_io",
        "ClusterEnvironment": "fulmen.engine.cluster",
        "DoublePrecision": "fulmen.engine.precision",
        "HalfPrecision": "fulmen.engine.precision",
        "LayerSync": "fulmen.engine.resolve",
        "MixedPrecision": "fulmen.engine.precision",
        "Precision": "fulmen.engine.precision",
        "TorchCheckpointIO": "fulmen.engine.checkpoint_io",
    },
)

if TYPE_CHECKING:
    from fulmen.engine.checkpoint_io import CheckpointIO, TorchCheckpointIO
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from fulmen.engine.resolve import LayerSync
