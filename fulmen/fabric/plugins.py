"""Public door: what can be passed to Fabric in ``plugins``: precision, checkpoint storage, cluster environment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "BitsandbytesPrecision", "CheckpointIO", "ClusterEnvironment", "DeepSpeedPrecision", "DoublePrecision",
    "FSDPPrecision", "HalfPrecision", "MixedPrecision", "Precision", "TorchCheckpointIO",
    "TransformerEnginePrecision", "XLACheckpointIO", "XLAPrecision",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.engine.bitsandbytes import BitsandbytesPrecision
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.deepspeed import DeepSpeedPrecision
    from fulmen.engine.dtensor import FSDPPrecision
    from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from fulmen.engine.transformer_engine import TransformerEnginePrecision
    from fulmen.engine.xla import XLACheckpointIO, XLAPrecision
    from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.fabric.plugins.precision`) can be served.
__path__: list[str] = []
