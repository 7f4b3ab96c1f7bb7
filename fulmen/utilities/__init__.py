"""Small tools that know nothing of training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AttributeDict": "fulmen.utilities.collections",
        "CombinedLoader": "fulmen.data.combined",
        "GradClipAlgorithmType": "fulmen.utilities.types",
        "LightningEnum": "fulmen.utilities.types",
        "MisconfigurationException": "fulmen.utilities.errors",
        "Throughput": "fulmen.utilities.throughput",
        "apply_to_collection": "fulmen.utilities.collections",
        "disable_possible_user_warnings": "fulmen.utilities.errors",
        "find_shared_parameters": "fulmen.utilities.modules",
        "grad_norm": "fulmen.utilities.modules",
        "is_picklable": "fulmen.utilities.modules",
        "is_shared_filesystem": "fulmen.utilities.filesystem",
        "measure_flops": "fulmen.utilities.throughput",
        "move_data_to_device": "fulmen.utilities.collections",
        "rank_zero_debug": "fulmen.utilities.rank_zero",
        "rank_zero_deprecation": "fulmen.utilities.rank_zero",
        "rank_zero_info": "fulmen.utilities.rank_zero",
        "rank_zero_only": "fulmen.utilities.rank_zero",
        "rank_zero_warn": "fulmen.utilities.rank_zero",
        "seed_everything": "fulmen.utilities.seed",
        "set_shared_parameters": "fulmen.utilities.modules",
        "suggested_max_num_workers": "fulmen.utilities.modules",
    },
)

if TYPE_CHECKING:
    from fulmen.utilities.collections import AttributeDict, apply_to_collection, move_data_to_device
    from fulmen.utilities.errors import MisconfigurationException, disable_possible_user_warnings
    from fulmen.utilities.filesystem import is_shared_filesystem
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
    from fulmen.utilities.types import GradClipAlgorithmType, LightningEnum
