"""Code that draws random numbers without moving the generators of the run around it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """Random numbers drawn inside do not change those drawn afterwards, by python, numpy or torch.

    For whatever may import a package: some draw while they are imported.
    """
    python, cpu, numpy = random.getstate(), torch.get_rng_state(), sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None
    # Before CUDA is in use there is no state to keep, and asking would start it (which forbids forking later).
    devices = torch.cuda.get_rng_state_all() if include_cuda and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if numpy is not None:
            numpy.random.set_state(arrays)
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)
