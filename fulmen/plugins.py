"""Public door: what can be passed in ``plugins``: precision, checkpoint storage, cluster environment, layer sync."""

from __future__ import annotations

from fulmen.engine.checkpoint_io import CheckpointIO, TorchCheckpointIO
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from fulmen.engine.resolve import LayerSync

# Makes this a package for the import system, so that deep paths (`fulmen.plugins.precision`) can be served.
__path__: list[str] = []
