"""Serving a trained module over HTTP, and trying that before it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["ServableModule", "ServableModuleValidator"]

if TYPE_CHECKING:
    from fulmen.serve.servable_module import ServableModule
    from fulmen.serve.servable_module_validator import ServableModuleValidator
else:
    __getattr__, __dir__ = lazy_exports(__name__)
