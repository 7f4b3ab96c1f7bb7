"""Logged values over all ranks: those of the epoch as one process would have them, those of a step if asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from fulmen.hooks import LOG_RULES, nothing
from fulmen.metrics.entries import Entry, EntryKey, EntryPart, MetricEntry, entry_type
from fulmen.metrics.values import Value, fetch_numbers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer

# What changes nothing in a reduction, from a rank that has no value.
_NEUTRAL = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}


class RankParts(NamedTuple):
    """What one rank sends when an epoch is reduced: is its hook implemented, and its part of each entry."""

    has_hook: bool
    parts: dict[EntryKey, EntryPart]


# ---------------------------------------------------------------------- epochs


def close_epoch(trainer: Trainer, fire: Callable[[], Any]) -> None:
    """Makes the values of the open scope those of all ranks and fires the hook at the end of the epoch.

    One exchange; one more for what the hook logs, if it is implemented on any rank.
    """
    book = trainer.book
    again = book.distributed and reduce_epoch_metrics(trainer, fire is not nothing)
    book.scope.close_epoch()
    fire()
    if again:
        reduce_epoch_metrics(trainer)


def report_train_epoch(loop: FitLoop, complete: bool) -> None:
    """After `on_train_epoch_end`: schedulers that watch a metric, if the epoch was not cut short, and the loggers."""
    progress = loop.progress
    book = loop.trainer.book
    if complete and loop.schedulers.any:
        loop.schedulers.watch("epoch", progress.epochs + 1, book)
    # The x axis is the last step of the epoch, which has been counted already.
    loop.trainer.report(book.finish_epoch(), step=max(progress.log_step - 1, 0), with_epoch=True)
    book.scope.reset()


def reduce_epoch_metrics(trainer: Trainer, has_hook: bool = False) -> bool:
    """Computes the epoch values from what all ranks have, in one exchange. Returns whether any rank has the hook.

    Only sums, weights and extremes travel, and the states of metrics. A rank without a name adds nothing to it, and
    knows the value afterwards.
    """
    trainer.book.flush_deferred()
    entries = trainer.book.scope.entries
    exchanged: list[RankParts] = trainer.strategy.exchange_objects(RankParts(has_hook, _local_parts(trainer)))
    for key in dict.fromkeys(key for sent in exchanged for key in sent.parts):
        if parts := _parts_for(trainer.global_rank, [sent.parts[key] for sent in exchanged if key in sent.parts]):
            entry = entries.get(key) or _new_entry(trainer, key, parts[0])
            entry.finalize_merged(parts)
    for entry in entries.values():
        if entry.is_pending and isinstance(entry, MetricEntry):  # `rank_zero_only`
            entry.finalize_merged([entry.local_part(None, trainer.lightning_module)])
    return any(sent.has_hook for sent in exchanged)


def _parts_for(rank: int, parts: list[EntryPart]) -> list[EntryPart]:
    return [part for part in parts if part.ranks is None or rank in part.ranks]


def _local_parts(trainer: Trainer) -> dict[EntryKey, EntryPart]:
    """What this rank has of all entries that are to be reduced."""
    entries = trainer.book.scope.entries
    due = {key: entry for key, entry in entries.items() if entry.is_pending and _is_shared(key, entry, trainer)}
    totals = fetch_numbers({key: entry.total for key, entry in due.items() if entry.total is not None})
    return {key: entry.local_part(totals.get(key), trainer.lightning_module) for key, entry in due.items()}


def _is_shared(key: EntryKey, entry: Entry, trainer: Trainer) -> bool:
    """What a step logs is a part of the whole. What an epoch hook logs may be the whole: `sync_dist` says if not."""
    ranks = entry.group_ranks()
    if entry.options.rank_zero_only or (ranks is not None and trainer.global_rank not in ranks):
        return False
    rule = LOG_RULES.get(key[0] or "")
    return isinstance(entry, MetricEntry) or bool(entry.options.sync_dist) or (rule is not None and rule.step_allowed)


def _new_entry(trainer: Trainer, key: EntryKey, part: EntryPart) -> Entry:
    """The entry of a name that was logged on other ranks only."""
    _, name, dataloader_idx = key
    entry = entry_type(part.options)(name, part.options, dataloader_idx, provisional=True)
    if isinstance(entry, MetricEntry):
        entry.attach_metric(part.metric_path, trainer.lightning_module)
    trainer.book.scope.add_entry(key, entry)
    return entry


# ---------------------------------------------------------------------- steps


def reduce_step_metrics(
    trainer: Trainer, batch_position: str, num_active: int | None = None, exhausted: bool = False
) -> None:
    """What was logged for this step with `sync_dist`, over the ranks: one collective per reduction and group.

    Arguments:
        batch_position: where in the batch this is called; a rank that is `exhausted` reduces what it reduced there last.
        num_active: ranks that have a batch, if not all have.
    """
    book = trainer.book
    book.flush_deferred()
    if not exhausted:
        book.scope.reduced_steps[batch_position] = list(dict.fromkeys(book.to_reduce))
    book.to_reduce.clear()
    for (group, op), entries in _by_collective(book.scope.reduced_steps.get(batch_position, [])).items():
        values = [_NEUTRAL[op] if exhausted or entry.newest is None else entry.newest for entry in entries]
        totals = _reduce_values(trainer, values, group, op)
        if exhausted:
            continue
        size = dist.get_world_size(group) if group is not None or num_active is None else num_active
        for entry, total in zip(entries, totals):
            entry.set_reduced_step(total / size if entry.options.reduce_fx == "mean" else total)


def _by_collective(entries: list[Entry]) -> dict[tuple[Any, str], list[Entry]]:
    """Those that one collective can reduce together, under its group and operation."""
    found: dict[tuple[Any, str], list[Entry]] = {}
    for entry in entries:
        op = "sum" if entry.options.reduce_fx == "mean" else str(entry.options.reduce_fx)
        found.setdefault((entry.options.sync_dist_group, op), []).append(entry)
    return found


def _reduce_values(trainer: Trainer, values: list[Value], group: ProcessGroup | None, op: str) -> torch.Tensor:
    """The values over the ranks of the group, as one tensor in float64."""
    strategy = trainer.strategy
    parts = [torch.as_tensor(v, dtype=torch.float64).detach().to(strategy.root_device) for v in values]
    with strategy.allow_collectives():  # those without a batch take part in this
        reduced: torch.Tensor = strategy.reduce(torch.stack([part.reshape(()) for part in parts]), group, op)
        return reduced


def count_true(trainer: Trainer, value: bool) -> int:
    """On how many ranks the value is true (sync)."""
    return int(trainer.strategy.reduce(torch.tensor(float(value)), reduce_op="sum"))
