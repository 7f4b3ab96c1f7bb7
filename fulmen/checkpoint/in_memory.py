"""What training changes, kept in memory for the time of trial runs and put back to the last bit.

A file could hold the same, but for gradients, flags, metrics and buffers that are not persistent; and loading it would make
other objects of what users and optimizers hold references to.
"""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch.nn.parameter import is_lazy

from fulmen.checkpoint.snapshot import collect_checkpoint
from fulmen.metrics.torchmetrics_state import capture_metrics
from fulmen.utilities.capture import Restore, capture_attributes, capture_value
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import is_overridden
from fulmen.utilities.modules import capture_buffers, module_flags, set_module_flags

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.datamodule import LightningDataModule
    from fulmen.engine.precision import Precision
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


def capture_run(trainer: Trainer) -> Restore:
    """Remember weights, buffers, gradients, flags, metrics, optimizers and precision, and the states that hooks keep.

    What `on_save_checkpoint` of the module writes down is given to its `on_load_checkpoint` when all is put back.

    Raises:
        MisconfigurationException: where weights cannot be put back: they are kept by an engine of their own, or have no
            shape yet.
    """
    module = trainer.lightning_module
    if not trainer.strategy.lightning_restore_optimizer:
        what = f"`{type(trainer.strategy).__name__}` keeps weights and optimizers in an engine of its own"
        raise MisconfigurationException(
            f"{what}, so that trial runs cannot be undone. Search on one device, or with DDP."
        )
    if lazy := [name for name, parameter in module.named_parameters() if is_lazy(parameter)]:
        what = f"The parameters {lazy[:5]} of {type(module).__name__} get their shape in the first step only,"
        raise MisconfigurationException(f"{what} so that trial runs cannot be undone. Run one batch through it before.")
    restores = [
        _capture_hooks(trainer),
        _capture_flags(module),
        *map(_capture_optimizer, trainer.optimizers),
        _capture_precision(trainer.precision_plugin),
        capture_buffers(module),
        capture_metrics(module),
        _capture_datamodule(trainer.datamodule),
        _capture_weights(module),
    ]

    def restore_run() -> None:
        with ExitStack() as everything:  # also if one of the user's own hooks raises
            for restore in reversed(restores):
                everything.callback(restore)

    return restore_run


def _capture_weights(module: LightningModule) -> Restore:
    """The parameters, and their gradients, which wait for the end of the trials."""
    kept = [
        (name, parameter, parameter.grad, capture_value(parameter)) for name, parameter in module.named_parameters()
    ]
    for _, parameter, _, _ in kept:
        parameter.grad = None

    def restore_weights() -> None:
        now = dict(module.named_parameters())
        for name, parameter, gradient, restore in kept:
            restore()
            parameter.grad = gradient
            current = now.get(name, parameter)
            if current is not parameter and current.shape == parameter.shape:  # made anew by `on_load_checkpoint`
                with torch.no_grad():
                    current.copy_(parameter)

    return restore_weights


def _capture_flags(module: LightningModule) -> Restore:
    flags = module_flags(module)

    def restore_flags() -> None:
        module.untoggle_optimizer()  # one that was toggled when a trial broke
        set_module_flags(module, flags)

    return restore_flags


def _capture_optimizer(optimizer: Optimizer) -> Restore:
    """The state and the groups of one optimizer, and the numbers that it counts in attributes."""
    restore_state = capture_value(optimizer.state)
    groups = [
        (
            group,
            list(group["params"]),
            {name: capture_value(value) for name, value in group.items() if name != "params"},
        )
        for group in optimizer.param_groups
    ]
    counts = {name: value for name, value in vars(optimizer).items() if type(value) in (bool, int, float)}

    def restore_optimizer() -> None:
        restore_state()
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, parameters, options in groups:
            group.clear()
            group.update({"params": parameters, **{name: restore() for name, restore in options.items()}})
        vars(optimizer).update(counts)

    return restore_optimizer


def _capture_precision(precision: Precision) -> Restore:
    state = deepcopy(precision.state_dict())
    restore_attributes = capture_attributes(precision)

    def restore_precision() -> None:
        precision.state_dict()  # a loss scale that waits for its update is brought up to date for it
        restore_attributes()
        if state:
            precision.load_state_dict(state)

    return restore_precision


def _capture_datamodule(datamodule: LightningDataModule | None) -> Restore:
    state = {} if datamodule is None else deepcopy(datamodule.state_dict())
    return lambda: datamodule.load_state_dict(state) if datamodule is not None and state else None


def _capture_hooks(trainer: Trainer) -> Restore:
    """What the module keeps beside weights, in the hooks that it has for checkpoints."""
    module = trainer.lightning_module
    if not (is_overridden("on_save_checkpoint", module) or is_overridden("on_load_checkpoint", module)):
        return lambda: None
    checkpoint = deepcopy(collect_checkpoint(trainer))

    def call_load_hook() -> None:
        with trainer.book.inside("on_load_checkpoint"):
            module.on_load_checkpoint(checkpoint)

    return call_load_hook
