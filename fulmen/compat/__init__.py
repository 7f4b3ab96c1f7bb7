"""Other names for the same things: deep paths below `fulmen`, and the import names of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["install"]

if TYPE_CHECKING:
    from fulmen.compat.foreign import install
else:
    __getattr__, __dir__ = lazy_exports(__name__)
