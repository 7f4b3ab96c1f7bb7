"""The state of one pass over a loader, and the same pass continued without loading again what was loaded.

The order of a pass follows from the random generators at two moments: when its iterator is made, and when the first
index is drawn. A `LoaderPass` takes an `RngSnapshot` of both. To continue, it makes the iterator as it was made, lets the
sampler give the indices of the batches that are done, and sets every generator to what the checkpoint has.

Worker processes have generators of their own. A `WorkerRngTracker` runs in them in the place of `collate_fn`, and keeps
their states in shared memory, which the main process reads only when a checkpoint is written.
"""

from __future__ import annotations

import pickle
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fulmen.data.sample_order import ForwardsAttributes, SharedOrder, sharded_samplers
from fulmen.data.tensor_batches import iterate_batches
from fulmen.supervision import loader_workers
from fulmen.utilities.collections import declared_batch_size
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import generator_states, python_state, same_states, set_generator_states

_ORIGIN = ("alone", "together", "seed", "epoch")  # of an order that another number of processes drew
_PLAIN = (type(None), bool, int, float, str, FunctionType)
_INSIDE = ("dataset", "sampler", "batch_sampler", "order", "loader")
BUSY_WORKERS_PATIENCE_S = 10.0  # for workers that are still busy with the end of an epoch


def dataset_of(loader: object) -> object:
    """The dataset that a loader reads, or the loader itself."""
    return getattr(loader, "dataset", loader)


def describe_loader(loader: object) -> str:
    """The classes of a loader and its dataset, for messages."""
    data = dataset_of(loader)
    return f"`{type(loader).__name__}`" + (f" over `{type(data).__name__}`" if data is not loader else "")


def is_map_style(loader: object) -> TypeGuard[DataLoader[Any]]:
    """Is it a loader whose samplers choose what is read?"""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def dataset_and_batch_size(loader: object) -> tuple[int | None, int | None]:
    """The number of samples, and of samples in a batch; None where no indices are read."""
    if not is_map_style(loader):
        return None, None
    size = loader.batch_size or declared_batch_size(loader.batch_sampler)
    return len(loader.dataset), 1 if loader.batch_sampler is None else size  # type: ignore[arg-type]


# ---------------------------------------------------------------------- random generators


def find_generators(part: object, depth: int = 5) -> dict[int, Any]:
    """The random generators that a loader, its samplers and its dataset have for themselves, by id."""
    found: dict[int, Any] = {}
    for name, value in vars(part).items() if depth and hasattr(part, "__dict__") else ():
        if type(value) in _PLAIN:
            continue  # most are; to ask whether they are a `torch.Generator` is a call
        from_numpy = type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator")
        if isinstance(value, (torch.Generator, random.Random)) or from_numpy:
            found[id(value)] = value
        elif name in _INSIDE:
            found |= find_generators(value, depth - 1)
    return found


def _get_states(generators: list[Any]) -> list[Any]:
    return [
        g.get_state() if isinstance(g, torch.Generator)
        else python_state(g.getstate()) if isinstance(g, random.Random) else g.bit_generator.state for g in generators
    ]  # fmt: skip


def _set_states(generators: list[Any], states: list[Any]) -> None:
    for generator, state in zip(generators, states):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            generator.setstate(python_state(state))
        else:
            generator.bit_generator.state = state


def _map_states(states: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {k: tuple(map(change, v)) if isinstance(v, tuple) else change(v) for k, v in states.items()}


class RngSnapshot:
    """The states of the run's random generators, and of those that a loader has for itself: as they are now, or as saved."""

    def __init__(self, generators: list[Any], saved: dict[str, Any] | None = None) -> None:
        self.generators = generators
        if saved is None:
            saved = {"global": generator_states(include_cuda=False), "own": _get_states(generators)}
        self.states: dict[str, Any] = saved

    def restore_all(self) -> None:
        """Sets all of them to this snapshot."""
        set_generator_states(self.states["global"])
        _set_states(self.generators, self.states["own"])

    def is_outdated(self) -> bool:
        """Has anybody drawn from the run's generators since?"""
        return not same_states(self.states["global"], generator_states(include_cuda=False))


class WorkerRngTracker:
    """Runs as `collate_fn` and `worker_init_fn` in workers, and publishes the states of their random generators.

    Each worker has some slots in shared memory. A state is written to the next one when a batch has drawn random numbers.

    Arguments:
        initial_states: to begin with, by worker; None begins as torch seeds it.
        skipped: batches of the pass that were done before there was this tracker.
    """

    SLOT_BYTES = 1 << 15  # of a pickled state: about 15,500

    def __init__(self, loader: DataLoader[Any], initial_states: list[Any] | None = None, skipped: int = 0) -> None:
        self.num_workers = loader.num_workers
        self.collate_fn = loader.collate_fn
        self.worker_init_fn = loader.worker_init_fn
        if initial_states is None or len(initial_states) != self.num_workers:
            initial_states = [None] * self.num_workers
        self.initial_states: list[Any] = initial_states
        # Batches are dealt to workers in turn: so many empty tasks let the next batch go to the worker it belongs to.
        self.num_fillers = skipped % self.num_workers
        self.skipped = skipped
        self.batches_before = [0] * self.num_workers  # of each worker, in passes that are over
        slots = (loader.prefetch_factor or 2) + 6  # what is prefetched is ahead of the batch in training
        self.slots = torch.zeros(self.num_workers, slots, self.SLOT_BYTES, dtype=torch.uint8).share_memory_()
        # For each slot: from which batch of the worker on the state holds.
        self.valid_from = torch.zeros(self.num_workers, slots, dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(self.num_workers, dtype=torch.int64).share_memory_()
        self.worker = self.count = self.slot = 0
        self.awaits_filler = False
        self.last_states: dict[str, Any] = {}

    # ------------------------------------------------------------------ in a worker

    def init_worker(self, worker_id: int) -> None:
        """What runs as `worker_init_fn`."""
        loader_workers.install_stack_handler()
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)
        if (states := self.initial_states[worker_id]) is not None:
            set_generator_states(states)
        self.worker = worker_id
        self.awaits_filler = worker_id < self.num_fillers
        self.last_states = generator_states(include_cuda=False)

    def __call__(self, samples: list[Any]) -> Any:
        if self.awaits_filler:
            self.awaits_filler = False
            set_generator_states(self.last_states)
            return None
        batch = self.collate_fn(samples)
        self.count += 1
        states = generator_states(include_cuda=False)
        if not same_states(states, self.last_states):
            self.last_states = states
            arrays = _map_states(states, lambda part: part.numpy() if isinstance(part, torch.Tensor) else part)
            text = pickle.dumps(arrays)
            slot = self.slot = (self.slot + 1) % self.valid_from.shape[1]
            self.slots[self.worker, slot, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self.valid_from[self.worker, slot] = self.count
        self.counts[self.worker] = self.count
        return batch

    # ------------------------------------------------------------------ in the main process

    def _count_batches(self, worker: int, until: int) -> int:
        """Batches of a worker in this pass, of those before number `until`."""
        begin = self.skipped + (worker - self.skipped) % self.num_workers
        return len(range(begin, until, self.num_workers))

    def begin_pass(self, tasks_sent: int) -> None:
        """A pass is over in which so many tasks were given to the workers, and the next one begins."""
        until = tasks_sent + self.skipped - self.num_fillers
        self.batches_before = [n + self._count_batches(worker, until) for worker, n in enumerate(self.batches_before)]
        self.skipped = self.num_fillers = 0

    def worker_states(self, consumed: int) -> list[Any]:
        """The states of all workers as of the first `consumed` batches of the pass."""
        counts = [n + self._count_batches(worker, consumed) for worker, n in enumerate(self.batches_before)]
        return [self._await_state(worker, count) for worker, count in enumerate(counts)]

    def _await_state(self, worker: int, count: int) -> Any:
        deadline = time.monotonic() + BUSY_WORKERS_PATIENCE_S
        while self.counts[worker] < count and time.monotonic() < deadline:
            time.sleep(0.001)
        marks = self.valid_from[worker].tolist()
        newest = max((mark for mark in marks if mark <= count), default=0)
        if not newest:
            return self.initial_states[worker]
        states = pickle.loads(self.slots[worker, marks.index(newest)].numpy().tobytes())
        return _map_states(states, lambda part: torch.from_numpy(part) if hasattr(part, "dtype") else part)


def _tracker_of(iterator: object) -> WorkerRngTracker | None:
    """The tracker in the workers of an iterator; None if a class of the user made them without it."""
    collate_fn = iterator._collate_fn if hasattr(iterator, "_collate_fn") else None
    return collate_fn if isinstance(collate_fn, WorkerRngTracker) else None


# ---------------------------------------------------------------------- samplers and loaders


class ResumedSampler(ForwardsAttributes):
    """A sampler or batch sampler that gives what is left of one pass, and all of every later one.

    Arguments:
        skip: how many items are done.
        first_draw: when the first index was drawn in the pass that is continued; None if the same follows without it.
        lazy: the first index is drawn only when it is asked for, and by then the generators are where they belong.
        num_fillers: so many of what is done are given again, cut to one sample.
        prefetched: how many more were drawn when the generators were where they belong now.
    """

    _forwards_to = "order"

    def __init__(
        self, order: Collection[Any], skip: int, first_draw: RngSnapshot | None, lazy: bool, num_fillers: int = 0, prefetched: int = 0
    ) -> None:  # fmt: skip
        self.order = order
        self.skip = skip
        self.first_draw = first_draw
        self.lazy = lazy
        self.num_fillers = num_fillers
        self.prefetched = prefetched
        self.held: deque[Any] = deque()
        self.items: Iterator[Any] = iter(())
        self.pending = True

    def __iter__(self) -> Iterator[Any]:
        return self._iterate_rest(iter(self.order)) if self.pending else iter(self.order)

    def _iterate_rest(self, items: Iterator[Any]) -> Iterator[Any]:
        if self.pending:
            self.pending = False
            self.items = items
            yield from self._pass_over_done()
        while True:
            while self.held:
                yield self.held.popleft()
            for item in items:
                yield item
                if self.held:
                    break
            else:
                return

    def _pass_over_done(self) -> Iterator[Any]:
        """Draws what is done, and gives the fillers."""
        before = RngSnapshot(self.first_draw.generators if self.first_draw else [])
        if self.first_draw is not None:
            self.first_draw.restore_all()
        if self.skip or self.first_draw is not None:
            last = self._draw_done(before)
            for _ in range(self.num_fillers):
                yield last[0][:1] if isinstance(last[0], (list, tuple)) else last[0]
        if self.lazy and self.first_draw is not None:
            before.restore_all()

    def _draw_done(self, before: RngSnapshot) -> list[Any]:
        """The last item that is done, in a list."""
        head = list(islice(self.items, 1))
        begun = RngSnapshot([])
        last = list(deque(islice(self.items, max(self.skip - 1, 0)), maxlen=1)) or head
        if not self.skip:
            self.held.extend(head)
        if self.lazy:
            self.draw_ahead()
            if begun.is_outdated() and before.is_outdated():
                what = f"`{type(self.order).__name__}` draws random numbers of the run for each index: what is left of this"
                fix = "Give it a generator of its own, `torch.Generator()`, in an attribute."
                rank_zero_warn(f"{what} epoch is in another order if training draws some in between. {fix}")
        return last

    def draw_ahead(self) -> None:
        """Draws what had been prefetched."""
        self.held.extend(islice(self.items, max(self.prefetched - len(self.held), 0)))

    def cancel_skip(self) -> None:
        """Nobody reads this sampler in the pass that is continued."""
        self.pending = False

    def __len__(self) -> int:
        return len(self.order)


class PeekedLoader:
    """A loader whose first batch has been read when it was made; its first pass begins with that batch."""

    rng_before_peek: dict[str, Any] | None = None  # the states of the run's generators, until the first pass

    def discard_peeked(self) -> None:
        """A pass that is continued does not begin with what was read to look at it."""


@contextmanager
def _override_parts(loader: object, **parts: object) -> Iterator[None]:
    """A loader has other parts while its iterator is made; torch lets nobody assign them."""
    kept = {name: vars(loader)[name] for name in parts if name in vars(loader)}
    vars(loader).update(parts)
    try:
        yield
    finally:
        for name in parts:
            del vars(loader)[name]
        vars(loader).update(kept)


class LoaderPass:
    """One pass over a loader.

    Arguments:
        start_batch: batches of the epoch before it; a loader that ends before the others starts again.
        saved: the pass that is to be continued, or what is left of the one before, from `pass_state`.
        done: batches of the epoch that are done.
    """

    def __init__(
        self, loader: Iterable[Any], start_batch: int = 0, saved: dict[str, Any] | None = None, done: int = 0
    ) -> None:
        self.loader: Any = loader
        self.saved = saved or {}
        self.start_batch = self.saved.get("at", start_batch)
        self.continues = "opened" in self.saved
        self.skip = done - self.start_batch if self.continues else 0
        self.generators = list(find_generators(loader).values())
        self.opened: dict[str, Any] = {}  # snapshots of when the iterator was made, and the first index drawn
        self.first_draw: dict[str, Any] | None = None
        self.tracker: WorkerRngTracker | None = None
        self.worker_states_at_start: list[Any] | None = None
        self.map_style = is_map_style(loader)
        self.num_workers = loader.num_workers if isinstance(loader, DataLoader) else 0

    # ------------------------------------------------------------------ opening

    def open_iterator(self) -> Iterator[Any]:
        """A new iterator; of a pass that is continued, after the batches that are done."""
        running = self._running_iterator()
        resumes = self.continues or bool(self.saved.get("persistent") and running is None)
        opened = self._restore_generators(running is not None)
        if not self.num_workers:
            iterator = self._read_in_process(resumes)
        elif running is not None:
            iterator = self._reuse_workers(running)
        else:
            iterator = self._start_workers(resumes)
        if resumes:
            if not self.map_style:
                iterator = self._skip_by_reading(iterator, opened)
            _set_states(self.generators, self.saved.get("own", []))
        return iterator

    def _running_iterator(self) -> Any:
        """That of workers which stay from one pass to the next, or None."""
        return self.loader._iterator if hasattr(self.loader, "_iterator") else None

    def _restore_generators(self, running: bool) -> RngSnapshot:
        """Everything random is as it was when the iterator was made, and noted."""
        saved = self.saved
        _set_states(self.generators, saved.get("own", []))
        self.first_draw = saved.get("first")
        snapshot = self._first_snapshot() if "alone" in saved else None
        for sampler in sharded_samplers(self.loader):
            sampler.resume_from(saved.get("seed"), snapshot.restore_all if snapshot is not None else None)
        opened = RngSnapshot(self.generators, saved.get("opened"))
        self.opened = opened.states
        peeked = self.loader if isinstance(self.loader, PeekedLoader) else None
        if peeked is not None and saved:
            peeked.discard_peeked()
        if self.continues:
            opened.restore_all()
        elif peeked is not None and peeked.rng_before_peek is not None:  # it has been opened already
            self.opened["global"] = peeked.rng_before_peek
            self.first_draw = self.opened
        elif running or saved.get("persistent"):
            self.first_draw = self.opened  # workers that stay, or stayed: nothing is drawn in between
        return opened

    def _first_snapshot(self) -> RngSnapshot | None:
        return None if self.first_draw is None else RngSnapshot(self.generators, self.first_draw)

    def _resume_sampler(self, lazy: bool, num_fillers: int = 0) -> dict[str, ResumedSampler]:
        """By its name, the part of the loader that chooses what is read, continued."""
        name = "sampler" if self.loader.batch_sampler is None else "batch_sampler"
        order = self.loader.sampler if name == "sampler" else self.loader.batch_sampler
        if "together" in self.saved:  # several processes drew the order of this epoch
            sampler = self.loader.sampler if name == "sampler" else order.sampler
            shared = SharedOrder(sampler, self.saved["together"])
            order = shared if name == "sampler" else BatchSampler(shared, order.batch_size, order.drop_last)
        prefetched = self.saved.get("ahead", 0)
        return {name: ResumedSampler(order, self.skip, self._first_snapshot(), lazy, num_fillers, prefetched)}

    def _read_in_process(self, resumes: bool) -> Iterator[Any]:
        if resumes and self.map_style:
            order = self._resume_sampler(lazy=True)
            with _override_parts(self.loader, **order):
                iterator = iterate_batches(self.loader)
            return chain(self._check_sampler_is_read(iterator, *order.values()), iterator)
        iterator = iterate_batches(self.loader)
        return iterator if resumes and self.first_draw else chain(self._note_first_draw(iterator), iterator)

    def _note_first_draw(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self.first_draw = self.first_draw or RngSnapshot(self.generators).states
        yield from islice(iterator, 1)

    def _check_sampler_is_read(self, iterator: Iterator[Any], sampler: ResumedSampler) -> Iterator[Any]:
        """A loader with an `__iter__` of its own may read without its sampler."""
        self.first_draw = self.first_draw or RngSnapshot(self.generators).states
        head = list(islice(iterator, 1))
        if sampler.pending and self.skip:
            sampler.cancel_skip()
            head = list(islice(iterator, self.skip - 1, self.skip))
            self._report_skipped(self.skip)
        yield from head

    def _reuse_workers(self, running: Any) -> Iterator[Any]:
        self.tracker = _tracker_of(running)
        if self.tracker is not None:
            self.tracker.begin_pass(running._send_idx)
            if not self.map_style:
                self.worker_states_at_start = self.tracker.worker_states(0)
        return iter(self.loader)

    def _start_workers(self, resumes: bool) -> Iterator[Any]:
        states = self.saved.get("workers") if resumes else None
        tracker = WorkerRngTracker(self.loader, states, self.skip if resumes and self.map_style else 0)
        self.tracker = tracker
        self.worker_states_at_start = tracker.initial_states
        parts: dict[str, Any] = {"collate_fn": tracker, "worker_init_fn": tracker.init_worker}
        order = self._resume_sampler(lazy=False, num_fillers=tracker.num_fillers) if resumes and self.map_style else {}
        with _override_parts(self.loader, **parts, **order):
            iterator = iter(self.loader)
        for sampler in order.values():
            sampler.draw_ahead()
        if _tracker_of(iterator) is not tracker:
            self.tracker = None
            if resumes:
                what = f"Random numbers drawn in the {self.num_workers} workers of `{type(self.loader).__name__}` start anew,"
                why = "as it makes its workers in a way of its own."
                rank_zero_warn(f"{what} {why} The order of samples is continued.")
        return islice(iterator, tracker.num_fillers, None) if tracker.num_fillers else iterator

    def _skip_by_reading(self, iterator: Iterator[Any], opened: RngSnapshot) -> Iterator[Any]:
        """What has no indices is read, and passed over."""
        if not self.continues:
            opened.restore_all()
        elif not self.saved.get("placed") and (self.skip or self.first_draw is not None):
            if (snapshot := self._first_snapshot()) is not None:
                snapshot.restore_all()
            if self.skip:
                self._report_skipped(sum(1 for _ in islice(iterator, self.skip)))
            # What was read ahead has been drawn already.
            ahead = 0 if self.num_workers else max(self.saved.get("ahead", 0), not self.skip)
            return chain(list(islice(iterator, ahead)), iterator)
        return iterator

    def _report_skipped(self, count: int) -> None:
        name = type(dataset_of(self.loader)).__name__
        what = f"Resuming inside an epoch: {count} batches of `{name}` were read and passed over, as it has no indices."
        rank_zero_info(f"{what} With `state_dict` and `load_state_dict` it continues at once.")

    # ------------------------------------------------------------------ saving

    def pass_state(self, done: int, inside: bool, prefetched: int = 0) -> dict[str, Any]:
        """In plain types, what `saved` takes; `inside` of an epoch of which so many batches are done, or between two."""
        running = self._running_iterator()
        persistent = (
            running is not None and hasattr(self.loader, "persistent_workers") and self.loader.persistent_workers
        )
        state: dict[str, Any] = {"own": _get_states(self.generators), "persistent": persistent}
        for sampler in sharded_samplers(self.loader):
            state |= {"seed": sampler.seed, "epoch": sampler.epoch}
        if inside:
            state |= {name: self.saved[name] for name in _ORIGIN if name in self.saved}
            state |= {
                "size": dataset_and_batch_size(self.loader),
                "ahead": prefetched,
                "at": self.start_batch,
                "opened": self.opened,
                "first": self.first_draw,
            }
        if self.tracker is None or not (inside or persistent):
            return state
        if inside and not self.map_style:
            return {**state, "workers": self.worker_states_at_start}
        skipped = self.tracker.skipped - self.tracker.num_fillers
        consumed = done - self.start_batch if inside else running._send_idx + skipped
        return {**state, "workers": self.tracker.worker_states(consumed)}
