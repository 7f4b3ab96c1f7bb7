"""`StrategyRegistry`: strategies by the names that users write, and the one for a single device."""

from __future__ import annotations

from typing import Any

import torch

from fulmen.engine.accelerators import Accelerator, Registry
from fulmen.engine.precision import Precision
from fulmen.engine.strategy import Strategy
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.introspection import alias_property


class SingleDeviceStrategy(Strategy):
    """One process, one device.

    Arguments:
        device: "cpu", "cuda:0", a `torch.device` ...

    >>> SingleDeviceStrategy("cuda:1").root_device
    device(type='cuda', index=1)
    """

    strategy_name = "single_device"

    def __init__(
        self,
        device: torch.device | str | int = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self._root_device = torch.device(device)

    root_device: torch.device = alias_property("_root_device", "The one device.")

    def model_to_device(self) -> None:
        self.model.to(self._root_device)


StrategyRegistry = Registry("strategy", taken=ValueError)
StrategyRegistry.register("single_device", SingleDeviceStrategy, "one process, one device")
# A family is imported when it is chosen. Its names say how processes start, and whether parameters may go unused.
for _start, _method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")):
    for _unused in (None, True, False):
        _given = {} if _unused is None else {"find_unused_parameters": _unused}
        _name = f"ddp{_start}" + ("" if _unused is None else f"_find_unused_parameters_{_unused}".lower())
        StrategyRegistry.register(
            _name, "fulmen.engine.ddp:DDPStrategy", f"DDP, {_method}", start_method=_method, **_given
        )
_FSDP = "fulmen.engine.fsdp:FSDPStrategy"
_DEEPSPEED = "fulmen.engine.deepspeed:DeepSpeedStrategy"
_OFFLOAD: dict[str, Any] = {"offload_optimizer": True}
_NVME: dict[str, Any] = {"offload_params_device": "nvme", "offload_optimizer_device": "nvme"}
_SHARDED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fsdp", _FSDP, {"start_method": "popen"}),
    ("fsdp_cpu_offload", _FSDP, {"start_method": "popen", "cpu_offload": True}),
    ("deepspeed", _DEEPSPEED, {}),
    ("deepspeed_stage_1", _DEEPSPEED, {"stage": 1}),
    ("deepspeed_stage_2", _DEEPSPEED, {"stage": 2}),
    ("deepspeed_stage_2_offload", _DEEPSPEED, {"stage": 2, **_OFFLOAD}),
    ("deepspeed_stage_3", _DEEPSPEED, {"stage": 3}),
    ("deepspeed_stage_3_offload", _DEEPSPEED, {"stage": 3, "offload_parameters": True, **_OFFLOAD}),
    ("deepspeed_stage_3_offload_nvme", _DEEPSPEED, {"stage": 3, "offload_parameters": True, **_OFFLOAD, **_NVME}),
)
for _name, _path, _given in _SHARDED:
    StrategyRegistry.register(_name, _path, "parameters spread over processes", **_given)
