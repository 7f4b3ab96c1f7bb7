"""From the arguments of `Fabric` and the variables of its command line to a strategy."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import Precision
from fulmen.engine.resolve import gpu_kind, parse_precision, resolve_strategy
from fulmen.engine.strategy import Strategy as EngineStrategy
from fulmen.fabric.strategy import STRATEGY_REGISTRY, SingleDeviceStrategy, Strategy
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.errors import describe_received
from fulmen.utilities.rank_zero import rank_zero_warn

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": None,
}
PLUGIN_KINDS = (Precision, CheckpointIO, ClusterEnvironment)
CALLBACKS_GROUP = "lightning.fabric.callbacks_factory"  # entry points of packages that bring callbacks along


def is_using_cli() -> bool:
    """Did the command line start the processes already?"""
    return os.environ.get("LT_CLI_USED") == "1"


def choose_strategy(plugins: object, **arguments: Any) -> Strategy:
    """The strategy, complete, that these arguments of `Fabric` and the `LT_*` variables ask for.

    Raises:
        ValueError: for a value that is not known or contradicts another one.
        TypeError: for a plugin that is none.
        RuntimeError: for a device or a strategy that is not available here.
    """
    chosen = {name: _read_variable(name, value) for name, value in arguments.items()}
    for plugin in as_list(plugins):
        if not isinstance(plugin, PLUGIN_KINDS):
            kinds = ", ".join(kind.__name__ for kind in PLUGIN_KINDS)
            what = f"Found invalid type for plugin {describe_received(plugin)}."
            raise TypeError(f"{what} Expected one of: {kinds}. Pass an object of such a class in `plugins`.")
    on_cpu = _is_cpu(chosen["accelerator"])
    if chosen["strategy"] == "dp" and on_cpu:
        rank_zero_warn("'dp' is not supported on CPUs, hence setting `strategy='ddp'`.")
        chosen["strategy"] = "ddp"
    precision = parse_precision(chosen["precision"])
    if precision == "16-mixed" and on_cpu:
        what = "You passed `Fabric(accelerator='cpu', precision='16-mixed')` but AMP with fp16 is not supported on CPU."
        rank_zero_warn(f"{what} Using `precision='bf16-mixed'` instead.")
        precision = "bf16-mixed"
    wish = chosen["strategy"]
    if isinstance(wish, EngineStrategy) and not isinstance(wish, Strategy):
        name = type(wish).__name__
        what = f"`Fabric(strategy={name}(...))` received a strategy for `Trainer`, which is handed a Trainer."
        raise ValueError(f"{what} Use `fulmen.fabric.strategies.{name}`.")
    strategy = resolve_strategy(
        **{**chosen, "precision": precision}, plugins=plugins, registry=STRATEGY_REGISTRY,
        single_device=SingleDeviceStrategy,
    )  # fmt: skip
    assert isinstance(strategy, Strategy)
    return strategy


def _is_cpu(accelerator: str | Accelerator) -> bool:
    if isinstance(accelerator, str):
        return accelerator == "cpu" or (accelerator == "auto" and not gpu_kind())
    return bool(accelerator.name() == "cpu")


def _read_variable(name: str, value: object) -> Any:
    """The argument, or where it is left at its default what the variable of its name says."""
    given: Any = os.environ.get(f"LT_{name.upper()}")
    if given is None:
        return value
    if name == "num_nodes" and given.isdigit():
        given = int(given)
    is_default = value == DEFAULTS[name] if isinstance(value, (str, int, type(None))) else False
    if is_default or str(value) == str(given):
        return given
    if is_using_cli():
        what = f"Your code has `Fabric({name}={value!r}, ...)` but it conflicts with the value `--{name}={given}` set"
        raise ValueError(f"{what} through the CLI. Remove it either from the CLI or from the Fabric object.")
    return value


def as_list(given: object) -> list[Any]:
    """One, several or none, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def load_callbacks() -> list[Any]:
    """The callbacks that installed packages bring along by an entry point."""
    found: list[Any] = []
    for factory in entry_points(group=CALLBACKS_GROUP):
        found += as_list(factory.load()())
    return found
