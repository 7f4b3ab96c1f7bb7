"""Checkpoints of a loop of one's own: a dictionary of states, by the names that the user gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fulmen.utilities.errors import suggest_name
from fulmen.utilities.types import Stateful

if TYPE_CHECKING:
    from fulmen.fabric.strategy import Strategy

    Filter = Callable[[str, Any], bool]


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


def check_raw_target(target: object) -> None:
    """Raises a TypeError unless a file may be the state dict of it."""
    if not isinstance(target, (nn.Module, Optimizer)):
        what = f"`fabric.load_raw` received a {type(target).__name__}."
        raise TypeError(f"{what} Pass a module or an optimizer; `fabric.load` takes dictionaries.")


def collect_states(strategy: Strategy, state: dict[str, Any], filters: dict[str, Filter]) -> dict[str, Any]:
    """The states of the objects in a state, in their place, with the entries that the filters keep."""
    if not isinstance(state, dict):
        what = f"`fabric.save` received a {type(state).__name__} as the state."
        raise TypeError(f"{what} Pass a dictionary: `fabric.save(path, {{'model': model}})`.")
    return {name: _filter_entries(convert_state(strategy, value), filters.get(name)) for name, value in state.items()}


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


def load_states(strategy: Strategy, state: dict[str, Any], content: dict[str, Any], strict: bool) -> dict[str, Any]:
    """Loads the content of a checkpoint into a state: into its objects, and in place of its values.

    Returns:
        What was not asked for.

    Raises:
        KeyError: the content lacks a name of the state; nothing was loaded then.
    """
    if strict:
        check_names(state, content)
    rest = dict(content)
    for name in [name for name in state if name in content]:
        state[name] = _load_entry(strategy, state[name], rest.pop(name), strict)
    return rest


def check_names(state: dict[str, Any], content: dict[str, Any]) -> None:
    """Raises a KeyError for the first name that a checkpoint does not have."""
    for name in state:
        if name not in content:
            what = f"The requested state contains a key '{name}' that does not exist in the loaded checkpoint."
            hint = suggest_name(str(name), [str(key) for key in content])
            raise KeyError(f"{what}{hint} To disable strict loading, set `strict=False`.")


def _load_entry(strategy: Strategy, target: Any, saved: Any, strict: bool) -> Any:
    """Loads one entry, and returns what stands in the state then: the same object, or the value."""
    if isinstance(target, (nn.Module, Optimizer, Stateful)):
        load_object(strategy, target, saved, strict)
        return target
    if type(target) is dict and isinstance(saved, dict) and holds_objects(target):
        for name in [name for name in target if name in saved]:
            target[name] = _load_entry(strategy, target[name], saved[name], strict)
        return target
    return saved


def load_object(strategy: Strategy, target: nn.Module | Optimizer | Stateful, saved: Any, strict: bool) -> None:
    """Loads the state of one object."""
    if isinstance(target, nn.Module):
        strategy.load_module_state_dict(target, saved, strict=strict)
    elif isinstance(target, Optimizer):
        strategy.load_optimizer_state(target, saved)
    else:
        target.load_state_dict(saved)


def holds_objects(value: object) -> bool:
    """Is there something in it that a state can be loaded into?"""
    if isinstance(value, dict):
        return any(holds_objects(child) for child in value.values())
    return isinstance(value, Stateful)


def put_values(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Writes the values of a loaded state into the user's own; into dictionaries that also hold objects, one by one."""
    for name, value in loaded.items():
        if type(state[name]) is dict and holds_objects(state[name]):
            put_values(state[name], value)
        elif not holds_objects(state[name]):
            state[name] = value
