"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["AdvancedProfiler", "PassThroughProfiler", "Profiler", "PyTorchProfiler", "SimpleProfiler", "XLAProfiler"]

if TYPE_CHECKING:
    from fulmen.profilers.profiler import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler, XLAProfiler
    from fulmen.profilers.pytorch import PyTorchProfiler
else:
    __getattr__, __dir__ = lazy_exports(__name__)
