"""Where a loader is inside of a pass, and the same pass opened again there without loading what was loaded.

The order of a pass follows from the random generators at two moments: when its iterator is made, and when the first
index is drawn. A `LoaderPass` notes both, once per pass. To go on, it makes the iterator as it was made, lets the sampler
give the indices of the batches that are done, and puts every generator where the checkpoint has it.

Worker processes have generators of their own. A `WorkerRngTracker` runs in them in the place of `collate_fn`, and keeps their
states in shared memory, where the main process looks only when a checkpoint is written.
"""

from __future__ import annotations

import pickle
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fulmen.data.sample_order import SharedOrder
from fulmen.data.tensor_batches import iterate_batches
from fulmen.supervision import loader_workers
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import generator_states, python_state, same_states, set_generator_states

_ORIGIN = ("alone", "together", "seed", "epoch")  # of an order that another number of processes drew
_INSIDE = ("dataset", "sampler", "batch_sampler", "order", "loader")
PATIENCE_S = 10.0  # for workers that are still busy with the end of an epoch


def find_generators(part: Any, depth: int = 5) -> dict[int, Any]:
    """The random generators that a loader, its samplers and its dataset have for themselves, by id."""
    found: dict[int, Any] = {}
    for name, value in vars(part).items() if depth and hasattr(part, "__dict__") else ():
        numpys = type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator")
        if isinstance(value, (torch.Generator, random.Random)) or numpys:
            found[id(value)] = value
        elif name in _INSIDE:
            found |= find_generators(value, depth - 1)
    return found


def _shards(loader: Any) -> list[Any]:
    """Samplers that give each process its part of an order that is drawn from a seed of their own."""
    found = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    found.append(getattr(found[0], "sampler", None))
    return [part for part in found if part is not None and "padded" in getattr(part, "__dict__", ())]


def _states(own: list[Any]) -> list[Any]:
    return [
        g.get_state() if isinstance(g, torch.Generator)
        else python_state(g.getstate()) if isinstance(g, random.Random) else g.bit_generator.state for g in own
    ]  # fmt: skip


def _put_back(own: list[Any], states: list[Any]) -> None:
    for generator, state in zip(own, states):
        if isinstance(generator, torch.Generator):
            generator.set_state(state)
        elif isinstance(generator, random.Random):
            generator.setstate(python_state(state))
        else:
            generator.bit_generator.state = state


def _each(states: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {k: tuple(map(change, v)) if isinstance(v, tuple) else change(v) for k, v in states.items()}


class RngSnapshot:
    """The states of the run's generators, and of those a loader has for itself."""

    def __init__(self, own: list[Any], kept: dict[str, Any] | None = None) -> None:
        self.own = own
        now = {"global": generator_states(include_cuda=False), "own": _states(own)} if kept is None else kept
        self.kept: dict[str, Any] = now

    def put_back(self) -> None:
        set_generator_states(self.kept["global"])
        _put_back(self.own, self.kept["own"])

    def moved(self) -> bool:
        """Has anybody drawn from the run's generators since?"""
        return not same_states(self.kept["global"], generator_states(include_cuda=False))


class ResumedSampler:
    """A sampler or batch sampler that gives what is left of one pass, and all of every later one.

    Arguments:
        skip: how many are done.
        first: when the first index was drawn in the pass that is continued; None if the same follows without it.
        later: the first index is drawn only when it is asked for, and by then the generators are where they belong.
        lead: so many of what is done are given again, cut to one sample.
        ahead: how many more were drawn when the generators were where they belong now.
    """

    def __init__(
        self, order: Any, skip: int, first: RngSnapshot | None, later: bool, lead: int = 0, ahead: int = 0
    ) -> None:
        self.order, self.skip, self.first, self.later = order, skip, first, later
        self.lead, self.ahead = lead, ahead
        self.held: deque[Any] = deque()
        self.items: Iterator[Any] = iter(())
        self.pending = True

    def __iter__(self) -> Iterator[Any]:
        return self._rest(iter(self.order)) if self.pending else iter(self.order)

    def _rest(self, items: Iterator[Any]) -> Iterator[Any]:
        if self.pending:
            self.pending, self.items = False, items
            yield from self._begin()
        while True:
            while self.held:
                yield self.held.popleft()
            for item in items:
                yield item
                if self.held:
                    break
            else:
                return

    def _begin(self) -> Iterator[Any]:
        before = RngSnapshot(self.first.own if self.first else [])
        if self.first is not None:
            self.first.put_back()
        if self.skip or self.first is not None:
            head = list(islice(self.items, 1))
            begun = RngSnapshot([])
            last = deque(islice(self.items, max(self.skip - 1, 0)), maxlen=1) or head
            self.held.extend(() if self.skip else head)
            if self.later:
                self.hold()
                if begun.moved():
                    self._warn(before)
            for _ in range(self.lead):
                yield last[0][:1] if isinstance(last[0], (list, tuple)) else last[0]
        if self.later and self.first is not None:
            before.put_back()

    def hold(self) -> None:
        """Draws what had been drawn ahead."""
        self.held.extend(islice(self.items, max(self.ahead - len(self.held), 0)))

    def _warn(self, before: RngSnapshot) -> None:
        if before.moved():
            what = f"`{type(self.order).__name__}` draws random numbers of the run for each index: what is left of this"
            fix = "Give it a generator of its own, `torch.Generator()`, in an attribute."
            rank_zero_warn(f"{what} epoch is in another order if training draws some in between. {fix}")

    def __len__(self) -> int:
        return len(self.order)

    def __getattr__(self, name: str) -> Any:
        if name == "order":  # asked for while a copy is being made
            raise AttributeError(name)
        return getattr(self.order, name)


class WorkerRngTracker:
    """Stands in for `collate_fn` and `worker_init_fn` in workers, and leaves the states of their generators behind.

    Each worker has some slots in shared memory. A state goes into the next one when a batch has drawn random numbers.

    Arguments:
        given: states to begin with, by worker; None begins as torch seeds it.
        skipped: batches of the pass that were done before there was this courier.
    """

    SIZE = 1 << 15  # bytes of a pickled state: about 15,500

    def __init__(self, loader: DataLoader, given: list[Any] | None = None, skipped: int = 0) -> None:
        self.workers, self.collate, self.init = loader.num_workers, loader.collate_fn, loader.worker_init_fn
        slots = (loader.prefetch_factor or 2) + 6  # what is prefetched is ahead of the batch in training
        fits = given is not None and len(given) == self.workers
        self.given: list[Any] = given if given is not None and fits else [None] * self.workers
        self.lead, self.skipped, self.base = skipped % self.workers, skipped, [0] * self.workers
        self.board = torch.zeros(self.workers, slots, self.SIZE, dtype=torch.uint8).share_memory_()
        # For each slot: from which batch of the worker on the state holds.
        self.marks = torch.zeros(self.workers, slots, dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(self.workers, dtype=torch.int64).share_memory_()
        self.worker = self.count = self.slot = 0
        self.waits, self.seen = False, {}  # type: bool, dict[str, Any]

    # ------------------------------------------------------------------ in a worker

    def start(self, worker_id: int) -> None:
        """What runs as `worker_init_fn`."""
        loader_workers.install_stack_handler()
        if self.init is not None:
            self.init(worker_id)
        if (given := self.given[worker_id]) is not None:
            set_generator_states(given)
        self.worker, self.waits, self.seen = worker_id, worker_id < self.lead, generator_states(include_cuda=False)

    def __call__(self, samples: Any) -> Any:
        if self.waits:  # this one is only there to let the next batch go to the worker it belongs to
            self.waits = False
            set_generator_states(self.seen)
            return None
        batch = self.collate(samples)
        self.count += 1
        states = generator_states(include_cuda=False)
        if not same_states(states, self.seen):
            self.seen = states
            text = pickle.dumps(_each(states, lambda part: part.numpy() if isinstance(part, torch.Tensor) else part))
            slot = self.slot = (self.slot + 1) % self.marks.shape[1]
            self.board[self.worker, slot, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            self.marks[self.worker, slot] = self.count
        self.counts[self.worker] = self.count
        return batch

    # ------------------------------------------------------------------ in the main process

    def _share(self, worker: int, until: int) -> int:
        """Batches of a worker in this pass, of those before number `until`."""
        begin = self.skipped + (worker - self.skipped) % self.workers
        return len(range(begin, until, self.workers))

    def turn(self, sent: int) -> None:
        """A pass is over in which `sent` tasks were given to the workers, and the next one begins."""
        until = sent + self.skipped - self.lead
        self.base = [base + self._share(worker, until) for worker, base in enumerate(self.base)]
        self.skipped = self.lead = 0

    def states(self, taken: int) -> list[Any]:
        """The states of all workers as of the first `taken` batches of the pass."""
        return [self._state(w, self.base[w] + self._share(w, taken)) for w in range(self.workers)]

    def _state(self, worker: int, count: int) -> Any:
        patience = time.monotonic() + PATIENCE_S
        while self.counts[worker] < count and time.monotonic() < patience:
            time.sleep(0.001)
        marks = self.marks[worker].tolist()
        newest = max((mark for mark in marks if mark <= count), default=0)
        if not newest:
            return self.given[worker]
        states = pickle.loads(self.board[worker, marks.index(newest)].numpy().tobytes())
        return _each(states, lambda part: torch.from_numpy(part) if hasattr(part, "dtype") else part)


def dataset_and_batch_size(loader: Any) -> tuple[int | None, int | None]:
    """Samples, and samples in a batch, where indices are read."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None, None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return len(loader.dataset), 1 if loader.batch_sampler is None else size  # type: ignore[arg-type]


@contextmanager
def _standing_in(loader: Any, **parts: Any) -> Iterator[None]:
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
        at: batches of the epoch before it; a loader that ends before the others starts again.
        kept: the pass that is to go on, or what is left of the one before, from `state`.
        done: batches of the epoch that are done.
    """

    def __init__(self, loader: Any, at: int = 0, kept: dict[str, Any] | None = None, done: int = 0) -> None:
        self.loader, self.kept = loader, kept or {}
        self.at, self.skip = self.kept.get("at", at), 0
        self.own = list(find_generators(loader).values())
        self.first: dict[str, Any] | None = None
        self.courier: WorkerRngTracker | None = None
        if "opened" in self.kept:
            self.skip = done - self.at
        self.indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        self.workers = loader.num_workers if isinstance(loader, DataLoader) else 0

    def open(self) -> Iterator[Any]:
        """The iterator; of a pass that goes on, behind what is done."""
        kept, running = self.kept, getattr(self.loader, "_iterator", None)
        _put_back(self.own, kept.get("own", []))
        self.first = kept.get("first")
        for shard in _shards(self.loader):
            shard.seed = kept.get("seed", shard.seed)
            if "alone" in kept and self.first is not None:
                shard.begin = RngSnapshot(self.own, self.first).put_back
        opened = RngSnapshot(self.own, kept.get("opened"))
        self.opened = opened.kept
        if kept and callable(reopen := getattr(self.loader, "reopen", None)):
            reopen()
        if "opened" in kept:
            opened.put_back()
        elif (began := getattr(self.loader, "began", None)) is not None:  # it has been opened already
            self.opened["global"] = began
            self.first = self.opened
        elif running is not None or kept.get("persistent"):
            self.first = self.opened  # workers that stay, or stayed: nothing is drawn in between
        resumes = "opened" in kept or bool(kept.get("persistent") and running is None)
        iterator = self._workers(running, resumes) if self.workers else self._alone(resumes)
        if resumes:
            if not self.indexed:
                iterator = self._count_off(iterator, opened)
            _put_back(self.own, kept.get("own", []))
        return iterator

    def _order(self, later: bool, lead: int = 0) -> dict[str, Any]:
        """The part of the loader that chooses what is read, continued."""
        name = "sampler" if self.loader.batch_sampler is None else "batch_sampler"
        first, order = None if self.first is None else RngSnapshot(self.own, self.first), getattr(self.loader, name)
        if "together" in self.kept:  # several processes drew the order of this epoch
            alike = SharedOrder(self.loader.sampler if name == "sampler" else order.sampler, self.kept["together"])
            order = alike if name == "sampler" else BatchSampler(alike, order.batch_size, order.drop_last)
        return {name: ResumedSampler(order, self.skip, first, later, lead, self.kept.get("ahead", 0))}

    def _alone(self, resumes: bool) -> Iterator[Any]:
        if not resumes:
            iterator = iterate_batches(self.loader)
            return chain(self._note(iterator), iterator)
        if not self.indexed:
            iterator = iterate_batches(self.loader)
            return iterator if self.first else chain(self._note(iterator), iterator)
        order = self._order(later=True)
        with _standing_in(self.loader, **order):
            iterator = iterate_batches(self.loader)
        return chain(self._checked(iterator, *order.values()), iterator)

    def _note(self, iterator: Iterator[Any]) -> Iterator[Any]:
        self.first = self.first or RngSnapshot(self.own).kept
        yield from islice(iterator, 1)

    def _checked(self, iterator: Iterator[Any], order: ResumedSampler) -> Iterator[Any]:
        """A loader with an `__iter__` of its own may read without its sampler."""
        self.first = self.first or RngSnapshot(self.own).kept
        head = list(islice(iterator, 1))
        if order.pending and self.skip:
            order.pending = False
            head = list(islice(iterator, self.skip - 1, self.skip))
            self._say(self.skip)
        yield from head

    def _workers(self, running: Any, resumes: bool) -> Iterator[Any]:
        loader = self.loader
        if running is not None:
            found = getattr(running, "_collate_fn", None)
            self.courier = found if isinstance(found, WorkerRngTracker) else None
            if self.courier is not None:
                self.courier.turn(running._send_idx)
            if not self.indexed:
                self.begun = self.courier and self.courier.states(0)
            return iter(loader)
        given = self.kept.get("workers") if resumes else None
        skipped = self.skip if resumes and self.indexed else 0
        self.courier = courier = WorkerRngTracker(loader, given, skipped)
        self.begun = courier.given
        parts: dict[str, Any] = {"collate_fn": courier, "worker_init_fn": courier.start}
        if resumes and self.indexed:
            parts |= self._order(later=False, lead=courier.lead)
        with _standing_in(loader, **parts):
            iterator = iter(loader)
        for part in parts.values():
            if isinstance(part, ResumedSampler):
                part.hold()
        if getattr(iterator, "_collate_fn", None) is not courier:
            self.courier = None
            if resumes:
                what = f"Random numbers drawn in the {self.workers} workers of `{type(loader).__name__}` start anew,"
                rank_zero_warn(
                    f"{what} as it makes its workers in a way of its own. The order of samples is continued."
                )
        return islice(iterator, courier.lead, None) if courier.lead else iterator

    def _count_off(self, iterator: Iterator[Any], opened: RngSnapshot) -> Iterator[Any]:
        """What has no indices is read, and passed over."""
        if "opened" not in self.kept:
            opened.put_back()
        elif not self.kept.get("placed") and (self.skip or self.first is not None):
            if self.first is not None:
                RngSnapshot(self.own, self.first).put_back()
            if self.skip:
                self._say(sum(1 for _ in islice(iterator, self.skip)))
            # What was read ahead has been drawn already.
            ahead = 0 if self.workers else max(self.kept.get("ahead", 0), not self.skip)
            return chain(list(islice(iterator, ahead)), iterator)
        return iterator

    def _say(self, count: int) -> None:
        name = type(getattr(self.loader, "dataset", self.loader)).__name__
        what = f"Resuming inside an epoch: {count} batches of `{name}` were read and passed over, as it has no indices."
        rank_zero_info(f"{what} With `state_dict` and `load_state_dict` it continues at once.")

    def state(self, done: int, inside: bool, ahead: int = 0) -> dict[str, Any]:
        """In plain types, what `kept` takes; `inside` of an epoch of which so many batches are done, or between two."""
        running: Any = getattr(self.loader, "_iterator", None)
        persistent = running is not None and getattr(self.loader, "persistent_workers", False)
        state: dict[str, Any] = {"own": _states(self.own), "persistent": persistent}
        for shard in _shards(self.loader):
            state |= {"seed": shard.seed, "epoch": shard.epoch}
        if inside:
            state |= {name: self.kept[name] for name in _ORIGIN if name in self.kept}
            state |= {
                "size": dataset_and_batch_size(self.loader),
                "ahead": ahead,
                "at": self.at,
                "opened": self.opened,
                "first": self.first,
            }
        if self.courier is not None and (inside or persistent):
            taken = done - self.at if inside else running._send_idx + self.courier.skipped - self.courier.lead
            state["workers"] = self.courier.states(taken) if self.indexed or not inside else self.begun
        return state
