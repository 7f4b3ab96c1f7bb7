"""How a batch reaches the device: the usual way inlined, the user's transfer hooks where they are overridden."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.engine.precision import Precision
from fulmen.engine.strategy import Strategy
from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.introspection import overrides_method

if TYPE_CHECKING:
    from fulmen.data.sources import Sources


def compile_transfer(
    strategy: Strategy, module: object, datamodule: object, sources: Sources, base: type
) -> Callable[[Any, int], Any]:
    """One function `(batch, dataloader_idx) -> batch on the device`, composed of what is overridden.

    The order where everything is: the precision converts the batch, `on_before_batch_transfer`, the strategy (which calls
    `transfer_batch_to_device`), `on_after_batch_transfer`. ``base`` is the class whose hooks do nothing (`DataHooks`).
    """
    device = strategy.root_device
    precision = strategy.precision_plugin

    def overridden_hook(name: str) -> Callable[..., Any] | None:
        owner = sources.transfer_owner(name, module, datamodule)
        return getattr(owner, name) if overrides_method(owner, name, base) else None

    before = overridden_hook("on_before_batch_transfer")
    after = overridden_hook("on_after_batch_transfer")
    transfer = overridden_hook("transfer_batch_to_device")
    convert = precision.convert_input if overrides_method(precision, "convert_input", Precision) else None
    strategy_moves = overrides_method(strategy, "batch_to_device", Strategy)
    strategy.use_transfer(transfer)
    if not (before or transfer or after or convert or strategy_moves):
        return _host_batch if device.type == "cpu" else lambda batch, _: move_data_to_device(batch, device)

    def move_batch(batch: Any, dataloader_idx: int) -> Any:
        if convert is not None:
            batch = convert(batch)
        if before is not None:
            batch = before(batch, dataloader_idx)
        batch = strategy.batch_to_device(batch, device, dataloader_idx)
        return after(batch, dataloader_idx) if after is not None else batch

    return move_batch


_CPU = torch.device("cpu")


def _host_batch(batch: Any, _: int) -> Any:
    """The batch as it is when it is made of CPU tensors, which is nearly always; else the general walk."""
    if type(batch) is list or type(batch) is tuple:
        for item in batch:
            if type(item) is not Tensor or not item.is_cpu:
                return move_data_to_device(batch, _CPU)
        return batch
    return batch if type(batch) is Tensor and batch.is_cpu else move_data_to_device(batch, _CPU)
