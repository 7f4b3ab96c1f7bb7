"""Fabric's strategies that spread parameters over processes: `FSDPStrategy` and `ModelParallelStrategy`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fulmen.engine import fsdp as engine_fsdp
from fulmen.engine import model_parallel as engine_model_parallel
from fulmen.engine import sharded as engine_sharded
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.dtensor import FSDPPrecision, gather_full
from fulmen.engine.parallel import ParallelStrategy as EngineParallelStrategy
from fulmen.engine.precision import Precision
from fulmen.fabric.checkpoint import check_names, collect_states, load_states
from fulmen.fabric.strategy import ParallelStrategy
from fulmen.storage.atomic import finish_interrupted_rename
from fulmen.storage.filesystem import local_path
from fulmen.storage.sharded import check_shards, is_sharded, list_shards, read_dcp_folder, read_meta, write_tensors
from fulmen.utilities.modules import is_dtensor, parameter_names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffload, MixedPrecision, MixedPrecisionPolicy, OffloadPolicy, ShardingStrategy
    from torch.optim.lr_scheduler import LRScheduler

    from fulmen.engine.fsdp import Policy
    from fulmen.fabric.checkpoint import Filter
    from fulmen.utilities.types import _PATH


class ShardedStrategy(ParallelStrategy, engine_sharded.ShardedStrategy):
    """Parameters, gradients and optimizer states are `DTensor`s from the moment a module is set up.

    A checkpoint has one such module, and any number of optimizers of it. It is a file with everything, or a folder to
    which each process adds its shards.
    """

    # ------------------------------------------------------------------ setting up

    def module_to_device(self, module: Module) -> None:
        """Each part comes to the device when it is spread; never the whole module."""

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Entered where a module is made: all processes draw the random numbers of rank 0."""
        return self.model_sharded_context()

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer itself.

        Raises:
            ValueError: it has none of the parameters of a module that was set up.
        """
        if not any(is_dtensor(parameter) for parameter in self.precision.main_params(optimizer)):
            what = f"`{type(optimizer).__name__}` has no parameters that are spread over processes."
            raise ValueError(f"{what} Make it after the module was set up, from the parameters of that.")
        return super().setup_optimizer(optimizer)

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: LRScheduler | None = None
    ) -> tuple[Module, list[Optimizer], LRScheduler | None]:
        """Spreads the module, and gives optimizers that were made before its new parameters."""
        old = dict(module.named_parameters())
        wrapped = self.setup_module(module)
        new = dict(wrapped.named_parameters())
        replaced = {id(parameter): new.get(name, parameter) for name, parameter in old.items()}
        for optimizer in optimizers:
            replace_parameters(optimizer, replaced)
        return wrapped, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def tell_precision_device(self) -> None:
        """The precision may need a loss scaler for the device."""
        precision = self.precision
        assert isinstance(precision, FSDPPrecision)  # what any other one became
        precision.use_device(self.root_device)

    def finish_sharding(self, module: Module) -> Module:
        """The module, whose parts are spread."""
        if self.process_group_backend != "nccl":
            engine_sharded.average_by_sum(fsdp_parts(module))
        return module

    # ------------------------------------------------------------------ steps

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, backward passes of the module keep their gradients to this process, at full size.

        Raises:
            TypeError: it is not a module that was set up.
        """
        parts = [] if module is None else fsdp_parts(module)
        if not parts:
            what = (
                f"`no_backward_sync` received a `{type(module).__name__}`, no part of which was given to `fully_shard`."
            )
            raise TypeError(f"{what} Pass the module that was set up.")
        return _without_sync(parts) if enabled else nullcontext()

    # ------------------------------------------------------------------ states and files

    def load_module_state_dict(self, module: Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Puts weights and buffers back, of which each process takes its shard."""
        filled = engine_sharded.fill_with_saved(state_dict, module.state_dict())
        module.load_state_dict(filled, strict=strict)

    def save_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: dict[str, Module | Optimizer | Any],
        storage_options: Any = None,
        filter: dict[str, Filter] | None = None,
    ) -> None:
        """Writes a checkpoint of one sharded module and what belongs to it; all processes call this.

        Raises:
            TypeError: for `storage_options`.
            NotImplementedError: for a `filter` of a folder, whose shards cannot be left out.
            ValueError: the state has no sharded module, or several.
            IsADirectoryError: the path is a folder that is no checkpoint, and a file should be written.
        """
        name = type(self).__name__
        if storage_options is not None:
            raise TypeError(f"`{storage_options=}`: `{name}` has no options for storage. Leave them out.")
        if filter is not None and self.sharded_checkpoints:
            what = f"`filter` of `{name}` works for files, not for folders with the shards of all processes."
            raise NotImplementedError(f"{what} Leave it out, or write full checkpoints.")
        module = find_sharded_module(state)
        path = self.broadcast(os.fspath(path))
        if self.sharded_checkpoints:
            self._save_folder(path, state, module)
            return
        if os.path.isdir(path):
            if not is_sharded(path):
                raise IsADirectoryError(f"{path!r} is a folder, and no checkpoint. Choose another path for the file.")
            self.on_rank_zero(lambda: shutil.rmtree(path), f"remove the checkpoint {path!r}")
        full = gather_nested(collect_states(self, state, filter or {}), self.is_global_zero)
        engine_sharded.ShardedStrategy.save_checkpoint(self, full, path)

    def _save_folder(self, path: str, state: dict[str, Any], module: Module) -> None:
        shards: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in collect_states(self, state, {}).items():
            if isinstance(state[key], Optimizer):
                shards[key] = name_parameters(value, self._names(state[key], module))
            else:
                (shards if isinstance(state[key], Module) else rest)[key] = value
        engine_sharded.write_folder(self, path, lambda folder: write_tensors(shards, folder), rest)

    def _names(self, optimizer: Optimizer, module: Module) -> list[str]:
        return parameter_names(module, self.precision.main_params(optimizer))

    def load_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: Module | Optimizer | dict[str, Module | Optimizer | Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads a file or folder into one sharded module and what belongs to it; all processes call this.

        Raises:
            ValueError: the state has no sharded module, or several.
            NotImplementedError: it is a single optimizer, whose parameters only a module can name.
            KeyError: it has a key that the checkpoint has not.
        """
        name = type(self).__name__
        if isinstance(state, Optimizer):
            what = f"`{name}` cannot load an optimizer alone: only its module knows which parameter is which."
            raise NotImplementedError(f"{what} Pass both: `{{'model': model, 'optimizer': optimizer}}`.")
        path = self.broadcast(os.fspath(path))
        if isinstance(state, Module):
            return super().load_checkpoint(path, state, strict, weights_only)
        if not state:
            what = f"`{name}.load_checkpoint` needs the module that the checkpoint is to be loaded into."
            raise ValueError(f"{what} Pass it in `state`: `{{'model': model, ...}}`.")
        module = find_sharded_module(state)
        content = self._read_content(path, state, module, weights_only)
        if strict:
            check_names(state, content)
        for key, optimizer in state.items():
            if isinstance(optimizer, Optimizer) and key in content:
                parameters = self.precision.main_params(optimizer)
                names = self._names(optimizer, module)
                content[key] = engine_sharded.shard_optimizer_state(content[key], parameters, names, "", None)
        return load_states(self, state, content, strict)

    def _read_content(
        self, path: str, state: dict[str, Any], module: Module, weights_only: bool | None
    ) -> dict[str, Any]:
        """What a file or folder holds; of a folder's tensors, this process's shards."""
        finish_interrupted_rename(local_path(path))
        if not is_sharded(path):
            return engine_sharded.ShardedStrategy.load_checkpoint(self, path, weights_only)
        check_shards(path, self.global_rank, self.world_size)
        return {**read_meta(path, weights_only), **self._read_shards(path, state, module, weights_only)}

    def _read_shards(
        self, path: str, state: dict[str, Any], module: Module, weights_only: bool | None
    ) -> dict[str, dict[str, Any]]:
        """State dicts of a folder under the keys of `state`, of which this process has its shards."""
        like: dict[str, Any] = {}  # a tensor of the same layout, by name of a shard
        for key, value in state.items():
            if isinstance(value, Optimizer):
                parameters = self.precision.main_params(value)
                like |= {f"{key}.state.{n}": p.detach() for n, p in zip(self._names(value, module), parameters)}
            elif isinstance(value, Module):
                like |= {f"{key}.{n}": tensor for n, tensor in value.state_dict().items()}
        wanted = {
            name: None if entry is None else _empty_like(like.get(name, like.get(name.rpartition(".")[0])), entry)
            for name, entry in list_shards(path, weights_only).items()
            if name.partition(".")[0] in state
        }
        return read_dcp_folder(path, weights_only, wanted)


class FSDPStrategy(ShardedStrategy, engine_fsdp.FSDPStrategy):
    """Parameters, gradients and optimizer states are spread over the processes, on GPUs or on the CPU.

    Arguments:
        cpu_offload: keep parameters and optimizer states on the CPU, and step there.
        mixed_precision: a `MixedPrecisionPolicy` of `fully_shard`, instead of what the precision says.
        auto_wrap_policy: the parts of a module that are communicated on their own, one after the other: classes, or what
            torch's older wrapper accepts.
        activation_checkpointing_policy: the parts that run again in the backward pass instead of keeping what they
            computed; said like the other policy. `activation_checkpointing` is its former name.
        sharding_strategy: "FULL_SHARD"; "SHARD_GRAD_OP" keeps parameters together until the backward pass; with
            "HYBRID_SHARD" each machine (or row of the mesh) has all parameters.
        state_dict_type: "sharded" writes folders, to which each process adds its part; "full" files.
        device_mesh: for "HYBRID_SHARD": copies and shards, as a mesh or its shape.
        kwargs: what else the older wrapper takes; what has no meaning any more is said, or refused.

    >>> FSDPStrategy().sharded_checkpoints
    True
    """

    def __init__(
        self, accelerator: Accelerator | None = None, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, precision: Precision | None = None,
        process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30),
        cpu_offload: bool | CPUOffload | OffloadPolicy | None = None,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None, auto_wrap_policy: Policy | None = None,
        activation_checkpointing: Policy | None = None, activation_checkpointing_policy: Policy | None = None,
        sharding_strategy: str | ShardingStrategy = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "sharded",
        device_mesh: DeviceMesh | tuple[int, ...] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        engine_fsdp.FSDPStrategy.__init__(
            self, accelerator, parallel_devices, cluster_environment, None, precision, process_group_backend, timeout,
            cpu_offload, mixed_precision, auto_wrap_policy, activation_checkpointing, activation_checkpointing_policy,
            sharding_strategy, state_dict_type, device_mesh, **kwargs,
        )  # fmt: skip

    def setup_module(self, module: Module) -> Module:
        """The module itself, whose parameters are spread; those of rank 0 are in all processes."""
        self.tell_precision_device()
        self.shard_module(module, [module])
        return self.finish_sharding(module)


class ModelParallelStrategy(ShardedStrategy, engine_model_parallel.ModelParallelStrategy):
    """Tensor parallelism, `fully_shard` or both, on the mesh `device_mesh`.

    Arguments:
        parallelize_fn: called as ``parallelize_fn(module, device_mesh)``; it spreads the layers over
            ``device_mesh["tensor_parallel"]`` (`parallelize_module`) and ``device_mesh["data_parallel"]``
            (`fully_shard`), and returns the module.
        data_parallel_size: with how many different batches; "auto" is the number of machines.
        tensor_parallel_size: over how many processes a layer is spread; "auto" is the number of devices of a machine.
        save_distributed_checkpoint: write folders, to which each process adds its part, instead of files.
    """

    def __init__(
        self, parallelize_fn: Callable[[Any, DeviceMesh], Any], data_parallel_size: int | Literal["auto"] = "auto",
        tensor_parallel_size: int | Literal["auto"] = "auto", save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:  # fmt: skip
        engine_model_parallel.ModelParallelStrategy.__init__(
            self, data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.parallelize_fn = parallelize_fn

    def setup_environment(self) -> None:
        EngineParallelStrategy.setup_environment(self)
        self.make_mesh()

    def setup_module(self, module: Module) -> Module:
        """What `parallelize_fn` makes of the module, with the values of rank 0.

        Raises:
            TypeError: it returned no module.
            RuntimeError: nothing would average some gradients over processes with different batches.
        """
        self.tell_precision_device()
        made = self.parallelize_fn(module, self.device_mesh)
        if not isinstance(made, Module):
            what = f"`parallelize_fn` returned a `{type(made).__name__}`."
            raise TypeError(f"{what} It must return the module whose layers it spread.")
        engine_model_parallel.check_gradients_averaged(made, self.device_mesh["data_parallel"].size())
        engine_model_parallel.materialize_module(made, self.root_device, self.global_rank == 0)
        return self.finish_sharding(made)


def fsdp_parts(module: Module) -> list[Any]:
    """The parts of a module that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def find_sharded_module(state: Mapping[str, Any]) -> Module:
    """The one module of a state whose parameters are spread.

    Raises:
        ValueError: there is none, or there are several.
    """
    modules = {key: value for key, value in state.items() if isinstance(value, Module)}
    found = {key: module for key, module in modules.items() if any(is_dtensor(p) for p in module.parameters())}
    if len(found) != 1:
        what = f"A checkpoint needs one module that was set up, and this state has {len(found)}"
        fix = "Save each with what belongs to it." if found else "Put it in: `{'model': model, ...}`."
        raise ValueError(f"{what}{''.join(f', {key!r}' for key in found)}. {fix}")
    return next(iter(found.values()))


@contextmanager
def _without_sync(parts: list[Any]) -> Generator[None]:
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def replace_parameters(optimizer: Optimizer, new: Mapping[int, Tensor]) -> None:
    """Gives an optimizer new parameters, by id of the old ones.

    Raises:
        RuntimeError: it has stepped already, so that it has states of the old ones.
    """
    if optimizer.state:
        what = f"`{type(optimizer).__name__}` has made a step already, and its states cannot be spread."
        raise RuntimeError(f"{what} Set it up before its first step.")
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]


def name_parameters(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The state dict of an optimizer with names of parameters in place of their positions."""
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def gather_nested(state: Any, keep: bool) -> Any:
    """Nested dictionaries with full tensors in place of sharded ones, on the processes that keep them; a collective."""
    if isinstance(state, Mapping):
        return {key: gather_nested(value, keep) for key, value in state.items()}
    return gather_full(state, keep) if is_dtensor(state) else state


def _empty_like(like: Any, entry: Tensor) -> Tensor:
    """Where a stored tensor can be read to: spread like a tensor of the same shape, or full on the CPU."""
    if like is None or like.shape != entry.shape:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    return torch.empty_like(like, dtype=entry.dtype)
