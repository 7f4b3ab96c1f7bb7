"""Public door: what can be passed in ``plugins``: precision, checkpoint storage, cluster environment, layer sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "AsyncCheckpointIO", "BitsandbytesPrecision", "CheckpointIO", "ClusterEnvironment", "DeepSpeedPrecision",
    "DoublePrecision", "FSDPPrecision", "HalfPrecision", "LayerSync", "MixedPrecision", "Precision",
    "TorchCheckpointIO", "TorchSyncBatchNorm", "TransformerEnginePrecision", "XLACheckpointIO", "XLAPrecision",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.engine.bitsandbytes import BitsandbytesPrecision
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.deepspeed import DeepSpeedPrecision
    from fulmen.engine.dtensor import FSDPPrecision
    from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from fulmen.engine.sync_batchnorm import LayerSync, TorchSyncBatchNorm
    from fulmen.engine.transformer_engine import TransformerEnginePrecision
    from fulmen.engine.xla import XLACheckpointIO, XLAPrecision
    from fulmen.storage.async_io import AsyncCheckpointIO
    from fulmen.storage.checkpoint_io import CheckpointIO, TorchCheckpointIO
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.plugins.precision`) can be served.
__path__: list[str] = []
