"""Types for arguments of a command line: optimizers and schedulers that are made when what they work on exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Union

import torch
from jsonargparse import Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ReduceLROnPlateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Torch's scheduler of that name, which also knows the logged value it listens to.

    Arguments:
        optimizer: The optimizer whose learning rate is reduced.
        monitor: Name of the logged value.
        args: Passed to torch's scheduler.
        kwargs: Passed to torch's scheduler.

    Examples:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> ReduceLROnPlateau(optimizer, monitor="val_loss", patience=2).monitor
        'val_loss'
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


# What `args=` of a command line takes instead of reading `sys.argv`.
ArgsType = Union[list[str], dict[str, Any], Namespace, None]  # noqa: UP007  # argument parsers look into it at run time
LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]  # noqa: UP007
# For an argument of a module that makes the optimizer of some parameters, or the scheduler of an optimizer.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRSchedulerTypeUnion]
