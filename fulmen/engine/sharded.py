"""`ShardedStrategy`: what strategies share that spread parameters over processes: states, files and the way back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import LBFGS

from fulmen.engine import collectives
from fulmen.engine.buffers import Buffers
from fulmen.engine.dtensor import FSDPPrecision, gather_full, shard_like
from fulmen.engine.parallel import ParallelStrategy
from fulmen.engine.precision import HalfPrecision, MixedPrecision, Precision
from fulmen.storage.async_io import unwrap_async_io
from fulmen.storage.atomic import finish_interrupted_rename, locked_folder, replace_folder, temporary_name
from fulmen.storage.checkpoint_io import TorchCheckpointIO
from fulmen.storage.filesystem import atomic_write, is_remote, local_path
from fulmen.storage.integrity import DamagedCheckpointError
from fulmen.storage.sharded import (
    CHECKSUMS,
    META,
    OPTIMIZER,
    ShardedStateDict,
    check_shards,
    hash_own_parts,
    is_sharded,
    read_outline,
    read_shards,
    write_shards,
)
from fulmen.utilities.errors import MisconfigurationException, explain
from fulmen.utilities.modules import is_dtensor, parameter_names

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH


class ShardedStrategy(ParallelStrategy):
    """Parameters, gradients and optimizer states are `DTensor`s from `setup` to `teardown`.

    Afterwards rank 0 has the weights as plain tensors on the CPU. In other processes they are on the meta device:
    the next run takes them from rank 0, and nothing holds memory.
    """

    forbids_inference_tensors = True
    restore_checkpoint_after_setup = True
    defers_gradient_reduction = True
    save_is_collective = True
    sharded_checkpoints = False  # a folder with the shards of all processes, instead of a file?
    forward_is_collective = True  # a forward pass gathers parameters

    def __init__(self, **kwargs: Any) -> None:
        self.module_backup: ModuleBackup | None = None  # how to undo what was done to the module, while it is spread
        self.sharded_modules: list[Any] = []  # those with communication of their own
        self._states_kept = True
        super().__init__(**kwargs)
        self.precision_plugin = self._precision_plugin

    @property
    def precision_plugin(self) -> Any:
        """In which numbers the model computes."""
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision: Precision | None) -> None:
        if precision is not None and type(precision) in (Precision, HalfPrecision, MixedPrecision):
            scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
            precision = FSDPPrecision(precision.precision, scaler)
        if precision is not None and not isinstance(precision, FSDPPrecision):
            what = f"`{type(self).__name__}` works with an `FSDPPrecision`, not with `{type(precision).__name__}`."
            raise TypeError(f"{what} Use `precision='bf16-mixed'`, or build your class on `FSDPPrecision`.")
        self._precision_plugin = precision

    def precision_for(self, name: str) -> FSDPPrecision:
        """The precision of that name."""
        return FSDPPrecision(name)

    # ------------------------------------------------------------------ life

    def setup(self, trainer: Trainer) -> None:
        if self.sharded_checkpoints:
            self.checkpoint_io = unwrap_async_io(self.checkpoint_io, "all processes write their shards together")
        if self.sharded_checkpoints and type(self.checkpoint_io) is not TorchCheckpointIO:
            what = f"`{type(self.checkpoint_io).__name__}` stores files, and sharded checkpoints are folders."
            raise MisconfigurationException(f"{what} Leave it out, or write full checkpoints.")
        lazy = [name for name, p in self._lightning_module.named_parameters() if torch.nn.parameter.is_lazy(p)]
        if lazy:
            what = f"Lazy parameters that saw no batch yet cannot be spread over processes: {', '.join(lazy[:5])}."
            raise RuntimeError(f"{what} Run a batch through them in `configure_model`.")
        self.precision_plugin.use_device(self.root_device)
        self.module_backup = ModuleBackup(self._lightning_module)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            what = "LBFGS joins all parameters to one vector, and they are spread over processes."
            raise MisconfigurationException(f"{what} Use another optimizer, or `strategy='ddp'`.")

    def model_to_device(self) -> None:
        """Each part comes to the device when it is spread; never the whole model."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None]:
        """With ``empty_init``, modules are made on the meta device: layers get values when they are spread."""
        with torch.device("meta") if empty_init else nullcontext(), self.precision_plugin.module_init_context():
            yield

    @contextmanager
    def model_sharded_context(self) -> Generator[None]:
        """Inside, all processes draw the random numbers of rank 0."""
        own = torch.get_rng_state()
        torch.set_rng_state(self.broadcast(own))
        try:
            yield
        finally:
            if self.global_rank != 0:
                torch.set_rng_state(own)

    def record_sharded_modules(self) -> None:
        """Everything is spread: finds the modules that communicate, and what has to be undone."""
        from torch.distributed.fsdp import FSDPModule

        assert self.module_backup is not None
        self.module_backup.record_changes()
        self.sharded_modules = [part for part in self.model.modules() if isinstance(part, FSDPModule)]
        self.buffers = Buffers(self._lightning_module, self.root_device)
        if self.sharded_modules and self.process_group_backend != "nccl":
            average_by_sum(self.sharded_modules)

    def teardown(self) -> None:
        if self.module_backup is not None and not self.aborting:
            self.unshard_module(self.module_backup)
        self.module_backup = None
        self.sharded_modules = []
        self.model = self._lightning_module
        super().teardown()

    def unshard_module(self, backup: ModuleBackup) -> None:
        """The module with plain parameters, values on rank 0; of the optimizers' states those that a file would have."""
        keep = self.global_rank == 0
        self._reshard()
        new: dict[int, Any] = {}
        for part in self._lightning_module.modules():
            for name, old in [*part._parameters.items()]:
                if old is not None and (is_dtensor(old) or not keep):
                    if id(old) not in new:
                        new[id(old)] = Parameter(_gather_or_meta(old, keep), old.requires_grad)
                    part._parameters[name] = new[id(old)]
        backup.restore()
        self._states_kept = not self.sharded_checkpoints
        for optimizer in self.optimizers:
            unshard_optimizer(optimizer, new, keep, self._states_kept)

    def move_to_cpu(self) -> None:
        """Parameters and states are there already, or nowhere."""
        if (module := self._lightning_module) is not None:
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.cpu())
            module.__dict__["_device"] = torch.device("cpu")

    # ------------------------------------------------------------------ steps

    @contextmanager
    def _without_sync(self) -> Generator[None]:
        for part in self.sharded_modules:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in self.sharded_modules:
                part.set_requires_gradient_sync(True, recurse=False)

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        return self._without_sync() if enabled and self.sharded_modules else nullcontext()

    def _reshard(self) -> None:
        for part in self.sharded_modules:
            part.reshard()

    def on_validation_start(self) -> None:
        """Weights that are still together from an earlier pass are let go: they may have been changed since."""
        self._reshard()

    on_validation_end = on_validation_start

    def on_train_end(self) -> None:
        """The same, and what is so at the end of any training."""
        self._reshard()
        super().on_train_end()

    # ------------------------------------------------------------------ states

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Weights and buffers: all on rank 0 and nothing elsewhere, or for a sharded checkpoint everybody's own part."""
        return self.state_to_save(self._lightning_module.state_dict())

    def state_to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        keep = self.global_rank == 0
        if self.sharded_checkpoints and self.module_backup is not None:
            return state
        full = {name: gather_full(value, keep) for name, value in state.items()}
        return full if keep else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self.module_backup is None and not self._states_kept:
            what = "The run is over, and the states of its optimizers, which were spread over processes, are gone."
            fix = "Save inside the run (`ModelCheckpoint`, `on_train_end`), or with `weights_only=True`."
            raise RuntimeError(f"{what} {fix}")
        state = super().optimizer_state(optimizer)
        keep = self.global_rank == 0
        if not self.sharded_checkpoints or self.module_backup is None:
            full = {i: {k: gather_full(v, keep) for k, v in values.items()} for i, values in state["state"].items()}
            return {**state, "state": full} if keep else {}
        names = parameter_names(self._lightning_module, self.precision_plugin.main_params(optimizer))
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
        return {**state, "state": {names[i]: dict(v) for i, v in state["state"].items()}, "param_groups": groups}

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        module = self._lightning_module
        saved = checkpoint["state_dict"]
        # Straight into the parameters; what does not fit is complained about here.
        module.load_state_dict(fill_with_saved(saved, module.state_dict()), strict=strict)

    def state_from_checkpoint(self, saved: dict[str, Any]) -> dict[str, Any]:
        own = self._lightning_module.state_dict()
        fitting = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
        return fill_with_saved(saved, {key: torch.empty_like(own[key], dtype=v.dtype) for key, v in fitting.items()})

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["optimizer_states"]
        stored = checkpoint["state_dict"] if isinstance(checkpoint["state_dict"], ShardedStateDict) else None
        fitted = []
        for index, (optimizer, state) in enumerate(zip(self.optimizers, saved)):
            parameters = self.precision_plugin.main_params(optimizer)
            names = parameter_names(self._lightning_module, parameters)
            fitted.append(shard_optimizer_state(state, parameters, names, OPTIMIZER.format(index), stored))
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": fitted + saved[len(fitted) :]})

    # ------------------------------------------------------------------ files

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: dict[str, Any] | None = None
    ) -> None:
        if not self.sharded_checkpoints or self.module_backup is None:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(f"`{storage_options=}`: sharded checkpoints have no options. Leave them out.")
        write_folder(self, filepath, lambda folder: write_shards(checkpoint, folder), checkpoint)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        finish_interrupted_rename(local_path(checkpoint_path))
        if not is_sharded(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only)
        problem = None
        try:
            check_shards(os.fspath(checkpoint_path), self.global_rank, self.world_size)
        except DamagedCheckpointError as error:
            problem = str(error)
        if problems := [found for found in self.exchange_objects(problem) if found]:
            raise DamagedCheckpointError(problems[0])
        return read_outline(checkpoint_path, weights_only)


def write_folder(
    strategy: ShardedStrategy, filepath: _PATH, write_own_part: Callable[[str], None], rest: dict[str, Any]
) -> None:
    """Writes a checkpoint as a folder, which is there as a whole or not at all; all processes call this.

    Arguments:
        write_own_part: writes this process's part of the tensors into the folder it is given.
        rest: what rank 0 writes beside them, as it is when that is done.
    """
    if is_remote(filepath):
        what = f"{os.fspath(filepath)!r} is no local path, and sharded checkpoints are folders on a file system."
        raise ValueError(f"{what} Use a path that all processes see, or write full checkpoints.")
    path = os.path.abspath(local_path(filepath))
    beside = strategy.broadcast(temporary_name(path))
    with ExitStack() as stack:
        strategy.on_rank_zero(lambda: stack.enter_context(locked_folder(beside)), f"make the folder {beside!r}")
        write_own_part(beside)  # an error of one process is raised in all of them
        written = strategy.exchange_objects(hash_own_parts(beside, strategy.global_rank))

        def finish() -> None:
            sums = {name: measured for own in written for name, measured in own.items()}
            atomic_write(os.path.join(beside, CHECKSUMS), json.dumps(sums).encode())
            strategy.checkpoint_io.save_checkpoint(rest, os.path.join(beside, META))
            replace_folder(beside, path)

        strategy.on_rank_zero(finish, f"write the checkpoint {path!r}")


class ModuleBackup:
    """How a module was before layers were given other classes, hooks and attributes; and that again."""

    def __init__(self, module: Module) -> None:
        self.before = [(part, type(part), set(vars(part)), _hooks_of(part)) for part in module.modules()]
        self.changes: list[tuple[Module, type, set[str], dict[str, set[Any]]]] = []

    def record_changes(self) -> None:
        """Only what was changed until now is undone."""
        for part, kind, names, hooks in self.before:
            more = {name: set(now) - set(hooks.get(name, ())) for name, now in _hooks_of(part).items()}
            self.changes.append((part, kind, set(vars(part)) - names, more))

    def restore(self) -> None:
        from torch.distributed import _composable_state

        known = _composable_state._module_state_mapping  # what torch keeps beside the modules
        for part, kind, names, hooks in self.changes:
            part.__class__ = kind
            known.pop(part, None)
            for name, keys in hooks.items():
                for key in keys:
                    vars(part)[name].pop(key, None)
            for name in names:
                vars(part).pop(name, None)


def _hooks_of(part: Module) -> dict[str, dict[Any, Any]]:
    return {name: dict(value) for name, value in vars(part).items() if isinstance(value, dict) and "hooks" in name}


def materialize_layers(
    parts: Iterable[Module], device: torch.device, first: bool, init: Callable[[Any], Any] | None
) -> None:
    """Layers get the values of rank 0; those on the meta device are initialised there, as if they were made now.

    Arguments:
        parts: layers, each with the parameters and buffers that it holds itself; not what is spread already.
        first: is this rank 0?
        init: called with a layer; its `reset_parameters` by default.

    Raises:
        TypeError: a layer on the meta device has no `reset_parameters`.
    """
    shared: list[Tensor] = []
    for part in parts:
        before = _plain_tensors(part)
        missing = {name: tensor for name, tensor in before.items() if tensor.is_meta}
        for name, tensor in missing.items():
            empty = torch.empty_like(tensor, device=device)
            made = Parameter(empty, tensor.requires_grad) if isinstance(tensor, Parameter) else empty
            setattr(part, name, made)
        if missing and first:
            init_layer(part, init, list(missing))
        # What an initialisation adds is there on rank 0 alone, and not to be shared.
        now = _plain_tensors(part)
        shared += [now[name] for name in before]
    collectives.broadcast_tensors(shared, device)


def _plain_tensors(part: Module) -> dict[str, Tensor]:
    """Parameters and buffers that a layer holds itself and that are not sharded, each under all of its names."""
    # Of the base class: layers may override these with fewer arguments.
    parameters = Module.named_parameters(part, recurse=False, remove_duplicate=False)
    buffers = Module.named_buffers(part, recurse=False, remove_duplicate=False)
    return {name: tensor for name, tensor in (*parameters, *buffers) if not is_dtensor(tensor)}


class _Resettable(Protocol):
    def reset_parameters(self) -> None: ...


class _PrivatelyResettable(Protocol):
    def _reset_parameters(self) -> None: ...


def _knows_first_values(part: object) -> TypeGuard[_Resettable]:
    return hasattr(part, "reset_parameters")


def _knows_them_privately(part: object) -> TypeGuard[_PrivatelyResettable]:
    return hasattr(part, "_reset_parameters")  # `nn.MultiheadAttention`, `nn.Transformer`


def init_layer(part: Module, init: Callable[[Any], Any] | None, names: list[str]) -> None:
    """Gives the tensors of a layer their first values."""
    with torch.no_grad():
        if init is not None:
            init(part)
        elif _knows_first_values(part):
            part.reset_parameters()
        elif _knows_them_privately(part):
            part._reset_parameters()
        else:
            what = f"`{type(part).__name__}` was made on the meta device, and it has no method `reset_parameters`:"
            why = f"nobody knows the first values of {', '.join(names)}."
            raise TypeError(explain(what, why, "Define it, or make it on the CPU."))


def average_by_sum(modules: Iterable[Any]) -> None:
    """Gradients are averaged by a sum and a division: gloo of some versions of torch takes an average for a sum.

    Raises:
        RuntimeError: torch is too old to be told.
    """
    for module in modules:
        if not hasattr(module, "set_force_sum_reduction_for_comms"):
            what = f"`fully_shard` of torch {torch.__version__} cannot average gradients over gloo."
            raise RuntimeError(f"{what} Install a newer one, or use `strategy='ddp'` on the CPU.")
        module.set_force_sum_reduction_for_comms(True)


def fill_with_saved(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What was saved, with this process's part of what is spread; what is in a folder is read into `own`."""
    loaded = dict(saved)
    if isinstance(saved, ShardedStateDict):
        fitting = {key: own[key] for key, value in saved.items() if key in own and _can_read(own[key], value)}
        wanted = {f"{saved.prefix}{key}": value for key, value in fitting.items()}
        read_shards(wanted, saved)
        loaded.update({key: wanted[f"{saved.prefix}{key}"] for key in fitting})
    for key, value in loaded.items():
        if is_dtensor(own.get(key)) and not is_dtensor(value) and value.shape == own[key].shape and not value.is_meta:
            loaded[key] = shard_like(value, own[key])
    return loaded


def unshard_optimizer(optimizer: Optimizer, new: dict[int, Any], keep: bool, keep_states: bool) -> None:
    """Gives an optimizer the new parameters, by id of the old ones, and full states where they are kept."""
    states = dict(optimizer.state)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for index, old in enumerate(group["params"]):
            group["params"][index] = new.get(id(old), old)
            if keep_states and old in states:
                state = {key: gather_full(value, keep) for key, value in states[old].items()}
                optimizer.state.update({group["params"][index]: state} if keep else {})


def shard_optimizer_state(
    state: dict[str, Any], parameters: list[Any], names: list[str], prefix: str, stored: ShardedStateDict | None
) -> dict[str, Any]:
    """A saved state of an optimizer as this process has one: keyed by position, and sharded like the parameters.

    Arguments:
        parameters: of the optimizer, in order; `names` are theirs.
        prefix: of the optimizer's tensors in a folder.
        stored: the folder that still has tensors of the state, if it is one.
    """
    keys = [key for group in state["param_groups"] for key in group["params"]]
    ordered = names if set(keys) == set(names) else keys
    position = {key: index for index, key in enumerate(ordered)}
    parameter_of = {key: parameters[position[key]] for key in state["state"]}
    read = {} if stored is None else _read_missing_states(state["state"], parameter_of, prefix, stored)
    values: dict[int, dict[str, Any]] = {}
    for key, value in state["state"].items():
        found = {name: read.get(f"{prefix}{key}.{name}", v) for name, v in value.items()}
        values[position[key]] = {name: _shard_if_full(v, parameter_of[key]) for name, v in found.items()}
    groups = [{**group, "params": [position[key] for key in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": values, "param_groups": groups}


def _read_missing_states(
    states: dict[Any, dict[str, Any]], parameter_of: dict[Any, Any], prefix: str, stored: ShardedStateDict
) -> dict[str, Any]:
    """What states hold of a folder only, by name of the shard, sharded like the parameters."""
    wanted: dict[str, Any] = {}
    for key, value in states.items():
        missing = {name: v for name, v in value.items() if _is_in_folder(v)}
        wanted |= {f"{prefix}{key}.{name}": _empty_like_saved(v, parameter_of[key]) for name, v in missing.items()}
    if wanted:
        read_shards(wanted, stored)
    return wanted


def _shard_if_full(value: object, parameter: Tensor) -> object:
    """This process's shard of a full tensor of a sharded parameter's shape; other values as they are."""
    if not isinstance(value, Tensor) or is_dtensor(value) or not is_dtensor(parameter):
        return value
    return shard_like(value, parameter) if value.shape == parameter.shape else value


def _gather_or_meta(tensor: Tensor, keep: bool) -> Tensor:
    full = gather_full(tensor, keep)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if full is None else full


def _is_in_folder(value: object) -> bool:
    """Is it still in the folder?"""
    return value is None or (isinstance(value, Tensor) and value.is_meta)


def _can_read(own: object, saved: object) -> bool:
    """Is it in the folder only, and of the shape that it has here? What is no tensor has none."""
    return _is_in_folder(saved) and _shape_of(own) == _shape_of(saved)


def _shape_of(value: object) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _empty_like_saved(value: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Where a stored tensor can be read to: spread like its parameter, if it has its shape."""
    if value is None:
        return None
    if value.shape != parameter.shape:
        return torch.empty_like(value, device="cpu")
    return torch.empty_like(parameter.detach(), dtype=value.dtype)
