"""Several loaders read as one."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice, zip_longest
from typing import Any

from torch.utils.data import IterableDataset

from fulmen.data.loader_state import LoaderPass, dataset_of, describe_loader
from fulmen.data.sample_order import batch_sampler_of, sampler_of
from fulmen.data.tensor_batches import iterate_batches
from fulmen.utilities.collections import map_children
from fulmen.utilities.errors import suggest_name

Triple = tuple[Any, int, int]

_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict)
_END = object()


def _tree_flatten(tree: object, leaves: list[Any]) -> Any:
    """Append the loaders of a container to ``leaves``; returns the container with the index of each in its place."""
    if _is_container(tree):
        return map_children(tree, lambda item: _tree_flatten(item, leaves))
    leaves.append(tree)
    return len(leaves) - 1


def _is_container(tree: object) -> bool:
    """Does it hold loaders? A list of numbers or strings is a loader, and so is what is empty."""
    if type(tree) not in _CONTAINERS and not (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        return False
    assert isinstance(tree, (list, tuple, dict))
    plain = not isinstance(tree, dict) and all(isinstance(item, (int, float, str)) for item in tree)
    return len(tree) > 0 and not plain


def _tree_unflatten(spec: object, values: Sequence[Any]) -> Any:
    return values[spec] if type(spec) is int else map_children(spec, lambda item: _tree_unflatten(item, values))


def _asked_of_each(read: Callable[[object], Any]) -> property:
    """What each iterable has (None for those without), in the shape of ``iterables``."""
    return property(lambda combined: combined.tree_unflatten([read(each) for each in combined.flattened]))


def loader_length(loader: Iterable[Any]) -> int | float:
    """The number of batches a loader says it has; infinite when it does not say."""
    if isinstance(loader, CombinedLoader):
        return loader.num_batches()
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return math.inf


class CombinedLoader:
    """One iterable over several, yielding ``(batch, batch_idx, dataloader_idx)``.

    ``iterables`` is any nesting of lists, tuples and dictionaries of iterables, and a batch has the same shape, with a
    batch in the place of each iterable. It ends with the shortest (mode ``"min_size"``), or with the longest while the
    others start again (``"max_size_cycle"``) or give None (``"max_size"``). In mode ``"sequential"`` one is read after
    the other, and ``batch_idx`` counts within each.

    ``len()`` works after ``iter()`` was called, and only if the iterables have a length.
    """

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in _TOTALS:
            hint = f"Use one of {list(_TOTALS)}.{suggest_name(str(mode), _TOTALS)}"
            raise ValueError(f"Unsupported mode: `CombinedLoader(mode={mode!r})`. {hint}")
        self.mode = mode
        self._iterables = iterables
        self._flattened: list[Any] = []
        self._spec = _tree_flatten(iterables, self._flattened)
        self._limits: list[int | float] | None = None
        self._triples: Iterator[Triple] | None = None
        self._passes: dict[int, LoaderPass] = {}  # those that run, by position
        self._ended: set[int] = set()  # positions whose first pass of this epoch is over
        self._resume_from: dict[str, Any] = {}  # the state that the next passes continue
        self._batches_before = 0  # of the epoch, before these passes
        self._history: deque[tuple[int, Any]] = deque(maxlen=4)  # states of loaders, by the batches consumed before

    @property
    def iterables(self) -> Any:
        """The iterables in the shape they were given."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a flat list; a list of equal length may be assigned."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: list[Any]) -> None:
        if len(flattened) != len(self._flattened):
            raise ValueError(
                f"Mismatch in flattened length: {len(flattened)} cannot replace {len(self._flattened)} iterables."
            )
        self._iterables = self.tree_unflatten(flattened)
        self._flattened = list(flattened)

    sampler = _asked_of_each(sampler_of)
    batch_sampler = _asked_of_each(batch_sampler_of)

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches are counted at most for each iterable; assign one number for all, or one for each."""
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None and len(limits) != len(self._flattened):
            raise ValueError(
                f"Mismatch in number of limits: {len(limits)} for {len(self._flattened)} iterables. Give one for each, or one for all."
            )
        self._limits = limits

    def loader_lengths(self) -> list[int | float]:
        """The number of batches of each iterable, limits applied; infinite where neither length nor limit is known."""
        limits = self._limits or [math.inf] * len(self._flattened)
        return [min(loader_length(loader), limit) for loader, limit in zip(self._flattened, limits)]

    def num_batches(self) -> int | float:
        """The number of batches of one pass over everything, limits applied; infinite when unknown."""
        return _TOTALS[self.mode](self.loader_lengths())

    def __len__(self) -> int:
        if self._triples is None:
            raise RuntimeError("Call `iter(combined_loader)` before `len(combined_loader)`.")
        total = self.num_batches()
        if math.isinf(total):
            raise TypeError("This `CombinedLoader` has no length, because one of its iterables has none.")
        return int(total)

    def __iter__(self) -> CombinedLoader:
        self.reset()
        in_turn = self.mode == "sequential"
        self._ended = set(self._resume_from.get("over", ()))
        self._batches_before = self._resume_from.get("done", 0)
        opened = [self.open_pass(position) for position in range(1 if in_turn else len(self._flattened))]
        triples = self._read_passes(opened)
        self._resume_from = {"readings": self._resume_from.get("readings", {})}
        total = math.inf if in_turn or self._limits is None else self.num_batches()
        self._triples = triples if math.isinf(total) else islice(triples, int(total))
        return self

    def __next__(self) -> Triple:
        if self._triples is None:
            raise RuntimeError("Call `iter(combined_loader)` before `next(combined_loader)`.")
        return next(self._triples)

    def reset(self) -> None:
        """Forget the running iterators; the next ``iter()`` starts from the beginning."""
        self._triples = None

    def open_pass(self, position: int, start_batch: int = 0) -> Iterator[Any]:
        """A new iterator over the iterable at this position of ``flattened``, in mode "sequential" up to its limit.

        ``start_batch`` batches of the epoch come before it. After `load_pass_state`, the first pass continues the saved one.
        """
        loader = self._flattened[position]
        if _has_state(loader):
            batches = iterate_batches(loader)
        else:
            saved = self._resume_from.get("readings", {}).pop(position, None)
            opened = LoaderPass(loader, start_batch, saved, self._resume_from.get("done", 0))
            self._passes[position] = opened
            batches = opened.open_iterator()
        limit = self._limits[position] if self._limits and self.mode == "sequential" else math.inf
        return batches if math.isinf(limit) else islice(batches, int(limit))

    def tree_unflatten(self, values: Sequence[Any]) -> Any:
        """A value for each iterable, in the shape of ``iterables``."""
        return _tree_unflatten(self._spec, values)

    # ------------------------------------------------------------------ reading

    def _read_passes(self, iterators: list[Iterator[Any]]) -> Iterator[Triple]:
        if self.mode == "sequential":
            return self._read_in_turn(iterators)
        if self.mode == "max_size_cycle":
            return self._read_in_cycles(iterators)
        rows = zip(*iterators) if self.mode == "min_size" else zip_longest(*iterators)
        return ((self.tree_unflatten(batches), batch_idx, 0) for batch_idx, batches in enumerate(rows))

    def _read_in_turn(self, iterators: list[Iterator[Any]]) -> Iterator[Triple]:
        for dataloader_idx in range(len(self._flattened)):
            # No other name for the iterator: it is gone, and its workers with it, before the next one is opened.
            for batch_idx, batch in enumerate(iterators.pop() if iterators else self.open_pass(dataloader_idx)):
                yield batch, batch_idx, dataloader_idx

    def _read_in_cycles(self, iterators: list[Iterator[Any]]) -> Iterator[Triple]:
        empty = {position for position, loader in enumerate(self._flattened) if loader_length(loader) == 0}
        running = set(range(len(iterators))) - self._ended - empty
        for batch_idx in count(self._batches_before):
            batches = []
            for position, iterator in enumerate(iterators):
                batch = None if position in empty else next(iterator, _END)
                if batch is _END:
                    running.discard(position)
                    self._ended.add(position)
                    if not running:
                        return
                    iterators[position] = self.open_pass(position, batch_idx)
                    batch = next(iterators[position], _END)
                    if batch is _END:
                        raise RuntimeError(_explain_empty_cycle(self._flattened[position], position, batch_idx))
                batches.append(batch)
            if not running:  # all of them say that they are empty
                return
            yield self.tree_unflatten(batches), batch_idx, 0

    # ------------------------------------------------------------------ state

    def _stateful_loaders(self) -> list[Any]:
        return [each for each in self._flattened if _has_state(each)]

    def _stateful_datasets(self) -> dict[int, Any]:
        """Iterable datasets that keep a state themselves, where they are read in this process; by position."""
        found = {
            position: dataset_of(loader)
            for position, loader in enumerate(self._flattened)
            if not _has_state(loader) and not (hasattr(loader, "num_workers") and loader.num_workers)
        }
        return {at: data for at, data in found.items() if isinstance(data, IterableDataset) and _has_state(data)}

    def is_stateful(self) -> bool:
        """Has any of the loaders, or of their datasets, a state of its own?"""
        return bool(self._stateful_loaders() or self._stateful_datasets())

    def record_state(self, consumed: int) -> None:
        """Keeps what `state_dict` and `pass_state` return of loaders while so many batches are consumed."""
        datasets = {position: data.state_dict() for position, data in self._stateful_datasets().items()}
        self._history.append((consumed, ([loader.state_dict() for loader in self._stateful_loaders()], datasets)))

    def _recorded_state(self, consumed: int | None) -> tuple[list[Any], dict[int, Any]]:
        found = [states for given, states in self._history if given == consumed]
        if not found:
            self.record_state(-1)
            found = [self._history.pop()[1]]
        states, datasets = found[-1]
        return states, datasets

    def state_dict(self, done: int | None = None) -> list[dict[str, Any]]:
        """The states of those iterables that have one; as of so many batches, where they were read ahead."""
        return self._recorded_state(done)[0]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Hand each iterable that has a state its own, in the order `state_dict` collected them."""
        stateful = self._stateful_loaders()
        if len(stateful) != len(states):
            what = f"The checkpoint has the states of {len(states)} loaders, but {len(stateful)} loaders take one."
            raise RuntimeError(f"{what} Resume with the loaders that were in use when it was saved.")
        for loader, state in zip(stateful, states):
            loader.load_state_dict(state)

    def pass_state(self, done: int, inside: bool, prefetched: int = 0) -> dict[str, Any]:
        """The state of the passes over all iterables, in plain types.

        Arguments:
            done: batches that are finished.
            inside: of an epoch, or between two of them?
            prefetched: batches that were read beyond those.
        """
        opened = {at: loader_pass.pass_state(done, inside, prefetched) for at, loader_pass in self._passes.items()}
        readings = {**self._resume_from.get("readings", {}), **opened}
        found: dict[str, Any] = {"done": done, "inside": inside, "readings": readings}
        if not inside:
            return found
        states, datasets = self._recorded_state(done)
        return {**found, "over": sorted(self._ended), "states": states, "datasets": datasets}

    def load_pass_state(self, saved: dict[str, Any]) -> None:
        """Lets the next passes begin where `pass_state` was taken."""
        self._history.clear()
        if states := saved.get("states"):
            self.load_state_dict(states)
        readings = {position: dict(reading) for position, reading in saved["readings"].items()}
        for position, data in self._stateful_datasets().items():
            if position in saved.get("datasets", {}) and position in readings:
                data.load_state_dict(saved["datasets"][position])
                readings[position]["placed"] = True
        self._resume_from = {**saved, "readings": readings}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_triples": None, "_passes": {}}


def _has_state(obj: object) -> bool:
    return hasattr(obj, "state_dict") and hasattr(obj, "load_state_dict")


def _explain_empty_cycle(loader: object, position: int, batch_idx: int) -> str:
    what = f"`CombinedLoader(mode='max_size_cycle')`: source {position}, a {describe_loader(loader)}, gave nothing"
    why = f"when it was opened again for batch {batch_idx}: it is empty or used up, and others are not."
    fix = "Give one whose `__iter__` begins anew (no generator), or use mode 'max_size' or 'min_size'."
    return f"{what} {why} {fix}"


# Mode -> the number of batches from the lengths of all.
_TOTALS: dict[str, Callable[[list[int | float]], int | float]] = {
    "min_size": min,
    "max_size_cycle": max,
    "max_size": max,
    "sequential": sum,
}
