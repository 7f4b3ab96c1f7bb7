"""Public door: where parameters, gradients and batches go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

# Makes this a package for the import system, so that deep paths (`fulmen.strategies.single_device`) can be served.
__path__: list[str] = []

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SingleDeviceStrategy": "fulmen.engine.strategy",
        "Strategy": "fulmen.engine.strategy",
        "StrategyRegistry": "fulmen.engine.strategy",
    },
)

if TYPE_CHECKING:
    from fulmen.engine.strategy import SingleDeviceStrategy, Strategy, StrategyRegistry
