"""`ModelParallelStrategy`: the user says in `configure_model` how layers are spread over a mesh of processes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fulmen.engine import collectives
from fulmen.engine.dtensor import shard_like
from fulmen.engine.sharded import ShardedStrategy, init_layer
from fulmen.utilities.introspection import is_overridden
from fulmen.utilities.modules import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from fulmen.trainer import Trainer

MESH_AXES = ("data_parallel", "tensor_parallel")


class ModelParallelStrategy(ShardedStrategy):
    """Tensor parallelism, `fully_shard` or both, on the mesh ``self.device_mesh`` of the module.

    `configure_model` spreads the layers over ``device_mesh["tensor_parallel"]`` (`parallelize_module`) and
    ``device_mesh["data_parallel"]`` (`fully_shard`). Processes with the same data index get the same batches.

    Arguments:
        data_parallel_size: with how many different batches; "auto" is the number of machines.
        tensor_parallel_size: over how many processes a layer is spread; "auto" is the number of devices of a machine.
        save_distributed_checkpoint: write folders, to which each process adds its part, instead of files.
        start_method: how the processes start, as for `DDPStrategy`.
    """

    strategy_name = "model_parallel"

    def __init__(
        self, data_parallel_size: int | Literal["auto"] = "auto", tensor_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = True, process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30), start_method: str = "popen",
    ) -> None:  # fmt: skip
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        for name, size in (("data", data_parallel_size), ("tensor", tensor_parallel_size)):
            if size != "auto" and (type(size) is not int or size < 1):
                raise ValueError(
                    f"`{name}_parallel_size={size!r}` must be a number of processes. Use 'auto', or 1 or more."
                )
        self._data_parallel_size = data_parallel_size
        self._tensor_parallel_size = tensor_parallel_size
        self.sharded_checkpoints = self._save_distributed_checkpoint = save_distributed_checkpoint
        self._device_mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """The processes as rows with the same data, by columns with the same part of the layers."""
        if self._device_mesh is None:
            raise RuntimeError(
                "The mesh is made when the processes have met. Ask for it in `configure_model` or later."
            )
        return self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        data = self.device_mesh["data_parallel"]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    def setup_environment(self) -> None:
        module = self._lightning_module
        if not is_overridden("configure_model", module):
            what = f"`{type(module).__name__}` has no `configure_model`, and only it can say how layers are spread:"
            raise TypeError(f"{what} `parallelize_module(self.layer, self.device_mesh['tensor_parallel'], ...)`.")
        super().setup_environment()
        module.device_mesh = self.make_mesh()

    def make_mesh(self) -> DeviceMesh:
        """The mesh, once the processes have met.

        Raises:
            RuntimeError: its sizes do not multiply to the number of processes.
        """
        from torch.distributed.device_mesh import init_device_mesh

        sizes = [self._data_parallel_size, self._tensor_parallel_size]
        automatic = [self.num_nodes, self.num_processes]
        data, tensor = (own if size == "auto" else size for size, own in zip(sizes, automatic))
        if data * tensor != self.world_size:
            what = f"`data_parallel_size={data}` times `tensor_parallel_size={tensor}` is not the number of processes"
            raise RuntimeError(f"{what}, {self.world_size}. Choose two numbers whose product it is.")
        if self._device_mesh is None:
            self._device_mesh = init_device_mesh(self.root_device.type, (data, tensor), mesh_dim_names=MESH_AXES)
        return self._device_mesh

    def wrap_model(self, trainer: Trainer) -> None:
        """Layers get their values, and what no process would exchange is found."""
        module = self._lightning_module
        check_gradients_averaged(module, self.device_mesh["data_parallel"].size() if trainer.state.fn == "fit" else 1)
        materialize_module(module, self.root_device, self.global_rank == 0)
        self.record_sharded_modules()

    def teardown(self) -> None:
        vars(self._lightning_module).pop("device_mesh", None)
        super().teardown()


def check_gradients_averaged(module: Module, rows: int) -> None:
    """With different batches, each gradient has to be averaged over them.

    Raises:
        RuntimeError: names parameters that nobody spread over the axis of the data.
    """
    learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    meshes = {name: p.device_mesh if is_dtensor(p) else None for name, p in learning}
    lonely = [name for name, mesh in meshes.items() if mesh is None or mesh.mesh_dim_names == ("tensor_parallel",)]
    if rows > 1 and lonely:
        shown = ", ".join(map(repr, lonely[:5])) + (f" and {len(lonely) - 5} more" if len(lonely) > 5 else "")
        what = f"Nothing averages the gradients of {shown} over the {rows} processes that see different data."
        fix = "`fully_shard(self.model, mesh=self.device_mesh['data_parallel'])`"
        raise RuntimeError(f"{what} Spread them in `configure_model`, last of all: {fix}.")


def materialize_module(module: Module, device: torch.device, first: bool) -> None:
    """Layers get the values of rank 0; those on the meta device are initialised there, as if they were made now."""
    held = {id(part): [*part._parameters.items(), *part._buffers.items()] for part in module.modules()}
    empty = {part: [name for name, t in tensors if t is not None and t.is_meta] for part, tensors in held.items()}
    if any(empty.values()):  # from the top, so that `fully_shard` hears of the new tensors
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    plain: list[Tensor] = []
    for part in module.modules():
        _materialize_layer(part, empty[id(part)], device, first)
        tensors = [*part._parameters.values(), *part._buffers.values()]
        plain += [tensor for tensor in tensors if tensor is not None and not is_dtensor(tensor)]
    collectives.broadcast_tensors(plain, device)


def _materialize_layer(part: Module, names: list[str], device: torch.device, first: bool) -> None:
    """Initialises the tensors of those names on rank 0, at full size; sharded ones get their shard of the result."""
    own = dict(Module.named_parameters(part, recurse=False, remove_duplicate=False))
    sharded = {name: parameter for name, parameter in own.items() if name in names and is_dtensor(parameter)}
    full = {name: Parameter(torch.empty(t.shape, dtype=t.dtype, device=device)) for name, t in sharded.items()}
    _hold_parameters(part, full)
    if names and first:
        init_layer(part, None, names)
    _hold_parameters(part, {name: own[name] for name in sharded})
    collectives.broadcast_tensors(full.values(), device)
    with torch.no_grad():
        for name, tensor in sharded.items():
            tensor.copy_(shard_like(full[name].detach(), tensor))


def _hold_parameters(part: Module, parameters: Mapping[str, Parameter]) -> None:
    for name, parameter in parameters.items():
        part.register_parameter(name, parameter)
