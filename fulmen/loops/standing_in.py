"""`standing_in`: around a step that runs only because other processes run theirs, and counts nowhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fulmen.engine.sync_batchnorm import SyncBatchNorm
from fulmen.metrics.torchmetrics_state import is_metric, metrics_in
from fulmen.utilities.introspection import in_library
from fulmen.utilities.seed import isolate_rng

_ABSENT = object()
_DEPTH = 6  # containers in containers
# Of torch: what a module is made of, hooks, and parameters, which stand elsewhere while they are spread over processes.
_OF_TORCH = frozenset(vars(Module())) - {"_buffers", "training"}
# Their statistics are those of all processes, and have to stay alike.
_SYNCHRONISED = (SyncBatchNorm, torch.nn.SyncBatchNorm)


@contextmanager
def standing_in(module: Module, fill: bool = False, others: Iterable[Any] = ()) -> Generator[None]:
    """Inside, steps count nowhere: afterwards the module holds what it held, and so do random generators.

    That is all attributes and buffers of the module, with the containers and objects of the user's own classes in them.
    The same is true of others, such as callbacks, if their classes are the user's.
    Metrics that are synchronised inside take part with what they had seen before.

    Arguments:
        fill: lists that were empty keep what was added. This process has no batch, and a hook may expect some output.
    """
    contents = Contents(fill)
    for part in (module, *others):
        contents.note(part)
    for metric in metrics_in(module):
        vars(metric)["update"] = partial(_update_nothing, metric, metric.update)
    SyncBatchNorm.in_shadow_step = True
    try:
        with isolate_rng():
            yield
    finally:
        SyncBatchNorm.in_shadow_step = False
        contents.put_back()


def _update_nothing(metric: Any, update: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Stands in for `Metric.update`: lists of states get something empty, of the shape that others have."""
    before = {name: getattr(metric, name) for name in metric._defaults}
    before = {name: list(state) if isinstance(state, list) else state.clone() for name, state in before.items()}
    update(*args, **kwargs)
    for name, state in before.items():
        if isinstance(state, list):
            added = [item.reshape(-1)[:0] if item.dim() == 0 else item[:0] for item in getattr(metric, name)]
            state += added[len(state) :]
        setattr(metric, name, state)


class Contents:
    """What objects hold now: attributes, containers and tensors in them, to come back to it.

    Tensors in lists are taken as they are: there may be many of them, and results are not changed once they are there.
    """

    def __init__(self, fill: bool = False) -> None:
        self.fill = fill
        self.known: dict[int, Any] = {}
        self.undo: list[Callable[[], None]] = []

    def put_back(self) -> None:
        """All is as it was."""
        for undo in self.undo:
            undo()

    def note(self, value: Any, depth: int = 0, fill: bool | None = None) -> None:
        """Remembers what an object holds."""
        if id(value) in self.known or depth > _DEPTH or value is None or isinstance(value, (bool, int, float, str)):
            return
        self.known[id(value)] = value
        fill = self.fill if fill is None else fill
        children: list[Any] = []
        if isinstance(value, Tensor):
            if not isinstance(value, Parameter) and not hasattr(value, "to_local"):
                self.undo.append(partial(_fill_tensor, value, value.clone(), _version(value)))
        elif isinstance(value, (list, deque)):
            children = [item for item in value if not isinstance(item, Tensor)]
            self.undo.append(partial(_fill_sequence, value, list(value), fill))
        elif isinstance(value, dict):
            children = list(value.values())
            self.undo.append(partial(_fill_dict, value, dict(value), fill))
        elif isinstance(value, set):
            self.undo.append(partial(_fill_set, value, set(value)))
        elif isinstance(value, tuple):
            children = list(value)
        elif isinstance(value, Module):
            # What a metric has computed with others is the newest there is, on all processes.
            left = _OF_TORCH | {"_computed"} if is_metric(value) else _OF_TORCH
            left = left | {"_buffers"} if isinstance(value, _SYNCHRONISED) else left
            fill = fill and not is_metric(value)
            kept = {name: held for name, held in vars(value).items() if name not in left}
            children = [*kept.values(), *value._modules.values()]
            self.undo.append(partial(_fill_dict, vars(value), kept, fill, left))
        elif _is_own(type(value)) and hasattr(value, "__dict__"):
            children = list(vars(value).values())
            self.undo.append(partial(_fill_dict, vars(value), dict(vars(value)), fill))
        elif type(value).__module__ == "numpy" and hasattr(value, "flags") and value.flags.writeable:
            self.undo.append(partial(value.__setitem__, ..., value.copy()))
        for child in children:
            self.note(child, depth if isinstance(child, Module) else depth + 1, fill)


def _is_own(kind: type) -> bool:
    """Is it a class of the user's?"""
    home = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or (home is not None and not in_library(home))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _fill_tensor(tensor: Tensor, kept: Tensor, version: int | None) -> None:
    if version is None or tensor._version != version:
        tensor.data.copy_(kept)  # what autograd has saved of it is not used, or as it was


def _fill_sequence(sequence: Any, kept: list[Any], fill: bool) -> None:
    if kept or not fill:
        sequence.clear()
        sequence.extend(kept)


def _fill_set(place: set[Any], kept: set[Any]) -> None:
    place.clear()
    place.update(kept)


def _fill_dict(place: dict[str, Any], kept: dict[str, Any], fill: bool, left: frozenset[str] = frozenset()) -> None:
    for name in [name for name in place if name not in left]:
        value, before = place[name], kept.get(name, _ABSENT)
        nothing = before is _ABSENT or before is None or (isinstance(before, (list, deque)) and not before)
        if fill and nothing and isinstance(value, (list, deque, Tensor)):
            continue
        if before is _ABSENT:
            dict.__delitem__(place, name)
        elif before is not value:
            dict.__setitem__(place, name, before)
    for name, before in kept.items():
        if name not in place:
            dict.__setitem__(place, name, before)
