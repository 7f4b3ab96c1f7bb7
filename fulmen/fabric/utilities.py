"""Public door: small tools for programs that use Fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "AttributeDict", "LightningEnum", "Throughput", "ThroughputMonitor", "disable_possible_user_warnings",
    "is_shared_filesystem", "measure_flops", "move_data_to_device", "rank_zero_deprecation", "rank_zero_info",
    "rank_zero_only", "rank_zero_warn", "suggested_max_num_workers",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.fabric.distributed import is_shared_filesystem
    from fulmen.fabric.throughput import ThroughputMonitor
    from fulmen.utilities.collections import AttributeDict, move_data_to_device
    from fulmen.utilities.errors import disable_possible_user_warnings
    from fulmen.utilities.modules import suggested_max_num_workers
    from fulmen.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_only, rank_zero_warn
    from fulmen.utilities.throughput import Throughput, measure_flops
    from fulmen.utilities.types import LightningEnum
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.fabric.utilities.seed`) can be served.
__path__: list[str] = []
