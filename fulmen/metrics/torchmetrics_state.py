"""torchmetrics objects: finding them in a module, and reading, merging and loading what they have seen.

torchmetrics is never imported here: an object can only be one of its metrics if somebody else has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric

StateValue = Tensor | list[Tensor]


class MetricState(TypedDict):
    """What one metric has seen, without the metrics inside of it; checkpoints hold it like this."""

    values: dict[str, StateValue]
    updates: int


def is_metric(value: object) -> TypeGuard[Metric]:
    """Whether it is a torchmetrics object."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def metrics_in(module: nn.Module) -> list[Metric]:
    """The metrics in a module, which may be one itself, in an order that is the same on all ranks."""
    return [child for child in module.modules() if is_metric(child)]


def metric_path(metric: Metric | None, module: nn.Module) -> str | None:
    """The name of the metric in the module; None if it is not in there."""
    return next((name for name, child in module.named_modules() if child is metric), None)


def was_updated(metric: Metric) -> bool:
    """Whether the metric, or one inside of it, has seen anything since its last reset."""
    return any(member._update_count for member in metrics_in(metric))


# ---------------------------------------------------------------------- state


def metric_state(metric: Metric) -> MetricState:
    """What a metric has seen, on the host (sync); not those inside of it."""

    def on_host(value: StateValue) -> StateValue:
        return [item.detach().cpu() for item in value] if isinstance(value, list) else value.detach().cpu()

    values = {name: on_host(value) for name, value in read_attributes(metric, metric._defaults).items()}
    return {"values": values, "updates": metric._update_count}


def read_attributes(metric: Metric, names: Iterable[str]) -> dict[str, Any]:
    """The attributes of a metric by name: its states are some of them."""
    return {name: getattr(metric, name) for name in names}


def metric_states(metric: Metric) -> list[MetricState]:
    """What a metric and those inside of it have seen, on the host (sync)."""
    return [metric_state(member) for member in metrics_in(metric)]


def load_metric_state(metric: Metric, state: MetricState) -> None:
    """Continues with what `metric_state` gave."""
    device = metric.device
    for name, value in state["values"].items():
        setattr(metric, name, [item.to(device) for item in value] if isinstance(value, list) else value.to(device))
    metric._update_count = state["updates"]
    metric._computed = None


def capture_metrics(module: nn.Module) -> Callable[[], None]:
    """Remembers what all metrics in a module have seen; the returned function makes them forget the rest."""
    found = [(metric, read_attributes(metric, (*metric._defaults, *_BOOKKEEPING))) for metric in metrics_in(module)]
    kept = [(metric, {name: copy_of(value) for name, value in values.items()}) for metric, values in found]

    def restore() -> None:
        for metric, states in kept:
            for name, value in states.items():
                setattr(metric, name, copy_of(value))

    return restore


_BOOKKEEPING = ("_update_count", "_computed", "_forward_cache")


def copy_of(value: object) -> object:
    """A tensor or a list that later changes in place of the original leave alone; other values as they are."""
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


# ---------------------------------------------------------------------- several ranks


def merge_metric_states(metric: Metric, states: Sequence[MetricState]) -> MetricState:
    """One state of a metric from those of several ranks; of those that never updated it, only the count."""
    updated = [state for state in states if state["updates"]] or list(states[:1])
    weights = [state["updates"] for state in updated]
    values = {
        name: _merge_values([state["values"][name] for state in updated], weights, reduction)
        for name, reduction in metric._reductions.items()
    }
    return {"values": values, "updates": sum(state["updates"] for state in states)}


def _merge_values(
    values: list[StateValue], weights: list[int], reduction: Callable[[Tensor], Tensor] | None
) -> StateValue:
    """One value of a state from those of several ranks, with their numbers of updates."""
    lists = [value for value in values if isinstance(value, list)]
    if lists:
        # One element per update and rank: back in the order of the data.
        longest = max(map(len, lists))
        return [value[index] for index in range(longest) for value in lists if index < len(value)]
    if len(values) == 1:
        return values[0]
    stacked = torch.stack([value for value in values if isinstance(value, Tensor)])
    if isinstance(reduction, FunctionType) and reduction.__name__ == "dim_zero_mean":
        shape = (-1, *[1] * (stacked.dim() - 1))
        return (stacked * torch.tensor(weights).view(shape)).sum(0) / max(sum(weights), 1)
    return stacked if reduction is None else reduction(stacked)


def load_merged_states(metric: Metric, of_ranks: Sequence[list[MetricState]]) -> None:
    """Lets a metric, and those inside of it, have seen what all ranks saw; `of_ranks` has the `metric_states` of each."""
    for member, states in zip(metrics_in(metric), zip(*of_ranks, strict=True), strict=True):
        load_metric_state(member, merge_metric_states(member, states))


@contextmanager
def without_sync(metric: Metric) -> Generator[None]:
    """`compute()` exchanges nothing in here, because the states are those of all ranks already."""
    members = metrics_in(metric)
    syncing = [member._to_sync for member in members]
    for member in members:
        member._to_sync = False
    try:
        yield
    finally:
        for member, sync in zip(members, syncing):
            member._to_sync = sync
