"""Public door: on which devices to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = [
    "Accelerator", "AcceleratorRegistry", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator",
    "XLAAccelerator", "find_usable_cuda_devices",
]  # fmt: skip

if TYPE_CHECKING:
    from fulmen.engine.accelerators import (
        Accelerator,
        AcceleratorRegistry,
        CPUAccelerator,
        CUDAAccelerator,
        MPSAccelerator,
        find_usable_cuda_devices,
    )
    from fulmen.engine.xla import XLAAccelerator
else:
    __getattr__, __dir__ = lazy_exports(__name__)

# Makes this a package for the import system, so that deep paths (`fulmen.accelerators.cuda`) can be served.
__path__: list[str] = []
