"""Other import names for the same things; nothing outside this folder knows of them."""

from __future__ import annotations

from fulmen.compat.finder import install

__all__ = ["install"]
