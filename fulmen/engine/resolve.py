"""From what the user wrote to a `Strategy` that is ready to be set up. The only place that chooses."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch

from fulmen.engine.accelerators import Accelerator, AcceleratorRegistry, CUDAAccelerator, MPSAccelerator, Registry
from fulmen.engine.cluster import ClusterEnvironment, detect_environment
from fulmen.engine.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from fulmen.engine.strategy import Strategy
from fulmen.engine.strategy_registry import SingleDeviceStrategy, StrategyRegistry
from fulmen.engine.sync_batchnorm import LayerSync, TorchSyncBatchNorm
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.console import is_interactive
from fulmen.utilities.errors import (
    InvalidChoiceError,
    InvalidPluginError,
    PossibleUserWarning,
    UnavailableError,
    describe_received,
    find_nearest_name,
    suggest_name,
)
from fulmen.utilities.optional import is_installed
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

# The parts of a strategy that come as plugins; a `LayerSync` is none of them.
PLUGIN_PARTS: dict[str, type] = {
    "precision_plugin": Precision,
    "checkpoint_io": CheckpointIO,
    "cluster_environment": ClusterEnvironment,
}
PLUGINS = (*PLUGIN_PARTS.values(), LayerSync)
PRECISIONS: dict[str, Callable[[torch.device], Precision]] = {
    "32-true": lambda device: Precision(),
    "64-true": lambda device: DoublePrecision(),
    "16-true": lambda device: HalfPrecision("16-true"),
    "bf16-true": lambda device: HalfPrecision("bf16-true"),
    "16-mixed": lambda device: MixedPrecision("16-mixed", device.type),
    "bf16-mixed": lambda device: MixedPrecision("bf16-mixed", device.type),
    "transformer-engine": lambda device: _make_transformer_engine(torch.bfloat16),
    "transformer-engine-float16": lambda device: _make_transformer_engine(torch.float16),
}
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
# What people write after the names in torch and elsewhere; no name, but a hint.
PRECISION_HINTS = {
    **dict.fromkeys(("float64", "fp64", "double", "64.0"), "64-true"),
    **dict.fromkeys(("float32", "fp32", "float", "single", "full", "32.0"), "32-true"),
    **dict.fromkeys(("float16", "fp16", "half", "amp", "mixed", "16.0"), "16-mixed"),
    **dict.fromkeys(("bfloat16", "brain"), "bf16-mixed"),
    **dict.fromkeys(("8", "fp8", "float8"), "transformer-engine"),
}

# What not every device of a type can do: how to find out, and which ones can. Other types can do all but FP8.
Ability = tuple[Callable[[torch.device], bool], str]
DEVICE_ABILITIES: dict[str, dict[str, Ability]] = {
    "cuda": {
        "bfloat16": (lambda device: torch.cuda.is_bf16_supported(), "GPUs of NVIDIA and AMD"),
        # what `is_bf16_supported(including_emulation=False)` asks of the current device
        "fast bfloat16": (lambda device: has_capability((8, 0), device), "GPUs from compute capability 8.0 on"),
        "FP8": (lambda device: has_capability((8, 9), device), "GPUs from compute capability 8.9 on"),
    },
    "mps": {
        "float64": (lambda device: False, "other devices"),
        "bfloat16": (lambda device: torch.backends.mps.is_macos_or_newer(14, 0), "macOS 14 and newer"),
        "a loss scaler": (lambda device: is_installed("torch", ">=2.8"), "torch 2.8 and newer"),
    },
}
# What a precision needs, and what to write instead.
PRECISION_REQUIREMENTS = {
    "64-true": ("float64", "'32-true', or `accelerator='cpu'`"),
    "bf16-true": ("bfloat16", "'16-true' or '32-true'"),
    "bf16-mixed": ("bfloat16", "'16-mixed' or '32-true'"),
    "16-mixed": ("a loss scaler", "'bf16-mixed' or '32-true'"),
    "transformer-engine": ("FP8", "'bf16-mixed'"),
}
UNSUPPORTED_STRATEGIES = ("single_xla", "single_tpu", "xla", "xla_debug")


@dataclass
class EngineRequest:
    """The arguments of `resolve`, with names and types checked."""

    accelerator: str | Accelerator = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str | Strategy = "auto"
    precision: int | str | None = None
    plugins: Any = None  # one or several; then by their kind
    sync_batchnorm: bool = False
    registry: Registry = field(default_factory=lambda: StrategyRegistry)  # what names of strategies mean
    single_device: type[SingleDeviceStrategy] = SingleDeviceStrategy  # what "auto" means for one device

    def __post_init__(self) -> None:
        accelerators = ("auto", "gpu", "tpu", *AcceleratorRegistry)
        self.accelerator = _check_known("accelerator", self.accelerator, accelerators, Accelerator)
        names = tuple(dict.fromkeys(("auto", *self.registry, *UNSUPPORTED_STRATEGIES)))
        spelled = {name.lower(): name for name in names}.get(str(self.strategy).lower(), self.strategy)
        self.strategy = _check_known("strategy", spelled, names, Strategy)
        self.precision = parse_precision(self.precision)
        self.plugins = _plugins_by_kind(self.plugins)

    def replace_auto_strategy(self, devices: list[torch.device]) -> None:
        """The devices are known: on one or several, "auto" means another strategy."""
        if self.strategy != "auto":
            return
        if len(devices) > 1 or self.num_nodes > 1:
            self.strategy = "ddp_fork" if is_interactive() else "ddp"
        else:
            self.strategy = "single_device" if "single_device" in self.registry else self.single_device(devices[0])

    def brought_along(self, attribute: str) -> Any:
        """A part that a strategy object was made with."""
        return self.strategy.given_parts()[attribute] if isinstance(self.strategy, Strategy) else None

    @property
    def needs_single_device(self) -> bool:
        """Is it a strategy for one device? One of the user's own may spread over as many as it likes."""
        kind: object = type(self.strategy)
        if isinstance(self.strategy, str) and self.strategy in self.registry:
            kind = self.registry[self.strategy]["strategy"]
        return isinstance(kind, type) and issubclass(kind, SingleDeviceStrategy)

    @property
    def start_method(self) -> str:
        """How the processes start, for those strategies that start them."""
        if isinstance(self.strategy, Strategy):
            return self.strategy.start_method
        given = self.registry[self.strategy]["init_params"] if self.strategy in self.registry else {}
        return str(given.get("start_method", ""))


_GIVEN_TWICE = "The strategy object has its own {}, and another one comes through `{}`. Choose one of the two."

# Two lines a row: a table is read by its columns.
# fmt: off

# What cannot be, whatever the hardware: a condition; the exception class, and a message about the {request}.
CONFLICTS: tuple[tuple[Callable[[EngineRequest], Any], type[Exception], str], ...] = (
    (lambda request: type(request.num_nodes) is not int or request.num_nodes < 1,
     ValueError, "`num_nodes={request.num_nodes!r}` must be a positive integer: the number of machines."),
    (lambda request: request.precision and Precision in request.plugins,
     ValueError, "`precision={request.precision!r}` and a plugin both say in which numbers to compute. Choose one of the two."),
    (lambda request: request.sync_batchnorm and not isinstance(request.plugins.get(LayerSync), (TorchSyncBatchNorm, NoneType)),
     InvalidChoiceError, "`sync_batchnorm=True` and a plugin both say how to synchronise layers. Choose one of the two."),
    (lambda request: request.brought_along("accelerator") and request.accelerator != "auto",
     InvalidChoiceError, _GIVEN_TWICE.format("accelerator", "accelerator")),
    (lambda request: (own := request.brought_along("precision_plugin")) and request.precision not in (None, own.precision),
     InvalidChoiceError, _GIVEN_TWICE.format("precision", "precision")),
    *((lambda request, part=part, kind=kind: request.brought_along(part) and kind in request.plugins,
       InvalidChoiceError, _GIVEN_TWICE.format(part, "plugins")) for part, kind in PLUGIN_PARTS.items()),
    (lambda request: request.devices in (0, "0", [], ()), InvalidChoiceError,
     "`devices={request.devices!r}` is not a valid input: it asks for no device at all. Use `devices=1`, or 'auto'."),
    (lambda request: isinstance(request.strategy, str) and request.strategy not in ("auto", *request.registry),
     InvalidChoiceError, "`strategy={request.strategy!r}` is not part of this version of fulmen. Use 'ddp', or 'auto'."),
    (lambda request: request.start_method not in ("", "popen", *multiprocessing.get_all_start_methods()), ValueError,
     "`strategy={request.strategy!r}` starts processes by {request.start_method!r}, which this platform cannot. Use 'ddp'."),
    (lambda request: request.start_method == "popen" and is_interactive(), UnavailableError,
     "`strategy={request.strategy!r}` runs the script again for each device, and in a notebook or interpreter there is none. "
     "Use `strategy='ddp_notebook'`."),
)
# fmt: on


def resolve_strategy(**arguments: Any) -> Strategy:
    """The strategy that arguments of `Trainer` (the fields of `EngineRequest`) ask for, complete."""
    request = EngineRequest(**arguments)
    for holds, error, message in CONFLICTS:
        if holds(request):
            raise error(message.format(request=request))
    chosen = choose_accelerator(request)
    devices = choose_devices(request, chosen)
    request.replace_auto_strategy(devices)
    return assemble_strategy(request, chosen, devices)


def choose_accelerator(request: EngineRequest) -> Accelerator:
    """An accelerator whose devices exist here."""
    wish: str | Accelerator = request.brought_along("accelerator") or request.accelerator
    if wish == "auto" and isinstance(request.strategy, SingleDeviceStrategy):
        wish = request.strategy.root_device.type
    if isinstance(wish, Accelerator):
        _check_available(wish.name(), wish)
        return wish
    name = wish if wish not in ("auto", "gpu") else gpu_kind() or ("cpu" if wish == "auto" else "cuda")
    _check_available(wish, None if name == "tpu" else AcceleratorRegistry[name]["accelerator"])
    made: Accelerator = AcceleratorRegistry.get(name)
    return made


def _check_available(asked: str, kind: Accelerator | type[Accelerator] | None) -> None:
    """Refuses an accelerator that this machine, or this version (None), does not have."""
    if kind is None or not kind.is_available():
        raise UnavailableError(_missing_accelerator_message(asked))


def _missing_accelerator_message(asked: str) -> str:
    usable = [repr(name) for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()]
    why = "fulmen does not support it" if asked == "tpu" else "torch finds no such device on this machine"
    if asked == "gpu":
        why = f"No supported gpu backend found, as {why}"
    return f"`accelerator={asked!r}`: {why}. Available are {', '.join(usable)}."


def choose_devices(request: EngineRequest, accelerator: Accelerator) -> list[torch.device]:
    """One device per process of this node."""
    wish = _count_automatic_devices(request, accelerator) if request.devices == "auto" else request.devices
    parsed = accelerator.parse_devices(wish)
    found = accelerator.get_parallel_devices(parsed) if parsed else []
    if not found:
        raise InvalidChoiceError(
            f"`devices={request.devices!r}` names no {accelerator.name()} device. Use `devices=1`."
        )
    if request.needs_single_device and (len(found) > 1 or request.num_nodes > 1):
        what = f"`devices={request.devices!r}` with `num_nodes={request.num_nodes}` are several devices"
        raise InvalidChoiceError(
            f"{what}, and `strategy={request.strategy!r}` trains on one. Use 'ddp', or `devices=1`."
        )
    wish = request.strategy
    distributed = wish.is_distributed if isinstance(wish, Strategy) else wish.startswith(("ddp", "fsdp"))
    if accelerator.name() == "mps" and distributed:
        raise ValueError(f"`strategy={wish!r}` needs collectives, which MPS has not. Use 'auto', or the CPU.")
    return found


def _count_automatic_devices(request: EngineRequest, accelerator: Accelerator) -> int:
    """How many devices ``devices="auto"`` means for this strategy, here."""
    count = accelerator.auto_device_count()
    if count > 1 and request.needs_single_device:
        rank_zero_info(f"There are {count} {accelerator.name()} devices; this strategy trains on the first.")
        return 1
    if count > 1 and accelerator.name() == "cuda" and is_interactive():
        rank_zero_info(f"There are {count} cuda devices; in a notebook, one is used unless you say `devices={count}`.")
        return 1
    return count


def assemble_strategy(request: EngineRequest, accelerator: Accelerator, devices: list[torch.device]) -> Strategy:
    """The strategy with all of its parts; those that it brought along stay."""
    brought = {part: request.brought_along(part) for part in PLUGIN_PARTS}
    strategy = _make_strategy(request, devices)
    cluster = brought["cluster_environment"] or request.plugins.get(ClusterEnvironment)
    strategy.use_environment(cluster or detect_environment())
    default_sync = TorchSyncBatchNorm() if request.sync_batchnorm else None
    strategy.use_nodes(request.num_nodes, request.plugins.get(LayerSync) or default_sync)
    strategy.configure_launcher()
    check_accelerator(accelerator, strategy.root_device)
    strategy.use_hardware(accelerator, brought["checkpoint_io"] or request.plugins.get(CheckpointIO))
    if isinstance(strategy, SingleDeviceStrategy):
        _warn_of_other_processes()
    precision = brought["precision_plugin"] or request.plugins.get(Precision) or _make_precision(strategy, request)
    strategy.use_precision(precision, restore_after_setup=precision.replaces_layers)
    check_precision(strategy.precision_plugin, strategy.root_device)
    return strategy


def check_accelerator(accelerator: Accelerator, device: torch.device) -> None:
    """Refuses an accelerator of another kind than the strategy's device."""
    if {device.type, accelerator.name()} in ({"cpu", "cuda"}, {"cpu", "mps"}, {"cuda", "mps"}):
        raise InvalidChoiceError(
            f"The strategy is on `{device}`, but the accelerator is {accelerator.name()!r}. Choose one of the two."
        )


def _make_strategy(request: EngineRequest, devices: list[torch.device]) -> Strategy:
    """The strategy of that name, or the object itself, which knows its devices."""
    strategy = request.strategy
    if isinstance(strategy, str):
        entry = request.registry[strategy]
        if request.needs_single_device:
            made: Strategy = entry["strategy"](**{"device": devices[0], **entry["init_params"]})
            return made
        strategy = request.registry.get(strategy)
    assert isinstance(strategy, Strategy)
    strategy.use_devices(devices)
    return strategy


def _make_transformer_engine(weights_dtype: torch.dtype) -> Precision:
    """Its file is imported when it is chosen."""
    kind: type[Precision] = pkgutil.resolve_name("fulmen.engine.transformer_engine:TransformerEnginePrecision")
    return kind(weights_dtype=weights_dtype)  # type: ignore[call-arg]


def _make_precision(strategy: Strategy, request: EngineRequest) -> Precision:
    """The precision of that name, as the strategy computes in it."""
    name = str(request.precision or "32-true")
    precision = strategy.precision_for(name) or PRECISIONS[name](strategy.root_device)
    if name.endswith("-mixed"):
        rank_zero_info(f"Using {'bfloat16' if name == 'bf16-mixed' else '16bit'} Automatic Mixed Precision (AMP)")
    return precision


def _warn_of_other_processes() -> None:
    """A launcher started several processes, and each would train alone."""
    started = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if started.isdigit() and int(started) > 1:
        what = f"{started} processes were started, but each trains a model of its own on one device here"
        rank_zero_warn(f"{what}, and all write the same files. Start one process.", category=PossibleUserWarning)


def check_precision(
    precision: Precision, device: torch.device, abilities: Mapping[str, Mapping[str, Ability]] = DEVICE_ABILITIES
) -> None:
    """Refuses what the device cannot compute in, and warns of what it only imitates."""
    kind = device.type
    asked = f"`precision={precision.precision!r}`"
    precision.check_device(device)
    need, instead = PRECISION_REQUIREMENTS.get(str(precision.precision), ("", ""))
    only_cuda: Ability = (lambda _: False, "NVIDIA GPUs from compute capability 8.9 on")
    known = {"FP8": only_cuda, **abilities.get(kind, {})}
    if who := _who_has_what_it_lacks(known.get(need), device):
        raise InvalidChoiceError(f"{asked} needs {need}. `{device}` does not have it, {who} do. Use {instead}.")
    if who := _who_has_what_it_lacks(known.get(f"fast {need}"), device):
        what = f"{asked}: `{device}` imitates {need}, which is slow; {who} compute in it."
        rank_zero_warn(f"{what} Use {instead}.", category=PossibleUserWarning)


def _who_has_what_it_lacks(ability: Ability | None, device: torch.device) -> str:
    """Which devices have an ability that this one has not; an empty string if it has it, or nobody is known to."""
    return ability[1] if ability is not None and not ability[0](device) else ""


def has_capability(capability: tuple[int, int], device: torch.device) -> bool:
    """Is the GPU of that compute capability or a newer one? Those of AMD count as new."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= capability


def parse_precision(value: int | str | None) -> str | None:
    """The full name of a precision.

    >>> parse_precision(64)
    '64-true'

    Raises:
        ValueError: it is not the name of one.
    """
    asked = str(value) if type(value) is int else value
    names = (*PRECISIONS, *ALIASES)
    if asked is None or (isinstance(asked, str) and asked in names):
        name = ALIASES.get(str(asked), asked)
        if asked in ("16", "bf16"):
            rank_zero_warn(
                f"`precision={asked!r}` is an old name, supported for historical reasons. Write `precision={name!r}` for the same."
            )
        return name
    spelled = str(value).lower().removeprefix("torch.")
    near = PRECISION_HINTS.get(spelled) or (find_nearest_name(spelled, names) if isinstance(value, str) else None)
    hint = f" Did you mean `{near}`?" if near else ""
    raise ValueError(f"`precision={value!r}` is invalid. It must be one of {', '.join(map(repr, names))}.{hint}")


def gpu_kind() -> str:
    """The accelerator name of this machine's GPUs, or an empty string."""
    return next((kind.name() for kind in (MPSAccelerator, CUDAAccelerator) if kind.is_available()), "")


def announce_accelerator(strategy: Strategy) -> None:
    """Say whether there is a GPU and whether it is used; warn when it idles."""
    gpu = gpu_kind()
    used = isinstance(strategy.accelerator, (CUDAAccelerator, MPSAccelerator))
    rank_zero_info(f"GPU available: {bool(gpu)}{f' ({gpu})' if gpu else ''}, used: {used}")
    if gpu and not used:
        what = f"This machine has a GPU ({gpu}), but training does not use it. Use `Trainer(accelerator='gpu')`."
        rank_zero_warn(what, category=PossibleUserWarning)


def _check_known(argument: str, value: Any, names: Sequence[str], kind: type) -> Any:
    """The value, which must be one of the names or an object of that kind."""
    if isinstance(value, kind) or (isinstance(value, str) and value in names):
        return value
    what = f"`{argument}` received {describe_received(value)}" if isinstance(value, type) else f"`{argument}={value!r}`"
    known = f"{', '.join(map(repr, names))}, or an instance of `{kind.__name__}`"
    raise ValueError(
        f"{what} is an invalid {argument} name. It must be one of {known}.{suggest_name(str(value), names)}"
    )


def _plugins_by_kind(plugins: Any) -> dict[type, Any]:
    found: dict[type, Any] = {}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]:
        kind = next((kind for kind in PLUGINS if isinstance(plugin, kind)), None)
        if kind is None:
            what = f"`plugins` received {describe_received(plugin)}; that" if isinstance(plugin, type) else repr(plugin)
            kinds = ", ".join(kind.__name__ for kind in PLUGINS)
            raise InvalidPluginError(f"{what} is not a plugin. Pass an object of one of {kinds} in `plugins`.")
        if kind in found:
            raise InvalidChoiceError(
                f"`plugins` has two of the kind {kind.__name__}: {found[kind]!r} and {plugin!r}. Pass one."
            )
        found[kind] = plugin
    return found
