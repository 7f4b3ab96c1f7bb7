"""Uneven inputs: what a rank without a batch does while others still have some, in training and in evaluation.

The loops, the optimization and the signals talk to a `Join`, which is chosen when the loaders are known. The base class is
the one for equal numbers of batches, and does nothing. The word is torch's, from `torch.distributed.algorithms.join`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fulmen.data.combined import CombinedLoader
from fulmen.data.feed import Feed, IteratorFeed, JoinFeed, Shortfall
from fulmen.engine import collectives
from fulmen.engine.sync_batchnorm import SyncBatchNorm
from fulmen.metrics.reduce import count_true, reduce_step_metrics
from fulmen.metrics.torchmetrics_state import is_metric, metrics_in
from fulmen.utilities.collections import apply_to_collection, move_data_to_device
from fulmen.utilities.introspection import in_library
from fulmen.utilities.modules import is_picklable
from fulmen.utilities.rank_zero import warn_once
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.trainer import Trainer

_UNSET = object()
_DEPTH = 6  # containers in containers
# Of torch: what a module is made of, hooks, and parameters, which stand elsewhere while they are spread over processes.
_OF_TORCH = frozenset(vars(Module())) - {"_buffers", "training"}
# Their statistics are those of all ranks, and have to stay equal on them.
_SYNCHRONISED = (SyncBatchNorm, torch.nn.SyncBatchNorm)


class Join:
    """As many batches on each rank, or one rank only: there is nothing to do but to reduce what was logged.

    Arguments:
        feed_type: gives the feed of training.
    """

    uneven = False  # may a rank run out of batches before others do?
    exhausted = False  # has this rank no batch of its own for the current step?
    partial = False  # has any rank none?
    num_active = 1  # ranks that have one, counted if `uneven`

    def __init__(self, trainer: Trainer, feed_type: Callable[..., Feed] = Feed) -> None:
        self.trainer = trainer
        self.feed_type = feed_type

    def build_feed(
        self, loaders: CombinedLoader, transfer: Callable[..., Any], profile: Callable[..., Any] | None
    ) -> Feed:
        """The batches of an epoch of training."""
        return self.feed_type(loaders, transfer, profile)

    def before_batch(self, batch: Any = None, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """A batch is about to be used."""

    def after_batch_start(self) -> None:
        """The hook at the start of the batch has run."""

    def reduce_metrics(self, batch_position: str) -> None:
        """Reduces over ranks what was logged with `sync_dist`, after the "step" and at the "end" of the batch."""
        reduce_step_metrics(self.trainer, batch_position)

    def close_loader(self, dataloader_idx: int) -> None:
        """This rank is done with one of several loaders."""

    def close_loaders(self, first: int) -> None:
        """This rank is done with all loaders from the `first` on."""

    def close_epoch(self) -> None:
        """No rank has a batch left in this epoch."""

    def have_all(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Whether all ranks are known to have this batch."""
        return True

    def gather_shortfalls(self, shortfalls: dict[int, Shortfall]) -> list[dict[int, Shortfall]]:
        """The shortfalls of all ranks where they may differ, else those of this one."""
        return [shortfalls]


# ---------------------------------------------------------------------- training


class TrainingJoin(Join):
    """All ranks end an epoch together. One that is exhausted runs shadow steps, which add nothing to the gradients.

    Arguments:
        counts: batches of each rank, as its loaders promise.
        certain: are these the numbers that they give?

    Raises:
        RuntimeError: if a rank has no batch at all, or pulls its batches itself.
    """

    uneven = True

    def __init__(self, trainer: Trainer, counts: list[float], certain: list[bool], iterator_feed: bool) -> None:
        super().__init__(trainer)
        shown = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(counts))
        if 0 in counts:
            what = f"Not all processes have training batches ({shown}), and each has to run its own `training_step`."
            raise RuntimeError(f"{what} Give each process data: use a smaller batch size, or fewer devices.")
        if iterator_feed:
            what = f"`training_step(dataloader_iter)` needs as many batches in each process, and there are {shown}."
            raise RuntimeError(f"{what} Limit them with `limit_train_batches`, or take `batch` instead.")
        self.certain = all(certain)
        self.counts = [count if sure else inf for count, sure in zip(counts, certain)]
        self.feed: JoinFeed

    def build_feed(
        self, loaders: CombinedLoader, transfer: Callable[..., Any], profile: Callable[..., Any] | None
    ) -> JoinFeed:
        """The feed whose epochs end on all ranks together."""
        self.feed = JoinFeed(loaders, transfer, profile, self.counts, partial(count_true, self.trainer))
        return self.feed

    def before_batch(self, batch: Any = None, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """What an exhausted rank logs in its shadow step does not count."""
        self.exhausted = self.feed.exhausted
        self.num_active = self.feed.num_active
        self.partial = self.num_active < len(self.counts)
        self.trainer.book.metrics_suppressed = self.exhausted

    def reduce_metrics(self, batch_position: str) -> None:
        reduce_step_metrics(self.trainer, batch_position, self.num_active, self.exhausted)
        if batch_position == "end":
            self.close_epoch()

    def close_epoch(self) -> None:
        self.trainer.book.metrics_suppressed = False

    def gather_shortfalls(self, shortfalls: dict[int, Shortfall]) -> list[dict[int, Shortfall]]:
        return [shortfalls] if self.certain else self.trainer.strategy.exchange_objects(shortfalls)


def join_training(trainer: Trainer, num_batches: float, certain: bool, iterator_feed: bool) -> tuple[Join, float]:
    """The `Join` of training, and the number of batches of an epoch; all ranks call this together.

    Arguments:
        num_batches: of this rank, as its loaders promise.
        certain: is this the number that they give?
        iterator_feed: does the step pull its batches itself?
    """
    answers = trainer.strategy.exchange_objects((num_batches, certain))
    counts = [count for count, _ in answers]
    sure = [answer for _, answer in answers]
    if len(counts) == 1 or (len(set(counts)) == 1 and inf not in counts and all(sure)):
        feed_type = IteratorFeed if iterator_feed else partial(Feed, counted=certain)
        return Join(trainer, feed_type), num_batches
    return TrainingJoin(trainer, counts, sure, iterator_feed), max(counts)


# ---------------------------------------------------------------------- evaluation


class EvaluationJoin(Join):
    """Ranks whose loaders are evaluated as they are: one without a batch takes part only in steps that need all ranks.

    Whether they do shows in the batches that all ranks have: a collective is counted by its group. A rank that has none
    left is lent the batch of another one, so that what is exchanged has the same shapes. One without any batch of a
    loader runs a step at least once, so that hooks at the end of the epoch find what a step leaves behind.

    Arguments:
        counts: batches of each loader, by rank; infinite where they are not known.
    """

    uneven = True

    def __init__(self, loop: EvaluationLoop, counts: list[list[float]]) -> None:
        super().__init__(loop.trainer)
        self.loop = loop
        self.counts = counts
        self.strategy = loop.trainer.strategy
        self.rank = loop.trainer.global_rank
        # Loaders that have no length on some rank; and how many batches of each all ranks have, 0 if not known.
        self.unknown = [inf in of_loader for of_loader in zip(*counts)]
        self.common = [0 if inf in of_loader else min(of_loader) for of_loader in zip(*counts)]
        # What needs all ranks: the "step", its "hooks".
        self.collective = {"step"} if self.strategy.forward_is_collective else set[str]()
        self.watching = False  # is a batch out that all ranks have?
        self.asking = True  # of a loader without a length: is it said at each batch who has one?
        self.collectives_seen = 0
        self.batches_done = 0  # of the loader, on this rank
        self.batch_idx = 0
        self.dataloader_idx = 0
        self.last_batch: Any = None  # as it came, or what was lent

    def have_all(self, batch_idx: int, dataloader_idx: int) -> bool:
        return batch_idx < self.common[dataloader_idx]

    def have_batch(self, batch_idx: int, dataloader_idx: int) -> list[bool]:
        """Which ranks have this batch of a loader whose length is known."""
        return [batch_idx < counts[dataloader_idx] for counts in self.counts]

    def count_active(self, batch_idx: int, dataloader_idx: int) -> int:
        """How many ranks have this batch of the loader; 0 if that is not known."""
        return 0 if self.unknown[dataloader_idx] else sum(self.have_batch(batch_idx, dataloader_idx))

    # ------------------------------------------------------------------ with a batch

    def before_batch(self, batch: Any = None, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Ranks that have no batch of the loader at all are lent the first one."""
        unknown = self.unknown[dataloader_idx]
        self.batch_idx = batch_idx
        self.dataloader_idx = dataloader_idx
        self.batches_done += 1
        first = self.batches_done == 1
        everywhere = self._announce_batch(batch, first)
        # Where all have a batch, or one that was lent to them.
        self.watching = (everywhere or first) and len(self.collective) < 2
        if unknown or self.batches_done == self.counts[self.rank][dataloader_idx]:
            self.last_batch = _copy_containers(batch)  # a step may take it apart
        if not (everywhere or unknown or self.collective or first):
            without = self.have_batch(batch_idx, dataloader_idx).index(False)
            what = f"`{self.loop.step_name}` wants to exchange something between all processes in batch {batch_idx}"
            why = f"and did not in those before, but rank {without} has none: {self.loop.kind} data is not padded."
            fix = "Exchange something in each batch, or only in the hook at the end of the epoch."
            self.strategy.block_collectives(f"{what} {why} {fix}")
        self._start_watching()

    def after_batch_start(self) -> None:
        self._note_collectives("hooks")

    def reduce_metrics(self, batch_position: str) -> None:
        """Step values are reduced over the ranks that have the batch."""
        self._note_collectives("step" if batch_position == "step" else "hooks")
        book = self.trainer.book
        if self.common[self.dataloader_idx] > 0:
            reduce_step_metrics(self.trainer, batch_position, self.count_active(self.batch_idx, self.dataloader_idx))
        elif book.to_reduce:
            book.to_reduce.clear()
            what = (
                f"A step value is logged with `sync_dist`, but not all processes have a batch of the {self.loop.kind}"
            )
            warn_once(f"{what} data, or it has no length: it stays the one of its process. Epoch values are exact.")
        self._start_watching()

    def _announce_batch(self, batch: Any, first: bool) -> bool:
        """Tells other ranks of a batch, and lends it to those without, where they wait for that. Do all have one?"""
        if self.unknown[self.dataloader_idx]:
            return self._count_remaining(True, first, batch) == len(self.counts)
        everywhere = self.have_all(self.batch_idx, self.dataloader_idx)
        if not everywhere and (first or self.collective):
            self._lend_batch(self.have_batch(self.batch_idx, self.dataloader_idx), batch)
        return everywhere

    def _start_watching(self) -> None:
        """From here on, collectives are the user's."""
        self.collectives_seen = collectives.count_collectives() if self.watching else 0

    def _note_collectives(self, part: str) -> None:
        """Were there any since, in the "step" or in its "hooks"?"""
        if self.watching and (seen := collectives.count_collectives()) != self.collectives_seen:
            self.collective.add(part)
            self.collectives_seen = seen

    def _count_remaining(self, has_batch: bool, first: bool, batch: Any = None) -> int:
        """How many ranks have one more batch of a loader whose length is not known; asked while that matters."""
        self.asking = first or (self.asking and bool(self.collective))
        having = self.strategy.exchange_objects(has_batch) if self.asking else [False]
        if any(having) and not all(having):
            self._lend_batch(having, batch)
        return sum(having)

    def _lend_batch(self, having: list[bool], batch: Any) -> None:
        """Ranks without a batch get that of another one, if it can be sent."""
        source = having.index(True)
        lent = None
        if source == self.rank:  # a view would travel with all of the data it shows
            lent = apply_to_collection(move_data_to_device(batch, "cpu"), Tensor, Tensor.clone)
        lent = self.strategy.broadcast((lent,) if is_picklable(lent) else None, source)
        if not having[self.rank] and lent is not None:
            self.last_batch = move_data_to_device(lent[0], self.strategy.root_device)

    # ------------------------------------------------------------------ without one

    def close_loaders(self, first: int) -> None:
        for dataloader_idx in range(first, len(self.counts[0])):
            self.close_loader(dataloader_idx)

    def close_loader(self, dataloader_idx: int) -> None:
        """This rank is done with the loader, and takes part in what is left of it on others."""
        self.strategy.block_collectives(None)
        self.dataloader_idx = dataloader_idx
        self.batch_idx = self.batches_done
        no_batches = self.batches_done == 0
        module = self.trainer.lightning_module
        with ExitStack() as stack:
            entered = False
            while self._count_others():
                first = self.last_batch is not None and self.batch_idx == 0
                if (first or self.collective) and not entered:
                    stack.enter_context(shadow_step(module, fill=no_batches, others=self.trainer.callbacks))
                    entered = True
                self._run_shadow_step(first)
                self.loop.skip_output()
                self.batch_idx += 1
        self.batches_done = 0
        self.last_batch = None
        self.loop.collect_remaining()

    def _count_others(self) -> int:
        """How many ranks have the batch that this one has not."""
        batch_idx = self.batch_idx
        dataloader_idx = self.dataloader_idx
        if self.unknown[dataloader_idx]:
            return self._count_remaining(False, first=batch_idx == 0)
        active = self.count_active(batch_idx, dataloader_idx)
        # Nobody waits with a batch for a rank that promised one and got none.
        lacking = batch_idx >= self.counts[self.rank][dataloader_idx]
        if active and lacking and (batch_idx == 0 or self.collective):
            self._lend_batch(self.have_batch(batch_idx, dataloader_idx), None)
        return active

    def _run_shadow_step(self, first: bool) -> None:
        """One batch of others: what needs all ranks is done with them, and nothing of it counts."""
        loop = self.loop
        book = self.trainer.book
        batch = _copy_containers(self.last_batch)
        runs_step = batch is not None and (first or "step" in self.collective)
        runs_hooks = batch is not None and (first or "hooks" in self.collective) and loop.runs_shadow_hooks
        arguments = (batch, self.batch_idx, self.dataloader_idx) if loop.several else (batch, self.batch_idx)
        outputs: Any = None
        book.metrics_suppressed = True
        self.watching = first
        self._start_watching()
        if runs_hooks:
            loop.on_batch_start(*arguments)
            self._note_collectives("hooks")
        if runs_step:
            book.hook = loop.step_name
            with nullcontext() if loop.context is None else loop.context():
                outputs = loop.step(*arguments)
            self._note_collectives("step")
        self._reduce_nothing("step")
        self._start_watching()
        if runs_hooks:
            loop.on_batch_end(outputs, *arguments)
            self._note_collectives("hooks")
        self._reduce_nothing("end")
        book.metrics_suppressed = False
        book.hook = None

    def _reduce_nothing(self, batch_position: str) -> None:
        """Takes part where other ranks reduce what they logged."""
        self.trainer.book.flush_deferred()
        if self.common[self.dataloader_idx] > 0:
            reduce_step_metrics(
                self.trainer, batch_position, self.count_active(self.batch_idx, self.dataloader_idx), exhausted=True
            )


def _copy_containers(batch: Any) -> Any:
    """The same items in new containers."""
    if type(batch) in (list, tuple):
        return type(batch)([_copy_containers(item) for item in batch])
    if type(batch) is dict:
        return {key: _copy_containers(item) for key, item in batch.items()}
    return copy(batch) if isinstance(batch, Mapping) else batch


# ---------------------------------------------------------------------- shadow steps


@contextmanager
def shadow_step(
    module: Module,
    context: Callable[[], AbstractContextManager[Any]] | None = None,
    fill: bool = False,
    others: Iterable[Any] = (),
) -> Generator[None]:
    """Inside, a step runs only because other ranks run theirs: afterwards the module and random generators are unchanged.

    That is all attributes and buffers of the module, with the containers and objects of the user's own classes in them.
    The same is true of `others`, such as callbacks, if their classes are the user's.
    Metrics that are synchronised inside take part with what they had seen before.

    Arguments:
        context: entered around the step, such as that of the precision.
        fill: lists that were empty keep what was added. This rank has no batch, and a hook may expect some output.
    """
    snapshot = ObjectSnapshot(fill)
    for part in (module, *others):
        snapshot.record(part)
    for metric in metrics_in(module):
        vars(metric)["update"] = partial(_update_nothing, metric, metric.update)
    try:
        with SyncBatchNorm.shadow_step(), isolate_rng(), nullcontext() if context is None else context():
            yield
    finally:
        snapshot.restore()


def _update_nothing(metric: Any, update: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """In place of `Metric.update`: lists of states get something empty, of the shape that other ranks have."""
    before = {name: getattr(metric, name) for name in metric._defaults}
    before = {name: list(state) if isinstance(state, list) else state.clone() for name, state in before.items()}
    update(*args, **kwargs)
    for name, state in before.items():
        if isinstance(state, list):
            added = [item.reshape(-1)[:0] if item.dim() == 0 else item[:0] for item in getattr(metric, name)]
            state += added[len(state) :]
        setattr(metric, name, state)


class ObjectSnapshot:
    """What objects hold now, to be put back: attributes, and the containers and tensors in them.

    Tensors in lists are kept as they are: there may be many of them, and results are not changed once they are there.
    """

    def __init__(self, fill: bool = False) -> None:
        self.fill = fill
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], None]] = []

    def restore(self) -> None:
        """Puts everything back."""
        for undo in self._undo:
            undo()

    def record(self, value: Any, depth: int = 0, fill: bool | None = None) -> None:
        """Keeps what an object holds, and what that holds in turn."""
        if id(value) in self._seen or depth > _DEPTH or value is None or isinstance(value, (bool, int, float, str)):
            return
        self._seen[id(value)] = value
        fill = (self.fill if fill is None else fill) and not is_metric(value)
        for child in self._record_content(value, fill):
            self.record(child, depth if isinstance(child, Module) else depth + 1, fill)

    def _record_content(self, value: Any, fill: bool) -> list[Any]:
        """Keeps what is in the object itself, and returns it."""
        if isinstance(value, Tensor):
            return self._record_tensor(value)
        if isinstance(value, Module):
            return self._record_module(value, fill)
        if isinstance(value, (list, deque)):
            self._undo.append(partial(_restore_sequence, value, list(value), fill))
            return [item for item in value if not isinstance(item, Tensor)]
        if isinstance(value, set):
            self._undo.append(partial(_restore_set, value, set(value)))
        elif isinstance(value, tuple):
            return list(value)
        elif isinstance(value, dict):
            return self._record_dict(value, fill)
        elif _is_own(type(value)) and hasattr(value, "__dict__"):
            return self._record_dict(vars(value), fill)
        elif _is_writable_array(value):
            self._undo.append(partial(value.__setitem__, ..., value.copy()))
        return []

    def _record_tensor(self, tensor: Tensor) -> list[Any]:
        if not isinstance(tensor, Parameter) and not hasattr(tensor, "to_local"):
            self._undo.append(partial(_restore_tensor, tensor, tensor.clone(), _version_of(tensor)))
        return []

    def _record_dict(self, content: dict[Any, Any], fill: bool) -> list[Any]:
        self._undo.append(partial(_restore_dict, content, dict(content), fill))
        return list(content.values())

    def _record_module(self, module: Module, fill: bool) -> list[Any]:
        # What a metric has computed with others is the newest there is, on all ranks.
        left_out = _OF_TORCH | {"_computed"} if is_metric(module) else _OF_TORCH
        left_out = left_out | {"_buffers"} if isinstance(module, _SYNCHRONISED) else left_out
        kept = {name: held for name, held in vars(module).items() if name not in left_out}
        self._undo.append(partial(_restore_dict, vars(module), kept, fill, left_out))
        return [*kept.values(), *module._modules.values()]


def _is_own(kind: type) -> bool:
    """Is it a class of the user's?"""
    home = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or (home is not None and not in_library(home))


def _is_writable_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "flags") and value.flags.writeable


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _restore_tensor(tensor: Tensor, kept: Tensor, version: int | None) -> None:
    if version is None or tensor._version != version:
        tensor.data.copy_(kept)  # what autograd has saved of it is not used, or as it was


def _restore_sequence(sequence: Any, kept: list[Any], fill: bool) -> None:
    if kept or not fill:
        sequence.clear()
        sequence.extend(kept)


def _restore_set(content: set[Any], kept: set[Any]) -> None:
    content.clear()
    content.update(kept)


def _restore_dict(
    content: dict[str, Any], kept: dict[str, Any], fill: bool, left_out: frozenset[str] = frozenset()
) -> None:
    for name in [name for name in content if name not in left_out]:
        value = content[name]
        before = kept.get(name, _UNSET)
        if fill and _is_empty(before) and isinstance(value, (list, deque, Tensor)):
            continue
        if before is _UNSET:
            dict.__delitem__(content, name)
        elif before is not value:
            dict.__setitem__(content, name, before)
    for name, before in kept.items():
        if name not in content:
            dict.__setitem__(content, name, before)


def _is_empty(before: Any) -> bool:
    """Was there nothing under a name?"""
    return before is _UNSET or before is None or (isinstance(before, (list, deque)) and not before)
