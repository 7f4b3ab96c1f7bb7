"""Batches in: who gives the loaders, how they are checked, combined and read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"CombinedLoader": "fulmen.data.combined"})

if TYPE_CHECKING:
    from fulmen.data.combined import CombinedLoader
