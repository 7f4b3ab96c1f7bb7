"""Small tools that know nothing of training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "FLOAT16_EPSILON", "FLOAT32_EPSILON", "FLOAT64_EPSILON", "AttributeDict", "CombinedLoader", "GradClipAlgorithmType", "LightningEnum", "MisconfigurationException",
    "Throughput", "apply_to_collection", "disable_possible_user_warnings", "find_shared_parameters", "grad_norm",
    "is_picklable", "is_shared_filesystem", "measure_flops", "move_data_to_device", "rank_zero_debug", "rank_zero_deprecation",
    "rank_zero_info", "rank_zero_only", "rank_zero_warn", "seed_everything", "set_shared_parameters",
    "suggested_max_num_workers",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.data.combined import CombinedLoader
    from fulmen.fabric.distributed import is_shared_filesystem
    from fulmen.utilities.collections import AttributeDict, apply_to_collection, move_data_to_device
    from fulmen.utilities.errors import MisconfigurationException, disable_possible_user_warnings
    from fulmen.utilities.modules import (
        find_shared_parameters,
        grad_norm,
        is_picklable,
        set_shared_parameters,
        suggested_max_num_workers,
    )
    from fulmen.utilities.rank_zero import (
        rank_zero_debug,
        rank_zero_deprecation,
        rank_zero_info,
        rank_zero_only,
        rank_zero_warn,
    )
    from fulmen.utilities.seed import seed_everything
    from fulmen.utilities.throughput import Throughput, measure_flops
    from fulmen.utilities.types import (
        FLOAT16_EPSILON,
        FLOAT32_EPSILON,
        FLOAT64_EPSILON,
        GradClipAlgorithmType,
        LightningEnum,
    )
else:
    __getattr__, __dir__ = lazy_exports(__name__)
