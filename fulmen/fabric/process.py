"""Who a process of `Fabric` is among others, and what they exchange."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fulmen.fabric.ddp import DataParallelStrategy
from fulmen.fabric.strategy import SingleDeviceStrategy, Strategy
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.keywords import KeywordHints
from fulmen.utilities.seed import seed_everything

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.collectives import ReduceOp

T = TypeVar("T")

_NUMBER_TYPES = {bool: torch.uint8, int: torch.int32, float: torch.float32}


class FabricProcess(KeywordHints):
    """The part of `Fabric` that is about this process and the others.

    Arguments:
        strategy: complete.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._launched = False
        self._num_barriers = 0

    # ------------------------------------------------------------------ who and where

    @property
    def accelerator(self) -> Accelerator:
        """Which kind of device."""
        return self._strategy.accelerator

    @property
    def strategy(self) -> Strategy:
        """How work is spread over devices."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process; create tensors there."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """Index of this process over all nodes."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its node."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self._strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Is this the first process?"""
        return self._strategy.is_global_zero

    # ------------------------------------------------------------------ between processes

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on one process of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Waits until every process is here."""
        self._check_launched()
        self._strategy.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """The object of process `src`, everywhere; it is pickled."""
        self._check_launched()
        return self._strategy.broadcast(obj, src=src)

    def all_gather(self, data: object, group: ProcessGroup | None = None, sync_grads: bool = False) -> Any:
        """Tensors of all processes along a new first dimension; unchanged on one device.

        Arguments:
            data: a tensor, a number, or a nested collection of them; numbers become tensors.
            group: the processes that exchange; all by default.
            sync_grads: let gradients flow back to the process a tensor is from.

        Returns:
            The same structure, with tensors of shape `(world_size, ...)`.
        """
        self._check_launched()
        tensors = self._as_tensors(data)
        return apply_to_collection(tensors, Tensor, self._strategy.all_gather, group=group, sync_grads=sync_grads)

    def all_reduce(
        self, data: object, group: ProcessGroup | None = None, reduce_op: ReduceOp | str | None = "mean"
    ) -> Any:
        """The same value on every process, combined element-wise.

        Arguments:
            data: a tensor, a number, or a nested collection of them; numbers become tensors.
            group: the processes that exchange; all by default.
            reduce_op: "mean", "sum", "max", "min", "product", or one of torch's.
        """
        self._check_launched()
        return apply_to_collection(
            self._as_tensors(data), Tensor, self._strategy.all_reduce, group=group, reduce_op=reduce_op
        )

    def _as_tensors(self, data: object) -> Any:
        def as_tensor(number: bool | int | float) -> Tensor:
            return torch.tensor(number, device=self.device, dtype=_NUMBER_TYPES[type(number)])

        return apply_to_collection(data, tuple(_NUMBER_TYPES), as_tensor)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Generator[None]:
        """Rank 0 runs the body before all others, such as to download what they then find; however long it takes.

        Arguments:
            local: the first process of each node does.
        """
        rank = self.local_rank if local else self.global_rank
        self._num_barriers += 1
        name = f"fabric/rank_zero_first/{self._num_barriers}"
        if rank > 0:
            self._strategy.barrier_without_timeout(name)
        try:
            yield
        finally:
            if rank == 0:
                self._strategy.barrier_without_timeout(name)
        self.barrier()

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seeds Python, NumPy and torch; unlike the function of that name it also seeds loader workers by default."""
        return seed_everything(seed, workers=True if workers is None else workers, verbose=verbose)

    def pack_results(self) -> None:
        """Nothing but the result of the function travels back to the process that launched others."""

    def unpack_results(self, packed: object) -> None:
        """See `pack_results`."""

    @property
    def needs_launch(self) -> bool:
        """Do processes have to meet, before they can exchange anything?"""
        return not isinstance(self._strategy, (SingleDeviceStrategy, DataParallelStrategy))

    def _check_launched(self) -> None:
        if not self._launched and self.needs_launch:
            what = "To use Fabric with more than one device, you must call `.launch()` before setting up modules,"
            fix = "Call `fabric.launch()` first, or `fabric.launch(function)` where processes are spawned."
            raise RuntimeError(f"{what} loaders, or exchanging anything. {fix}")
