"""The loops that train, evaluate and predict, and what belongs to a run rather than to a part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["open_trials"]

if TYPE_CHECKING:
    from fulmen.loops.trials import open_trials  # few runs search for something
else:
    __getattr__, __dir__ = lazy_exports(__name__)
