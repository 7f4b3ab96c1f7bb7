"""Snapshots out and in: the chapters of a `.ckpt` file, where it lies, and objects made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "API_VERSION": "fulmen.checkpoint.migrate",
        "load_from_checkpoint": "fulmen.checkpoint.load",
        "migrate_checkpoint": "fulmen.checkpoint.migrate",
    },
)

if TYPE_CHECKING:
    from fulmen.checkpoint.load import load_from_checkpoint
    from fulmen.checkpoint.migrate import API_VERSION, migrate_checkpoint
