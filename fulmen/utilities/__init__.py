"""Small tools that know nothing of training loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

_NAMES = {
    "collections": "AttributeDict apply_to_collection move_data_to_device",
    "errors": "MisconfigurationException disable_possible_user_warnings",
    "filesystem": "is_shared_filesystem",
    "modules": "find_shared_parameters grad_norm is_picklable set_shared_parameters suggested_max_num_workers",
    "rank_zero": "rank_zero_debug rank_zero_deprecation rank_zero_info rank_zero_only rank_zero_warn",
    "seed": "seed_everything",
    "throughput": "Throughput measure_flops",
    "types": "GradClipAlgorithmType LightningEnum",
}
_homes = {name: f"{__name__}.{file}" for file, names in _NAMES.items() for name in names.split()}

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"CombinedLoader": "fulmen.data.combined", **_homes})

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
