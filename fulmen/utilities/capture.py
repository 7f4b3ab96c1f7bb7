"""Remembering what something is like, so that it can be put back in place after something was tried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fulmen.utilities.modules import local_part

Restore = Callable[[], None]


def capture_attributes(owner: object) -> Restore:
    """Remember which attributes an object has and what they refer to; the returned function puts that back.

    Examples:
        >>> class Counter:
        ...     def __init__(self):
        ...         self.count = 1
        >>> counter = Counter()
        >>> restore = capture_attributes(counter)
        >>> counter.count = 2
        >>> restore()
        >>> counter.count
        1
    """
    attributes = vars(owner)
    kept = dict(attributes)

    def restore_attributes() -> None:
        attributes.clear()
        attributes.update(kept)

    return restore_attributes


def capture_value(value: Any) -> Callable[[], Any]:
    """Remember a value with all that is nested in it; the returned function gives the same objects with those contents.

    Tensors are copied to the host, so that no device memory is held. Objects other than tensors, dicts, lists, sets and
    tuples count as immutable.

    Examples:
        >>> state = {"step": 1, "average": torch.zeros(2)}
        >>> restore = capture_value(state)
        >>> state["average"] += 1
        >>> state["more"] = 2
        >>> restore()
        {'step': 1, 'average': tensor([0., 0.])}
    """
    if isinstance(value, Tensor):
        return _capture_tensor(value)
    if isinstance(value, dict):
        return _capture_dict(value)
    if isinstance(value, (list, tuple)):
        return _capture_sequence(value)
    if isinstance(value, set):
        members = set(value)

        def restore_set() -> set[Any]:
            value.clear()
            value.update(members)
            return value

        return restore_set
    return lambda: value


def _capture_tensor(tensor: Tensor) -> Callable[[], Tensor]:
    kept = local_part(tensor.detach()).to("cpu", copy=True)  # sync: once a search

    @torch.no_grad()
    def restore_tensor() -> Tensor:
        local_part(tensor.detach()).copy_(kept)
        return tensor

    return restore_tensor


def _capture_dict(value: dict[Any, Any]) -> Callable[[], dict[Any, Any]]:
    held = {key: capture_value(item) for key, item in value.items()}

    def restore_dict() -> dict[Any, Any]:
        contents = {key: restore() for key, restore in held.items()}
        value.clear()
        value.update(contents)
        return value

    return restore_dict


def _capture_sequence(value: list[Any] | tuple[Any, ...]) -> Callable[[], list[Any] | tuple[Any, ...]]:
    held = [capture_value(item) for item in value]

    def restore_sequence() -> list[Any] | tuple[Any, ...]:
        contents = [restore() for restore in held]
        if isinstance(value, list):
            value[:] = contents
        return value

    return restore_sequence
