"""Public door: what can be passed in ``plugins``: precision, checkpoint storage, cluster environment, layer sync."""

from __future__ import annotations

from fulmen.engine.async_checkpoint_io import AsyncCheckpointIO
from fulmen.engine.bitsandbytes import BitsandbytesPrecision
from fulmen.engine.checkpoint_io import CheckpointIO, TorchCheckpointIO
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.deepspeed import DeepSpeedPrecision
from fulmen.engine.dtensors import FSDPPrecision
from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from fulmen.engine.sync_batchnorm import LayerSync, TorchSyncBatchNorm
from fulmen.engine.transformer_engine import TransformerEnginePrecision

# Makes this a package for the import system, so that deep paths (`fulmen.plugins.precision`) can be served.
__path__: list[str] = []
