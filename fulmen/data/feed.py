"""`Feed`: the batches of one epoch, on the device, knowing which one is last."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import count, islice
from math import inf
from typing import Any, NamedTuple

from fulmen.data.combined import CombinedLoader
from fulmen.data.loaders import shutdown_workers
from fulmen.utilities.seed import isolate_rng

_END = object()


# What fetches a batch, and what makes a function of it that is measured.
Fetch = Callable[[], Any]
Profile = Callable[[Fetch], Fetch]


class Shortfall(NamedTuple):
    """The batches that a loader gave, and how many it had promised."""

    given: int
    promised: float


class Feed:
    """The batches of one epoch.

    `open_iterators()` makes the iterators (and so starts the workers), iterating yields `(batch, batch_idx,
    dataloader_idx)`. While a batch is out, `is_last` tells whether another will follow: by counting where the length is
    known for certain, else by prefetching one batch. The limits of ``loaders`` are set, ``transfer(batch,
    dataloader_idx)`` gives the batch on the device (see `data.transfer`), and ``profile`` wraps the function that fetches
    one batch.

    Arguments:
        counted: is `len()` of the loaders the number of batches they give?
    """

    def __init__(
        self,
        loaders: CombinedLoader,
        transfer: Callable[[Any, int], Any],
        profile: Profile | None = None,
        counted: bool = True,
    ) -> None:
        self.loaders = loaders
        self.transfer = transfer
        self.profile = profile
        self.num_batches = loaders.num_batches()
        self.counted = counted and self.num_batches < inf
        self.is_last = False
        self.shortfalls: dict[int, Shortfall] = {}  # of the last pass, by index of the loader
        self._over = False  # does no batch follow in this epoch?
        self.opened_epoch: int | None = None  # the epoch whose iterators were made last
        self.first_batch_idx = 0  # a resumed epoch continues counting from here
        self._iterator: Any = None  # opened for the next pass
        # one plain loader: no need to ask the combination who is next
        self._single = loaders.flattened[0] if loaders.iterables is loaders.flattened[0] else None

    def open_iterators(self, epoch: int | None = None) -> None:
        """Makes fresh iterators; called once before each pass, of this epoch."""
        self.opened_epoch = epoch
        self._over = False
        self._iterator = iter(self.loaders) if self._single is None else self.loaders.open_pass(0)

    def mark_exhausted(self) -> None:
        """Lets no batch follow in this epoch."""
        self._over = True

    def __iter__(self) -> Generator[tuple[Any, int, int]]:
        self.is_last = False
        self.shortfalls = {}
        if self._over:
            return
        if self._iterator is None:
            self.open_iterators()
        iterator = self._iterator
        self._iterator = None
        fetch: Callable[[], Any] = lambda: next(iterator, _END)  # noqa: E731
        if self.profile is not None:
            fetch = self.profile(fetch)
        if stateful := self.loaders.is_stateful():
            fetch = self._record_states(fetch)
        if self._single is None:
            yield from self._iterate_combined(fetch)
        else:
            iterate = self._iterate_counted if self.counted else self._iterate_prefetching
            yield from iterate(iterator if self.profile is None and not stateful else iter(fetch, _END))

    def _record_states(self, fetch: Callable[[], Any]) -> Callable[[], Any]:
        """Records the states of loaders before each batch: when a checkpoint is written, one more may have been read."""
        consumed = count(self.first_batch_idx)

        def record_and_fetch() -> Any:
            self.loaders.record_state(next(consumed))
            return fetch()

        return record_and_fetch

    def _iterate_counted(self, iterator: Iterator[Any]) -> Generator[tuple[Any, int, int]]:
        transfer = self.transfer
        idx = self.first_batch_idx
        last = min(self.num_batches, self.loaders.num_batches()) - 1  # the dataset may have become smaller
        if idx > last:
            return
        for batch in iterator:
            self.is_last = idx >= last
            yield transfer(batch, 0), idx, 0
            idx += 1
            if idx > last:
                break
        self._note_shortfalls({0: idx})

    def _iterate_prefetching(self, iterator: Iterator[Any]) -> Generator[tuple[Any, int, int]]:
        transfer = self.transfer
        idx = self.first_batch_idx
        end = self.num_batches
        waiting: Any = _END
        for batch in iterator if end == inf else islice(iterator, max(int(end) - idx, 0)):
            if waiting is not _END:
                yield transfer(waiting, 0), idx, 0
                idx += 1
            waiting = batch
        if waiting is not _END:
            self.is_last = True
            yield transfer(waiting, 0), idx, 0
            idx += 1
        self._note_shortfalls({0: idx})

    def _iterate_combined(self, fetch: Callable[[], Any]) -> Generator[tuple[Any, int, int]]:
        given = self.first_batch_idx
        end = self.num_batches
        in_turn = self.loaders.mode == "sequential"
        counts = dict.fromkeys(range(len(self.loaders.flattened)), 0) if in_turn else {0: given}
        prefetched: Any = _END if self.counted or given >= end else fetch()
        while given < end:
            item = fetch() if self.counted else prefetched
            if item is _END:
                break
            given += 1
            if not self.counted:
                prefetched = fetch() if given < end else _END
            batch, batch_idx, dataloader_idx = item
            counts[dataloader_idx] += 1
            self.is_last = given >= end or (not self.counted and prefetched is _END)
            if not in_turn:
                batch_idx = given - 1
            yield self.transfer(batch, dataloader_idx), batch_idx, dataloader_idx
        self._note_shortfalls(counts)

    def _note_shortfalls(self, counts: dict[int, int]) -> None:
        promised = self.loaders.loader_lengths() if len(counts) > 1 else [self.num_batches]
        for (at, given), expected in zip(counts.items(), promised):
            if given < expected and (expected < inf or not given):
                self.shortfalls[at] = Shortfall(given, expected)

    @property
    def batches_prefetched(self) -> int:
        """How many batches are read before they are asked for."""
        return int(not self.counted)

    def batches_consumed(self, done: int, in_batch: bool) -> int:
        """How many batches ``done`` finished steps have used; the one that runs does not count.

        Arguments:
            in_batch: does a step run?
        """
        return done

    def close_loaders(self) -> None:
        """Ends the workers."""
        self._iterator = None
        for loader in self.loaders.flattened:
            shutdown_workers(loader)


class JoinFeed(Feed):
    """The batches of one of several processes that have not as many each, and end the epoch together.

    One that has none left is `exhausted`, and gives its last one again until all are done; `num_active` says how many
    have the batch that is out. Where all lengths are known, nothing is exchanged to know it.

    Arguments:
        counts: batches of each process; infinite where that is not certain.
        count_true: on how many processes a bool is true; called by all at every batch if a length is not certain.
    """

    def __init__(
        self, loaders: CombinedLoader, transfer: Callable[[Any, int], Any], profile: Profile | None, counts: list[int | float],
        count_true: Callable[[bool], int],
    ) -> None:  # fmt: skip
        super().__init__(loaders, transfer, profile, counted=inf not in counts)
        self.counts = counts
        self.count_true = count_true
        self.exhausted = False
        self.num_active = len(counts)

    def __iter__(self) -> Generator[tuple[Any, int, int]]:
        if self._over:
            return
        source = super().__iter__()
        idx = self.first_batch_idx
        item = next(source, None)
        kept = None
        self.num_active = self._count_active(idx, item is not None)
        while self.num_active:
            more = item is not None and not self.is_last
            following = self._count_active(idx + 1, more)
            self.exhausted = item is None
            self.is_last = following == 0
            if item is not None:
                kept = item[0]
            elif kept is None:
                kept = self._any_batch()
            yield kept, idx, 0
            item = next(source, None)
            idx += 1
            self.num_active = following

    def _count_active(self, idx: int, here: bool) -> int:
        """How many processes have a batch of this index."""
        return self.count_true(here) if inf in self.counts else sum(idx < count for count in self.counts)

    def _any_batch(self) -> Any:
        with isolate_rng():  # in a run that was not stopped, it is one that was given before
            for batch, _, _ in self.loaders:
                return self.transfer(batch, 0)
        what = "This process has no batch at all, and others have."
        raise RuntimeError(f"{what} Give each process data: use a smaller batch size, or fewer devices.")


class IteratorFeed(Feed):
    """For steps with an argument `dataloader_iter`: hands out the iterator, the step pulls batches from it itself.

    The step receives `(batch, batch_idx, dataloader_idx)` from `next(dataloader_iter)`; no transfer hooks run. Each time
    it is yielded with the index of the batch that was pulled last, and the loader of the next one.
    """

    def __init__(
        self, loaders: CombinedLoader, transfer: Callable[[Any, int], Any], profile: Profile | None = None
    ) -> None:
        super().__init__(loaders, lambda batch, _: batch, profile)
        self.batch: Any = None  # that was pulled last
        self.batch_idx = 0
        self.pulled = 0  # batches of the epoch, with those of steps before
        self.pulled_before_step = 0

    def __iter__(self) -> Generator[tuple[Any, int, int]]:
        source = super().__iter__()
        # Always one batch ahead: whether there is a next step is known only to whoever has its batch.
        prefetched: Any = next(source, _END)
        self.batch = None
        self.batch_idx = self.pulled = self.first_batch_idx

        def pull_batches() -> Generator[tuple[Any, int, int]]:
            nonlocal prefetched
            while prefetched is not _END:
                item = prefetched
                prefetched = next(source, _END)
                self.batch, self.batch_idx, _ = item
                self.is_last = prefetched is _END
                self.pulled = item[1] + 1
                yield item

        iterator = pull_batches()
        while prefetched is not _END:
            self.is_last = False
            self.pulled_before_step = self.pulled
            yield iterator, self.batch_idx, prefetched[2]

    @property
    def batches_prefetched(self) -> int:
        return super().batches_prefetched + 1

    def batches_consumed(self, done: int, in_batch: bool) -> int:
        return max(self.pulled_before_step if in_batch else self.pulled, self.first_batch_idx)
