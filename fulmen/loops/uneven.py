"""Evaluation by several processes that do not have as many batches each: what the others do when one has none left."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from copy import copy
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.engine import collectives
from fulmen.loops.standing_in import standing_in
from fulmen.metrics.reduce import reduce_step_metrics
from fulmen.utilities.collections import apply_to_collection, move_data_to_device
from fulmen.utilities.modules import is_picklable
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from fulmen.loops.evaluate import EvaluationLoop


class UnevenBatches:
    """Knows which processes have which batches, and lets those without one take part in steps that need all of them.

    Whether they do shows in the batches that all have: a collective is counted by its group. A process that has none
    left is lent the batch of another one, so that what is exchanged has the same shapes. One without any batch of a
    loader runs a step at least once, so that hooks at the end of the epoch find what a step leaves behind.

    Arguments:
        counts: batches of each loader, by rank; infinite where they are not known.
    """

    def __init__(self, loop: EvaluationLoop, counts: list[list[float]]) -> None:
        self.loop, self.trainer, self.counts = loop, loop.trainer, counts
        self.rank = loop.trainer.global_rank
        # Loaders that have no length in some process; and so many batches of each all processes have, 0 if not known.
        self.unknown = [inf in of_loader for of_loader in zip(*counts)]
        self.full = [0 if inf in of_loader else min(of_loader) for of_loader in zip(*counts)]
        together = loop.trainer.strategy.forward_is_collective
        self.joined = {"step"} if together else set[str]()  # what needs all processes: the step, its hooks
        self.watching = False  # is a batch out that all processes have?
        self.asking = True  # of a loader without a length: is it said at each batch who has one?
        self.seen = 0  # collectives so far
        self.own = 0  # batches of the loader so far
        self.batch: Any = None  # the last one, as it came, or what was lent

    def present(self, batch_idx: int, dataloader_idx: int) -> int:
        """How many processes have this batch of the loader; 0 if that is not known."""
        return 0 if self.unknown[dataloader_idx] else sum(batch_idx < counts[dataloader_idx] for counts in self.counts)

    # ------------------------------------------------------------------ with a batch

    def begin(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """This process has a batch. Those that have none at all are given the first one."""
        strategy, unknown = self.trainer.strategy, self.unknown[dataloader_idx]
        self.own += 1
        common = batch_idx < self.full[dataloader_idx]
        if unknown:
            common = self.ask(True, self.own == 1, batch) == len(self.counts)
        elif not common and (self.own == 1 or self.joined):
            self.lend([batch_idx < counts[dataloader_idx] for counts in self.counts], batch)
        # Where all have a batch, or one that was lent to them.
        self.watching = (common or self.own == 1) and len(self.joined) < 2
        if unknown or self.own == self.counts[self.rank][dataloader_idx]:
            self.batch = _copied(batch)  # a step may take it apart
        if not (common or unknown or self.joined or self.own == 1):
            without = next(rank for rank, counts in enumerate(self.counts) if batch_idx >= counts[dataloader_idx])
            what = f"`{self.loop.step_name}` wants to exchange something between all processes in batch {batch_idx}"
            why = f"and did not in those before, but rank {without} has none: {self.loop.kind} data is not padded."
            fix = "Exchange something in each batch, or only in the hook at the end of the epoch."
            strategy.block_collectives(f"{what} {why} {fix}")
        self.mark()

    def mark(self) -> None:
        """From here on, collectives are the user's."""
        self.seen = collectives.count_collectives() if self.watching else 0

    def note(self, where: str) -> None:
        """Were there any, in the "step" or in its "hooks"?"""
        if self.watching and (seen := collectives.count_collectives()) != self.seen:
            self.joined.add(where)
            self.seen = seen

    def ask(self, here: bool, first: bool, batch: Any = None) -> int:
        """How many processes have one more batch of a loader whose length is not known; asked while that matters."""
        self.asking = first or (self.asking and bool(self.joined))
        having = self.trainer.strategy.exchange_objects(here) if self.asking else [False]
        if any(having) and not all(having):
            self.lend(having, batch)
        return sum(having)

    def lend(self, having: list[bool], batch: Any) -> None:
        """Those without a batch get that of another process, if it can travel."""
        source = having.index(True)
        lent = None
        if source == self.rank:  # a view would travel with all of the data it shows
            lent = apply_to_collection(move_data_to_device(batch, "cpu"), Tensor, Tensor.clone)
        lent = self.trainer.strategy.broadcast((lent,) if is_picklable(lent) else None, source)
        if not having[self.rank] and lent is not None:
            self.batch = move_data_to_device(lent[0], self.trainer.strategy.root_device)

    def reduce_step_metrics(self, batch_position: str, batch_idx: int, dataloader_idx: int) -> None:
        """Values of a step with `sync_dist`, over those processes that have the batch."""
        book = self.trainer.book
        if self.full[dataloader_idx] > 0:
            reduce_step_metrics(self.trainer, batch_position, self.present(batch_idx, dataloader_idx))
        elif book.to_reduce:
            book.to_reduce.clear()
            what = (
                f"A step value is logged with `sync_dist`, but not all processes have a batch of the {self.loop.kind}"
            )
            warn_once(f"{what} data, or it has no length: it stays the one of its process. Epoch values are exact.")

    # ------------------------------------------------------------------ without one

    def finish_loader(self, dataloader_idx: int) -> None:
        """This process is done with the loader. It takes part in what is left of it elsewhere."""
        self.trainer.strategy.block_collectives(None)
        batch_idx, none_here, unknown = self.own, self.own == 0, self.unknown[dataloader_idx]
        with ExitStack() as stack:
            entered = False
            while True:
                if unknown:
                    present = self.ask(False, first=batch_idx == 0)
                else:
                    present = self.present(batch_idx, dataloader_idx)
                    # One that was promised and did not come is awaited by nobody.
                    lacking = batch_idx >= self.counts[self.rank][dataloader_idx]
                    if present and lacking and (batch_idx == 0 or self.joined):
                        self.lend([batch_idx < counts[dataloader_idx] for counts in self.counts], None)
                if not present:
                    break
                first = self.batch is not None and batch_idx == 0
                if (first or self.joined) and not entered:
                    stack.enter_context(standing_in(self.trainer.lightning_module, none_here, self.trainer.callbacks))
                    entered = True
                self.stand_in(batch_idx, dataloader_idx, first)
                self.loop.keep_nothing()
                batch_idx += 1
        self.own, self.batch = 0, None
        self.loop.drain()

    def stand_in(self, batch_idx: int, dataloader_idx: int, first: bool) -> None:
        """One batch of others: what they do together is done with them, and nothing of it counts."""
        loop, book, batch = self.loop, self.trainer.book, _copied(self.batch)
        steps = batch is not None and (first or "step" in self.joined)
        hooks = batch is not None and (first or "hooks" in self.joined) and loop.hooks_may_repeat
        place = (batch, batch_idx, dataloader_idx) if loop.several else (batch, batch_idx)
        book.muted, outputs, shared = True, None, self.full[dataloader_idx] > 0
        self.watching = first
        self.mark()
        if hooks:
            loop.on_batch_start(*place)
            self.note("hooks")
        if steps:
            book.hook = loop.step_name
            with nullcontext() if loop.context is None else loop.context():
                outputs = loop.step(*place)
            self.note("step")
        book.flush_deferred()
        if shared:
            reduce_step_metrics(self.trainer, "step", self.present(batch_idx, dataloader_idx), idle=True)
        self.mark()
        if hooks:
            loop.on_batch_end(outputs, *place)
            self.note("hooks")
        book.flush_deferred()
        if shared:
            reduce_step_metrics(self.trainer, "end", self.present(batch_idx, dataloader_idx), idle=True)
        book.muted, book.hook = False, None


def _copied(batch: Any) -> Any:
    """The same items in containers of its own."""
    if type(batch) in (list, tuple):
        return type(batch)([_copied(item) for item in batch])
    if type(batch) is dict:
        return {key: _copied(item) for key, item in batch.items()}
    return copy(batch) if isinstance(batch, Mapping) else batch
