"""Walking nested batches: applying a function, moving to a device, finding the batch size."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What `isinstance` takes.
TypeOrTypes = type[Any] | tuple[type[Any], ...]


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``AttributeDict(lr=0.1).lr`` is 0.1."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)  # a missing one raises the right error
        del self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)  # in a form that `torch.load(weights_only=True)` can be told to read

    def __repr__(self) -> str:
        rows = [(f'"{key}":', self[key]) for key in sorted(self, key=str)]
        width = max((len(key) for key, _ in rows), default=0)
        return "\n".join(f"{key:{width}} {value}" for key, value in rows)


def map_children(data: Any, fn: Callable[[Any], Any]) -> Any:
    """A mapping, sequence or dataclass with ``fn`` applied to what it directly holds; anything else as it is."""
    if isinstance(data, Mapping):
        return _map_values(data, fn)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(fn, data))
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes, range)):
        return type(data)([fn(item) for item in data])  # type: ignore[call-arg]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        new = copy.copy(data)
        for name, value in _field_values(data):
            # Frozen dataclasses are filled too: nobody else has seen the copy yet.
            object.__setattr__(new, name, fn(value))
        return new
    return data


def _map_values(data: Mapping[Any, Any], fn: Callable[[Any], Any]) -> Mapping[Any, Any]:
    items = {key: fn(value) for key, value in data.items()}
    return defaultdict(data.default_factory, items) if isinstance(data, defaultdict) else type(data)(items)  # type: ignore[call-arg]


def _field_values(data: DataclassInstance) -> list[tuple[str, Any]]:
    """The fields of a dataclass that have a value, by name."""
    names = [field.name for field in dataclasses.fields(data)]
    return [(name, getattr(data, name)) for name in names if hasattr(data, name)]


def apply_to_collection(
    data: Any,
    dtype: TypeOrTypes,
    function: Callable[..., Any],
    *args: Any,
    wrong_dtype: TypeOrTypes | None = None,
    **kwargs: Any,
) -> Any:
    """Apply a function to all elements of some types in nested mappings, sequences and dataclasses.

    Args:
        data: the collection, or a single element.
        dtype: the type or types of the elements to which the function is applied.
        function: called as ``function(element, *args, **kwargs)``.
        *args: passed on to the function.
        wrong_dtype: a type or types left alone even if they are a ``dtype``.
        **kwargs: passed on to the function.

    Returns:
        A collection of the same structure; elements of other types are the same objects.

    Examples:
        >>> apply_to_collection({"x": [1, 2], "name": "a"}, int, lambda number, by: number * by, by=10)
        {'x': [10, 20], 'name': 'a'}
    """

    def apply_below(item: Any) -> Any:
        if isinstance(item, dtype) and (wrong_dtype is None or not isinstance(item, wrong_dtype)):
            return function(item, *args, **kwargs)
        return map_children(item, apply_below)

    return apply_below(data)


def move_data_to_device(batch: Any, device: str | torch.device | int) -> Any:
    """Move everything in a nested batch that has a ``.to`` method; tensors asynchronously where the device allows it.

    Args:
        batch: a tensor, an object, or nested mappings, sequences and dataclasses of them.
        device: where to; a number is the index of a CUDA device.

    Returns:
        A batch of the same structure. An object whose ``.to`` returns None has moved itself and stays in it.

    Examples:
        >>> move_data_to_device({"x": torch.ones(2), "id": 7}, "cpu")
        {'x': tensor([1., 1.]), 'id': 7}
    """
    if not isinstance(device, torch.device):
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    # To CPU and MPS, the host could read a buffer that has not arrived yet.
    return _move_item(batch, device, device.type not in ("cpu", "mps"))


def _move_item(item: Any, device: torch.device, asynchronous: bool) -> Any:
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=asynchronous)
    # The usual batches first: this runs for every batch.
    if type(item) is list or type(item) is tuple:
        return type(item)([_move_item(child, device, asynchronous) for child in item])
    if type(item) is dict:
        return {key: _move_item(child, device, asynchronous) for key, child in item.items()}
    if not isinstance(item, type) and hasattr(item, "to") and callable(item.to):
        moved = item.to(device)
        return item if moved is None else moved
    return map_children(item, lambda child: _move_item(child, device, asynchronous))


def _batch_sizes(batch: Any) -> Iterator[int]:
    children: Iterable[Any] = ()
    if isinstance(batch, Tensor):
        yield batch.size(0) if batch.ndim else 1
    elif isinstance(batch, Mapping):
        children = batch.values()
    # An array of another library is not split into its elements.
    elif isinstance(batch, Iterable) and not isinstance(batch, (str, bytes)) and not hasattr(batch, "__array__"):
        children = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        children = (value for _, value in _field_values(batch))
    for child in children:
        yield from _batch_sizes(child)


def extract_batch_size(batch: Any) -> int:
    """The first dimension of the first tensor, with a warning if others disagree; without any, an error."""
    fix = "Simplify the batch or say `self.log(..., batch_size=...)`."
    sizes = _batch_sizes(batch)
    try:
        first = next(sizes, None)
        other = next((size for size in sizes if size != first), None)
    except RecursionError:
        raise RecursionError(f"The batch contains itself, so its size cannot be found. {fix}") from None
    if first is None:
        what = f"Could not infer the batch_size: no tensor is in a batch of type `{type(batch).__name__}`."
        raise MisconfigurationException(f"{what} {fix}")
    if other is not None:
        what = f"The tensors of the batch have different first dimensions ({first} and {other});"
        warn_once(f"{what} {first} is taken as the batch size. {fix}")
    return first


def declared_batch_size(loader: object) -> int | None:
    """The ``batch_size`` that a loader or a batch sampler says it has; None where it says none."""
    size = loader.batch_size if hasattr(loader, "batch_size") else None
    return operator.index(size) if isinstance(size, SupportsIndex) else None
