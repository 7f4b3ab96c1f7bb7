"""`Buffers`: keeps the buffers of a module, such as running statistics, equal to those of rank 0 on all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fulmen.engine import collectives


class Buffers:
    """The buffers of a module. Those of rank 0 count, as they are the ones in checkpoints: others take them over.

    They do so before they are read: running statistics of batch norm before a step if a layer has changed its mode,
    all others before every step, and everything before validation and at the end of training.

    Arguments:
        per_process: each process trains with its own, and has those of rank 0 for validation only.
    """

    def __init__(self, module: Module, device: torch.device, per_process: bool = False) -> None:
        self.device = device
        self.per_process = per_process
        self.norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
        statistics = {id(buffer) for layer in self.norms for buffer in layer.buffers(recurse=False)}
        # Where each buffer is found, not the buffer: an assignment `self.buffer = ...` replaces it. And its shape: one
        # that changes it grows with what a process has seen, and may be another one elsewhere.
        self.slots = find_buffers(module)
        found = [owner.get(name) for owner, name in self.slots]
        self.shapes: list[torch.Size | None] = [None if buffer is None else buffer.shape for buffer in found]
        self.every_step = any(id(buffer) not in statistics for buffer in found)
        self.modes = [layer.training for layer in self.norms]
        self.stashed: list[Tensor] | None = None  # while those of rank 0 are there instead

    def current_buffers(self) -> list[Tensor]:
        """The buffers of the module that all processes have."""
        found = []
        for index, (owner, name) in enumerate(self.slots):
            if (buffer := owner.get(name)) is not None:
                if self.shapes[index] is None:
                    self.shapes[index] = buffer.shape
                if buffer.shape == self.shapes[index]:
                    found.append(buffer)
        return found

    def broadcast(self) -> None:
        """Takes over those of rank 0, in one broadcast or few."""
        collectives.broadcast_tensors(self.current_buffers(), self.device)

    def sync_before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step, which begins with the buffers it may read."""
        if self.per_process or not self.slots:
            return step

        def run(*args: Any, **kwargs: Any) -> Any:
            modes = [layer.training for layer in self.norms]
            if self.every_step or modes != self.modes:
                self.modes = modes
                self.broadcast()
            return step(*args, **kwargs)

        return run

    def own_state(self) -> list[Tensor] | None:
        """What this process trains with and no other does: a checkpoint needs it beside those of rank 0."""
        if not self.per_process:
            return None
        return [buffer.detach().cpu() for buffer in (self.current_buffers() if self.stashed is None else self.stashed)]

    @torch.no_grad()
    def load_own_state(self, kept: list[Tensor]) -> None:
        """Takes back what `own_state` gave."""
        for buffer, own in zip(self.current_buffers(), kept):
            buffer.copy_(own)

    def use_rank_zero(self) -> None:
        """Lets all processes have those of rank 0, until `restore_own`."""
        if self.per_process and self.stashed is None:
            self.stashed = [buffer.clone() for buffer in self.current_buffers()]
        self.broadcast()

    def restore_own(self) -> None:
        """Gives each process its own back, if it trains with them."""
        self.load_own_state(self.stashed or [])
        self.stashed = None


def find_buffers(module: Module) -> list[tuple[dict[str, Any], str]]:
    """Each buffer of a module once, as the dictionary that holds it and its name; without sharded ones."""
    slots: list[tuple[dict[str, Any], str]] = []
    found: set[int] = set()
    for part in module.modules():
        for name, buffer in part._buffers.items():
            unused = buffer is None and isinstance(part, _NormBase)
            if not unused and id(buffer) not in found and not hasattr(buffer, "to_local"):
                found.update(() if buffer is None else (id(buffer),))
                slots.append((part._buffers, name))
    return slots
