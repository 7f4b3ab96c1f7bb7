"""Checkpoints of a loop of one's own: a dictionary of states, by the names that the user gave them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn
from torch.optim import Optimizer

from fulmen.engine.strategy import Strategy
from fulmen.utilities.errors import suggest_name

if TYPE_CHECKING:
    from fulmen.utilities.types import _PATH

    Filter = Callable[[str, Any], bool]


@runtime_checkable
class Stateful(Protocol):
    """What has a state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class Loaded:
    """What a checkpoint had: the values to put into the user's state, and what was not asked for."""

    values: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def check_filter(state: dict[str, Any], filter: object) -> None:
    """Raises unless it is None, or a function for names of the state.

    Raises:
        TypeError: it is no dictionary of functions.
        ValueError: it has names that the state has not.
    """
    if filter is None:
        return
    if not isinstance(filter, dict):
        raise TypeError(f"Filter should be a dictionary, given {filter!r}. Write `filter={{'model': function}}`.")
    if unknown := filter.keys() - state.keys():
        hint = "".join(suggest_name(str(name), [str(key) for key in state]) for name in unknown)
        raise ValueError(
            f"The filter keys {unknown} are not present in the state keys {set(state)}.{hint} Leave them out."
        )
    for name, function in filter.items():
        if not callable(function):
            what = f"Expected `fabric.save(filter=...)` for key {name!r} to be a callable, given {function!r}."
            raise TypeError(f"{what} Pass a function of `(name, value)`.")


def save_state(strategy: Strategy, path: _PATH, state: dict[str, Any], filters: dict[str, Filter]) -> None:
    """Writes a state, whose objects are not wrapped."""
    if not isinstance(state, dict):
        what = f"`fabric.save` received a {type(state).__name__} as the state."
        raise TypeError(f"{what} Pass a dictionary: `fabric.save(path, {{'model': model}})`.")
    converted = {
        name: _filter_entries(convert_state(strategy, value), filters.get(name)) for name, value in state.items()
    }
    strategy.save_checkpoint(converted, path)


def convert_state(strategy: Strategy, value: object) -> Any:
    """The states of the objects in a value."""
    if isinstance(value, nn.Module):
        return strategy.get_module_state_dict(value)
    if isinstance(value, Optimizer):
        return strategy.get_optimizer_state(value)
    if isinstance(value, Stateful):
        return value.state_dict()
    if type(value) is dict:
        return {key: convert_state(strategy, child) for key, child in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)([convert_state(strategy, child) for child in value])
    return value


def _filter_entries(value: object, keeps: Filter | None) -> Any:
    if keeps is None or not isinstance(value, dict):
        return value
    return {name: entry for name, entry in value.items() if keeps(name, entry)}


def load_state(
    strategy: Strategy, path: _PATH, state: dict[str, Any] | None, strict: bool, weights_only: bool | None
) -> Loaded:
    """Loads a checkpoint into a state, whose objects are not wrapped.

    Raises:
        KeyError: it lacks a name of the state.
    """
    content = strategy.load_checkpoint(path, weights_only=weights_only)
    if not state:
        return Loaded(rest=content)
    if strict:
        check_names(state, content)
    values: dict[str, Any] = {}
    for name in [name for name in state if name in content]:
        values |= _load_entry(strategy, name, state[name], content.pop(name), strict)
    return Loaded(values, content)


def check_names(state: dict[str, Any], content: dict[str, Any]) -> None:
    """Raises a KeyError for the first name that a checkpoint does not have."""
    for name in state:
        if name not in content:
            what = f"The requested state contains a key '{name}' that does not exist in the loaded checkpoint."
            hint = suggest_name(str(name), [str(key) for key in content])
            raise KeyError(f"{what}{hint} To disable strict loading, set `strict=False`.")


def _load_entry(strategy: Strategy, name: str, target: object, saved: Any, strict: bool) -> dict[str, Any]:
    """Loads one entry; what no object takes is returned, under its name."""
    if isinstance(target, nn.Module):
        strategy.load_module_state_dict(target, saved, strict=strict)
    elif isinstance(target, Optimizer):
        strategy.load_optimizer_state(target, saved)
    elif isinstance(target, Stateful):
        target.load_state_dict(saved)
    elif type(target) is dict and isinstance(saved, dict) and holds_objects(target):
        inner: dict[str, Any] = {}
        for key in [key for key in target if key in saved]:
            inner |= _load_entry(strategy, key, target[key], saved[key], strict)
        return {name: inner}
    else:
        return {name: saved}
    return {}


def holds_objects(value: object) -> bool:
    """Is there something in it that a state can be loaded into?"""
    if isinstance(value, dict):
        return any(holds_objects(child) for child in value.values())
    return isinstance(value, Stateful)


def put_values(state: dict[str, Any], values: dict[str, Any]) -> None:
    """Writes loaded values into the user's state; into dictionaries that also hold objects, one by one."""
    for name, value in values.items():
        if isinstance(value, dict) and type(state[name]) is dict and holds_objects(state[name]):
            put_values(state[name], value)
        else:
            state[name] = value


def load_raw(strategy: Strategy, path: _PATH, target: object, strict: bool, weights_only: bool | None) -> None:
    """Loads a file that is the state of one object."""
    content = strategy.load_checkpoint(path, weights_only=weights_only)
    if isinstance(target, nn.Module):
        strategy.load_module_state_dict(target, content, strict=strict)
    elif isinstance(target, Optimizer):
        strategy.load_optimizer_state(target, content)
    else:
        what = f"`fabric.load_raw` received a {type(target).__name__}."
        raise TypeError(f"{what} Pass a module or an optimizer; `fabric.load` takes dictionaries.")
