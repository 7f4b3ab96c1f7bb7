"""Walking nested batches: applying a function, moving to a device, detaching, finding the batch size."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fulmen.utilities.errors import MisconfigurationException, explain
from fulmen.utilities.rank_zero import WarningCache

warning_cache = WarningCache()


class AttributeDict(dict):
    """A dict whose keys are attributes too::

    >>> d = AttributeDict(lr=0.1)
    >>> d.lr, d["lr"]
    (0.1, 0.1)
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name) from None

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        return "\n".join(f"{chr(34) + str(key) + chr(34) + ':':{width}} {self[key]}" for key in sorted(self, key=str))


def is_dataclass_instance(value: Any) -> bool:
    """Is it an object (not the class) of a dataclass?"""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def map_children(data: Any, fn: Callable[[Any], Any], *, include_none: bool = True) -> Any:
    """A container of the same kind with ``fn`` applied to what it directly holds; anything else comes back as it is.

    Containers are mappings, sequences (not strings), named tuples and dataclasses. ``include_none=False`` leaves out
    entries that became None.
    """
    if isinstance(data, Mapping):
        pairs = [(key, fn(value)) for key, value in data.items()]
        return _like_mapping(data, [(key, value) for key, value in pairs if include_none or value is not None])
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(fn(item) for item in data))
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes, range)):
        items = [fn(item) for item in data]
        return type(data)(items if include_none else [item for item in items if item is not None])  # type: ignore[call-arg]
    if is_dataclass_instance(data):
        new = copy.copy(data)
        for field in dataclasses.fields(data):
            if hasattr(data, field.name):
                # Frozen dataclasses are filled too: nobody else has seen the copy yet.
                object.__setattr__(new, field.name, fn(getattr(data, field.name)))
        return new
    return data


def _like_mapping(original: Mapping, pairs: list[tuple[Any, Any]]) -> Mapping:
    if type(original) is dict:
        return dict(pairs)
    if isinstance(original, defaultdict):
        return defaultdict(original.default_factory, pairs)
    return type(original)(OrderedDict(pairs))  # type: ignore[call-arg]


def apply_to_collection(
    data: Any,
    dtype: type | tuple[type, ...] | Any,
    function: Callable,
    *args: Any,
    wrong_dtype: type | tuple[type, ...] | None = None,
    include_none: bool = True,
    **kwargs: Any,
) -> Any:
    """The same nesting with ``function(item, *args, **kwargs)`` for each ``dtype`` that is not a ``wrong_dtype``."""

    def walk(item: Any) -> Any:
        if isinstance(item, dtype) and (wrong_dtype is None or not isinstance(item, wrong_dtype)):
            return function(item, *args, **kwargs)
        return map_children(item, walk, include_none=include_none)

    return walk(data)


def move_data_to_device(batch: Any, device: str | torch.device | int) -> Any:
    """The batch with everything that has a ``.to`` method moved.

    Tensors travel asynchronously where the device allows it. An object whose ``.to`` returns None moved itself.
    """
    if not isinstance(device, torch.device):
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    # To CPU and MPS, the host could read a buffer that has not arrived yet.
    return _moved(batch, device, device.type not in ("cpu", "mps"))


def _moved(item: Any, device: torch.device, asynchronous: bool) -> Any:
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=asynchronous)
    # The usual batches first: this runs for every batch.
    if type(item) is list or type(item) is tuple:
        return type(item)([_moved(child, device, asynchronous) for child in item])
    if type(item) is dict:
        return {key: _moved(child, device, asynchronous) for key, child in item.items()}
    if not isinstance(item, type) and callable(getattr(item, "to", None)):
        moved = item.to(device)
        return item if moved is None else moved
    return map_children(item, lambda child: _moved(child, device, asynchronous))


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """The same collection with its tensors detached from the graph, on the CPU if asked (which waits: a sync)."""
    return apply_to_collection(in_dict, Tensor, lambda t: t.detach().cpu() if to_cpu else t.detach())


def _batch_sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield 1 if batch.ndim == 0 else batch.size(0)
    elif isinstance(batch, (str, bytes)) or hasattr(batch, "__array__"):
        return  # an array of another library is not split into its elements
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _batch_sizes(value)
    elif isinstance(batch, Iterable):
        for item in batch:
            yield from _batch_sizes(item)
    elif is_dataclass_instance(batch):
        for field in dataclasses.fields(batch):
            yield from _batch_sizes(getattr(batch, field.name))


def extract_batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; tensors that disagree cause one warning.

    Raises:
        MisconfigurationException: if there is no tensor to measure.
    """
    fix = "Simplify the batch or say `self.log(..., batch_size=...)`."
    first = None
    try:
        for size in _batch_sizes(batch):
            if first is None:
                first = size
            elif size != first:
                what = f"The tensors of the batch have different first dimensions ({first} and {size});"
                warning_cache.warn(explain(f"{what} {first} is taken as the batch size.", fix=fix))
                break
    except RecursionError:
        raise RecursionError(explain("The batch contains itself, so its size cannot be found.", fix=fix)) from None
    if first is None:
        what = f"No batch size could be found in a batch of type `{type(batch).__name__}`."
        raise MisconfigurationException(explain(what, "It holds no tensor.", fix))
    return first
