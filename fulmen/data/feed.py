"""`Feed`: the batches of one epoch, on the device, knowing which one is last."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from math import inf
from typing import Any

from fulmen.data.combined import CombinedLoader
from fulmen.data.fetch import iterate
from fulmen.data.loaders import shutdown_workers

_END = object()


class Feed:
    """The batches of one epoch.

    `open()` makes the iterators (and so starts the workers), iterating yields `(batch, batch_idx, dataloader_idx)`.
    While a batch is out, `is_last` tells whether another will follow: by counting where the length is known, else by
    reading one batch ahead. The limits of ``loaders`` are set, ``transfer(batch, dataloader_idx)`` gives the batch on
    the device (see `data.batches`), and ``profile`` wraps the function that fetches one batch.
    """

    def __init__(self, loaders: CombinedLoader, transfer: Callable, profile: Callable | None = None) -> None:
        self.loaders = loaders
        self.transfer = transfer
        self.profile = profile
        self.num_batches = loaders.num_batches()
        self.is_last = False
        self.first_batch_idx = 0  # a resumed epoch goes on counting from here
        self._iterator: Any = None  # opened for the next pass
        # one plain loader: no need to ask the combination who is next
        self._single = loaders.flattened[0] if loaders.iterables is loaders.flattened[0] else None

    def open(self) -> None:
        """Makes fresh iterators; called once before each pass."""
        self._iterator = iter(self.loaders) if self._single is None else iterate(self._single)

    def exhaust(self) -> None:
        """Lets no batch follow in this epoch."""
        self._iterator = iter(())

    def __iter__(self) -> Generator[tuple[Any, int, int]]:
        if self._iterator is None:
            self.open()
        iterator, self._iterator = self._iterator, None
        fetch: Callable[[], Any] = lambda: next(iterator, _END)  # noqa: E731
        if self.profile is not None:
            fetch = self.profile(fetch)
        if self._single is None:
            yield from self._combined(fetch)
        elif self.num_batches == inf:
            yield from self._unsized(fetch)
        else:
            yield from self._sized(iterator if self.profile is None else iter(fetch, _END))

    def _sized(self, iterator: Iterator[Any]) -> Generator[tuple[Any, int, int]]:
        transfer, idx, last = self.transfer, self.first_batch_idx, self.num_batches - 1
        self.is_last = False
        if idx > last:
            return
        for batch in iterator:
            self.is_last = idx >= last
            yield transfer(batch, 0), idx, 0
            if self.is_last:
                return
            idx += 1

    def _unsized(self, fetch: Callable[[], Any]) -> Generator[tuple[Any, int, int]]:
        idx = self.first_batch_idx
        ahead = fetch()
        while ahead is not _END:
            batch, ahead = ahead, fetch()
            self.is_last = ahead is _END
            yield self.transfer(batch, 0), idx, 0
            idx += 1

    def _combined(self, fetch: Callable[[], Any]) -> Generator[tuple[Any, int, int]]:
        given, unsized = self.first_batch_idx, self.num_batches == inf
        ahead: Any = fetch() if unsized else None
        while given < self.num_batches:
            item = ahead if unsized else fetch()
            if item is _END:
                return
            ahead = fetch() if unsized else None
            batch, batch_idx, dataloader_idx = item
            given += 1
            self.is_last = given >= self.num_batches or ahead is _END
            if self.loaders.mode != "sequential":
                batch_idx = given - 1
            yield self.transfer(batch, dataloader_idx), batch_idx, dataloader_idx

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None
        for loader in self.loaders.flattened:
            shutdown_workers(loader)


class IteratorFeed(Feed):
    """For `training_step(dataloader_iter)`: hands out the iterator, the step pulls batches from it itself.

    The step receives `(batch, batch_idx, dataloader_idx)` from `next(dataloader_iter)`; no transfer hooks run.
    """

    def __init__(self, loaders: CombinedLoader, transfer: Callable, profile: Callable | None = None) -> None:
        super().__init__(loaders, lambda batch, _: batch, profile)
        self.batch_idx = 0

    def __iter__(self) -> Generator[tuple[Any, int, int]]:
        source = super().__iter__()
        # Always one batch ahead: whether there is a next step is known only to whoever has its batch.
        ahead: Any = next(source, _END)
        self.batch_idx = self.first_batch_idx

        def pull() -> Generator[tuple[Any, int, int]]:
            nonlocal ahead
            while ahead is not _END:
                item, ahead = ahead, next(source, _END)
                self.batch_idx, self.is_last = item[1], ahead is _END
                yield item

        iterator = pull()
        while ahead is not _END:
            self.is_last = False
            yield iterator, self.batch_idx, 0
