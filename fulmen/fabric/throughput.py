"""`ThroughputMonitor`: rates of a Fabric's loop, logged by its loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fulmen.utilities.rank_zero import rank_zero_only
from fulmen.utilities.throughput import Throughput, get_available_flops

if TYPE_CHECKING:
    from fulmen.engine.precision import Precision
    from fulmen.engine.strategy import Strategy


class MonitoredLoop(Protocol):
    """What a monitor asks a `Fabric`."""

    strategy: Strategy

    @property
    def device(self) -> torch.device: ...

    @property
    def world_size(self) -> int: ...

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...


class ThroughputMonitor(Throughput):
    """`Throughput` that knows the devices of a Fabric and logs through it; on the first process only.

    Arguments:
        fabric: one that was launched.
        kwargs: of `Throughput`, without `available_flops` and `world_size`, which Fabric knows.

    Attributes:
        step: of the last call of `compute_and_log`; -1 before.
    """

    def __init__(self, fabric: MonitoredLoop, **kwargs: Any) -> None:
        flops = get_available_flops(fabric.device, compute_dtype(fabric.strategy.precision_plugin))
        super().__init__(available_flops=flops, world_size=fabric.world_size, **kwargs)
        self._fabric = fabric
        self.step = -1

    @rank_zero_only
    def update(self, **totals: Any) -> None:
        super().update(**totals)

    def compute(self) -> dict[str, float]:
        """The last totals and, once the window is full, the rates per second; nothing on other processes."""
        return super().compute() if rank_zero_only.rank == 0 else {}  # type: ignore[attr-defined]

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, float]:
        """The same, and logs it.

        Arguments:
            step: for the loggers; by default one more than in the last call.
            kwargs: of `compute`.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        if metrics:
            self._fabric.log_dict(metrics, step=self.step)
        return metrics


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of most operations under a precision."""
    dtype = vars(precision).get("dtype")
    return dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
