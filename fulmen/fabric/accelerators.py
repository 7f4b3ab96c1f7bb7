"""Public door: the devices that Fabric runs on."""

from __future__ import annotations

from fulmen.engine.accelerators import (
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    find_usable_cuda_devices,
)
from fulmen.engine.xla import XLAAccelerator

ACCELERATOR_REGISTRY = AcceleratorRegistry

__all__ = [
    "ACCELERATOR_REGISTRY", "Accelerator", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator", "XLAAccelerator",
    "find_usable_cuda_devices",
]  # fmt: skip

# Makes this a package for the import system, so that deep paths (`fulmen.fabric.accelerators.cuda`) can be served.
__path__: list[str] = []
