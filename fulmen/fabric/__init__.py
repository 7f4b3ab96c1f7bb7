"""Fabric: devices, processes and precision for a training loop of one's own, on the engine that the Trainer runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["Fabric", "disable_possible_user_warnings", "is_wrapped", "seed_everything"]

if TYPE_CHECKING:
    from fulmen.fabric.fabric import Fabric
    from fulmen.fabric.wrappers import is_wrapped
    from fulmen.utilities.errors import disable_possible_user_warnings
    from fulmen.utilities.seed import seed_everything
else:
    __getattr__, __dir__ = lazy_exports(__name__)
