"""`FSDPStrategy`: every process keeps a part of each parameter, on torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import Precision
from fulmen.engine.sharded import ShardedStrategy, materialize_layers
from fulmen.engine.strategy_registry import StrategyRegistry
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.introspection import is_generator
from fulmen.utilities.modules import is_dtensor, mode_of_module
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffload, MixedPrecision, MixedPrecisionPolicy, OffloadPolicy, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from fulmen.trainer import Trainer

    Policy = type[Module] | Iterable[type[Module]] | Callable[..., bool] | ModuleWrapPolicy

# Whether parameters are let go between forward and backward, and whether they are spread over a part of the processes.
SHARDING_STRATEGIES = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (False, False),
    "HYBRID_SHARD": (True, True),
    "_HYBRID_SHARD_ZERO2": (False, True),
}
# What the older wrapper, `FullyShardedDataParallel`, is told and `fully_shard` is not: what to say, and for which values
# there is nothing to say.
OBSOLETE_OPTIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "use_orig_params": ("parameters are always the module's own", (True,)),
    "sync_module_states": ("weights are always those of rank 0", (True,)),
    "limit_all_gathers": ("at most two layers are put together at a time", (True,)),
    "backward_prefetch": ("the next layer is always fetched early", ()),
    "forward_prefetch": ("the next layer is always fetched early", ()),
    "device_id": ("the device is that of the Trainer", (None,)),
}
REFUSED_OPTIONS = {
    "process_group": "Use `device_mesh`.",
    "ignored_modules": "Freeze them instead (`requires_grad_(False)`): each parameter has a choice of its own.",
    "ignored_parameters": "Freeze them instead (`requires_grad_(False)`): each parameter has a choice of its own.",
    "ignored_states": "Freeze them instead (`requires_grad_(False)`): each parameter has a choice of its own.",
}
KNOWN_OPTIONS = (*OBSOLETE_OPTIONS, *REFUSED_OPTIONS, "param_init_fn")


class FSDPStrategy(ShardedStrategy):
    """Parameters, gradients and optimizer states are spread over the processes, on GPUs or on the CPU.

    With automatic optimization, parameters come together for the whole step; those of modules that the policy chooses
    only while such a module runs. Otherwise each child of the module has its parameters together while it runs.

    Arguments:
        cpu_offload: keep parameters and optimizer states on the CPU, and step there.
        mixed_precision: a `MixedPrecisionPolicy` of `fully_shard`, instead of what the precision says.
        auto_wrap_policy: the modules that are communicated on their own, one after the other: classes, or what torch's
            older wrapper accepts.
        activation_checkpointing_policy: the modules that run again in the backward pass instead of keeping what they
            computed; said like the other policy. `activation_checkpointing` is its former name.
        sharding_strategy: "FULL_SHARD"; "SHARD_GRAD_OP" keeps parameters together until the backward pass; with
            "HYBRID_SHARD" each machine (or row of the mesh) has all parameters.
        state_dict_type: "full" writes files, which every strategy reads; "sharded" folders, to which each process adds
            its part.
        device_mesh: for "HYBRID_SHARD": copies and shards, as a mesh or its shape.
        start_method: how the processes start, as for `DDPStrategy`.
        kwargs: what else the older wrapper takes; what has no meaning any more is said, or refused.
    """

    strategy_name = "fsdp"

    def __init__(
        self, accelerator: Accelerator | None = None, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, checkpoint_io: CheckpointIO | None = None, precision_plugin: Precision | None = None,
        process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30),
        cpu_offload: bool | CPUOffload | OffloadPolicy | None = None,
        mixed_precision: MixedPrecision | MixedPrecisionPolicy | None = None, auto_wrap_policy: Policy | None = None,
        activation_checkpointing: Policy | None = None, activation_checkpointing_policy: Policy | None = None,
        sharding_strategy: str | ShardingStrategy = "FULL_SHARD", state_dict_type: str = "full",
        device_mesh: DeviceMesh | tuple[int, ...] | None = None,
        start_method: str = "popen", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            accelerator=accelerator, parallel_devices=parallel_devices, cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io, precision_plugin=precision_plugin,
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method,
        )  # fmt: skip
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(f"`{state_dict_type=}` is not known. Use 'full' or 'sharded'.")
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            what = "`activation_checkpointing` is the former name of `activation_checkpointing_policy`."
            raise ValueError(f"{what} Leave it out.")
        self.sharding_strategy = name = parse_sharding_strategy(sharding_strategy)
        self.reshards, self.hybrid = SHARDING_STRATEGIES[name]
        if device_mesh is not None and num_axes(device_mesh) != (2 if self.hybrid else 1):
            what = f"`{device_mesh=}` does not fit `sharding_strategy={name!r}`."
            raise ValueError(f"{what} 'HYBRID_SHARD' needs two numbers, copies and shards; the others none at all.")
        self.kwargs = check_options(kwargs)
        self.cpu_offload = offloads_to_cpu(cpu_offload)
        self.mixed_precision = None if mixed_precision is None else as_mixed_precision_policy(mixed_precision)
        self.auto_wrap_policy = auto_wrap_policy
        self.activation_checkpointing_policy = activation_checkpointing_policy or activation_checkpointing
        self.state_dict_type = state_dict_type
        self.device_mesh = device_mesh
        self._mesh: DeviceMesh | None = None

    @classmethod
    def get_registered_strategies(cls) -> list[str]:
        """The names that mean this strategy."""
        return [name for name in StrategyRegistry if name.startswith("fsdp")]

    @property
    def sharded_checkpoints(self) -> bool:  # type: ignore[override]
        return self.state_dict_type == "sharded"

    @property
    def mixed_precision_config(self) -> Any:
        """The `MixedPrecisionPolicy` of `fully_shard`."""
        return self.mixed_precision or self.precision_plugin.mixed_precision_config

    def mesh(self) -> DeviceMesh:
        """The processes as a row or, for hybrid sharding, as copies by shards."""
        from torch.distributed.device_mesh import init_device_mesh

        given = self.device_mesh
        if given is not None and not isinstance(given, (tuple, list)):
            return given
        if self._mesh is None:
            default = (self.num_nodes, self.num_processes) if self.hybrid else (self.world_size,)
            names = ("replicate", "shard") if self.hybrid else ("shard",)
            self._mesh = init_device_mesh(self.root_device.type, tuple(given or default), mesh_dim_names=names)
        return self._mesh

    # ------------------------------------------------------------------ the model

    def wrap_model(self, trainer: Trainer) -> None:
        """Layer by layer: the values of rank 0, then everybody's part of them."""
        module = self._lightning_module
        whole = trainer.state.fn != "fit" or (module.automatic_optimization and not is_generator(module.training_step))
        if whole:
            self.model = StepModule(module)
            roots: list[Module] = [self.model]
        else:
            roots = list(callable_children(module))
            check_parameters_in_layers(module, roots)
        self.shard_module(module, roots)
        self.record_sharded_modules()

    def shard_module(self, module: Module, roots: list[Module]) -> None:
        """Shards the parts that the policy chooses, each on its own, and the rest of each of the ``roots``."""
        # Batch norm stays in float32, so it is a part of its own.
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.affine]
        units = select_modules(module, self.auto_wrap_policy)
        parts = list(dict.fromkeys([*(norms if self.narrows_parameters else []), *units, *roots]))
        check_tied_parameters(module, parts)
        for part in select_modules(module, self.activation_checkpointing_policy):
            vars(part)["forward"] = partial(recompute, part.forward, use_reentrant=False)
        self.shard_parts(parts, roots)

    @property
    def narrows_parameters(self) -> bool:
        """Do parameters travel, and are they used, in another dtype than their own?"""
        return self.mixed_precision_config.param_dtype is not None

    def shard_parts(self, parts: list[Module], roots: list[Module]) -> None:
        """Gives each part the values of rank 0 and shards it, unless the user did; ``roots`` are needed together."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        options = self.shard_options()
        done: set[int] = set()
        for part in parts:
            new = [layer for layer in part.modules() if id(layer) not in done]
            done.update(map(id, new))
            materialize_layers(new, self.root_device, self.global_rank == 0, self.kwargs.get("param_init_fn"))
            if isinstance(part, FSDPModule):  # by the user
                continue
            own = dict(options)
            if self.narrows_parameters and isinstance(part, _BatchNorm):
                own["mp_policy"] = as_mixed_precision_policy(None)
            if part in roots and self.reshards:
                own["reshard_after_forward"] = None  # they are needed next, when the backward pass begins
            fully_shard(part, **own)

    def shard_options(self) -> dict[str, Any]:
        """Arguments of `fully_shard`."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        offload = self.cpu_offload
        if not isinstance(offload, OffloadPolicy):
            offload = CPUOffloadPolicy() if offload and self.root_device.type != "cpu" else OffloadPolicy()
        return {
            "mesh": self.mesh(),
            "reshard_after_forward": self.reshards,
            "mp_policy": self.mixed_precision_config,
            "offload_policy": offload,
        }

    def wrap_step(self, step_name: str) -> Callable[..., Any]:
        step: Callable[..., Any] = getattr(self._lightning_module, step_name)
        return explain_missing_parameters(partial(self.model, step) if isinstance(self.model, StepModule) else step)


def explain_missing_parameters(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, whose error says what to do when it uses parameters that are not together."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            what = "A parameter was used while only a part of it is here: that of a layer which was not called."
            fix = (
                "Call the layer, or leave it out of `auto_wrap_policy`; with manual optimization, use `strategy='ddp'`."
            )
            raise RuntimeError(f"{what} {fix} ({error})") from error

    return run


class StepModule(Module):
    """Around the module: calls its steps while the parameters that no other part communicates are together."""

    def __init__(self, module: Module) -> None:
        super().__init__()
        self.module = module

    training = mode_of_module

    def forward(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)


# ---------------------------------------------------------------------- arguments


def num_axes(device_mesh: DeviceMesh | Sequence[int]) -> int:
    """Of a mesh, or of the shape of one."""
    return len(device_mesh) if isinstance(device_mesh, (tuple, list)) else device_mesh.ndim  # type: ignore[union-attr]


def parse_sharding_strategy(value: str | ShardingStrategy) -> str:
    """The name of a sharding strategy, from it or an enum."""
    name = value.name if isinstance(value, Enum) else value
    name = name.upper() if isinstance(name, str) else name
    if name == "NO_SHARD":
        raise ValueError("`sharding_strategy='NO_SHARD'` keeps everything everywhere. That is `strategy='ddp'`.")
    if name not in SHARDING_STRATEGIES:
        known = ", ".join(repr(known) for known in SHARDING_STRATEGIES if not known.startswith("_"))
        raise ValueError(
            f"`sharding_strategy={value!r}` must be one of {known}.{suggest_name(str(name), SHARDING_STRATEGIES)}"
        )
    return name


def check_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Further arguments, after a word about those that mean nothing any more."""
    for name, value in kwargs.items():
        if name not in KNOWN_OPTIONS:
            raise TypeError(f"`FSDPStrategy` has no argument `{name}`.{suggest_name(name, KNOWN_OPTIONS)}")
        if name in REFUSED_OPTIONS and value is not None:
            raise ValueError(f"`FSDPStrategy({name}=...)`: `fully_shard` has no such option. {REFUSED_OPTIONS[name]}")
        why, fine = OBSOLETE_OPTIONS.get(name, ("", (value,)))
        if name == "use_orig_params" and not value:
            raise ValueError(f"`FSDPStrategy({name}={value!r})`: {why} with `fully_shard`. Leave it out.")
        if value not in fine:
            rank_zero_info(f"`FSDPStrategy({name}=...)` changes nothing: {why} with `fully_shard`.")
    return {name: value for name, value in kwargs.items() if name not in REFUSED_OPTIONS}


def as_mixed_precision_policy(given: MixedPrecision | MixedPrecisionPolicy | None) -> MixedPrecisionPolicy:
    """A `MixedPrecisionPolicy`, from one or from the `MixedPrecision` of the older wrapper."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if isinstance(given, MixedPrecisionPolicy):
        return given
    if given is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    if not hasattr(given, "param_dtype"):
        what = f"`mixed_precision={given!r}` must be a policy."
        raise TypeError(f"{what} Use a `torch.distributed.fsdp.MixedPrecisionPolicy`, or `Trainer(precision=...)`.")
    if given.buffer_dtype is not None:
        rank_zero_warn(
            f"`MixedPrecision(buffer_dtype={given.buffer_dtype})`: `fully_shard` leaves buffers as they are."
        )
    cast = bool(given.cast_forward_inputs or given.cast_root_forward_inputs)
    return MixedPrecisionPolicy(given.param_dtype, given.reduce_dtype, cast_forward_inputs=cast)


def offloads_to_cpu(offload: bool | CPUOffload | OffloadPolicy | None) -> bool | OffloadPolicy | None:
    """What an object for torch's older wrapper says; anything else as it is."""
    if offload is None or isinstance(offload, bool):
        return offload
    from torch.distributed.fsdp import CPUOffload

    return offload.offload_params if isinstance(offload, CPUOffload) else offload


# ---------------------------------------------------------------------- parts of a module


def select_modules(module: Module, policy: Policy | None) -> list[Module]:
    """The parts that a policy chooses, inner ones first; never the module itself."""
    if policy is None:
        return []
    if isinstance(policy, type):
        policy = {policy}
    if isinstance(policy, (set, list, tuple, frozenset)):
        found = {part for part in module.modules() if isinstance(part, tuple(policy))}
    elif hasattr(policy, "_run_policy"):  # torch's objects for the older wrapper
        found = set(policy._run_policy(module, set(), {}))
    elif callable(policy):
        found = set()
        _apply_policy(policy, module, found)
    else:
        what = f"The policy {policy!r} chooses no modules."
        raise TypeError(f"{what} Use a set of classes, or `policy(module, recurse, nonwrapped_numel) -> bool`.")
    return [part for part in modules_inner_first(module) if part in found and part is not module and has_forward(part)]


def _apply_policy(policy: Callable[..., bool], part: Module, found: set[Module], top: bool = True) -> int:
    """Asks about a part and what is in it; returns how many numbers are in chosen parts."""
    total = sum(parameter.numel() for parameter in part.parameters())
    if not policy(module=part, recurse=True, nonwrapped_numel=total):
        return 0
    inside = sum(_apply_policy(policy, child, found, False) for child in part.children())
    if not top and policy(module=part, recurse=False, nonwrapped_numel=total - inside):
        found.add(part)
        return total
    return inside


def modules_inner_first(module: Module) -> Iterator[Module]:
    """All modules in it, each after those that it contains."""
    for child in module.children():
        yield from modules_inner_first(child)
    yield module


def has_forward(module: Module) -> bool:
    """Can it be called? A `ModuleList` cannot."""
    return type(module).forward is not Module.forward


def callable_children(module: Module) -> Iterator[Module]:
    """The outermost parts that can be called."""
    for child in module.children():
        if has_forward(child):
            yield child
        else:
            yield from callable_children(child)


def check_parameters_in_layers(module: Module, roots: list[Module]) -> None:
    """Where backward runs inside the step, all parameters have to be in layers that are called."""
    inside = {id(parameter) for root in roots for parameter in root.parameters()}
    outside = [name for name, p in module.named_parameters() if id(p) not in inside and not is_dtensor(p)]
    if outside:
        what = f"The parameters {', '.join(outside[:5])} are in no layer of `{type(module).__name__}` that is called."
        why = "With manual optimization (or a step that yields), FSDP puts parameters together when a layer is called."
        raise MisconfigurationException(f"{what} {why} Put them into one, or use `strategy='ddp'`.")


def check_tied_parameters(module: Module, parts: list[Module]) -> None:
    """A parameter that several layers share has to be communicated by one part."""
    homes = {id(layer): id(part) for part in reversed(parts) for layer in part.modules()}
    seen: dict[int, tuple[str, int]] = {}
    for name, layer in module.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is None or is_dtensor(parameter):
                continue
            home = homes.get(id(layer), 0)
            full = f"{name}.{key}" if name else key
            other, before = seen.setdefault(id(parameter), (full, home))
            if before != home:
                what = f"`{other}` and `{full}` are the same parameter, in parts that the policy would spread apart."
                raise MisconfigurationException(f"{what} Leave both to their parent in `auto_wrap_policy`.")
