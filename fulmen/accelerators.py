"""Public door: on which devices to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

# Makes this a package for the import system, so that deep paths (`fulmen.accelerators.cuda`) can be served.
__path__: list[str] = []

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "ACCELERATOR_REGISTRY": "fulmen.engine.accelerators",
        "Accelerator": "fulmen.engine.accelerators",
        "AcceleratorRegistry": "fulmen.engine.accelerators",
        "CPUAccelerator": "fulmen.engine.accelerators",
        "CUDAAccelerator": "fulmen.engine.accelerators",
        "MPSAccelerator": "fulmen.engine.accelerators",
        "XLAAccelerator": "fulmen.engine.accelerators",
        "find_usable_cuda_devices": "fulmen.engine.accelerators",
    },
)

if TYPE_CHECKING:
    from fulmen.engine.accelerators import (
        ACCELERATOR_REGISTRY,
        Accelerator,
        AcceleratorRegistry,
        CPUAccelerator,
        CUDAAccelerator,
        MPSAccelerator,
        XLAAccelerator,
        find_usable_cuda_devices,
    )
