"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

if TYPE_CHECKING:
    from fulmen.profilers.profiler import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler, XLAProfiler
    from fulmen.profilers.pytorch import PyTorchProfiler
