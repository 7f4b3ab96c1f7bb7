"""The tuner: searches for a learning rate or a batch size before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["Tuner"]

if TYPE_CHECKING:
    from fulmen.tuner.tuning import Tuner
else:
    __getattr__, __dir__ = lazy_exports(__name__)
