"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AdvancedProfiler": "fulmen.profilers.builtin",
        "PassThroughProfiler": "fulmen.profilers.profiler",
        "Profiler": "fulmen.profilers.profiler",
        "PyTorchProfiler": "fulmen.profilers.pytorch",
        "SimpleProfiler": "fulmen.profilers.builtin",
        "XLAProfiler": "fulmen.profilers.profiler",
    },
)

if TYPE_CHECKING:
    from fulmen.profilers.builtin import AdvancedProfiler, SimpleProfiler
    from fulmen.profilers.profiler import PassThroughProfiler, Profiler, XLAProfiler
    from fulmen.profilers.pytorch import PyTorchProfiler
