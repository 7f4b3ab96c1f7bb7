"""Logged values over all processes: those of the epoch as one process would have them, those of a step if asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulmen.hooks import LOG_RULES, nothing
from fulmen.metrics.logbook import KINDS, Entry, Maximum, Mean, MetricEntry, Minimum, metric_states, metrics_in, to_host

if TYPE_CHECKING:
    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer

Key = tuple[str | None, str, int | None]
_SHORT = {kind: name for name, kind in reversed(list(KINDS.items())) if isinstance(name, str)}
_NEUTRAL = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}


def end_epoch(trainer: Trainer, fire: Callable[[], Any]) -> None:
    """Makes the values of the open page those of all processes and fires the hook at the end of the epoch.

    One exchange; one more for what the hook logs, if anybody listens to it in any process.
    """
    book = trainer.book
    again = book.shared and combine(trainer, fire is not nothing)
    assert book.page is not None
    book.page.epoch_over = True
    fire()
    if again:
        combine(trainer)


def report_epoch(loop: FitLoop, whole: bool) -> None:
    """After `on_train_epoch_end`: schedulers that watch a metric, if the epoch came to its end, and the loggers."""
    progress, book = loop.progress, loop.trainer.book
    if whole and loop.schedulers.any:
        loop.schedulers.watch("epoch", progress.epochs + 1, book)
    # The x axis is the last step of the epoch, which has been counted already.
    loop.trainer.report(book.finish_epoch(), step=max(progress.log_step - 1, 0), with_epoch=True)
    assert book.page is not None
    book.page.reset()


def combine(trainer: Trainer, listening: bool = False) -> bool:
    """Computes the epoch values from what all processes have, in one exchange. Is anybody `listening`?

    Only sums, weights and extremes travel, and the states of metrics. A process without a name adds nothing to it, and
    knows the value afterwards.
    """
    book, rank = trainer.book, trainer.global_rank
    book.copy_jottings()
    due = {
        key: entry
        for key, entry in book.entries.items()
        if not entry.empty and entry.on_epoch and entry.final is None and _is_shared(key, entry, rank)
    }
    totals = to_host({str(key): e.total for key, e in due.items() if not isinstance(e, MetricEntry)})
    mine = {key: _part(trainer, entry, totals.get(str(key))) for key, entry in due.items()}
    every = trainer.strategy.exchange_objects((listening, mine))
    for key in dict.fromkeys(key for _, parts in every for key in parts):
        parts = [parts[key] for _, parts in every if key in parts]
        parts = [part for part in parts if part["members"] is None or rank in part["members"]]
        if parts:
            entry = book.entries.get(key) or _created(trainer, key, parts[0])
            entry.final = _merged_metric(entry, parts) if isinstance(entry, MetricEntry) else _merged(entry, parts)
            entry.empty = False
    for entry in book.entries.values():
        if isinstance(entry, MetricEntry) and not entry.empty and entry.final is None and entry.on_epoch:
            entry.final = _merged_metric(entry, [_part(trainer, entry, None)])  # `rank_zero_only`
    return any(told for told, _ in every)


def _is_shared(key: Key, entry: Entry, rank: int) -> bool:
    """What a step logs is a part of the whole. What an epoch hook logs may be the whole: `sync_dist` says if not."""
    members = _members(entry)
    if entry.options[10] or (members is not None and rank not in members):
        return False
    rule = LOG_RULES.get(key[0] or "")
    return isinstance(entry, MetricEntry) or bool(entry.options[6]) or (rule is not None and rule.step_allowed)


def _members(entry: Entry) -> list[int] | None:
    sync, group = entry.options[6:8]
    return dist.get_process_group_ranks(group) if sync and group is not None else None


def _part(trainer: Trainer, entry: Entry, total: Any) -> dict[str, Any]:
    """What this process adds to an entry, and how another makes one like it."""
    bar, logger, _, _, _, graph, sync, _, suffix, _, _ = entry.options
    options = (bar, logger, entry.on_step, entry.on_epoch, "mean", graph, sync, None, suffix, None, False)
    part = {"members": _members(entry), "options": options}
    if isinstance(entry, MetricEntry):
        states = metric_states(entry.metric) if entry.parked is None else entry.parked
        path = next((name for name, child in trainer.lightning_module.named_modules() if child is entry.metric), None)
        return {**part, "states": states, "path": path}
    reduction = _SHORT[type(entry)]
    part["options"] = (*options[:4], reduction, *options[5:])
    return {**part, "total": total, "weight": entry.weight, "dtype": entry.dtype}


def _created(trainer: Trainer, key: Key, part: dict[str, Any]) -> Entry:
    """The entry of a name that was logged in other processes only."""
    options = part["options"]
    kind = MetricEntry if "states" in part else KINDS[options[4]]
    entry = trainer.book.entries[key] = kind(key[1], options, options[2], options[3], key[2])
    if isinstance(entry, MetricEntry):
        # Where it is not found, the value is computed with the states of others anyway, and this process has none.
        entry.metric = trainer.lightning_module.get_submodule(part["path"]) if part["path"] is not None else None
    return entry


def _merged(entry: Entry, parts: list[dict[str, Any]]) -> Any:
    values = [part["total"] for part in parts]
    value: Any
    if isinstance(entry, Mean):
        weight = sum(part["weight"] for part in parts)
        value = sum(values) / weight if weight else None
    elif isinstance(entry, (Maximum, Minimum)):
        largest = isinstance(entry, Maximum)
        value = next((v for v in values if v != v), max(values) if largest else min(values))
    else:
        value = sum(values)
    dtype = next((part["dtype"] for part in parts if part["dtype"] is not None), None)
    if value is None or dtype is None:
        return value
    return torch.tensor(value, dtype=dtype, device=entry.total.device if isinstance(entry.total, Tensor) else None)


# ---------------------------------------------------------------------- metrics


def _merged_metric(entry: MetricEntry, parts: list[dict[str, Any]]) -> Any:
    """The value of a metric that has seen what all processes saw."""
    if entry.metric is None:
        return None
    members = metrics_in(entry.metric)
    for index, metric in enumerate(members):
        seen = [part["states"][index] for part in parts]
        updated = [states for states in seen if states["updates"]] or seen[:1]
        for name, reduction in metric._reductions.items():
            values = [states["values"][name] for states in updated]
            weights = [states["updates"] for states in updated]
            merged = merged_state(values, weights, reduction)
            device = metric.device
            own = [value.to(device) for value in merged] if isinstance(merged, list) else merged.to(device)
            setattr(metric, name, own)
        metric._update_count = sum(states["updates"] for states in seen)
        metric._computed = None
    entry.parked = None
    syncing = [metric._to_sync for metric in members]
    for metric in members:
        metric._to_sync = False  # it is done
    try:
        return entry.epoch_value()
    finally:
        for metric, sync in zip(members, syncing):
            metric._to_sync = sync
        entry.metric.reset()


def merged_state(values: list[Any], weights: list[int], reduction: Any) -> Any:
    """One state of a metric from those of several processes, with their numbers of updates."""
    if isinstance(values[0], list):
        # One element per update and process: back in the order of the data.
        longest = max(map(len, values))
        return [value[index] for index in range(longest) for value in values if index < len(value)]
    if len(values) == 1:
        return values[0]
    stacked = torch.stack(values)
    if getattr(reduction, "__name__", "") == "dim_zero_mean":
        shape = (-1, *[1] * (stacked.dim() - 1))
        return (stacked * torch.tensor(weights).view(shape)).sum(0) / max(sum(weights), 1)
    return stacked if reduction is None else reduction(stacked)


# ---------------------------------------------------------------------- steps


def sync_steps(trainer: Trainer, place: str, present: int | None = None, idle: bool = False) -> None:
    """What was logged for this step with `sync_dist`, over the processes: one collective per reduction and group.

    Arguments:
        place: where in the batch this is called; a process that is `idle` takes part in what it took part in there.
        present: how many processes have a batch, if not all have.
    """
    book, strategy = trainer.book, trainer.strategy
    book.copy_jottings()
    assert book.page is not None
    if idle:
        entries = book.page.synced.get(place, [])
    else:
        entries = book.page.synced[place] = list(dict.fromkeys(book.due))
    book.due.clear()
    together: dict[tuple[Any, str], list[Entry]] = {}
    for entry in entries:
        op = "sum" if isinstance(entry, Mean) else _SHORT[type(entry)]
        together.setdefault((entry.options[7], op), []).append(entry)
    for (group, op), found in together.items():
        device = strategy.root_device
        numbers = [_NEUTRAL[op] if idle else entry.newest for entry in found]
        parts = [torch.as_tensor(number, dtype=torch.float64).detach().to(device) for number in numbers]
        with strategy.allow_collectives():  # those without a batch take part in this
            totals = strategy.reduce(torch.stack([part.reshape(()) for part in parts]), group, op)
        size = dist.get_world_size(group) if group is not None or present is None else present
        for entry, total in zip(found, totals) if not idle else ():
            floating = isinstance(entry.newest, Tensor) and entry.newest.is_floating_point()
            dtype = entry.newest.dtype if floating else torch.get_default_dtype()
            entry.newest = (total / size if isinstance(entry, Mean) else total).to(dtype)


def votes(trainer: Trainer, yes: bool) -> int:
    """How many processes say yes (sync)."""
    return int(trainer.strategy.reduce(torch.tensor(float(yes)), reduce_op="sum"))
