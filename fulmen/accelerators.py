"""Public door: on which devices to train."""

from __future__ import annotations

from fulmen.engine.accelerators import (
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)

# Makes this a package for the import system, so that deep paths (`fulmen.accelerators.cuda`) can be served.
__path__: list[str] = []
