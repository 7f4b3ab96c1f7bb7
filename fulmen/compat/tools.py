"""Small tools of devices, processes, loaders and modules under the names that public code imports."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, SequentialSampler

from fulmen.accelerators import CUDAAccelerator, MPSAccelerator
from fulmen.data.loaders import inner_sampler, rebuild_loader, record_arguments, seed_workers
from fulmen.engine import collectives
from fulmen.engine.process_launcher import ProcessLauncher
from fulmen.engine.resolve import gpu_kind
from fulmen.engine.script_launcher import ScriptLauncher
from fulmen.engine.sharded import init_layer
from fulmen.engine.strategy import Strategy, _SkipInit, move_optimizer_state
from fulmen.fabric.distributed import DistributedSamplerWrapper
from fulmen.fabric.sharded import ShardedStrategy
from fulmen.module import LightningModule
from fulmen.utilities.modules import from_compiled, is_compiled
from fulmen.utilities.seed import seed_everything
from fulmen.utilities.types import Stateful

# ---------------------------------------------------------------------- types

_DEVICE = torch.device | str | int
_MAP_LOCATION_TYPE = (
    _DEVICE | Callable[[torch.UntypedStorage, str], torch.UntypedStorage | None] | dict[Any, Any] | None
)
_PARAMETERS = Iterator[nn.Parameter]
CollectibleGroup = dist.ProcessGroup
ReduceOp = dist.ReduceOp
RedOpType = dist.ReduceOp.RedOpType


@runtime_checkable
class Steppable(Protocol):
    """What can make a step."""

    def step(self, closure: Callable[[], Any] | None = ..., **kwargs: Any) -> Any:
        """One step."""


@runtime_checkable
class Optimizable(Steppable, Stateful, Protocol):
    """What behaves like a `torch.optim.Optimizer`."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: Any


class _BackwardSyncControl(ABC):
    """Switches the exchange of gradients off in one backward pass."""

    @abstractmethod
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Inside, gradients are not exchanged if `enabled`."""


class _Sharded(ABC):
    """Marks a strategy of Fabric that spreads parameters over processes; those of fulmen are among them."""

    @abstractmethod
    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Modules created inside are prepared for being spread."""


class _Launcher(ABC):
    """Starts the processes of a run; those of fulmen are among them."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Does it work in a notebook?"""

    @abstractmethod
    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returns in the first process."""


_Sharded.register(ShardedStrategy)
_Launcher.register(ScriptLauncher)
_Launcher.register(ProcessLauncher)

# ---------------------------------------------------------------------- devices


def num_cuda_devices() -> int:
    """How many GPUs torch finds; asking starts no CUDA."""
    return torch.cuda.device_count()


def is_cuda_available() -> bool:
    """Does torch find a GPU?"""
    return num_cuda_devices() > 0


def _determine_root_gpu_device(gpus: Sequence[_DEVICE] | None) -> _DEVICE | None:
    """The first of the devices."""
    return gpus[0] if gpus else None


def _select_auto_accelerator() -> str:
    """What ``accelerator="auto"`` takes: "cuda", "mps" or "cpu"."""
    return gpu_kind() if is_cuda_available() or MPSAccelerator.is_available() else "cpu"


def _parse_gpu_ids(
    gpus: int | str | list[int] | None, include_cuda: bool = False, include_mps: bool = False
) -> list[int] | None:
    """The indices of the GPUs that are meant: by their number, as in "0,2" or as a list; None where none are."""
    kind = CUDAAccelerator if include_cuda and not (include_mps and MPSAccelerator.is_available()) else MPSAccelerator
    indices: list[int] | None = kind.parse_devices(gpus)  # type: ignore[arg-type]  # which refuses None
    return indices


def _optimizer_to_device(optimizer: Optimizer, device: _DEVICE) -> None:
    move_optimizer_state(optimizer, torch.device(device))


def _optimizers_to_device(optimizers: Iterable[Optimizer], device: _DEVICE) -> None:
    for optimizer in optimizers:
        _optimizer_to_device(optimizer, device)


def _has_meta_device_parameters_or_buffers(obj: nn.Module | Optimizer, recurse: bool = True) -> bool:
    """Is a tensor of a module or optimizer on the meta device?"""
    if isinstance(obj, Optimizer):
        return any(tensor.is_meta for group in obj.param_groups for tensor in group["params"])
    return any(tensor.is_meta for tensors in (obj.parameters(recurse), obj.buffers(recurse)) for tensor in tensors)


def _materialize_meta_tensors(module: nn.Module, device: _DEVICE) -> None:
    """Initialises the layers on the meta device, as if they were made on `device` now."""
    late = [part for part in module.modules() if _has_meta_device_parameters_or_buffers(part, recurse=False)]
    for part in late:
        names = [name for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
        part.to_empty(device=device, recurse=False)
        init_layer(part, None, names)


# ---------------------------------------------------------------------- processes


def _sync_ddp_if_available(result: Tensor, group: Any = None, reduce_op: Any = None) -> Tensor:
    """The sum of the tensors of all processes, or what another operation gives; the tensor itself on one."""
    if not collectives.is_initialized():
        return result
    return collectives.all_reduce_tensor(result, result.device, group, reduce_op or "sum")


def _all_gather_ddp_if_available(tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
    """The tensors of all processes along a new first dimension; the tensor itself on one process."""
    if not collectives.is_initialized():
        return tensor
    return collectives.all_gather_tensor(tensor, tensor.device, group, sync_grads)


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """Deals samples out to processes in turn, none of them twice: the last ones may have one less.

    Arguments:
        args: of `torch.utils.data.DistributedSampler`, like `kwargs`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.dataset, Sized)
        self.num_samples = len(range(self.rank, len(self.dataset), self.num_replicas))
        self.total_size = len(self.dataset)


class UnrepeatedDistributedSamplerWrapper(DistributedSamplerWrapper, UnrepeatedDistributedSampler):
    """The same for what a sampler of the user's own chooses."""


def _block_parallel_sync_behavior(strategy: Strategy, block: bool = True) -> AbstractContextManager[Any]:
    """Inside, gradients are not exchanged between processes."""
    return strategy.no_backward_sync(strategy.model) if block else nullcontext()


# ---------------------------------------------------------------------- loaders


def sized_len(dataloader: object) -> int | None:
    """The length; None without one."""
    try:
        return len(dataloader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_len(dataloader: object) -> TypeGuard[Sized]:
    """Is there a length?"""
    return sized_len(dataloader) is not None


def has_iterable_dataset(dataloader: object) -> bool:
    """Does a loader read a dataset that has no indices?"""
    return hasattr(dataloader, "dataset") and isinstance(dataloader.dataset, IterableDataset)


def _is_dataloader_shuffled(dataloader: object) -> bool:
    """Is the order of the samples drawn?"""
    if not isinstance(dataloader, DataLoader) or has_iterable_dataset(dataloader):
        return False
    sampler = inner_sampler(dataloader)
    return isinstance(sampler, RandomSampler) or not isinstance(sampler, (SequentialSampler, list, tuple, range))


def _update_dataloader(dataloader: DataLoader[Any], sampler: Sampler[Any] | Iterable[Any], mode: Any = None) -> Any:
    """A loader like this one with another sampler."""
    return rebuild_loader(dataloader, sampler=sampler)


def _replace_dunder_methods(base_cls: type, store_explicit_arg: str | None = None) -> AbstractContextManager[None]:
    """Inside, loaders and batch samplers remember what they were made of."""
    return record_arguments()


def _auto_add_worker_init_fn(dataloader: object, rank: int) -> None:
    seed_workers(dataloader, rank)


# ---------------------------------------------------------------------- modules and seeds


class _EmptyInit(_SkipInit):
    """Inside, modules are made without first values.

    Arguments:
        enabled: False leaves them their values.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        skip = super().__torch_function__
        return skip(func, types, args, kwargs) if self.enabled else func(*args, **(kwargs or {}))


class _LightningModuleWrapperBase(nn.Module):
    """A module whose call is the step of the stage that runs.

    Arguments:
        forward_module: a `LightningModule`.
    """

    def __init__(self, forward_module: LightningModule) -> None:
        super().__init__()
        self._forward_module = forward_module
        self.module = forward_module

    lightning_module = property(lambda self: self.module, doc="The module inside.")

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        trainer = self.module.trainer
        step = {"train": "training_step", "validate": "validation_step", "sanity_check": "validation_step"}
        stage = trainer.state.stage
        name = "forward" if stage is None else step.get(stage.value, f"{stage.value}_step")
        return getattr(self.module, name)(*inputs, **kwargs)


class _ModuleMode:
    """Remembers train or eval of each part of a module."""

    def __init__(self) -> None:
        self.mode: dict[str, bool] = {}

    def capture(self, module: nn.Module) -> None:
        self.mode = {name: part.training for name, part in module.named_modules()}

    def restore(self, module: nn.Module) -> None:
        for name, part in module.named_modules():
            part.training = self.mode.get(name, part.training)


def _maybe_unwrap_optimized(model: nn.Module) -> nn.Module:
    """The module that was compiled, or the module itself."""
    return from_compiled(model) if is_compiled(model) else model


def reset_seed() -> None:
    """Seeds again as `seed_everything` did last."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        seed_everything(int(seed), workers=os.environ.get("PL_SEED_WORKERS", "0") == "1", verbose=False)


def do_nothing_closure() -> None:
    """A closure for steps without one."""
